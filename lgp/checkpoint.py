"""Encoder folders that plain timm loads, and the state from which an interrupted training goes on."""

import errno
import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp.arms import HEADS, no_encoder
from lgp.data.prepared import Prepared
from lgp.errors import LgpError
from lgp.models.vit import ARCHITECTURE, model_args
from lgp.params import DataParams, ModelParams

WEIGHTS, CONFIG, PROVENANCE = "model.safetensors", "config.json", "provenance.json"
DIGEST_BYTES = 32


def save_encoder(
    folder: Path, encoder: VisionTransformer, model: ModelParams, data: DataParams, prepared: Prepared, provenance: Any
) -> None:
    """Write an encoder folder: `timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)` loads it.

    Args:
        folder: to write into; made if missing.
        encoder: the trained encoder; key names are timm's.
        model: its dimensions.
        data: size and channels of its images.
        prepared: whose mean and standard deviation it was trained with.
        provenance: parameters, data digest, code; written beside the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    save_tensors(tensors, folder / WEIGHTS)
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": model.width,
        "global_pool": "token",
        "model_args": model_args(model, data),
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [data.channels, data.image_size, data.image_size],
            "fixed_input_size": True,
            "mean": prepared.mean,
            "std": prepared.std,
            "interpolation": "bilinear",
            "crop_pct": data.eval_crop,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file; raise `OSError` where the disk is full (the library has an error of its own)."""
    try:
        save_file(tensors, path)
    except SafetensorError as e:
        if "No space left" in str(e):
            raise OSError(errno.ENOSPC, str(e), str(path)) from None
        raise


def load_encoder(folder: Path) -> VisionTransformer:
    """Load an encoder folder, strictly.

    Raises:
        LgpError: no encoder there, or its tensors are not those of its configuration; names them.
    """
    config = read_config(folder)
    encoder: VisionTransformer = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    try:
        encoder.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except (RuntimeError, SafetensorError) as e:
        raise LgpError(
            f"{folder / WEIGHTS} is damaged or does not fit its {CONFIG}: {' '.join(str(e).split())}"
        ) from None
    return encoder


def read_config(folder: Path) -> dict[str, Any]:
    """Read an encoder folder's configuration; raise `LgpError` where there is no encoder."""
    _check_present(folder)
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config


def load_heads(folder: Path) -> dict[str, Tensor]:
    """Load what an arm's folder keeps beside its encoder (decoder, projector, predictor); empty if nothing."""
    path = folder / HEADS
    return load_file(path) if path.exists() else {}


def _check_present(folder: Path) -> None:
    if not (folder / WEIGHTS).exists() or not (folder / CONFIG).exists():
        raise LgpError(f"{no_encoder(folder.parent.name)} (looked in {folder})")


def check_input_size(folder: Path, data: Prepared) -> None:
    """Raise `LgpError` unless the encoder in `folder` takes images like the prepared ones."""
    takes = read_config(folder)["pretrained_cfg"]["input_size"]
    given = [data.channels, data.image_size, data.image_size]
    if takes != given:
        raise LgpError(
            f"the encoder in {folder} takes images of {takes} (channels, height, width), the prepared ones are "
            f"{given}: run `lgp {folder.parent.name}` on them first"
        )


def check_encoder_fits(folder: Path, model: ModelParams, data: DataParams) -> None:
    """Raise `LgpError` unless the encoder in `folder` has the dimensions that the parameters ask for."""
    found, wanted = read_config(folder)["model_args"], model_args(model, data)
    if found != wanted:
        raise LgpError(
            f"the encoder in {folder} was trained with {found}, but the parameters say {wanted}: train it anew"
        )


