"""Every file that a stage leaves for another is damaged in four ways. Each is told in one line, or made anew."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT
from made_models import make_classifier, make_encoder
from PIL import Image

from lgp.compute import seals
from lgp.compute.intact import Damaged, record_text
from lgp.compute.seals import SEAL, check_sealed, seal
from lgp.data.labels import LabelledImages
from lgp.data.preparation import prepare
from lgp.data.storage import Images
from lgp.errors import LgpError
from lgp.evaluate.results_files import read_metrics, read_predictions, write_predictions
from lgp.features.cache import FeatureCache
from lgp.features.extraction import ALONE
from lgp.features.of_encoder import encoder_source
from lgp.models.classifier_folder import load_classifier
from lgp.models.encoder_folder import load_encoder, save_tensors
from lgp.models.files import check_trained, read_provenance, seal_arm
from lgp.models.heads_file import load_first_fc, load_heads, save_heads
from lgp.params.data import DataParams
from lgp.params.evaluate import FeatureParams
from lgp.report.outcomes import Inputs
from lgp.report.report import _draw_trainings
from lgp.workflow.stage import StageSpec, stage

T = TypeVar("T")

CPU = torch.device("cpu")
ARM, TASK = Path("models/graft"), Path("models/graft/classifiers/fewshot-1pct")
METRICS, PREDICTIONS = Path("metrics/graft-fewshot-1pct.json"), Path("predictions/graft-fewshot-1pct.parquet")
REMEDIES = {  # the command that makes a file anew, by the longest beginning of its path
    "data": "run `lgp prepare`",
    "shards": "run `lgp prepare`",
    "data/labels": "run `lgp labels`",
    "models": "run `lgp graft`",
    "models/graft/classifiers": "run `lgp fewshot graft 1pct`",
    "metrics": "run `lgp fewshot graft 1pct`",
    "predictions": "run `lgp fewshot graft 1pct`",
}
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "cut": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "replaced": lambda data: b"{}",
}


@pytest.fixture(scope="module")
def whole(prepared: LabelledImages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of small files, as the stages leave them."""
    project = tmp_path_factory.mktemp("whole")
    shutil.copytree(prepared.folder.parent, project / "data")
    make_encoder(project / ARM / "encoder", 1)
    make_classifier(project / TASK, project / ARM / "encoder")
    seal(project / TASK)
    save_heads(project / ARM, {"projector.0.weight": torch.ones(3, 16)}, "projector.0.weight")
    save_tensors({name: torch.ones(2, 1, 8, 8) for name in ("original", "masked", "painted")}, pictures(project))
    (project / ARM / "curves.csv").write_text("epoch,train/loss,train/lr\n0,2.5,0.1\n1,1.25,0.1\n")
    (project / ARM / "metrics.json").write_text(record_text({"trained": True, "encoder_parameters": 12}))
    seal_arm(project / ARM)
    for path in (METRICS, PREDICTIONS):
        (project / path).parent.mkdir()
    values = {"test/top1": 71.25, "val/top1": 70.0, "labels": 10.0, "subsets": 5.0, "encoder": "0" * 64}
    (project / METRICS).write_text(record_text(values))
    write_predictions(project / PREDICTIONS, some_predictions())
    return project


def pictures(project: Path) -> Path:
    return project / ARM / "reconstructions.safetensors"


def some_predictions() -> pd.DataFrame:
    rows = np.arange(40)
    confidence = np.linspace(0.1, 0.9, 40, dtype=np.float32)
    return pd.DataFrame(
        {"id": rows, "label": rows % 10, "prediction": rows % 7, "confidence": confidence, "subset": rows % 5}
    )


def open_data() -> None:
    data = LabelledImages(Path("data/prepared"), Path("data/labels"))
    data.open_all()
    _ = data.index, data.paths, data.parts, data.labels, data.ids("test"), data.subsets("1pct")


def open_encoder() -> None:
    check_trained(ARM / "encoder")
    load_encoder(ARM / "encoder")
    read_provenance(ARM / "encoder")


def open_heads() -> None:
    load_heads(ARM)
    load_first_fc(ARM)


def open_results() -> None:
    of = ("graft", "fewshot-1pct")
    Inputs({of: METRICS}, {of: PREDICTIONS}, {"graft": ARM}).read()
    _draw_trainings(Path(), {"graft": ARM})


OPENERS: dict[str, Callable[[], object]] = {  # as stages and tools open what begins with a path
    "": open_results,
    "data": open_data,
    f"{ARM}/encoder": open_encoder,
    f"{ARM}/encoder/{SEAL}": lambda: (open_encoder(), open_heads(), open_results()),
    f"{ARM}/heads": open_heads,
    str(TASK): lambda: load_classifier(TASK, CPU),
}


def open_file(file: str) -> None:
    """Open a file of the project in the working folder, and what is opened with it."""
    of_longest(OPENERS, file)()


def of_longest(of_start: dict[str, T], file: str) -> T:
    return of_start[max((start for start in of_start if file.startswith(start)), key=len)]


