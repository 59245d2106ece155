"""Machines that train together. Two processes stand for two machines; two network namespaces do where they can."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT
from torch.distributed import HashStore

from lgp.compute import machines
from lgp.compute.launch import Stopped
from lgp.compute.machines import LEFT, Card, Pulse, different, names_of, together, unreachable
from lgp.errors import LgpError


def card(host: str, address: str = "10.0.0.1", interfaces: tuple[str, ...] = ("eth0",)) -> Card:
    return Card(host=host, address=address, interfaces=list(interfaces), facts={}, versions={})


def test_equal_machines_are_not_told_apart() -> None:
    assert different([{"code": "a", "graft.epochs": "6"}] * 3, ["n1", "n2", "n3"]) == ""


def test_a_difference_is_named_with_its_machines() -> None:
    facts = [{"code": "a", "graft.epochs": "6"}, {"code": "a", "graft.epochs": "7"}, {"code": "a"}, {"code": "a"}]
    told = different(facts, ["n1", "n2", "n3", "n4"])
    assert "cannot train together: graft.epochs is 6 on n1 and 7 on n2 and missing on n3, n4: give them" in told
    assert "code is" not in told


def test_many_differences_are_counted_and_long_values_are_cut() -> None:
    told = different([{str(i): "a" * 100 for i in range(8)}, {}], ["n1", "n2"])
    assert told.count("missing on n2") == 5
    assert "; and 3 more: give" in told
    assert "a" * 60 + "… on n1" in told


def test_a_loopback_address_is_told_with_what_to_set() -> None:
    told = unreachable([card("n1", "127.0.1.1", ("eth0", "ib0")), card("n2", "10.0.0.2"), card("n3", "::1")])
    assert "n1 has 127.0.1.1, n3 has ::1" in told
    assert "GLOO_SOCKET_IFNAME there, with the interface to the other machines (eth0|ib0 on n1, eth0 on n3)" in told
    assert "n2" not in told


def test_loopback_does_on_one_machine_and_other_addresses_do_on_several() -> None:
    assert unreachable([card("n1", "127.0.1.1"), card("n1", "127.0.1.1")]) == ""
    assert unreachable([card("n1", "10.0.0.1"), card("n2", "fe80::1%eth0")]) == ""


def test_machines_of_one_name_are_told_apart() -> None:
    assert names_of([card("n1"), card("n2"), card("n2")]) == ["n1", "n2 (machine 1)", "n2 (machine 2)"]


def test_the_address_is_that_of_the_named_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert machines._own_card({}, {}).address == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nic7")
    with pytest.raises(
        LgpError, match=r"GLOO_SOCKET_IFNAME names 'nic7', which is no network interface .* choose of .*lo"
    ):
        machines._own_card({}, {})


@pytest.mark.parametrize("name", ["127.0.0.1", "no-such-host.invalid"])
def test_the_address_is_that_of_the_host_name_or_loopback(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(machines.socket, "gethostname", lambda: name)
    assert machines._own_card({}, {}).address == "127.0.0.1"


MEETINGS: dict[str, dict[str, Any]] = {  # what the second of two machines has that the first has not
    "equal": {},
    "facts": {"facts": {"data/prepared": "b"}},
    "versions": {"versions": {"torch": "2.12"}},
    "loopback": {"address": "127.0.1.1"},
}
# takes part in all meetings as one of two machines, and prints what is raised and what is said
MACHINE = """
import contextlib, io, json, os, sys
from lgp.compute import machines
from lgp.compute.launch import Stopped

number, told = int(os.environ["RANK"]), {}
machines.socket.gethostname = lambda: f"n{number}"
for name, (port, of_second) in json.loads(sys.argv[1]).items():
    differs = of_second if number else {}
    os.environ["MASTER_PORT"] = str(port)
    machines._address_of_name = lambda: differs.get("address", "10.0.0.1")
    facts = {"data/prepared": "a", "seed": "0"} | differs.get("facts", {})
    versions = {"torch": "2.11"} | differs.get("versions", {})
    said, raised = io.StringIO(), "nothing"
    try:
        with contextlib.redirect_stdout(said), machines.together("mim", lambda: facts, versions, 60):
            pass
    except machines.LgpError as e:
        raised = str(e)
    told[name] = [raised, said.getvalue()]
print(json.dumps(told))
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def of_machine(number: int, address: str) -> dict[str, str]:
    """Return the variables that torchrun sets for the only process of one of two machines."""
    return {
        "MASTER_ADDR": address, "TORCHELASTIC_RUN_ID": "test", "RANK": str(number), "WORLD_SIZE": "2",
        "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(number), "GROUP_WORLD_SIZE": "2",
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


@pytest.fixture(scope="module")
def met() -> list[dict[str, list[str]]]:
    """What each of two machines raised and said, by meeting."""
    given = json.dumps({name: [free_port(), of_second] for name, of_second in MEETINGS.items()})
    clean = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MACHINE, given], env=clean | of_machine(number, "127.0.0.1"), stdout=subprocess.PIPE
        )
        for number in (0, 1)
    ]
    return [json.loads(process.communicate(timeout=300)[0]) for process in started]


