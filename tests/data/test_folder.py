"""The walk over an image folder: what is offered is an image, or is listed with a reason."""

import os
from pathlib import Path

import pytest
from made_sources import folder, png

from lgp.data.sources.folder import folder_source
from lgp.data.sources.offers import Offers


def rows(offers: Offers) -> dict[str, tuple[str, str | None]]:
    return {p: (s, label) for p, s, label in zip(offers.paths, offers.splits, offers.labels, strict=True)}


def everything(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir() or p.is_symlink()}


def check_nothing_is_lost(offers: Offers, root: Path) -> None:
    listed = [*offers.paths, *(s.path for s in offers.skipped), *(s.path for s in offers.clutter)]
    assert len(set(listed)) == len(listed)
    assert all(any(path == one or path.startswith(f"{one}/") for one in listed) for path in everything(root))


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train", "val", "test"), ("train", "val", "test")),
        (("Training", "valid", "Testing"), ("train", "val", "test")),
        (("TRAIN", "Validation", "TEST"), ("train", "val", "test")),
        (("train", "unlabelled", "test"), ("train", "train", "test")),
    ],
)
def test_names_of_splits_are_understood_in_any_case(tmp_path: Path, names: list[str], splits: list[str]) -> None:
    for name in names:
        folder(tmp_path, {"ant": 1}, name)
    found = rows(folder_source(tmp_path))
    for name, split in zip(names, splits, strict=True):
        label = None if name == "unlabelled" else "ant"
        assert found[f"{name}/ant/0.png"] == (split, label)


def test_folders_are_classes_without_a_folder_of_a_split(tmp_path: Path) -> None:
    folder(tmp_path, {"ant": 2, "bee": 1}, ".")
    (tmp_path / "bee" / "deep").mkdir()
    (tmp_path / "bee" / "deep" / "x.PNG").write_bytes(png())
    (tmp_path / "stray.jpg").write_bytes(png())
    offers = folder_source(tmp_path)
    assert offers.classes == ["ant", "bee"]
    assert rows(offers)["bee/deep/x.PNG"] == ("train", "bee")
    assert rows(offers)["stray.jpg"] == ("train", None)


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png())
    offers = folder_source(tmp_path)
    assert offers.labels == [None] * 3
    assert offers.classes == []


def test_classes_that_are_numbers_stand_in_their_order(tmp_path: Path) -> None:
    assert folder_source(folder(tmp_path, {"10": 1, "9": 1})).classes == ["9", "10"]


def test_train_among_classes_is_a_class(tmp_path: Path) -> None:
    offers = folder_source(folder(tmp_path, {"car": 1, "bus": 1, "train": 2}, "."))
    assert offers.classes == ["bus", "car", "train"]
    assert len(offers) == 4


def test_folders_above_all_say_nothing(tmp_path: Path) -> None:
    folder(tmp_path / "photos" / "v2", {"ant": 1, "bee": 1})
    offers = folder_source(tmp_path)
    assert offers.classes == ["ant", "bee"]
    assert offers.paths[0] == "photos/v2/train/ant/0.png"


def test_images_below_a_list_of_labels_have_no_class_of_their_folder(tmp_path: Path) -> None:
    folder(tmp_path, {"2020": 2, "2021": 1}, ".")
    (tmp_path / "labels.csv").write_text("path,label\n2020/0.png,ant\n")
    offers = folder_source(tmp_path)
    assert (offers.classes, offers.labels) == (["ant"], ["ant", None, None])


def test_metadata_without_paths_labels_nothing(tmp_path: Path) -> None:
    folder(tmp_path, {"ant": 1})
    (tmp_path / "metadata.csv").write_text("lesion_id,age\nx,7\n")
    assert folder_source(tmp_path).labels == ["ant"]


def test_everything_else_is_listed(tmp_path: Path) -> None:
    folder(tmp_path, {"ant": 2})
    folder(tmp_path, {"more": 2}, "extra")
    ant = tmp_path / "train" / "ant"
    for name in ("Thumbs.db", ".DS_Store", "._0.png", "notes.txt", "labels.csv"):
        (ant / name).write_text("x")
    for name in ("@eaDir", "__MACOSX", ".cache"):
        (ant / name).mkdir()
        (ant / name / "0.png").write_bytes(png())
    (ant / "gone.png").symlink_to("nowhere")
    (ant / "self.png").symlink_to("self.png")
    os.mkfifo(ant / "pipe.png")
    offers = folder_source(tmp_path)
    assert offers.paths == ["train/ant/0.png", "train/ant/1.png"]
    reasons = {Path(s.path).name: s.reason for s in offers.skipped}
    assert reasons["gone.png"] == "a link to nothing"
    assert reasons["pipe.png"].startswith("neither a file nor a folder: a pipe")
    assert reasons["0.png"].startswith("beside folders of splits, and in none of them")
    assert {Path(s.path).name for s in offers.clutter} == {
        "Thumbs.db", ".DS_Store", "._0.png", "notes.txt", "labels.csv", "@eaDir", "__MACOSX", ".cache"
    }  # fmt: skip
    check_nothing_is_lost(offers, tmp_path)