FILES = [
    *(f"data/prepared/{name}" for name in ("images.npy", "index.parquet", "meta.json", "skipped.csv", SEAL)),
    *(f"data/labels/{name}" for name in ("labels.parquet", "subsets.json", "meta.json", SEAL)),
    *(f"{ARM}/encoder/{name}" for name in ("model.safetensors", "config.json", "provenance.json", SEAL)),
    *(f"{ARM}/{name}" for name in ("heads.safetensors", "metrics.json", "curves.csv", "reconstructions.safetensors")),
    *(f"{TASK}/{name}" for name in ("model.safetensors", "config.json", "provenance.json", SEAL)),
    str(METRICS),
    str(PREDICTIONS),
]


@pytest.fixture
def project(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr("lgp.report.figures.plot_curves", lambda path, curves: None)
    monkeypatch.setattr("lgp.report.figures.plot_reconstructions", lambda path, images: None)
    shutil.copytree(whole, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def damage(file: Path, how: str) -> None:
    file.write_bytes(DAMAGES[how](file.read_bytes()))


def line_of(opening: Callable[[], object]) -> str:
    """Return the one line that opening a damaged project gives."""
    with pytest.raises(LgpError) as raised:
        opening()
    line = str(raised.value)
    assert "\n" not in line
    return line


def remedy_of(file: str) -> str:
    return of_longest(REMEDIES, file)


def test_whole_project_is_opened(project: Path) -> None:
    for opening in OPENERS.values():
        opening()
    there = {str(file.relative_to(project)) for file in project.rglob("*") if file.is_file()}
    assert there - {"data/held_out.csv"} == {*FILES, "data/prepared/source_state", "data/labels/source_state"}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_damaged_file_is_named_with_its_fault_and_the_command_that_makes_it_anew(
    project: Path, file: str, how: str
) -> None:
    if (file, how) == (str(PREDICTIONS), "flipped"):
        return  # the middle of it may be of no consequence: see the test of many flips
    damage(Path(file), how)
    line = line_of(lambda: open_file(file))
    # a seal that is flipped accuses a file near it
    assert line.startswith(str(Path(file).parents[1]) if file.endswith(SEAL) and how == "flipped" else file), line
    assert "is damaged (" in line, line
    assert f"): {remedy_of(file)}, or `dvc repro`, to make it anew" in line, line


@pytest.mark.parametrize("how", ["cut", "replaced"])
@pytest.mark.parametrize("file", [f for f in FILES if not f.endswith((SEAL, "skipped.csv", "curves.csv"))])
def test_damage_is_told_in_folders_that_older_versions_left_without_a_seal(project: Path, file: str, how: str) -> None:
    for sealed in project.rglob(SEAL):
        sealed.unlink()
    damage(Path(file), how)
    if how == "replaced" and file.endswith(("provenance.json", f"{ARM}/metrics.json")):
        return  # an arm without metrics, as an import of an early version
    if "classifiers" in file and file.endswith("provenance.json"):
        return  # a classifier is opened without it, as in a folder of the Hub
    if how == "replaced" and file.endswith("subsets.json"):
        return  # no subset is valid: it is told that there is none of the name
    line = line_of(lambda: open_file(file))
    assert "damaged" in line
    assert remedy_of(file) in line


@pytest.mark.parametrize("file", FILES)
def test_missing_file_of_a_sealed_folder_is_told(project: Path, file: str) -> None:
    Path(file).unlink()
    if file.endswith((SEAL, "provenance.json", "curves.csv", "heads.safetensors", "reconstructions.safetensors")):
        return  # a folder without a seal is an older one; an arm may lack the others
    assert " ".join(remedy_of(file).split()[1:3]).rstrip("`") in line_of(lambda: open_file(file))


@pytest.mark.parametrize("read", [Path("data/prepared"), Path("data/labels"), ARM / "heads.safetensors"])
def test_stage_refuses_a_damaged_input_before_it_works(project: Path, values: dict[str, Any], read: Path) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(values))
    damaged = read if read.suffix else next(file for file in sorted(read.iterdir()) if file.name != SEAL)
    damage(damaged, "flipped")

    def run() -> None:
        with stage(StageSpec("linear", ["seed"], [read], [Path("out.json")], "graft", "linear"), Path("params.yaml")):
            pytest.fail("it works on a damaged input")

    assert line_of(run).startswith(f"{damaged} is damaged (")
    assert not Path(".lgp").exists()


@functools.cache
def encoded_images(source: Path) -> Path:
    """Prepare images of another size than the model's, which stay encoded."""
    (source / "train").mkdir(parents=True)
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 256, (12, 9), dtype=np.uint8)
        Image.fromarray(noise).save(source / "train" / f"{number}.png")
    (source / "prepared").mkdir()
    preset = yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text())["data"]
    params = DataParams.model_validate(preset | {"source": str(source / "train")})
    prepare(params, 0, source / "prepared", source / "held_out.csv")
    return source / "prepared"


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_shard_is_told(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, how: str, sealed: bool
) -> None:
    folder = shutil.copytree(encoded_images(tmp_path_factory.getbasetemp() / "encoded"), tmp_path / "shards")
    if not sealed:
        (folder / SEAL).unlink()
    damage(folder / "images-00000.arrow", how)
    if how == "flipped" and not sealed:
        return Images(folder).open_all()
    line = line_of(lambda: Images(folder).open_all())
    assert line.startswith(f"{folder}/images-00000.arrow is damaged (")
    assert "run `lgp prepare`" in line


