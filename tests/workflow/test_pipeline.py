"""dvc.yaml: what each stage depends on, and what runs again when a key, an input or the code changes."""

import contextlib
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import networkx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, merged
from dvc.repo import Repo

from lgp.workflow.pipeline import SECTIONS

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
CONTROLS = yaml.safe_load((ROOT / "controls" / "dvc.yaml").read_text())["stages"]
STAGES = PIPELINE | CONTROLS
TRAINED, BASELINES = ("mim", "cl", "graft"), ("pixels", "random")
ARMS = (*BASELINES, *TRAINED)
CHOICES = {
    "${arms}": ARMS,
    "${finetuned_arms}": TRAINED,
    "${few_labels}": ("1pct", "10pct"),
    "${propagated}": ("1pct", "10pct"),
    "${selected}": ("1pct", "10pct"),
    "${finetuned}": ("10pct",),
    "${semi_supervised}": (),
}
DVC = [sys.executable, "-m", "dvc"]

FEW = [(task, share) for task in ("fewshot", "propagate", "selected") for share in ("-1pct", "-10pct")]
FROZEN = [f"{task}@{arm}{share}" for arm in (*ARMS, "joint", "reverse") for task, share in [("linear", ""), *FEW]]
TUNED = [f"finetune@{arm}-10pct" for arm in (*TRAINED, "joint", "reverse")]


def of_arm(*arms: str) -> set[str]:
    return {stage for stage in [*FROZEN, *TUNED] for arm in arms if stage.split("@")[1].split("-")[0] == arm}


FEWSHOT = {s for s in of_arm(*ARMS) if s.startswith("fewshot")}
PROPAGATE = {s for s in of_arm(*ARMS) if s.startswith("propagate")}
SELECTED = {s for s in of_arm(*ARMS) if s.startswith("selected")}
FINETUNE = {s for s in of_arm(*ARMS) if s.startswith("finetune")}
LINEAR = {s for s in of_arm(*ARMS) if s.startswith("linear")}
BASELINE = {f"baseline@{name}" for name in BASELINES}
EVALUATIONS = of_arm(*ARMS)
ALL = {"prepare", "labels", "report", *TRAINED, *BASELINE} | EVALUATIONS


@pytest.mark.parametrize("name", STAGES)
def test_parameters_in_dvc_are_those_that_the_stage_digests(name: str) -> None:
    listed = STAGES[name].get("params", [])
    if name in ("finetune", "semi"):
        listed = [section.removesuffix(".${item.labels}") for section in listed]
    assert tuple(listed) == SECTIONS.get(name, ())


@pytest.mark.parametrize("name", [name for name in STAGES if name != "inputs"])
def test_every_stage_depends_on_its_own_code_alone(name: str) -> None:
    assert [d for d in STAGES[name]["deps"] if d.startswith("inputs/code")] == [f"inputs/code/{name}"]