def test_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    folder(tmp_path, {"ant": 1})
    odd = os.fsencode(tmp_path / "train" / "ant") + b"/\xff.png"
    with open(odd, "wb") as file:
        file.write(b"bytes")
    offers = folder_source(tmp_path)
    assert offers.paths[1] == "train/ant/\\xff.png"
    assert [read() for read in offers.reads([1])] == [b"bytes"]


def test_class_names_that_look_the_same_are_the_same(tmp_path: Path) -> None:
    folder(tmp_path, {"café": 1})
    folder(tmp_path, {"café": 1}, "test")
    assert folder_source(tmp_path).classes == ["café"]


def test_folder_without_permission_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, {"ant": 1, "bee": 1})
    scan = os.scandir

    def forbidden(path: Path) -> object:
        if Path(path).name == "bee":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    offers = folder_source(tmp_path)
    assert offers.skipped == [("train/bee", "a folder that cannot be read: Permission denied")]
    assert offers.paths == ["train/ant/0.png"]


def test_metadata_labels_the_images_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for i in range(3):
        (tmp_path / "train" / f"{i}.png").write_bytes(png())
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\n0.png,ant\n2.png,bee\n")
    assert folder_source(tmp_path).labels == ["ant", None, "bee"]


def test_reads_are_of_the_positions_asked_for(tmp_path: Path) -> None:
    offers = folder_source(folder(tmp_path, {"ant": 5}))
    files = [(tmp_path / path).read_bytes() for path in offers.paths]
    assert [read() for read in offers.reads([1, 3])] == [files[1], files[3]]


def test_state_changes_with_size_and_time_of_a_file(tmp_path: Path) -> None:
    folder(tmp_path, {"ant": 2})
    before = folder_source(tmp_path).states
    file = tmp_path / "train" / "ant" / "1.png"
    file.write_bytes(file.read_bytes() + b"x")
    longer = folder_source(tmp_path).states
    os.utime(file, ns=(1, 1))
    assert before[0] == longer[0]
    assert len({before[1], longer[1], folder_source(tmp_path).states[1]}) == 3


@pytest.mark.parametrize("other", ["scripts", "annotations/a.xml", "a/b/c", "hidden/.gitkeep", "table/x.parquet"])
@pytest.mark.parametrize("labels", [False, True])
def test_folder_without_images_does_not_change_what_others_say(tmp_path: Path, other: str, labels: bool) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.png").write_bytes(png())
    path = tmp_path / other
    path.parent.mkdir(exist_ok=True, parents=True)
    path.touch() if path.suffix else path.mkdir(exist_ok=True)
    if labels:
        (tmp_path / "labels.csv").write_text("path,label\ntrain/0.png,x\ntest/0.png,y\n")
    offers = folder_source(tmp_path)
    assert rows(offers) == {
        "test/0.png": ("test", "y" if labels else None),
        "train/0.png": ("train", "x" if labels else None),
    }
    assert offers.classes == (["x", "y"] if labels else [])
    check_nothing_is_lost(offers, tmp_path)


def test_folder_without_images_is_a_class_only_if_it_is_empty(tmp_path: Path) -> None:
    folder(tmp_path, {"ant": 1, "bee": 1}, ".")
    for name in ("wasp", "kept", "annotations"):
        (tmp_path / name).mkdir()
    (tmp_path / "kept" / ".gitkeep").touch()
    (tmp_path / "annotations" / "0.xml").touch()
    assert folder_source(tmp_path).classes == ["ant", "bee", "kept", "wasp"]


def test_one_folder_of_images_is_no_class_beside_an_empty_folder(tmp_path: Path) -> None:
    folder(tmp_path, {"images": 2}, ".")
    (tmp_path / "scripts").mkdir()
    assert folder_source(tmp_path).classes == []


def test_rows_of_metadata_name_images_below_its_folder_alone(tmp_path: Path) -> None:
    for name in ("train/0.png", "test/0.png", "test/train/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\ntrain/0.png,ant\n1.png,bee\n")
    offers = folder_source(tmp_path)
    assert rows(offers)["train/0.png"] == ("train", "ant")
    assert "bee" not in offers.labels
    assert [s.reason for s in offers.skipped] == ["names no image of the source"]


@pytest.mark.parametrize("name", ["t.parquet", "t.PARQUET", "t.arrow", "t.npz"])
def test_tables_and_arrays_are_no_images(tmp_path: Path, name: str) -> None:
    folder(tmp_path, {"ant": 1})
    (tmp_path / name).write_bytes(b"x")
    offers = folder_source(tmp_path)
    assert offers.paths == ["train/ant/0.png"]
    assert [s.path for s in offers.clutter] == [name]
