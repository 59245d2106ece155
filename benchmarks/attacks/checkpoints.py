"""Checkpoints of strangers: bytes, headers, names, kinds and shapes of tensors."""

import functools
import io
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manifests import broken
from project import merged, preset
from tried import Tried, Wrong, tried

MODEL = {"model": {"width": 16, "depth": 1, "heads": 2}}
Tensors = dict[Any, Any]


@functools.cache
def _params() -> Any:
    from lgp.params.file import Params

    changes = {"graft": {"policy": ["layer_decay"], "scratch_end": {"lower_blocks": 1}}, **MODEL}
    changes["graft"] |= {name: {"lower_blocks": 1} for name in ("freeze", "cl_end")}
    changes["graft"] |= {"l1": {"lower_blocks": 1, "weight": 1e-3}}
    return Params.model_validate(merged(preset(), changes))


def _tensors() -> Tensors:
    from lgp.models.vit import build_encoder

    params = _params()
    return dict(build_encoder(params.model, params.data).state_dict())


def _kind(rng: random.Random, tensor: Any) -> Any:
    """Return a tensor of another kind, whose values may be none."""
    import torch

    kinds: list[Callable[[], Any]] = [
        lambda: tensor.to(
            rng.choice(
                [torch.int8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64, torch.complex64]
            )
        ),
        lambda: tensor.to(torch.float8_e4m3fn),
        lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda: tensor.to_sparse(),
        lambda: tensor.to("meta"),
        lambda: torch.zeros(()).expand(tensor.shape),
        lambda: torch.full_like(tensor, rng.choice((float("nan"), float("inf"), -float("inf"), 3e38))),
        lambda: torch.full(tensor.shape, 1e300, dtype=torch.float64),
        lambda: torch.nn.Parameter(tensor),
        lambda: rng.choice((None, 1, "text", [tensor], {"a": tensor}, (), b"bytes", float("nan"))),
    ]
    return rng.choice(kinds)()


def _shape(rng: random.Random, tensor: Any) -> Any:
    """Return a tensor of another shape; it may have absurdly many values, of no memory."""
    import torch

    shapes: list[Callable[[], Any]] = [
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: tensor[:0],
        lambda: tensor.T if tensor.ndim == 2 else tensor.squeeze(),
        lambda: torch.zeros(()),
        lambda: torch.zeros(1).expand(1, 2**40, 16),
        lambda: torch.zeros(1).expand(1, 1 + rng.choice((1, 3, 49, 196, 10**6 + 1)), 16),
        lambda: torch.zeros(rng.choice((1, 0, 7)), 17, 16),
        lambda: torch.zeros(2, 3, 5, 7, 1, 1),
    ]
    return rng.choice(shapes)()


def _odd_tensor(how: Callable[[random.Random, Any], Any]) -> Callable[[random.Random, Tensors], Tensors]:
    def changed(rng: random.Random, tensors: Tensors) -> Tensors:
        for name in rng.sample(list(tensors), rng.choice((1, 1, 3))):
            tensors[name] = how(rng, tensors[name])
        return tensors

    return changed


def _names(rng: random.Random, tensors: Tensors) -> Tensors:
    for name in rng.sample(list(tensors), rng.choice((1, 2, 10))):
        value = tensors.pop(name)
        new = rng.choice(
            (None, 1, (), "", "\0", "é", "猫", "a" * 5000, f"module.{name}", name.upper(), 1.5, True, b"x", "DROP")
        )
        if new != "DROP":
            tensors[new] = value
    return tensors


CHANGES = {"kinds": _odd_tensor(_kind), "shapes": _odd_tensor(_shape), "names": _names}


def _wrapped(rng: random.Random, tensors: Tensors) -> Any:
    """Return tensors in one of the containers of the known layouts, or in none of them."""
    moco = {f"module.base_encoder.{name}": value for name, value in tensors.items()}
    return rng.choice(
        [
            tensors,
            {"model": tensors},
            {"state_dict": tensors},
            {"state_dict": moco, "epoch": 1, "arch": "vit"},
            {"backbone_state_dict": tensors},
            {"model": tensors, "args": {"a": float("nan")}},
            {"model": {"model": tensors}},
            [tensors],
        ]
    )


def _pickled(content: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _safetensors() -> bytes:
    from safetensors.torch import save

    return bytes(save(_tensors()))


def _lied(rng: random.Random, data: bytes) -> bytes:
    """Return safetensors whose header says what is not so."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = header[rng.choice(list(header))]
    match rng.randrange(7):
        case 0:
            entry["dtype"] = rng.choice(("F64", "I8", "BOOL", "BF16", "F8_E4M3", "X", 1))
        case 1:
            entry["shape"] = rng.choice(([], [0], [2**40, 2**40], [-1], [1.5], "16", None, [10**30]))
        case 2:
            entry["data_offsets"] = rng.choice(([0, 0], [0, 2**63], [-1, 4], [8, 4], [], None, [0, len(data)]))
        case 3:
            header["__metadata__"] = rng.choice(({"a": 1}, [], "x", {"format": "tf"}, {"": ""}))
        case 4:
            header = rng.choice(([], {}, {"a": {}}, 1, None))
        case 5:
            text = json.dumps(header).encode()
            return (
                rng.choice((0, 2**63, 2**64 - 1, length + 1, 10**8)).to_bytes(8, "little") + text + data[8 + length :]
            )
        case _:
            header["extra"] = dict(entry)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


CONFIGS = (
    "{",
    "[]",
    "null",
    '{"num_features": "a"}',
    '{"model_args": 1}',
    '{"pretrained_cfg": {"mean": ["a"], "std": [0]}}',
    '{"pretrained_cfg": {"mean": [0.5], "std": [0]}}',
    '{"pretrained_cfg": []}',
    '{"architecture": null}',
    "\udcff",
)


def _bytes(rng: random.Random) -> tuple[str, bytes, str]:
    """Return a case, a file, and its suffix."""
    how = rng.choice(("bytes of .safetensors", "bytes of .pth", "header of .safetensors", *CHANGES, "config.json"))
    if how == "bytes of .safetensors":
        return how, broken(rng, _safetensors()), ".safetensors"
    if how == "header of .safetensors":
        return how, _lied(rng, _safetensors()), ".safetensors"
    tensors = _tensors()
    if how in CHANGES:
        tensors = CHANGES[how](rng, tensors)
    data = _pickled(_wrapped(rng, tensors))
    data = broken(rng, data) if how == "bytes of .pth" else data
    return how, data, rng.choice((".pth", ".pt", ".pth.tar", ".safetensors", ".PTH", ""))


def attack(rng: random.Random, folder: Path) -> Tried:
    """Write a checkpoint, and import it. What is taken is finite."""
    with warnings.catch_warnings(action="ignore"):
        how, data, suffix = _bytes(rng)
    file = folder / f"checkpoint{suffix}"
    file.write_bytes(data)
    if how == "config.json":
        (folder / "config.json").write_bytes(rng.choice(CONFIGS).encode("utf-8", "surrogateescape"))
    partial = rng.random() < 0.5

    def work() -> None:
        from lgp.data.normalization import Normalization
        from lgp.models.interchange import import_checkpoint

        # grey images, whose statistics no layout has
        given = None if how == "config.json" else Normalization((0.5,), (0.5,))
        params = _params()
        imported = import_checkpoint(file, params.model, params.data, partial, given)
        tensors = {**imported.encoder.state_dict(), **imported.projector}
        if bad := [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]:
            raise Wrong(f"weights that are not finite were taken: {bad}")

    return tried(how, work, folder)
