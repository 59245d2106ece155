"""Files of strangers: told what they are by content, and no tensor taken that is no weight."""

import pickle
import struct
import zipfile
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
from lgp.models.checkpoint_files import fault_of, fault_of_count, object_beside, read_tensors, shown, unwrapped
from lgp.models.heads_file import load_heads, save_heads
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
        (b"\xef\xbb\xbf<!doctype html>", "is a web page"),
        (b"\x1f\x8b\x08\0", "is compressed"),
        (b"7z\xbc\xaf\x27\x1c", "is compressed"),
        (b"\0" * 9 + b"a" * 248 + b"ustar", "is compressed or an archive"),
        (b"GGUF\x03", "is GGUF, whose weights are quantised"),
        (b"\x93NUMPY\x01", r"is an array of NumPy \(.npy\)"),
        (b"PK\x03\x04" + b"a" * 99, "is cut off"),
        (b"404: Not Found", r'is no checkpoint \(it begins with "404: Not Found"\)'),
        (b'{"error": 1}\n', r'is no checkpoint \(it begins with "{"error": 1}\\n"\)'),
        (b"\x89PNG\r\n\x1a\n\0", "is no checkpoint"),
        (pickle.dumps({"model": np.zeros(3)}), "holds more than tensors"),
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


def test_pickle_is_known_by_content_too(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3.0)}, tmp_path / "m.safetensors")
    assert read_tensors(tmp_path / "m.safetensors")["a"].tolist() == [0, 1, 2]


