"""Arrays of pixels as people save them, and the data sets of libraries."""

import gzip
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_files import number_in, png, reason_of

from lgp.data.sources.arrays import digits_source, npz_source, pixels_of, torchvision_source
from lgp.data.sources.offers import Columns, Offers
from lgp.errors import LgpError

ANY = Columns()
RNG = np.random.default_rng(0)


def pixels(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return RNG.integers(0, 256, shape).astype(dtype)


def saved(tmp_path: Path, compressed: bool = True, **arrays: Any) -> Path:
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", **arrays)
    return tmp_path / "a.npz"


def read(offers: Offers, positions: list[int] | None = None) -> list[Any]:
    reads = list(offers.reads(range(len(offers)) if positions is None else positions))
    return [pickle.loads(pickle.dumps(one))() for one in reads]


@pytest.mark.parametrize("compressed", [True, False])
def test_images_and_labels(tmp_path: Path, compressed: bool) -> None:
    images = pixels(5, 4, 6, 3)
    path = saved(tmp_path, compressed, images=images, labels=np.array([10, 9, -1, 9, 10]), groups=list("abcde"))
    offers = npz_source(path, ANY)
    assert offers.labels == ["10", "9", None, "9", "10"]
    assert (offers.classes, offers.groups, set(offers.splits)) == (["9", "10"], list("abcde"), {"train"})
    assert offers.paths[2] == "images#2"
    assert len(set(offers.states)) == 5
    assert np.array_equal(read(offers), images)
    assert np.array_equal(read(offers, [1, 4]), images[[1, 4]])


def test_the_layouts_of_medmnist_and_keras(tmp_path: Path) -> None:
    for name in ("{}_images {}_labels", "x_{} y_{}"):
        image, label = name.split()
        arrays = {}
        for i, part in enumerate(("train", "val", "test")):
            arrays |= {image.format(part): pixels(2, 4, 4) + i, label.format(part): np.array([[i], [1]], np.uint8)}
        offers = npz_source(saved(tmp_path, **arrays), ANY)
        assert offers.splits == ["train", "train", "val", "val", "test", "test"]
        assert offers.labels == ["0", "1", "1", "1", "2", "1"]
        found = read(offers, [1, 3, 5])
        assert all(np.array_equal(found[i], arrays[image.format(p)][1]) for i, p in enumerate(("train", "val", "test")))


@pytest.mark.parametrize(
    "labels", [np.array(["cat", "", "-1"]), np.array([b"cat", b"", b"-1"]), np.array(["cat", "", "-1"], ">U9")]
)
def test_text_labels_and_a_column_of_splits(tmp_path: Path, labels: np.ndarray) -> None:
    path = saved(tmp_path, images=pixels(3, 2, 2), labels=labels, splits=np.array([b"train", b"test", b""]), extra=[1])
    offers = npz_source(path, ANY)
    assert (offers.labels, offers.splits) == (["cat", None, None], ["train", "test", "train"])
    assert [s.path for s in offers.skipped] == ["extra"]


def test_given_names(tmp_path: Path) -> None:
    path = saved(tmp_path, arr_0=pixels(2, 3, 3), arr_1=[1, 2], x1=[0])
    offers = npz_source(path, Columns(image="arr_0", label="arr_1"))
    assert (offers.paths, offers.labels) == (["arr_0#0", "arr_0#1"], ["1", "2"])
    with pytest.raises(LgpError, match="has no images: its arrays are arr_0, arr_1, x1; name them images"):
        npz_source(path, ANY)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.array([[0, 0.5, 1]]), [[0, 128, 255]]),
        (np.array([[0, 0.5, 1]], ">f4"), [[0, 128, 255]]),
        (np.array([[0, 1, 0.5]], np.float16), [[0, 255, 128]]),
        (np.array([[True, False]]), [[255, 0]]),
        (np.array([[3, 255]], np.int64), [[3, 255]]),
        (np.array([[3, 65535]], ">u2"), [[3, 65535]]),
        (np.arange(15, dtype=np.uint8).reshape(1, 3, 5), np.arange(15).reshape(3, 5, 1)),
        (np.arange(18, dtype=np.uint8).reshape(3, 2, 3), np.arange(18).reshape(3, 2, 3)),
    ],
)
def test_pixels_of_many_types(given: np.ndarray, expected: Any) -> None:
    found = pixels_of(given)
    assert found.dtype in (np.uint8, np.uint16)
    assert found.dtype.isnative
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "bad", [[[0.0, 255.0]], [[-1.0, 1.0]], [[np.nan, 0.5]], [[np.inf, 0.5]], [[256, 0]], [[-1, 0]]]
)
def test_pixels_of_another_range_are_refused(tmp_path: Path, bad: Any) -> None:
    images = np.array([np.zeros_like(bad), bad])
    offers = npz_source(saved(tmp_path, images=images), ANY)
    assert np.array_equal(read(offers, [0])[0], [[0, 0]])
    assert "its values are from" in reason_of(offers, 1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": pixels(3, 2, 2), "labels": [1, 2]}, r"labels has the shape \(2,\) for 3 images"),
        ({"images": pixels(3, 2, 2), "labels": np.eye(3)}, r"shape \(3, 3\) .* several labels"),
        ({"images": pixels(3, 2, 2), "labels": [0.5, 1, 2]}, r"row 0 of images has the label 0\.5"),
        ({"images": pixels(3, 2, 2), "splits": ["train", "fold", ""]}, r"row 1 of images has the split 'fold'"),
        ({"images": pixels(3, 64)}, r"images has the shape \(3, 64\) .* but images are \(N, H, W\)"),
        ({"images": pixels(3, 5, 5, 5)}, r"images has the shape \(3, 5, 5, 5\)"),
        ({"images": np.zeros((3, 2, 2), complex)}, "the type complex128"),
        ({"images": np.array([[["a"]]])}, "the type <U1"),
        ({"images": np.asfortranarray(pixels(3, 2, 4))}, "ascontiguousarray"),
        ({"labels": [1]}, "has no images: its arrays are labels"),
    ],
)
def test_arrays_that_are_no_images_or_labels_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(LgpError, match=message):
        npz_source(saved(tmp_path, **arrays), ANY)


