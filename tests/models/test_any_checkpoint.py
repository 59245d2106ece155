"""Whatever a file of weights contains, it is taken with finite weights, or told with its name."""

import functools
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import FOREIGN, ROOT, SMALL, merged
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from lgp.errors import LgpError
from lgp.models.interchange import import_checkpoint
from lgp.models.vit import build_encoder
from lgp.params.file import Params

Header = dict[str, Any]


@functools.cache
def params() -> Params:
    return Params.model_validate(merged(yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text()), SMALL))


@functools.cache
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(build_encoder(params().model, params().data).state_dict())


@functools.cache
def content(suffix: str) -> bytes:
    """The encoder as a file."""
    if suffix == ".safetensors":
        return bytes(save(weights()))
    buffer = io.BytesIO()
    torch.save({"model": weights()}, buffer)
    return buffer.getvalue()


def taken(data: bytes, suffix: str, partial: bool = False) -> dict[str, Tensor] | None:
    """Return the weights that are taken of a file, None if an error names it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"checkpoint{suffix}"
        file.write_bytes(data)
        told = ""
        try:
            imported = import_checkpoint(file, params().model, params().data, partial, FOREIGN)
        except LgpError as e:
            told = str(e)
            imported = None
    if imported is None:
        assert told.startswith(str(file))
        return None
    found = {**imported.encoder.state_dict(), **imported.projector}
    assert all(tensor.isfinite().all() for tensor in found.values())
    return found


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_whole_file_is_taken(suffix: str) -> None:
    found = taken(content(suffix), suffix)
    assert found is not None
    assert all(torch.equal(found[name], tensor) for name, tensor in weights().items())


@settings(max_examples=40, deadline=None)
@given(
    suffix=st.sampled_from([".safetensors", ".pth"]),
    edits=st.lists(st.tuples(st.integers(0, 2**20) | st.integers(-2000, -1), st.integers(1, 255)), max_size=4),
    length=st.none() | st.integers(0, 2**20),
)
@example(suffix=".safetensors", edits=[(7, 128)], length=None)
@example(suffix=".pth", edits=[], length=1000)
def test_any_damage_is_told_or_leaves_finite_weights(
    suffix: str, edits: list[tuple[int, int]], length: int | None
) -> None:
    data = bytearray(content(suffix)[:length])
    for place, change in edits:
        if data:
            data[place % len(data)] ^= change
    taken(bytes(data), suffix)


OFFSETS = st.lists(st.integers(-5, 2**64), min_size=0, max_size=3)
LIES: dict[str, st.SearchStrategy[Any]] = {
    "dtype": st.sampled_from(["F64", "F16", "I8", "BOOL", "F8_E4M3", "C64", "", "x", 1, None]),
    "shape": st.lists(st.integers(-1, 2**45), max_size=3) | st.none() | st.text(max_size=3),
    "data_offsets": OFFSETS | st.none(),
}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_lie_of_a_header_is_told(data: st.DataObject) -> None:
    whole = content(".safetensors")
    length = int.from_bytes(whole[:8], "little")
    header: Header = json.loads(whole[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    key = data.draw(st.sampled_from(sorted(LIES)))
    before = header[name][key]
    header[name][key] = data.draw(LIES[key])
    text = json.dumps(header).encode()
    found = taken(len(text).to_bytes(8, "little") + text + whole[8 + length :], ".safetensors")
    assert found is None or header[name][key] == before


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "integers": lambda t: t.to(torch.int32),
    "complex": lambda t: t.to(torch.complex64),
    "eight bits": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "not finite": lambda t: torch.full_like(t, torch.inf),
    "too large": lambda t: torch.full(t.shape, 1e300, dtype=torch.float64),
    "repeated": lambda t: torch.zeros(()).expand(t.shape),
    "huge": lambda t: torch.zeros(()).expand(2**40, 16),
    "flat": lambda t: t.flatten(),
    "empty": lambda t: t[:0],
    "none": lambda t: None,
    "number": lambda t: 1.5,
    "list": lambda t: [t],
}


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(weights())), min_size=1, max_size=3, unique=True),
    kind=st.sampled_from(sorted(KINDS)),
    partial=st.booleans(),
    key=st.none() | st.integers() | st.text(max_size=5) | st.binary(max_size=3),
)
def test_any_kind_of_tensor_under_any_name_is_told_or_taken(
    names: list[str], kind: str, partial: bool, key: Any
) -> None:
    tensors: dict[Any, Any] = dict(weights())
    for name in names:
        tensors[name] = KINDS[kind](tensors[name])
    if key is not None:
        tensors[key] = torch.ones(2)
    buffer = io.BytesIO()
    torch.save({"model": tensors}, buffer)
    taken(buffer.getvalue(), ".pth", partial)
