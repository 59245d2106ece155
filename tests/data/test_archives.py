"""Archives as people have them, whole, damaged and hostile."""

import io
import json
import multiprocessing
import pickle
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_files import number_in, numbers, png, reason_of, tar_archive, zip_archive

from lgp.data.sources import archive_files
from lgp.data.sources.archives import expand, tar_source, zip_source
from lgp.data.sources.offers import Columns, Offers
from lgp.errors import LgpError

ANY = Columns()


def labels(offers: Offers) -> dict[str, str | None]:
    return dict(zip(offers.paths, offers.labels, strict=True))


def reasons(offers: Offers) -> dict[str, str]:
    assert len({s.path for s in offers.skipped}) == len(offers.skipped)
    return {s.path: s.reason for s in offers.skipped}


def of_tar(tmp_path: Path, files: dict[str, bytes]) -> Offers:
    return tar_source([tar_archive(tmp_path / "a.tar", files)], ANY)


def of_zip(tmp_path: Path, files: dict[str, bytes]) -> Offers:
    return zip_source([zip_archive(tmp_path / "a.zip", files)], ANY)


@pytest.fixture(params=[of_tar, of_zip])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[dict[str, bytes]], Offers]:
    return lambda files: request.param(tmp_path, files)


Opened = Callable[[dict[str, bytes]], Offers]


def test_folders_are_splits_and_classes(opened: Opened) -> None:
    names = ["train/cat/a.png", "train/dog/x/b.JPG", "valid/cat/a.png", "test/c.png", "unlabeled/u/d.png"]
    offers = opened({f"./mine/{name}": png(i) for i, name in enumerate(names)})
    assert offers.paths == [f"mine/{name}" for name in names]
    assert offers.labels == ["cat", "dog", "cat", None, None]
    assert offers.splits == ["train", "train", "val", "test", "train"]
    assert (offers.classes, offers.declared, offers.skipped) == (["cat", "dog"], False, [])
    assert numbers(offers) == [0, 1, 2, 3, 4]
    reads = [pickle.loads(pickle.dumps(read)) for read in offers.reads([1, 4])]
    assert [number_in(read()) for read in reads] == [1, 4]


@pytest.mark.parametrize(
    ("names", "classes", "splits"),
    [
        (["10/a.png", "9/b.png"], ["9", "10"], "train"),
        (["train/a.png", "bus/b.png"], ["bus", "train"], "train"),  # a train is a vehicle
        (["images/a.png", "images/b.png"], [], "train"),
        (["a.png", "b.png"], [], "train"),
        (["x/y/cat/a.png", "x/y/dog/b.png"], ["cat", "dog"], "train"),
        (["Testing/cat/a.png", "Testing/dog/b.png"], ["cat", "dog"], "test"),
    ],
)
def test_layouts_of_folders(opened: Opened, names: list[str], classes: list[str], splits: str) -> None:
    offers = opened(dict.fromkeys(names, png()))
    assert offers.classes == classes
    assert set(offers.splits) == {splits}


def test_webdataset_samples(opened: Opened) -> None:
    offers = opened(
        {
            "s/0001.jpg": png(1),
            "s/0001.cls": b"7\n",
            "s/0001.json": b'{"label": 5}',
            "s/0002.json": json.dumps({"class": "cat", "patient": 12, "split": "val"}).encode(),
            "s/0002.png": png(2),
            "s/0002.seg.png": png(3),
            "s/0003.png": png(4),
            "s/0003.cls": b"-1",
            "s/0004.v2.png": png(5),
            "s/0004.v2.cls": b"9",
            "s/0005.png": png(6),
            "s/0005.txt": b"a caption",
            "s/0005.json": b'{"caption": "x"}',
            "s/none.cls": b"\xff",
        }
    )
    assert labels(offers) == {
        "s/0001.jpg": "7",
        "s/0002.png": "cat",
        "s/0003.png": None,
        "s/0004.v2.png": "9",
        "s/0005.png": None,
    }
    assert offers.groups == [None, "12", None, None, None]
    assert offers.splits == ["train", "val", "train", "train", "train"]
    assert reasons(offers).keys() == {"s/0001.json", "s/0002.seg.png", "s/0005.txt", "s/0005.json", "s/none.cls"}
    assert numbers(offers) == [1, 2, 4, 5, 6]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("1.cls", b"\xff\xfe", r"1\.cls cannot be read: .*utf-8"),
        ("1.json", b"{", r"1\.json cannot be read: Expecting"),
        ("1.json", b'{"label": [1, 0]}', r"1\.json has the label \[1, 0\]: several labels"),
        ("1.json", b'{"label": 0.5}', r"1\.json has the label 0\.5"),
        ("1.json", b'{"label": 1, "split": "fold"}', r"1\.json has the split 'fold'"),
    ],
)
def test_a_label_that_cannot_be_read_is_refused(opened: Opened, name: str, data: bytes, message: str) -> None:
    with pytest.raises(LgpError, match=message):
        opened({"1.png": png(), name: data})