def test_equal_machines_work_together_without_a_word(met: list[dict[str, list[str]]]) -> None:
    assert [told["equal"] for told in met] == [["nothing", ""]] * 2


@pytest.mark.parametrize(
    ("meeting", "why"),
    [("facts", "data/prepared is a on n0 and b on n1"), ("loopback", "addresses: n1 has 127.0.1.1")],
)
def test_machines_that_differ_refuse_on_each_and_say_why(
    meeting: str, why: str, met: list[dict[str, list[str]]]
) -> None:
    for told in met:
        raised, said = told[meeting]
        assert raised.startswith("mim: ")
        assert why in raised
        assert "seed" not in raised
        assert said == ""


def test_other_versions_are_warned_of_by_the_first_process(met: list[dict[str, list[str]]]) -> None:
    warning = "warning: mim: torch is 2.11 on n0 and 2.12 on n1: equal versions give equal results\n"
    assert [told["versions"] for told in met] == [["nothing", warning], ["nothing", ""]]


@pytest.mark.parametrize(("local_rank", "raised"), [("0", LgpError), ("1", Stopped)])
def test_the_first_process_of_a_machine_says_why_and_the_others_end_with_it(
    local_rank: str, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> None:
        raise LgpError("mim: no way")

    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(machines, "_store", fail)
    with pytest.raises(raised) as caught, together("mim", dict, {}, 60):
        pass
    assert raised is LgpError or caught.value.code == 1  # type: ignore[attr-defined]


def test_a_machine_beats_before_it_waits_for_a_late_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a `lost_after_s` below `READ` takes it for lost."""
    order = list[str]()

    @contextmanager
    def beating(_: Pulse) -> Iterator[None]:
        order.append("beats")
        yield

    for name, value in of_machine(0, "127.0.0.1").items():
        monkeypatch.setenv(name, value)
    other = machines._own_card({}, {}).model_dump_json()
    values = {"card/1": other}
    shared = SimpleNamespace(set=values.__setitem__, get=values.__getitem__, wait=lambda *_: order.append("waits"))
    monkeypatch.setattr(machines, "_store", lambda _: shared)
    monkeypatch.setattr(Pulse, "beating", beating)
    with machines.together("mim", dict, {}, 5):
        order.append("works")
    assert order == ["beats", "works", "waits"]


def test_a_machine_that_does_not_come_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in of_machine(0, "n0").items():
        monkeypatch.setenv(name, value)
    store = HashStore()
    store.set("card/0", card("n0").model_dump_json())
    store.set_timeout(timedelta(seconds=0.05))
    with pytest.raises(LgpError, match=r"mim: machine 1 of 2 \(from 0\) did not come within 300 s: "):
        machines._met("mim", store)


def test_a_store_out_of_reach_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "n1", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no\nroute")

    monkeypatch.setattr(machines, "rendezvous", fail)
    with pytest.raises(LgpError, match=r"cannot reach n1:29500, where the machines meet \(no route\): .* --local-addr"):
        together("mim", dict, {}, 60).__enter__()


class Ended(Exception):  # noqa: N818
    """Stands for the end of the process."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let turns pass quickly. Return the codes with which the process would have ended."""
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise Ended

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(machines, "BEAT_S", 0.01)
    monkeypatch.setattr(os, "_exit", end)
    return codes


def test_a_silent_machine_ends_the_process_in_one_line(quick: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    store, names = HashStore(), ["n0", "n1", "n2"]
    with ExitStack() as stack:
        for number in (0, 1):
            stack.enter_context(Pulse("mim", store, number, names, 10).beating())
        pulse = Pulse("mim", store, 0, names, 0.2)
        judging = threading.Thread(target=pulse._judge)
        stack.enter_context(pulse.beating())
        judging.start()
        judging.join(60)
    assert quick
    assert set(quick) == {1}
    (line, *_) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: mim: n0 has heard nothing from n2 for 0.2 s (run.lost_after_s): ")
    assert line.endswith("start the same command on all machines again, it goes on from its last state")


def test_machines_that_live_or_have_left_are_not_lost(quick: list[int]) -> None:
    store, names = HashStore(), ["n0", "n1", "n2"]
    pulse = Pulse("mim", store, 0, names, 0.2)
    lives, leaves = Pulse("mim", store, 1, names, 60), Pulse("mim", store, 2, names, 60)
    with lives.beating(), pulse.beating():
        with leaves.beating():
            pass
        for _ in range(2):  # more turns than make a silent machine a lost one
            before = store.add("beats/1", 0)
            while store.add("beats/1", 0) < before + 40:
                pass
        assert pulse._beats[2] >= LEFT
    assert quick == []


@pytest.mark.parametrize(("error", "left"), [(None, True), (KeyboardInterrupt(), True), (LgpError("x"), False)])
def test_a_machine_leaves_unless_its_work_failed(error: BaseException | None, left: bool, quick: list[int]) -> None:
    store = HashStore()
    with pytest.MonkeyPatch.context():
        try:
            with Pulse("mim", store, 0, ["n0", "n1"], 60).beating():
                if error is not None:
                    raise error
        except (KeyboardInterrupt, LgpError):
            pass
    assert (store.add("beats/0", 0) >= LEFT) == left


def test_another_process_of_a_machine_ends_without_a_word(quick: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    store = HashStore()
    pulse = Pulse("mim", store, 0, ["n0", "n1"], 0.05, first=False)
    with pulse.beating():
        judging = threading.Thread(target=pulse._judge)
        judging.start()
        judging.join(60)
    assert quick
    assert set(quick) == {1}
    assert capsys.readouterr().err == ""
    assert store.add("beats/0", 0) == 0


def test_all_are_silent_where_the_store_is_gone(quick: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    class Gone:
        def add(self, *_: object) -> int:
            raise RuntimeError("Connection reset by peer")

    pulse = Pulse("mim", Gone(), 1, ["n0", "n1", "n2"], 0.05)  # type: ignore[arg-type]
    with pulse.beating():
        judging = threading.Thread(target=pulse._judge)
        judging.start()
        judging.join(60)
    assert "n1 has heard nothing from n0, n2 for 0.05 s" in capsys.readouterr().err


# meets the other host twice, without and with the interface that reaches it, and exchanges values for ever
HOST = """
import os, sys, torch
from lgp.compute.distributed import agree, joined
from lgp.compute.machines import together
from lgp.errors import LgpError

os.environ["MASTER_PORT"] = sys.argv[1]
try:
    with together("mim", dict, {}, 60): pass
except LgpError as e:
    print(e, flush=True)
os.environ |= {"MASTER_PORT": sys.argv[2], "GLOO_SOCKET_IFNAME": "lgp" + os.environ["RANK"]}
with together("mim", dict, {}, 5), joined("mim", torch.device("cpu")):
    print(agree(int(os.environ["RANK"])), flush=True)
    while True:
        agree(1)
"""


def host(number: int, ports: list[str]) -> "subprocess.Popen[str]":
    """Start one of two hosts in a namespace of its own. It says "here", and begins when it reads a line."""
    begin = 'hostname "host$0" && echo here && read -r line && exec "$@"'
    command = ["unshare", "--net", "--uts", "sh", "-c", begin, str(number), sys.executable, "-c", HOST, *ports]
    clean = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=clean | of_machine(number, "10.77.1.1"), text=True, **pipes)


def in_host(process: "subprocess.Popen[str]", *command: str) -> None:
    subprocess.run(["nsenter", "-t", str(process.pid), "-n", "ip", *command], check=True, capture_output=True)


def needs_namespaces() -> None:
    """Skip the test where network namespaces with a link between them cannot be made."""
    tools = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    made = not tools and subprocess.run(
        ["unshare", "--net", "--uts", "ip", "link", "add", "lgp0", "type", "veth", "peer", "name", "lgp1"],
        capture_output=True,
    )
    if not made or made.returncode:
        pytest.skip("network namespaces need root, Linux, iproute2 and util-linux")


def test_two_hosts_meet_and_a_link_that_goes_down_ends_both_in_one_line() -> None:
    needs_namespaces()
    ports = [str(free_port()) for _ in range(2)]
    hosts = [host(number, ports) for number in range(2)]
    try:
        assert [line_of(process) for process in hosts] == ["here\n"] * 2
        in_host(hosts[0], "link", "add", "lgp0", "type", "veth", "peer", "name", "lgp1", "netns", str(hosts[1].pid))
        for number, process in enumerate(hosts):
            in_host(process, "address", "add", f"10.77.1.{number + 1}/24", "dev", f"lgp{number}")
            for device in ("lo", f"lgp{number}"):
                in_host(process, "link", "set", device, "up")
            assert process.stdin is not None
            process.stdin.write("begin\n")
            process.stdin.flush()
        for process in hosts:
            assert "host0 has 127.0.0.1, host1 has 127.0.0.1; " in (told := line_of(process))
            assert "(lgp0 on host0, lgp1 on host1)" in told
        assert [line_of(process) for process in hosts] == ["1\n"] * 2
        in_host(hosts[0], "link", "set", "lgp0", "down")
        for number, process in enumerate(hosts):
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 1
            (line,) = [line for line in errors.splitlines() if not line.startswith("[")]  # torch's own begin so
            assert f"mim: host{number} has heard nothing from host{1 - number} for 5 s (run.lost_after_s)" in line
    finally:
        for process in hosts:
            process.kill()
            process.communicate()


def line_of(process: "subprocess.Popen[str]") -> str:
    """Return the next line of a host. One that says nothing for two minutes is killed, and its errors are shown."""
    assert process.stdout is not None
    assert process.stderr is not None
    late = threading.Timer(120, process.kill)
    late.start()
    line = process.stdout.readline()
    late.cancel()
    assert line, process.stderr.read()
    return line
