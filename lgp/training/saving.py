"""Resume states written while the training goes on."""

import copy
import threading
import time
from typing import Any

import torch
from torch import Tensor

from lgp.compute.nested import with_tensors
from lgp.training.resume_states import StateStore


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a state on the CPU, which no later step changes. Its file is that of the state itself."""
    copies: dict[int, Any] = {}
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        # `torch.save` writes a storage once, however many tensors lie in it: a module may have two names in a model
        live = tensor.untyped_storage()
        if live._cdata not in storages:
            storages[live._cdata] = live.clone() if live.device.type == "cpu" else live.cpu()
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        copies[id(tensor)] = torch.empty(0, dtype=tensor.dtype).set_(storages[live._cdata], *place)
        return tensor

    with_tensors(state, note)
    # what else the state shares stays shared: pickle writes it once
    return copy.deepcopy(state, copies)


class BackgroundSaver:
    """Writes states to a store in a thread, one at a time."""

    def __init__(self, store: StateStore) -> None:
        """Write to `store`. Nothing is written yet."""
        self._store = store
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.took = 0.0  # seconds for the last state, copied and written

    def save(self, state: dict[str, Any]) -> None:
        """Copy a state, and begin to write the copy. A state before it must have been `settled`."""
        assert self._thread is None, "a state is being written"
        started = time.monotonic()
        copied = snapshot(state)
        self._thread = threading.Thread(target=self._write, args=(copied, started), name="saving")
        self._thread.start()

    def _write(self, state: dict[str, Any], started: float) -> None:
        try:
            self._store.save(state)
        except BaseException as e:  # noqa: BLE001 - the training raises it
            self._error = e
        self.took = time.monotonic() - started

    @property
    def is_busy(self) -> bool:
        """Whether a state is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until nothing is being written. How it ended stays to be asked for."""
        if self._thread is not None:
            self._thread.join()

    def settled(self) -> bool:
        """Wait until nothing is being written. Return whether a state was, since this was last asked.

        Raises:
            OSError: the file system raised it while that state was written.
        """
        self.wait()
        written, self._thread = self._thread is not None, None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return written