def test_shards_have_the_splits_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    files = [
        tar_archive(tmp_path / "mine-train-000.tar", {"0.png": png(0), "0.cls": b"a"}),
        tar_archive(tmp_path / "mine-val-000.tar.gz", {"0.png": png(1), "0.cls": b"b"}, "w:gz"),
        tar_archive(tmp_path / "test/000.tar", {"0.png": png(2), "1.png": png(3)}),
    ]
    offers = tar_source([*files, files[0]], ANY)
    assert offers.paths == [
        "mine-train-000.tar/0.png",
        "mine-val-000.tar.gz/0.png",
        "test/000.tar/0.png",
        "test/000.tar/1.png",
    ]
    assert offers.splits == ["train", "val", "test", "test"]
    assert numbers(offers) == [0, 1, 2, 3]
    assert [number_in(read()) for read in offers.reads([1, 3])] == [1, 3]
    assert set(tar_source(files[2:], ANY).splits) == {"train"}


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tar_is_streamed_in_order(tmp_path: Path, mode: str) -> None:
    files = {f"{'ab'[i % 2]}/{i}.png": png(i) for i in range(40)} | {"b/7.cls": b"c"}
    offers = tar_source([tar_archive(tmp_path / "a.tgz", files, mode)], ANY)
    assert numbers(offers) == list(range(40))
    assert (offers.labels[6:9], len(set(offers.states))) == (["a", "c", "a"], 40)
    assert [number_in(read()) for read in offers.reads([3, 39])] == [3, 39]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "\ufefffile_name,label,patient\na.png,cat,3\nd\\b.png,,\nd/none.png,dog,1\n"),
        ("labels.csv", "label;file;group\r\ncat;a.png;3\r\n-1;./d/b.png;\r\nx;d/none.png;1\r\n"),
        ("metadata.csv", "file_name\tclass\tpatient\na.png\tcat\t3\nd/b.png\t-1\t\nd/none.png\tdog\t1\n"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "label": "cat", "patient": 3}\n\n{"file_name": "d/b.png", "label": null}\n'
            '{"file_name": "d/none.png"}\n',
        ),
    ],
)
def test_a_list_in_the_archive_labels_its_images(opened: Opened, name: str, text: str) -> None:
    offers = opened({f"m/{name}": text.encode(), "m/a.png": png(1), "m/d/b.png": png(2), "m/d/c.png": png(3)})
    assert labels(offers) == {"m/a.png": "cat", "m/d/b.png": None, "m/d/c.png": None}
    assert offers.groups == ["3", None, None]
    assert reasons(offers) == {f"m/{name}#2": "names 'm/d/none.png', which the archive lacks"}


def test_a_list_without_labels_leaves_those_of_folders(opened: Opened) -> None:
    rows = b"file_name,caption,split\nd/x.png,a dog,test\n"
    offers = opened({"metadata.csv": rows, "d/x.png": png(), "e/y.png": png()})
    assert (offers.labels, offers.splits) == (["d", "e"], ["test", "train"])
    offers = opened({"labels.csv": b"id,colour\n1,red\n", "d/x.png": png(), "e/y.png": png()})
    assert (offers.labels, reasons(offers)) == (["d", "e"], {"labels.csv": "names no images"})
    assert offers.notes == []


def test_columns_of_a_list_that_are_not_read_are_told(opened: Opened) -> None:
    offers = opened({"labels.csv": b"file,label,fold\nx.png,red,1\n", "x.png": png()})
    assert offers.notes[0].startswith(
        "labels.csv: image from 'file', label from 'label'; no split and no group; not re"
    )


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "labels.csv",
            b"file,label\na.png,\xff\n",
            r"labels\.csv cannot be read: it is not UTF-8 \(byte 0xff in line 2",
        ),
        ("metadata.jsonl", b'{"file_name": "a.png"}\n[1]\n', "a row is no object"),
        ("labels.csv", b"file,label\na.png,x\na.png,y\n", r"row 1 says something else of a\.png"),
        ("labels.csv", b"file,split\na.png,fold1\n", r"labels\.csv: row 0 has the split 'fold1'"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused(opened: Opened, name: str, data: bytes, message: str) -> None:
    with pytest.raises(LgpError, match=message):
        opened({name: data, "a.png": png()})


def test_clutter_and_other_files_are_listed(opened: Opened) -> None:
    files = [
        "__MACOSX/a/._x.png",
        "a/._x.png",
        "a/Thumbs.db",
        ".DS_Store",
        "a/.hidden.png",
        "README",
        "a/x.xml",
        "a/x.png",
    ]
    offers = opened(dict.fromkeys(files, png()))
    assert offers.paths == ["a/x.png"]
    assert [c.path for c in offers.clutter] == files[:5]
    assert reasons(offers).keys() == {"README", "a/x.xml"}


def test_members_that_lead_out_are_skipped(opened: Opened) -> None:
    bad = ["../x.png", "/etc/x.png", "a/../../x.png"]
    offers = opened(dict.fromkeys([*bad, "a/ok.png"], png()))
    assert offers.paths == ["a/ok.png"]
    assert reasons(offers) == dict.fromkeys(bad, "its path leads out of the archive")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.BLKTYPE])
