"""Machines that train together: they compare what they start from, and notice when one of them falls silent.

`torchrun` starts the same command on each of them. They meet through the store of torchrun, before any work.
"""

import ipaddress
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

from pydantic import BaseModel
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lgp.compute.launch import Stopped, launched_rank, machine, machines
from lgp.errors import LgpError, one_line, shortened

REACH = timedelta(minutes=2)  # for the store to answer: shorter than COME, so that a machine can say that it does not
COME = timedelta(minutes=5)  # for the slowest machine to import what it needs and to digest what it starts from
READ = timedelta(seconds=30)  # for all to read what all say
BEAT_S = 1.0
LEFT = 2**40  # added to the beats of a machine that has done its part
TOLD = 5  # differences, in a message
TOLD_CHARACTERS = 60  # of a value, in a message

Facts = Mapping[str, str]


class Card(BaseModel):
    """What a machine says of itself when it meets the others.

    Attributes:
        host: its name.
        address: the one that it gives the other machines.
        interfaces: its network interfaces, without loopback.
        facts: name → value of what must be equal.
        versions: name → value of what should be equal.
    """

    host: str
    address: str
    interfaces: list[str]
    facts: dict[str, str]
    versions: dict[str, str]


@contextmanager
def together(name: str, facts: Callable[[], Facts], versions: Facts, lost_after_s: float) -> Iterator[None]:
    """Run the block as one of several machines that train together.

    They compare their facts first. Inside the block each says every second that it lives. Where one says nothing for
    `lost_after_s` seconds, the process prints one line and ends with 1: the exchange of values cannot be interrupted.
    How long a step, a measurement or a state takes does not matter.

    Args:
        name: the stage, for messages.
        facts: returns name → value of what must be equal on all machines. The first process of each calls it.
        versions: name → value of what should be equal. The first process warns of a difference.
        lost_after_s: seconds.

    Raises:
        LgpError: a machine did not come or cannot be reached, or one differs from the others. The first process of
            each machine raises it.
        Stopped: the same, in the other processes of a machine.
    """
    try:
        store = _store(name)
        if not _local_rank():
            store.set(f"card/{machine()}", _own_card(facts(), versions).model_dump_json())
        cards = _met(name, store)
    except LgpError:
        if _local_rank():
            raise Stopped from None
        raise
    try:
        if told := unreachable(cards) or different([card.facts for card in cards], names_of(cards)):
            raise Stopped if _local_rank() else LgpError(f"{name}: {told}")
        if launched_rank() == 0 and (told := _differences([card.versions for card in cards], names_of(cards))):
            print(f"warning: {name}: {told}: equal versions give equal results", flush=True)
        with Pulse(name, store, machine(), names_of(cards), lost_after_s, first=not _local_rank()).beating():
            yield
    finally:
        _let_all_read(store)


def unreachable(cards: Sequence[Card]) -> str:
    """Return what is said of machines that give the others a loopback address; nothing if there are none."""
    if len({card.host for card in cards}) == 1:  # on one machine loopback does
        return ""
    alone = [card for card in cards if ipaddress.ip_address(card.address.partition("%")[0]).is_loopback]
    if not alone:
        return ""
    given = ", ".join(f"{card.host} has {card.address}" for card in alone)
    choice = ", ".join(f"{'|'.join(card.interfaces) or 'none is up'} on {card.host}" for card in alone)
    return (
        f"no other machine can reach these addresses: {given}; Debian gives them to the machine's own name in "
        f"/etc/hosts: export GLOO_SOCKET_IFNAME there, with the interface to the other machines ({choice}), or correct "
        "/etc/hosts"
    )


def different(facts: Sequence[Facts], names: Sequence[str]) -> str:
    """Return what is said of machines whose facts are not equal; nothing where they are.

    Args:
        facts: of each machine.
        names: of the machines.
    """
    told = _differences(facts, names)
    return told and (
        f"the machines cannot train together: {told}: give them the same parameters, code, data and encoder, by a "
        "shared folder or a copy"
    )


def _differences(facts: Sequence[Facts], names: Sequence[str]) -> str:
    differing = []
    for fact in dict.fromkeys(fact for of_machine in facts for fact in of_machine):
        having: dict[str, list[str]] = {}
        for name, of_machine in zip(names, facts, strict=True):
            having.setdefault(of_machine.get(fact, "missing"), []).append(name)
        if len(having) > 1:
            values = (f"{shortened(value, TOLD_CHARACTERS)} on {', '.join(of)}" for value, of in having.items())
            differing.append(f"{fact} is {' and '.join(values)}")
    more = [f"and {len(differing) - TOLD} more"] if len(differing) > TOLD else []
    return "; ".join(differing[:TOLD] + more)


def names_of(cards: Sequence[Card]) -> list[str]:
    """Return a name of each machine. Those of the same host name get their number, too."""
    hosts = [card.host for card in cards]
    return [host if hosts.count(host) == 1 else f"{host} (machine {i})" for i, host in enumerate(hosts)]


def _local_rank() -> int:
    return int(os.environ["LOCAL_RANK"])