class Harmful:
    def __reduce__(self) -> Any:
        raise AssertionError("it is unpickled")


@pytest.mark.parametrize("name", ["images", "labels"])
def test_python_objects_are_never_loaded(tmp_path: Path, name: str) -> None:
    arrays = {"images": pixels(1, 2, 2)} | {name: np.array([None], dtype=object)}
    with pytest.raises(LgpError, match="it holds Python objects"):
        npz_source(saved(tmp_path, **arrays), ANY)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\3\4"])
def test_a_file_that_is_no_npz_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(LgpError, match=r"a\.npz cannot be read as an \.npz file"):
        npz_source(tmp_path / "a.npz", ANY)


def test_a_header_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"shape": (2**40, 8, 8), "fortran_order": False, "descr": "|u1"})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", buffer.getvalue())
    with pytest.raises(LgpError, match="not as long as its header says"):
        npz_source(tmp_path / "a.npz", ANY)


def test_damaged_pixels_fail_image_by_image(tmp_path: Path) -> None:
    path = saved(tmp_path, images=pixels(50, 32, 32), labels=np.zeros(50, int))
    offers = npz_source(path, ANY)
    data = bytearray(path.read_bytes())
    middle = data.index(b"images.npy") + 25_000
    data[middle : middle + 2000] = bytes(2000)
    path.write_bytes(data)
    reads = list(offers.reads(range(50)))
    assert len(reads) == 50
    assert reads[0]().shape == (32, 32)  # type: ignore[union-attr]
    assert "images is damaged" in reason_of(offers, 49)


def test_no_images_and_no_labels(tmp_path: Path) -> None:
    offers = npz_source(saved(tmp_path, images=pixels(0, 2, 2), labels=np.zeros(0, int)), ANY)
    assert (len(offers), read(offers)) == (0, [])
    assert npz_source(saved(tmp_path, images=pixels(2, 2, 2)), ANY).labels == [None, None]


def test_digits() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    offers = digits_source()
    assert (offers.paths[5], len(offers), set(offers.splits)) == ("digits/5", 1797, {"train"})
    assert (offers.classes, offers.declared) == ([str(i) for i in range(10)], True)
    assert offers.labels == [str(label) for label in digits.target]
    (image,) = read(offers, [5])
    assert np.array_equal(image[..., 0], np.round(digits.images[5] * 255 / 16))


def write_mnist(root: Path, name: str = "MNIST") -> np.ndarray:
    """Write a small data set as torchvision stores MNIST."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    images = pixels(5, 28, 28)
    for part, rows in (("train", slice(0, 3)), ("t10k", slice(3, 5))):
        of_part = images[rows]
        head = struct.pack(">4i", 0x803, len(of_part), 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + of_part.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, len(of_part)) + bytes(range(len(of_part)))
        )
        with gzip.open(raw / f"{part}-unused.gz", "wb"):
            pass
    return images


def test_arrays_of_torchvision(tmp_path: Path) -> None:
    images = write_mnist(tmp_path)
    offers = torchvision_source("MNIST", tmp_path)
    assert offers.paths == ["train/0", "train/1", "train/2", "test/0", "test/1"]
    assert offers.labels == ["0 - zero", "1 - one", "2 - two", "0 - zero", "1 - one"]
    assert (len(offers.classes), offers.declared, offers.splits[2:4]) == (10, True, ["train", "test"])
    assert np.array_equal(read(offers), images)
    assert np.array_equal(read(offers, [1, 4]), images[[1, 4]])


def test_files_of_torchvision(tmp_path: Path) -> None:
    for i, name in enumerate(("Forest", "River")):
        folder = tmp_path / "eurosat/2750" / name
        folder.mkdir(parents=True)
        (folder / f"{i}.jpg").write_bytes(png(i))
    offers = torchvision_source("EuroSAT", tmp_path)
    assert offers.paths == ["eurosat/2750/Forest/0.jpg", "eurosat/2750/River/1.jpg"]
    assert (offers.labels, offers.classes) == (["Forest", "River"], ["Forest", "River"])
    assert [number_in(data) for data in read(offers)] == [0, 1]


def test_unknown_and_unreachable_sets_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LgpError, match=r"torchvision:VOC is not known: valid are CIFAR10, CIFAR100, .*USPS"):
        torchvision_source("VOC", tmp_path)

    def unreachable(*given: Any, **named: Any) -> None:
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    with pytest.raises(LgpError, match=r"CIFAR10 is not below .*, and cannot be downloaded: Name or service not known"):
        torchvision_source("CIFAR10", tmp_path / "new")