@pytest.mark.parametrize("name", ["prepare", "mim", "cl", "graft", "joint", "reverse", "baseline"])
def test_pre_training_depends_on_no_label(name: str) -> None:
    assert not [d for d in STAGES[name].get("deps", []) if "labels" in d.removeprefix(f"inputs/code/{name}")]
    assert "labels" not in STAGES[name]["params"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which DVC believes that everything ran."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("lgp", "stages", "controls", "presets"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cli.py", "dvc.yaml", "params.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, folder)
    write_images(folder)
    (folder / "official.txt").write_text("".join(f"digits/{i}\n" for i in range(30)))
    subprocess.run([*DVC, "init", "--no-scm", "--quiet"], cwd=folder, check=True)
    subprocess.run([*DVC, "config", "core.analytics", "false"], cwd=folder, check=True)
    write_params(folder, {})
    write_inputs(folder)
    for stage in PIPELINE.values():
        for item in _items(stage):
            for path in _outputs(stage):
                _pretend(folder, _filled(path, item))
    subprocess.run([*DVC, "commit", "--force", "--quiet", "dvc.yaml"], cwd=folder, check=True)
    return folder


def write_images(folder: Path, labels: Sequence[int] = (0, 1, 0, 1)) -> None:
    """Write a source of four images, which only their labels tell apart: nothing here decodes them."""
    (folder / "images").mkdir(exist_ok=True)
    images = [{"bytes": b"", "path": None} for _ in labels]
    pq.write_table(pa.table({"image": images, "label": list(labels)}), folder / "images" / "train.parquet")


def _pretend(folder: Path, path: str) -> None:
    out = folder / path
    if path == "inputs":
        return
    if out.suffix:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(str(path))
        return
    out.mkdir(parents=True, exist_ok=True)
    for dep in (_filled(d, i) for s in STAGES.values() for i in _items(s) for d in s.get("deps", [])):
        if (folder / dep).is_relative_to(out) and folder / dep != out:
            (folder / dep).parent.mkdir(parents=True, exist_ok=True)
            (folder / dep).write_text(dep)
    (out / "file").write_text(path)


def write_params(folder: Path, change: dict[str, Any]) -> None:
    values = yaml.load((ROOT / "params.yaml").read_text(), _FastLoader)
    values["data"]["source"] = "images"
    values["labels"]["lists"] = {"official": "official.txt"}
    (folder / "params.yaml").write_text("# a comment\n" + yaml.safe_dump(merged(values, change)))


def write_inputs(folder: Path) -> None:
    """Run the stage `inputs` with the folder's own code, as DVC would."""
    shutil.rmtree(folder / "inputs", ignore_errors=True)
    subprocess.run([sys.executable, "-m", "lgp.workflow.inputs"], cwd=folder, check=True)


def states(folder: Path) -> dict[str, str]:
    """Return the states of the sources that `inputs` finds."""
    write_inputs(folder)
    return {name: (folder / "inputs" / name).read_text() for name in ("images", "labels")}


def _items(stage: dict[str, Any]) -> list[dict[str, str]]:
    items: list[dict[str, str]] = [{}]
    for key, choices in stage.get("matrix", {}).items():
        values = CHOICES[choices] if isinstance(choices, str) else choices
        items = [{**item, key: choice} for item in items for choice in values]
    return items


def _filled(text: str, item: dict[str, str]) -> str:
    for key, value in item.items():
        text = text.replace("${item." + key + "}", value)
    return text.replace("${graft.start}", "mim").replace("${graft.end}", "mim")


def _outputs(stage: dict[str, Any]) -> list[str]:
    return [next(iter(o)) if isinstance(o, dict) else o for o in stage.get("outs", []) + stage.get("metrics", [])]


class _FastLoader(yaml.CSafeLoader):
    """PyYAML's reader in C, which reads 1e-05 as the number that YAML 1.2 has there."""


_FastLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9.]+e[-+]?[0-9]+$"), list("-+0123456789.")
)


def _fast_yaml(text: str, _path: str, typ: str = "safe") -> Any:
    assert typ == "safe"
    return yaml.load(text, _FastLoader) or {}


def changed(folder: Path) -> tuple[set[str], set[str]]:
    """Ask DVC what `dvc repro report` would run.

    Returns:
        The stages whose own parameters, code or inputs differ from those recorded; and with them all that read what
        these write.
    """
    write_inputs(folder)
    # in this process: a command would import DVC anew each time; and by the fast reader of YAML: DVC's own reads
    # params.yaml for each stage anew
    with warnings.catch_warnings(), contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch, Repo() as repo:
        warnings.simplefilter("ignore")
        for module in ("serialize._yaml", "strictyaml"):
            patch.setattr(f"dvc.utils.{module}.parse_yaml", _fast_yaml)
        directly = {name.split(":")[-1] for name in repo.status(targets=["report"], with_deps=True)} - {"inputs"}
        graph = repo.index.graph  # from each stage to those that it reads from
        needed = {s: {d.addressing.split(":")[-1] for d in networkx.descendants(graph, s)} for s in graph}
        report = next(s for s in graph if s.addressing == "report")
        behind = {"report", *needed[report]}
        names = {s.addressing.split(":")[-1]: deps for s, deps in needed.items()}
    return directly, directly | {name for name in behind if names[name] & directly}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, set()),
        ({"fewshot": {"c_fixed": 0.5}}, FEWSHOT | PROPAGATE | SELECTED | {"report"}),
        ({"propagation": {"gamma": 2}}, PROPAGATE | SELECTED | {"report"}),
        ({"selection": {"method": "random"}}, SELECTED | {"report"}),
        ({"propagated": ["1pct"]}, {"report"}),
        ({"selected": ["1pct"]}, {"report"}),
        ({"linear": {"knn_k": 5}}, LINEAR | {"report"}),
        ({"features": {"pool": "average"}}, FEWSHOT | PROPAGATE | SELECTED | LINEAR | {"report"}),
        ({"finetune": {"10pct": {"epochs": 7}}}, FINETUNE | {"report"}),
        ({"finetune": {"all": {"epochs": 7}}}, set()),
        ({"few_labels": ["1pct"]}, {"report"}),
        ({"finetuned": []}, {"report"}),
        ({"semi_supervised": ["10pct"]}, {"report"} | {f"semi@{arm}-10pct" for arm in TRAINED}),
        ({"semi": {"epochs": 7}}, set()),
        ({"labels": {"shots": [5]}}, {"labels", "report"} | EVALUATIONS),
        ({"labels": {"shares": {"2pct": 0.02}}}, {"labels", "report"} | EVALUATIONS),
        ({"labels": {"leaks": "drop_test"}}, {"labels", "report"} | EVALUATIONS),
        ({"graft": {"epochs": 7}}, {"graft", "report"} | of_arm("graft")),
        ({"arms": ["pixels", "cl"], "finetuned_arms": ["cl"], "graft": {"epochs": 7}}, {"report"}),  # no arm needs it
        ({"cl": {"epochs": 7}}, {"cl", "report"} | of_arm("cl")),
        ({"mim": {"epochs": 7}}, {"mim", "graft", "report"} | of_arm("mim", "graft")),
        ({"mim": {"base_lr": 1e-3}}, {"mim", "graft", "report"} | of_arm("mim", "graft")),
        ({"contrastive": {"temperature": 0.1}}, {"cl", "graft", "report"} | of_arm("cl", "graft")),
        ({"graft": {"policy": ["layer_decay"]}}, {"graft", "report"} | of_arm("graft")),
        ({"graft": {"end": "cl", "policy": ["stage_lr", "cl_end"]}}, {"graft", "report"} | of_arm("graft")),
        ({"joint": {"epochs": 7}}, set()),
        ({"arms": ["mim", "cl"], "finetuned_arms": ["mim", "cl"]}, {"report"}),
        ({"arms": [*ARMS, "joint"]}, {"joint", "report"} | {s for s in of_arm("joint") if s in FROZEN}),
        ({"arms": [*ARMS, "reverse"], "cl": {"epochs": 7}},
         {"cl", "reverse", "report"} | of_arm("cl") | {s for s in of_arm("reverse") if s in FROZEN}),
        ({"model": {"depth": 9}}, ALL - {"prepare", "labels"}),
        ({"data": {"val_share": 0.2}}, ALL),
        ({"seed": 1}, ALL),
        ({"run": {"workers": 2, "device": "cpu", "tracking_uri": "http://127.0.0.1:5000"}}, set()),
    ],
    ids=lambda value: "-".join(value) or "nothing" if isinstance(value, dict) else "",
)  # fmt: skip
def test_changed_key_runs_again_what_reads_it(finished: Path, change: dict[str, Any], expected: set[str]) -> None:
    write_params(finished, change)
    assert changed(finished)[1] == expected