def repacked(path: Path, compression: int = zipfile.ZIP_STORED, **changed: bytes) -> None:
    """Pack what `torch.save` wrote once more, with other parts."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, changed.get(name.rpartition("/")[2].replace(".", "_"), data))


def test_archives_that_torch_did_not_write_are_told(tmp_path: Path) -> None:
    file = tmp_path / "m.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights\n.pth", b"x")
    with pytest.raises(LgpError, match=r"is an archive without a checkpoint \(weights\\n.pth, …\): unpack it first"):
        read_tensors(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("m/constants.pkl", b"x")
    with pytest.raises(LgpError, match="is a program of TorchScript"):
        read_tensors(file)


def test_archive_that_may_grow_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "m.pth")
    repacked(tmp_path / "m.pth")
    assert read_tensors(tmp_path / "m.pth")["a"].sum() == 0
    repacked(tmp_path / "m.pth", zipfile.ZIP_DEFLATED)
    with pytest.raises(LgpError, match="was packed again with compression"):
        read_tensors(tmp_path / "m.pth")


def test_flipped_byte_of_a_tensor_is_noticed(tmp_path: Path) -> None:
    torch.save({"a": torch.full((999,), 1 / 3)}, tmp_path / "m.pth")
    data = tmp_path.joinpath("m.pth").read_bytes()
    value = struct.pack("<f", 1 / 3)
    assert data.count(value) == 999
    tmp_path.joinpath("m.pth").write_bytes(data.replace(value, struct.pack("<f", 1 / 4), 1))
    with pytest.raises(LgpError, match=r"is damaged \(m/data/0 does not fit its checksum\)"):
        read_tensors(tmp_path / "m.pth")


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
    "integer": (lambda: torch.ones(2, 3, dtype=torch.int64), "is of type int64, not of floats of 16, 32 or 64 bits"),
    "complex": (lambda: torch.ones(2, dtype=torch.complex64), "is of type complex64, not of floats"),
    "eight bits": (lambda: torch.ones(2).to(torch.float8_e4m3fn), "is of type float8_e4m3fn, not of floats"),
    "four bits": (
        lambda: torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "is of type float4_e2m1fn_x2",
    ),
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(set(FAULTS) - {"integer"}))
def test_count_that_is_none_is_named(kind: str) -> None:
    assert fault_of_count(FAULTS[kind][0]())
    assert fault_of_count(torch.tensor(7)) is None
    assert fault_of_count(torch.ones(2, dtype=torch.int64)) == "is (2,) of type int64, not one whole number of 64 bits"


def test_count_of_a_projector_is_checked_before_it_is_written(
    vit: Any,  # noqa: F811
    params: Params,
    tmp_path: Path,
) -> None:
    tensors = {f"module.base_encoder.{name}": tensor for name, tensor in encoder_of(vit).items()}
    count = torch.ones(1, dtype=torch.int64).expand(10**9, 10**6)
    torch.save({"state_dict": tensors | {"module.base_encoder.head.1.num_batches_tracked": count}}, tmp_path / "m.pth")
    with pytest.raises(LgpError, match=r"num_batches_tracked has the shape \(1000000000, 1000000\), and fewer values"):
        read(tmp_path / "m.pth", params)


@pytest.mark.parametrize("shape", [(), (0, 16), (4, 15), (4, 16, 1)])
def test_first_layer_of_a_projector_fits_the_encoder(
    shape: tuple[int, ...],
    vit: Any,  # noqa: F811
    params: Params,
    tmp_path: Path,
) -> None:
    tensors = {f"module.base_encoder.{name}": tensor for name, tensor in encoder_of(vit).items()}
    torch.save({"state_dict": tensors | {"module.base_encoder.head.0.weight": torch.ones(shape)}}, tmp_path / "m.pth")
    with pytest.raises(LgpError, match=r"head\.0\.weight is \(.*\) where \(N, 16\) is needed"):
        read(tmp_path / "m.pth", params)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_projector_is_written_in_single_precision_even_where_layers_share_memory(
    dtype: torch.dtype,
    vit: Any,  # noqa: F811
    params: Params,
    tmp_path: Path,
) -> None:
    shared = torch.arange(256, dtype=dtype).reshape(16, 16)
    heads = {"module.base_encoder.head.0.weight": shared, "module.base_encoder.head.3.weight": shared}
    tensors = {f"module.base_encoder.{name}": tensor for name, tensor in encoder_of(vit).items()}
    torch.save({"state_dict": tensors | heads}, tmp_path / "m.pth")
    imported = read(tmp_path / "m.pth", params)
    save_heads(tmp_path, imported.projector, imported.first_fc)
    for weight in load_heads(tmp_path).values():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, shared.float())


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        (torch.ones(2, 26, 16), "needed"),
        (torch.ones(0, 26, 16), "needed"),
        (torch.ones(1, 1, 1).expand(1, 10**9, 16), "fewer values"),
        (3.4e38 * torch.eye(26, 16)[None].sub(0.5).sign(), "interpolated from 5×5 .* not finite"),
    ],
    ids=["two", "none", "absurd", "overflow"],
)
def test_positions_that_are_none_are_refused(
    positions: Tensor,
    said: str,
    vit: Any,  # noqa: F811
    params: Params,
    tmp_path: Path,
) -> None:
    torch.save({"model": encoder_of(vit) | {"pos_embed": positions}}, tmp_path / "mae.pth")
    with pytest.raises(LgpError, match=rf"pos_embed.*{said}"):
        read(tmp_path / "mae.pth", params)


def test_names_of_tensors_stay_on_one_short_line(
    vit: Any,  # noqa: F811
    params: Params,
    tmp_path: Path,
) -> None:
    assert shown("a\n\x1b[31m\udcff é") == r"a\n\x1b[31m\udcff é"
    assert len(shown("a" * 10**6)) == 101
    odd = {"a\nb": torch.ones(1), f"blocks.{'9' * 5000}.norm1.weight": torch.ones(16)}
    torch.save({"model": encoder_of(vit) | odd | {"patch_embed.proj.weight": torch.tensor(1.0)}}, tmp_path / "mae.pth")
    with pytest.raises(LgpError, match=r"a\\nb has no place in the encoder; .* holds a ViT of depth 3,") as e:
        read(tmp_path / "mae.pth", params)
    assert len(str(e.value)) < 1000


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'[["mean", [0.5]]]', b"null", b"\xff\xfe", b"[" * 100_000, b"9" * 5000]
)
def test_object_beside_a_checkpoint_is_whole(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    assert object_beside(file) == {}
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert object_beside(file) == {"a": 1}
    file.write_bytes(content)
    with pytest.raises(LgpError, match=r"config\.json beside the checkpoint is damaged \("):
        object_beside(file)
    file.unlink()
    file.mkdir()
    with pytest.raises(LgpError, match=r"is damaged \(Is a directory\)"):
        object_beside(file)


@pytest.mark.parametrize(
    "beside", ['{"model_args": 3}', '{"model_args": {"num_heads": "x\\n"}}', '{"pretrained_cfg": 3}']
)
def test_configuration_of_another_form_is_no_traceback(
    beside: str,
    vit: Any,  # noqa: F811
    params: Params,
    tmp_path: Path,
) -> None:
    torch.save({"model": encoder_of(vit)}, tmp_path / "mae.pth")
    (tmp_path / "config.json").write_text(beside)
    with pytest.raises(LgpError, match=r"of 3 channels, data\.channels is 1|says x\\n heads"):
        import_checkpoint(tmp_path / "mae.pth", params.model, params.data)


@pytest.mark.parametrize(
    "statistics",
    [("x", "y"), ([0.5], [0]), ([float("nan")], [1]), (0.5, 0.5), ([[1]], [[1]]), ([None], [1]), ([127], [64])],
)
def test_statistics_of_a_file_are_those_of_pixels(
    statistics: tuple[Any, Any],
    vit: Any,  # noqa: F811
    params: Params,
    tmp_path: Path,
) -> None:
    cfg = dict(zip(("mean", "std"), statistics, strict=True))
    torch.save({"model": encoder_of(vit), "pretrained_cfg": cfg}, tmp_path / "mae.pth")
    with pytest.raises(LgpError, match="which are no statistics of pixels"):
        import_checkpoint(tmp_path / "mae.pth", params.model, params.data)