class _Digesting:
    """A file that digests what is written to it, and keeps its error, of which `torch.save` makes another."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as e:
            self.error = e
            raise

    def flush(self) -> None:
        self.file.flush()


def _payload(path: Path) -> bytes | None:
    """Return what a file holds before its digest, None if it is missing or torn."""
    if not path.exists():
        return None
    data = path.read_bytes()
    payload = data[:-DIGEST_BYTES]
    return payload if hashlib.sha256(payload).digest() == data[-DIGEST_BYTES:] else None


class StateStore:
    """The resume state of one training: two files in turn, each followed by its digest, under locks.

    A state that is torn (power loss in the middle of a write) is noticed by its digest, and the one
    before it used. Code that differs writes files of other names, so its states are kept, not used, unless asked for.
    """

    def __init__(self, folder: Path, code_digest: str) -> None:
        """Keep states of this code in `folder`, made when it is first needed."""
        self.folder = folder
        self.latest = folder / f"state-{code_digest[:16]}.pt"
        self.previous = self.latest.with_suffix(".previous.pt")
        self.run_id_file = folder / f"run_id-{code_digest[:16]}"
        self.adopted_file = folder / f"adopted-{code_digest[:16]}"
        # two trainers clash over a state (the same parameters) or over a result (the same stage in the same folder;
        # DVC's experiments run in folders of their own, and share this one's states)
        here = hashlib.sha256(os.getcwd().encode()).hexdigest()[:16]
        self._locks = [FileLock(folder.parent / f"{name}.lock") for name in (folder.name, f"in-{here}")]
        self._code_digest = code_digest

    def part(self, name: str) -> "StateStore":
        """Return the store of one of several trainings of a stage, which share locks and end."""
        return StateStore(self.folder / name, self._code_digest)

    def acquire(self) -> None:
        """Take the locks; raise `LgpError` with the holder's process id where another trainer has one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for lock in self._locks:
            holder = Path(lock.lock_file).with_suffix(".pid")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                self._release()
                pid = holder.read_text().strip() if holder.exists() else "unknown"
                raise LgpError(
                    f"process {pid} is training the same thing (it holds {lock.lock_file}): wait for it, or stop it"
                ) from None
            holder.write_text(f"{os.getpid()}\n")

    def _release(self) -> None:
        for lock in self._locks:
            lock.release()

    def adopt(self) -> None:
        """Go on from the newest state that other code wrote, if this code has none.

        Raises:
            LgpError: there is none.
        """
        if self.has_state():
            return
        newest: dict[Path, Path] = {}
        for path in sorted(self.folder.rglob("state-*.pt"), key=lambda path: path.stat().st_mtime):
            if _payload(path) is not None:
                newest[path.parent] = path
        if not newest:
            raise LgpError(f"nothing to resume: no whole state of these parameters and inputs in {self.folder}")
        writers = {state.name.removeprefix("state-").split(".")[0] for state in newest.values()}
        self.adopted_file.write_text(", ".join(sorted(writers)))
        for folder, state in newest.items():
            copied = folder / f"{self.latest.stem}.new"
            shutil.copy(state, copied)
            copied.replace(folder / self.latest.name)

    def adopted(self) -> str | None:
        """Return the digest of the code that wrote the state which this training once went on from, if it did so."""
        return self.adopted_file.read_text() if self.adopted_file.exists() else None

    def save(self, state: dict[str, Any]) -> None:
        """Write a state durably (write, fsync, rename, fsync the folder).

        Raises:
            OSError: as the file system does; the states before stay usable.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.latest.with_suffix(".new")
        try:
            with new.open("wb") as file:
                self._write(state, file)
        except OSError:
            new.unlink(missing_ok=True)
            raise
        if self.latest.exists():
            self.latest.replace(self.previous)
        new.replace(self.latest)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @staticmethod
    def _write(state: dict[str, Any], file: BinaryIO) -> None:
        digesting = _Digesting(file)
        try:
            torch.save(state, digesting)  # type: ignore[arg-type]  # it only writes and flushes
        except RuntimeError:
            if digesting.error is None:
                raise
            raise digesting.error from None
        file.write(digesting.sha256.digest())
        file.flush()
        os.fsync(file.fileno())

    def read(self) -> bytes | None:
        """Return the newest whole state as `decode` takes it, or None."""
        for path in (self.latest, self.previous):
            payload = _payload(path)
            if payload is not None:
                return payload
            path.unlink(missing_ok=True)  # torn, and not to take the place of a whole one when the next is saved
        return None

    @staticmethod
    def decode(payload: bytes) -> dict[str, Any]:
        """Return a state, its tensors on the CPU."""
        state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        return state

    def has_state(self) -> bool:
        """Whether an interrupted training left a state."""
        return any(self.folder.rglob(f"{self.latest.stem}*.pt"))

    def forget(self) -> None:
        """Remove the states of this code, of all parts."""
        for path in (*self.folder.rglob(f"{self.latest.stem}.*"), self.adopted_file):
            path.unlink(missing_ok=True)

    def close(self, succeeded: bool) -> None:
        """Give the lock back; after success forget the states, and remove the folder once nothing in it is of use."""
        if succeeded:
            self.forget()
        if not self.has_state():
            self.run_id_file.unlink(missing_ok=True)
        if not any(self.folder.rglob("state-*")):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._release()