def some_flips(file: Path) -> list[bytes]:
    """Return the content of a file with one bit of every few bytes flipped."""
    data = file.read_bytes()
    places = range(0, len(data), max(1, len(data) // 100))
    return [data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :] for i in places]


@pytest.mark.parametrize(
    ("file", "read"),
    [(METRICS, read_metrics), (PREDICTIONS, read_predictions)],
)
def test_no_flipped_bit_of_a_result_gives_another_result(
    project: Path, file: Path, read: Callable[[Path, str], Any]
) -> None:
    expected, told, contents = read(file, ""), 0, some_flips(file)
    for content in contents:
        file.write_bytes(content)
        try:
            found = read(file, "")
        except Damaged:
            told += 1
            continue
        # a metric file whose flipped key is that of the digest reads as one of an older version, with a key too many
        assert found.equals(expected) if isinstance(found, pd.DataFrame) else expected.items() <= found.items()
    assert told > len(contents) / 4


@pytest.mark.parametrize(
    ("name", "how"),
    [*(("0.npy", how) for how in DAMAGES), ("last2.npy", "flipped"), (SEAL, "emptied"), (SEAL, "unsealed")],
)
def test_damaged_entry_of_the_feature_cache_is_extracted_anew_with_a_warning(
    tmp_path: Path, project: Path, prepared: LabelledImages, encoder_folder: Path, name: str, how: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    params = FeatureParams(blocks=2, by_depth=True)

    def features() -> list[bytes]:
        cache = FeatureCache(tmp_path / "cache", params, 1.0)
        found = cache.features(encoder_source(encoder_folder, params, ALONE), prepared)
        return [np.asarray(found.x["test"]).tobytes(), *(np.asarray(b).tobytes() for b in found.by_block["test"])]

    expected = features()
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    before = {file.name: file.read_bytes() for file in entry.iterdir()}
    assert name in before
    if how == "unsealed":
        (entry / SEAL).unlink()
    else:
        damage(entry / name, how)
    capsys.readouterr()
    assert features() == expected
    warning = capsys.readouterr().out
    assert warning.startswith("warning: ")
    assert warning.count("\n") == 1
    assert "of the cached features is damaged (" in warning
    assert {file.name: file.read_bytes() for file in entry.iterdir()} == before
    assert features() == expected
    assert capsys.readouterr().out == ""


class Digesting:
    """Counts the files that are digested."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: list[str] = []
        digest = seals.file_digest

        def counting(file: Path) -> str:
            self.files.append(file.name)
            return digest(file)

        monkeypatch.setattr(seals, "file_digest", counting)
        monkeypatch.setattr(seals, "NOTED_FROM", 10)
        monkeypatch.setattr(seals, "SETTLED_NS", 0)


@pytest.fixture
def digesting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Digesting:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / "folder").mkdir()
    Path("folder", "large").write_bytes(bytes(100))
    Path("folder", "small").write_bytes(bytes(5))
    seal(Path("folder"))
    return Digesting(monkeypatch)


def test_large_file_is_digested_once_per_content_and_a_small_one_always(digesting: Digesting) -> None:
    for _ in range(3):
        check_sealed(Path("folder"), "")
    assert sorted(digesting.files) == ["large", "small", "small", "small"]


def test_file_of_equal_size_and_time_that_changed_is_digested_again(digesting: Digesting) -> None:
    check_sealed(Path("folder"), "")
    large = Path("folder", "large")
    stat = large.stat()
    large.write_bytes(bytes(99) + b"x")
    os.utime(large, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(Damaged, match=r"large is damaged \(its bytes are not those that were written\)"):
        check_sealed(Path("folder"), "")
    large.write_bytes(bytes(100))
    check_sealed(Path("folder"), "")


def test_damaged_note_costs_a_digest_and_nothing_else(digesting: Digesting) -> None:
    check_sealed(Path("folder"), "")
    (note,) = Path(".lgp/checked").iterdir()
    note.write_bytes(b"\xff\xfe")
    check_sealed(Path("folder"), "")
    assert digesting.files.count("large") == 2
    check_sealed(Path("folder"), "")
    assert digesting.files.count("large") == 2


def test_file_that_has_just_changed_is_not_noted(digesting: Digesting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seals, "SETTLED_NS", 60 * 10**9)
    check_sealed(Path("folder"), "")
    assert not Path(".lgp").exists()


def test_seal_tells_of_a_file_beside_the_folder_only_when_asked(digesting: Digesting) -> None:
    Path("beside").write_bytes(b"abc")
    seal(Path("folder"), ["../beside"])
    assert set(json.loads(Path("folder", SEAL).read_text())) == {"large", "small", "../beside"}
    Path("beside").write_bytes(b"abd")
    check_sealed(Path("folder"), "")
    with pytest.raises(Damaged, match="beside is damaged"):
        check_sealed(Path("folder"), "", ["../beside"])