def test_links_and_devices_in_tar_are_skipped(tmp_path: Path, kind: bytes) -> None:
    path = tar_archive(tmp_path / "a.tar", {"a/ok.png": png()})
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("a/bad.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
        tar.addfile(tarfile.TarInfo("a/folder/"))
    offers = tar_source([path], ANY)
    assert offers.paths[0] == "a/ok.png"
    assert reasons(offers)["a/bad.png"] in ("a link", "no regular file")


@pytest.mark.parametrize(("kind", "reason"), [(stat.S_IFLNK, "a link"), (stat.S_IFIFO, "no regular file")])
def test_links_and_devices_in_zip_are_skipped(tmp_path: Path, kind: int, reason: str) -> None:
    path = zip_archive(tmp_path / "a.zip", {"a/ok.png": png(), "a/folder/": b""})
    info = zipfile.ZipInfo("a/bad.png")
    info.external_attr = (kind | 0o644) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, "/etc/passwd")
    offers = zip_source([path], ANY)
    assert (offers.paths, reasons(offers)) == (["a/ok.png"], {"a/bad.png": reason})


def test_members_that_declare_too_much_are_skipped(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_files, "LARGEST_BYTES", 1000)
    offers = opened({"a/ok.png": png(), "a/bomb.png": bytes(1001)})
    assert offers.paths == ["a/ok.png"]
    assert "it declares" in reasons(offers)["a/bomb.png"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_the_last_of_several_members_of_one_name_counts(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "tar":
        with tarfile.open(tar_archive(path, {"a/x.png": png(1), "b/y.png": png(2)}), "a") as tar:
            info = tarfile.TarInfo("./a/x.png")
            info.size = len(png(3))
            tar.addfile(info, io.BytesIO(png(3)))
    else:
        with zipfile.ZipFile(zip_archive(path, {"a/x.png": png(1), "b/y.png": png(2)}), "a") as archive:
            archive.writestr("a/x.png", png(3))
    offers = (tar_source if kind == "tar" else zip_source)([path], ANY)
    assert (offers.paths, numbers(offers)) == (["b/y.png", "a/x.png"], [2, 3])
    assert list(reasons(offers).values()) == ["a later member has the same name"]


def test_names_that_are_no_text_can_be_printed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in (b"caf\xe9/\xe9.png", b"b/x.png"):
            info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            info.size = len(png())
            tar.addfile(info, io.BytesIO(png()))
    offers = tar_source([tmp_path / "a.tar"], ANY)
    assert offers.paths[0].encode() == rb"caf\xe9/\xe9.png"
    assert offers.classes == ["b", r"caf\xe9"]
    assert len(numbers(offers)) == 2


def test_backslashes_of_windows_separate_folders(tmp_path: Path) -> None:
    offers = of_zip(tmp_path, {"train\\cat\\a.png": png(1), "train\\dog\\b.png": png(2), "train\\dog\\": b""})
    assert labels(offers) == {"train/cat/a.png": "cat", "train/dog/b.png": "dog"}
    assert numbers(offers) == [1, 2]


def test_a_damaged_member_of_a_zip_fails_alone(tmp_path: Path) -> None:
    path = zip_archive(tmp_path / "a.zip", {f"a/{i}.png": png(i) for i in range(3)}, zipfile.ZIP_STORED)
    data = path.read_bytes()
    path.write_bytes(data.replace(png(1)[40:60], bytes(20)))
    offers = zip_source([path], ANY)
    assert "Bad CRC-32" in reason_of(offers, 1)
    assert [number_in(read()) for read in offers.reads([0, 2])] == [0, 2]


def encrypted(path: Path) -> Path:
    """Mark every member of a zip archive as encrypted."""
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = data.find(signature)
        while start >= 0:
            data[start + offset] |= 1
            start = data.find(signature, start + 1)
    path.write_bytes(data)
    return path


def test_an_encrypted_zip_fails_where_it_is_read(tmp_path: Path) -> None:
    path = encrypted(zip_archive(tmp_path / "a.zip", {"a/0.png": png()}))
    assert "password" in reason_of(zip_source([path], ANY), 0)
    path = encrypted(zip_archive(tmp_path / "a.zip", {"a/0.png": png(), "a/0.cls": b"1"}))
    with pytest.raises(LgpError, match=r"0\.cls cannot be read: .*password"):
        zip_source([path], ANY)


@pytest.mark.parametrize("cut", [0, 3, 700, 0.5, 0.9])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_truncated_tar_is_named(tmp_path: Path, cut: float, mode: str) -> None:
    path = tar_archive(tmp_path / "a.tar", {f"{i}.png": png(i) + bytes(range(256)) * i for i in range(90)}, mode)
    data = path.read_bytes()
    path.write_bytes(data[: int(cut if cut > 1 else cut * len(data))])
    with pytest.raises(LgpError, match=r"a\.tar cannot be read as a tar archive"):
        tar_source([path], ANY)


@pytest.mark.parametrize("change", ["header", "joined"])
def test_nothing_after_a_damaged_header_is_lost_silently(tmp_path: Path, change: str) -> None:
    path = tar_archive(tmp_path / "a.tar", {f"{i}.png": png(i) for i in range(9)})
    data = bytearray(path.read_bytes())
    if change == "header":
        start = data.index(b"5.png")
        data[start : start + 500] = b"x" * 500
    else:
        data += bytes(data)
    path.write_bytes(data)
    with pytest.raises(LgpError, match=r"a\.tar has more after byte"):
        tar_source([path], ANY)


@pytest.mark.parametrize("cut", [0, 0.5])
def test_a_truncated_zip_is_named(tmp_path: Path, cut: float) -> None:
    path = zip_archive(tmp_path / "a.zip", {f"{i}.png": png(i) for i in range(9)})
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(LgpError, match=r"a\.zip cannot be read as a zip archive"):
        zip_source([path], ANY)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_an_archive_that_shrinks_after_listing_fails_image_by_image(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    files = {f"a/{i}.png": png(i) for i in range(9)}
    if kind == "zip":
        offers = zip_source([zip_archive(path, files)], ANY)
    else:
        offers = tar_source([tar_archive(path, files, "w:gz" if kind == "tar.gz" else "w")], ANY)
    path.write_bytes(path.read_bytes()[: 200 if kind == "tar.gz" else 700])
    assert len(list(offers.reads(range(9)))) == 9
    assert reason_of(offers, 8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 warns of a fork beside threads
def test_forked_processes_share_no_open_zip(tmp_path: Path) -> None:
    offers = of_zip(tmp_path, {f"a/{i}.png": png(i) for i in range(60)})
    reads = list(offers.reads(range(60)))
    reads[0]()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(_number, reads, chunksize=1)
    assert found == list(range(60))


def _number(read: Any) -> int:
    return number_in(read())


def test_patterns_name_files(tmp_path: Path) -> None:
    for name in ("s-0008.tar", "s-0009.tar", "s-0010.tar", "t.zip", "odd[1].tar", "train-a.tar", "val-a.tar"):
        (tmp_path / name).touch()

    def names(pattern: str) -> list[str]:
        return [path.name for path in expand(f"{tmp_path}/{pattern}")]

    assert names("s-{0008..0010}.tar") == ["s-0008.tar", "s-0009.tar", "s-0010.tar"]
    assert names("{val,train}-*.tar") == ["val-a.tar", "train-a.tar"]
    assert names("s-00{08,{09..10}}.tar") == ["s-0008.tar", "s-0009.tar", "s-0010.tar"]
    assert names("s-*.tar") == ["s-0008.tar", "s-0009.tar", "s-0010.tar"]
    assert names("odd[1].tar") == ["odd[1].tar"]
    assert names("{t.zip,t.*}") == ["t.zip"]
    with pytest.raises(LgpError, match=r"matches nothing for .*s-0011\.tar: check the path"):
        names("s-{0008..0012}.tar")
    with pytest.raises(LgpError, match=r"none-\*\.tar matches nothing: check"):
        names("none-*.tar")
    with pytest.raises(LgpError, match="from the lower number to the higher"):
        names("s-{10..8}.tar")
    with pytest.raises(LgpError, match=r"names 10,000,000 files"):
        names("s-{1..10000000}.tar")


def test_metadata_of_parquet_labels_an_archives_images(opened: Opened) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"file_name": ["a.png", "gone.png"], "label": ["cat", "dog"]}), buffer)
    offers = opened({"d/metadata.parquet": buffer.getvalue(), "d/a.png": png(), "d/b.png": png()})
    assert dict(zip(offers.paths, offers.labels, strict=True)) == {"d/a.png": "cat", "d/b.png": None}
    assert [skip.path for skip in offers.skipped] == ["d/metadata.parquet#1"]