@pytest.fixture
def edited(finished: Path) -> Iterator[Path]:
    """The finished project, whose files a test may edit: they are as before after it."""
    write_params(finished, {})
    kept = {path: path.read_bytes() for path in [*finished.rglob("*.py"), finished / "official.txt"]}
    yield finished
    for path, content in kept.items():
        if path.read_bytes() != content:
            path.write_bytes(content)


CONTRASTIVE = {"cl", "graft"}
TRAININGS = {"mim", "cl", "graft"} | LINEAR | FINETUNE

# (file, text, replacement, stages whose own code is another afterwards)
EDITS = {
    "a comment": ("lgp/models/mae.py", "NORM_EPS = 1e-6", "NORM_EPS = 1e-6  # a comment", set()),
    "a docstring": ("lgp/pretrain/mim.py", '"""Put MAE\'s decoder', '"""Set MAE\'s decoder', set()),
    "a module's docstring": ("lgp/models/mae.py", '"""Masked autoencoder', '"""The masked autoencoder', set()),
    "formatting": ("lgp/models/moco.py", "temperature: float", "temperature:   float", set()),
    "an annotation": ("lgp/models/mae.py", "def patchify(images: Tensor,", "def patchify(images: 'Tensor',", set()),
    "a message": ("lgp/training/loop.py", "lower the learning rate of", "reduce the learning rate of", set()),
    "what is printed": ("lgp/training/loop.py", "going on from step", "resuming at step", set()),
    "the report": ("lgp/report/page.py", 'TITLE = "Label efficiency"', 'TITLE = "Labels"', {"report"}),
    "a figure": ("lgp/report/drawing.py", "DPI = 120", "DPI = 100", {"report"}),
    "a new print": ("lgp/training/optimizer.py", "    return AdamW(", "    print(1)\n    return AdamW(", set()),
    "tracking": ("lgp/workflow/tracking.py", "FLUSH_EVERY_S = 2.0", "FLUSH_EVERY_S = 3.0", set()),
    "an evaluation key": ("lgp/params/evaluate.py", "knn_k: Count", "knn_k: Count = 20", LINEAR),
    "a few-label key": ("lgp/params/labels.py", "    leaks: ", "    more: int = 1\n    leaks: ", {"labels"}),
    "the labels": ("lgp/data/labels.py", "SHOWN_LEAKS = 100", "SHOWN_LEAKS = 50", {"labels"}),
    "labels as evaluation reads them": (
        "lgp/data/labels.py",
        "return [self.ids(\"train\")] if name == ALL_LABELS",
        "return [self.ids(\"val\")] if name == ALL_LABELS",
        LINEAR | FEWSHOT | PROPAGATE | SELECTED | FINETUNE | {"report"},
    ),
    "the sections of one stage": ("lgp/workflow/pipeline.py", '"linear": ("seed",', '"linear": ("model",', LINEAR),
    "a key of MIM": ("lgp/params/pretrain.py", "mask_ratio: OpenFraction", "mask_ratio: OpenFraction = 0.75", {"mim"}),
    "a key of run": ("lgp/params/run.py", "save_every_s: Positive = 60.0", "save_every_s: Positive = 30.0", set()),
    "the whole file's checks": ("lgp/params/file.py", "if names.count(name) > 1:", "if names.count(name) > 2:", set()),
    "the mask of MAE": ("lgp/models/mae.py", "ids_restore >= keep", "ids_restore > keep", {"mim", *CONTRASTIVE}),
    "MAE's decoder": ("lgp/models/mae.py", "decoder_norm = norm(", "decoder_norm = nn.LayerNorm(", {"mim"}),
    "the colour jitter": ("lgp/data/views.py", "BLUR_SIGMA = (0.1, 2.0)", "BLUR_SIGMA = (0.1, 1.0)", CONTRASTIVE),
    "the crops": ("lgp/data/views.py", "ASPECT = (3 / 4, 4 / 3)", "ASPECT = (1.0, 1.0)", TRAININGS),
    "the momentum": ("lgp/models/moco.py", "1 - (1 - base)", "1 - 2 * (1 - base)", CONTRASTIVE),
    "the graft's rates": ("lgp/pretrain/graft.py", "(depth + 1 - role.layer)", "(depth - role.layer)", {"graft"}),
    "the schedule": ("lgp/training/optimizer.py", "warmup_lr_init=0.0", "warmup_lr_init=0.1", TRAININGS),
    "the text of metrics": (
        "lgp/workflow/metric_files.py",
        "record_text(metrics)",
        "record_text(dict(metrics))",
        {"prepare", "labels", *TRAINED} | BASELINE | EVALUATIONS,
    ),
    "logistic regression": ("lgp/evaluate/logistic.py", "TOL = 1e-5", "TOL = 1e-4", FEWSHOT | PROPAGATE | SELECTED),
    "the split": ("lgp/data/splits.py", 'seed, "hold out", name)', 'seed, "part", name)', {"prepare"}),
    "the draw of subsets": ("lgp/data/subsets.py", 'seed, "few-label", s)', 'seed, "few", s)', {"labels"}),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_edited_code_runs_again_what_it_can_change(edited: Path, edit: str) -> None:
    name, text, replacement, expected = EDITS[edit]
    source = (edited / name).read_text()
    assert text in source
    (edited / name).write_text(source.replace(text, replacement))
    assert changed(edited)[0] == expected


def test_edited_list_runs_the_labels_again(edited: Path) -> None:
    (edited / "official.txt").write_text("".join(f"digits/{i}\n" for i in range(1, 40)))
    assert changed(edited)[1] == {"labels", "report"} | EVALUATIONS


def test_changed_label_in_a_table_runs_the_labels_again(edited: Path) -> None:
    (edited / "labels.csv").write_text("path,label\ntrain.parquet#0,0\n")
    write_params(edited, {"data": {"labels": ["labels.csv"]}})
    before = states(edited)
    (edited / "labels.csv").write_text("path,label\ntrain.parquet#0,1\n")
    after = states(edited)
    assert before["images"] == after["images"]
    assert before["labels"] != after["labels"]


def test_changed_file_of_images_prepares_them_again(edited: Path) -> None:
    """Labels lie in the same file as images here. What trains depends on the digest of the images, which stays."""
    write_images(edited, (0, 1, 1, 1))
    try:
        assert changed(edited)[0] == {"prepare", "labels"}
    finally:
        write_images(edited)


@pytest.mark.parametrize("name", [name for name in STAGES if name not in ("inputs", "prepare", "labels", "report")])
def test_training_and_evaluation_depend_on_the_digest_of_the_images(name: str) -> None:
    """So the same images from another layout, or under other names, train nothing again."""
    assert [dep for dep in STAGES[name]["deps"] if dep.startswith("data/prepared")] == ["data/prepared/meta.json"]


def test_old_images_are_never_taken_from_the_run_cache() -> None:
    """DVC restores no stage that has an output which persists. `prepare` reads the file that it writes anew."""
    assert {"held_out.csv": {"cache": False, "persist": True}} in STAGES["prepare"]["outs"]


def test_inputs_are_the_same_again(finished: Path) -> None:
    write_params(finished, {})
    write_inputs(finished)
    first = {path: path.read_bytes() for path in (finished / "inputs").rglob("*") if path.is_file()}
    (finished / ".lgp" / "code.json").unlink()  # without the cache
    write_inputs(finished)
    assert first == {path: path.read_bytes() for path in (finished / "inputs").rglob("*") if path.is_file()}