def _store(name: str) -> Store:
    """Connect to the store that all processes share."""
    try:
        store, _, _ = next(rendezvous("env://", timeout=REACH))
    except RuntimeError as e:
        place, why = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", shortened(one_line(e), 150)
        raise LgpError(
            f"{name}: {socket.gethostname()} cannot reach {place}, where the machines meet ({why}): start "
            "torchrun on every machine with --local-addr and the address by which the others reach it"
        ) from None
    store.set_timeout(COME)
    return PrefixStore("lgp", store)


def _met(name: str, store: Store) -> list[Card]:
    """Return the cards of all machines, when they have come."""
    cards = []
    for number in range(machines()):
        try:
            cards.append(Card.model_validate_json(store.get(f"card/{number}")))
        except RuntimeError:
            raise LgpError(
                f"{name}: machine {number} of {machines()} (from 0) did not come within {COME.seconds} s: its own last "
                "lines say why; then start the same command on all machines again"
            ) from None
    store.set(f"read/{launched_rank()}", "")
    return cards


def _let_all_read(store: Store) -> None:
    """Wait in the first process until all have read the cards: the store ends with its machine."""
    if launched_rank() == 0:
        with suppress(RuntimeError):
            store.wait([f"read/{rank}" for rank in range(int(os.environ["WORLD_SIZE"]))], READ)


def _own_card(facts: Facts, versions: Facts) -> Card:
    import psutil

    addresses = {
        name: [a.address for a in of_interface if a.family in (socket.AF_INET, socket.AF_INET6)]
        for name, of_interface in psutil.net_if_addrs().items()
    }
    up = {name for name, state in psutil.net_if_stats().items() if state.isup and name != "lo"}
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if chosen and not addresses.get(chosen):
        raise LgpError(
            f"GLOO_SOCKET_IFNAME names {chosen!r}, which is no network interface of {socket.gethostname()} with an "
            f"address: choose of {', '.join(name for name, of in addresses.items() if of)}"
        )
    return Card(
        host=socket.gethostname(),
        address=addresses[chosen][0] if chosen else _address_of_name(),
        interfaces=sorted(name for name in up if addresses.get(name)),
        facts=dict(facts),
        versions=dict(versions),
    )


def _address_of_name() -> str:
    """Return the address that gloo takes for this machine: the first of its name that is its own, else loopback."""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(socket.gethostname(), None, 0, socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as trial:
                trial.bind(address)
                return str(address[0])
    return "127.0.0.1"


class Pulse:
    """Says again and again that this machine lives, and ends the process where another machine says nothing.

    One thread counts: it writes to the store and reads from it, which may block for long where the network is down. The
    other judges by what the first has read. Both take turns of a second. A process that was halted itself, with its
    machine, therefore finds nobody lost.
    """

    def __init__(
        self, name: str, store: Store, number: int, names: Sequence[str], lost_after_s: float, first: bool = True
    ) -> None:
        """Take what the pulse is of.

        Args:
            name: of the stage, for the message.
            store: that all machines share.
            number: of this machine.
            names: of all machines.
            lost_after_s: seconds without a beat until a machine is lost.
            first: whether this is the first process of its machine. It alone beats, and says what is lost.
        """
        self.name, self.store, self.number, self.names, self.lost_after_s = name, store, number, names, lost_after_s
        self.first = first
        self._beats = {other: 0 for other in range(len(names)) if other != number}
        self._over = threading.Event()

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Count and judge inside the block. A block that fails leaves without a word: the others find it silent."""
        counting = threading.Thread(target=self._count, daemon=True)
        counting.start()
        threading.Thread(target=self._judge, daemon=True).start()
        left = False
        try:
            yield
            left = True
        except KeyboardInterrupt:  # all machines stop together
            left = True
            raise
        finally:
            self._over.set()
            counting.join(BEAT_S)
            if self.first and left and not counting.is_alive():
                with suppress(RuntimeError):  # the store went with its machine
                    self.store.add(self._key(self.number), LEFT)

    def silent(self, before: Mapping[int, int]) -> list[int]:
        """Return the machines that have not beaten since `before`, without those that have left."""
        return [other for other, beats in self._beats.items() if beats < LEFT and beats == before[other]]

    def _key(self, number: int) -> str:
        return f"beats/{number}"

    def _count(self) -> None:
        with suppress(RuntimeError):  # the store went with its machine: from now on all are silent
            while not self._over.wait(BEAT_S):
                if self.first:
                    self.store.add(self._key(self.number), 1)
                for other in self._beats:
                    self._beats[other] = self.store.add(self._key(other), 0)

    def _judge(self) -> None:
        turns = dict.fromkeys(self._beats, 0)
        before = dict(self._beats)
        while not self._over.wait(BEAT_S):
            silent = self.silent(before)
            before = dict(self._beats)
            turns = {other: turns[other] + 1 if other in silent else 0 for other in turns}
            lost = [self.names[other] for other, of_other in turns.items() if of_other * BEAT_S >= self.lost_after_s]
            if lost:
                self._end(lost)

    def _end(self, lost: Sequence[str]) -> NoReturn:
        process = f" in process {launched_rank()}" if launched_rank() else ""
        line = (
            f"error{process}: {self.name}: {self.names[self.number]} has heard nothing from {', '.join(lost)} for "
            f"{self.lost_after_s:g} s (run.lost_after_s): look at the last lines there and at the network, then start "
            "the same command on all machines again, it goes on from its last state"
        )
        if self.first:
            print(line, file=sys.stderr, flush=True)
        os._exit(1)
