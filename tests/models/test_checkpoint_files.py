"""Files of strangers: told what they are by content, and no tensor taken that is no weight."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FOREIGN
from safetensors.torch import save_file
from test_interchange import encoder_of, read, vit  # noqa: F401 - a fixture
from torch import Tensor

from lgp.errors import LgpError
from lgp.models.checkpoint_files import fault_of, read_tensors, unwrapped
from lgp.models.interchange import import_checkpoint
from lgp.params.file import Params

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 343\n"
PAGES = [b"<!DOCTYPE html><title>Sign in</title>", b"\n <html><body>404</body></html>"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, "is a pointer of Git LFS, not the file itself: get it with `git lfs pull`"),
        (PAGES[0], "is a web page"),
        (PAGES[1], "is a web page"),
        (b"\x89HDF\r\n\x1a\n", "is HDF5"),
        (b"\x1f\x8b\x08\0", "is compressed"),
        (b"", "is empty"),
        (b"\0" * 4096, "is empty"),
    ],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_what_is_no_checkpoint_is_told_by_content(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LgpError, match=said):
        read_tensors(tmp_path / name)


def test_arrays_of_numpy_are_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "ViT-B_16.npz", cls=np.zeros(3))
    with pytest.raises(LgpError, match=r"holds arrays of NumPy \(.npz\)"):
        read_tensors(tmp_path / "ViT-B_16.npz")


@pytest.mark.parametrize("name", ["m.SAFETENSORS", "m.pth", "model"])
def test_safetensors_are_known_by_content(name: str, tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0)}, tmp_path / name)
    assert read_tensors(tmp_path / name)["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_names_that_a_trainer_wrapped_are_taken(
    prefix: str,
    vit: Any,  # noqa: F811
    params: Params,
    tmp_path: Path,
) -> None:
    wrapped = {f"{prefix}{name}": tensor for name, tensor in encoder_of(vit).items()}
    torch.save({"epoch": 1, "state_dict": wrapped}, tmp_path / "ddp.pth")
    found = read(tmp_path / "ddp.pth", params).encoder.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in encoder_of(vit).items())


def test_prefix_of_some_names_stays() -> None:
    tensors = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert list(unwrapped(tensors)) == ["module.a", "b"]
    assert unwrapped({}) == {}


def test_keys_inside_a_file_are_shown_where_its_layout_is_unknown(params: Params, tmp_path: Path) -> None:
    torch.save({"epoch": 1, "state_dict": {"stem.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(LgpError, match=r"its keys begin with epoch, state_dict \(stem\.weight, …\)"):
        read(tmp_path / "other.pth", params)


FAULTS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "integer": (lambda: torch.ones(2, 3, dtype=torch.int64), "is of type int64, not of floats"),
    "complex": (lambda: torch.ones(2, dtype=torch.complex64), "is of type complex64, not of floats"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "is sparse, not a dense tensor of floats"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "is quantised, not a dense tensor of floats",
    ),
    "meta": (lambda: torch.ones(2, device="meta"), "has a shape and no values"),
    "expanded": (lambda: torch.ones(1).expand(10**9, 10**6), "has the shape (1000000000, 1000000), and fewer values"),
    "overflow": (lambda: torch.full((2,), 1e300, dtype=torch.float64), "not finite in single precision"),
    "nan": (lambda: torch.tensor([1.0, float("nan")]), "not finite in single precision"),
}


@pytest.mark.filterwarnings("ignore")  # torch's own, of quantised tensors
@pytest.mark.parametrize("kind", FAULTS)
def test_tensor_that_is_no_weight_is_named_before_anything_is_computed(kind: str) -> None:
    make, said = FAULTS[kind]
    assert said in str(fault_of(make()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_every_precision_are_taken(dtype: torch.dtype) -> None:
    assert fault_of(torch.ones(2, 3, dtype=dtype)) is None
    assert fault_of(torch.ones(3, 2, dtype=dtype).T) is None
    assert fault_of(torch.ones(0, dtype=dtype)) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["integer", "expanded", "overflow"])
@pytest.mark.parametrize("name", ["norm.weight", "pos_embed"])
def test_checkpoint_with_such_a_tensor_is_refused_by_its_name(
    kind: str,
    name: str,
    vit: Any,  # noqa: F811
    params: Params,
    tmp_path: Path,
) -> None:
    torch.save({"model": encoder_of(vit) | {name: FAULTS[kind][0]()}}, tmp_path / "mae.pth")
    with pytest.raises(LgpError, match=name.replace(".", r"\.")):
        read(tmp_path / "mae.pth", params)


def test_projector_that_is_not_finite_is_refused(
    vit: Any,  # noqa: F811
    params: Params,
    tmp_path: Path,
) -> None:
    tensors = {f"module.base_encoder.{name}": tensor for name, tensor in encoder_of(vit).items()}
    heads = {"module.base_encoder.head.0.weight": torch.full((4, 4), float("inf"))}
    counted = {"module.base_encoder.head.1.num_batches_tracked": torch.tensor(7)}
    torch.save({"state_dict": tensors | counted}, tmp_path / "moco.pth")
    assert import_checkpoint(tmp_path / "moco.pth", params.model, params.data, False, FOREIGN).projector
    torch.save({"state_dict": tensors | counted | heads}, tmp_path / "moco.pth")
    with pytest.raises(LgpError, match=r"head\.0\.weight holds values that are not finite"):
        read(tmp_path / "moco.pth", params)


def test_keys_that_are_no_text_are_left_out(
    vit: Any,  # noqa: F811
    params: Params,
    tmp_path: Path,
) -> None:
    torch.save({"model": encoder_of(vit) | {7: torch.ones(2)}}, tmp_path / "mae.pth")
    assert "7" not in {use.name for use in read(tmp_path / "mae.pth", params).uses}
