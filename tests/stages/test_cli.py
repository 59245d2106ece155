"""The command line, run as its users do: stages by hand in a folder of their own, and every error as one line."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import typer
import yaml
from conftest import ROOT, SMALL, merged
from safetensors.torch import load_file
from torchvision import transforms
from typer.testing import CliRunner

from cli import app
from lgp.data.labels import LabelledImages
from lgp.errors import LgpError
from lgp.evaluate.few_labels import evaluate_fewshot, evaluate_propagation
from lgp.evaluate.prediction import kept_classifiers
from lgp.evaluate.selection import selected_subsets
from lgp.features.extraction import extract, features_of
from lgp.features.of_encoder import encoder_features
from lgp.models.encoder_folder import load_encoder, normalization_of
from lgp.models.files import read_arm_metrics
from lgp.models.heads_file import load_first_fc
from lgp.models.vit import ARCHITECTURE, model_args
from lgp.params.file import Params, load_params
from lgp.params.selection import Method
from lgp.report.embedding import embedding_map
from lgp.workflow import publishing

RUNNER = CliRunner()


def lgp(*arguments: str) -> Any:
    return RUNNER.invoke(app, list(arguments))


@pytest.fixture
def project(tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with small parameters, where tracking is kept out of the way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it in the process that used it
    write(values)
    return tmp_path


def write(values: dict[str, Any]) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(values))


def error_of(result: Any) -> str:
    """Return the one line that a failing command prints."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    return lines[0]


TRAINED, BASELINES = ("mim", "cl", "graft"), ("pixels", "random")
COMMANDS = [
    ["prepare"],
    ["labels"],
    *([arm] for arm in TRAINED),
    *(["baseline", name] for name in BASELINES),
    *(["linear", arm] for arm in (*BASELINES, *TRAINED)),
    *(["fewshot", arm, share] for arm in (*BASELINES, *TRAINED) for share in ("1pct", "10pct")),
    *(["propagate", arm, share] for arm in (*BASELINES, *TRAINED) for share in ("1pct", "10pct")),
    *(["selected", arm, "1pct"] for arm in (*BASELINES, *TRAINED)),
    *(["finetune", arm, "10pct"] for arm in TRAINED),
    ["report"],
]


def labelled(folder: Path) -> LabelledImages:
    return LabelledImages(folder / "data" / "prepared", folder / "data" / "labels")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project in which every stage ran once, by hand."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("DVC_ROOT", raising=False)
        write(merged(yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text()), SMALL))
        for command in COMMANDS:
            result = lgp(*command)
            assert result.exit_code == 0, (command, result.output, result.exception)
            with (folder / "output.txt").open("a") as file:
                file.write(result.output)
        yield folder


def test_stages_by_hand_end_in_a_report(finished: Path) -> None:
    table = (finished / "reports" / "results.csv").read_text().splitlines()
    assert table[0] == "arm,task,labels,top1_mean,top1_std,subsets,top1_low,top1_high"
    assert {line.split(",")[0] for line in table[1:]} == {"pixels", "random", "mim", "cl", "graft"}
    assert len(table) == 1 + 5 * 8 + 3
    page = (finished / "reports" / "report.md").read_text()
    html = (finished / "reports" / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', html)
    pictures = (
        "label_efficiency",
        "map",
        "accuracy_by_depth",
        "accuracy_per_class",
        "reliability",
        "confusion",
        "worst_mistakes",
        "curves",
        "reconstructions",
    )
    assert html.count("data:image/png") == len(pictures) - 1  # the map is live
    for name in pictures:
        assert (finished / "reports" / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"figures/{name}.png" in page
    result = lgp("results", str(finished / "reports" / "results.csv"))
    assert result.exit_code == 0
    assert "graft" in result.output
    verdict = (finished / "reports" / "verdict.txt").read_text().splitlines()
    assert result.output.splitlines()[: len(verdict)] == verdict
    assert "Top-1 accuracy on test, % [95 % interval]" in result.output


def test_map_of_the_report_is_of_the_leaders_features(finished: Path) -> None:
    html = (finished / "reports" / "report.html").read_text()
    shown = json.loads(re.findall(r"const v = (.*?), box", html)[0])
    page = (finished / "reports" / "report.md").read_text()
    arm = re.findall(r"leader of the pictures \(.*?\) is (\w+)\.", " ".join(page.split()))[0]
    params, data = load_params(finished / "params.yaml"), labelled(finished)
    features = encoder_features(finished / "models" / arm / "encoder", data, params, torch.device("cpu"))
    predictions = pd.read_parquet(finished / "predictions" / f"{arm}-linear.parquet")
    expected = embedding_map(features, predictions, data.classes, params.seed)
    assert expected is not None
    assert shown["places"] == expected.places.round(4).tolist()
    assert shown["predictions"] == expected.predictions.tolist()


def test_selected_images_are_those_of_the_arms_features_and_are_evaluated_twice(finished: Path) -> None:
    params, data, cpu = load_params(finished / "params.yaml"), labelled(finished), torch.device("cpu")
    features = encoder_features(finished / "models/cl/encoder", data, params, cpu)
    chosen = selected_subsets(features, data.subsets("1pct"), Method.TYPICALITY, params.seed, params.fewshot)
    assert [ids.tolist() for ids in chosen] != [ids.tolist() for ids in data.subsets("1pct")]
    for task, expected in (
        ("selected-1pct", evaluate_fewshot(features, chosen, params.fewshot)),
        ("selected-1pct-propagated", evaluate_propagation(features, chosen, params.fewshot, params.propagation, cpu)),
    ):
        found = pd.read_parquet(finished / "predictions" / f"cl-{task}.parquet")
        assert found["prediction"].tolist() == expected.predictions["prediction"].tolist(), task


def test_small_validation_part_is_told_by_labels_evaluations_and_report(finished: Path) -> None:
    told = f"val has {len(labelled(finished).ids('val'))} images, so an accuracy of 50 % on it has the 95 % interval ["
    said = (finished / "output.txt").read_text().splitlines()
    assert sum(line.startswith(f"labels: warning: {told}") for line in said) == 1
    assert sum(line.startswith(f"warning: {told}") for line in said) == 5 * 7 + 3
    assert f"Warning: {told}" in (finished / "reports" / "verdict.txt").read_text()


def test_nothing_partial_and_no_resume_state_is_left(finished: Path) -> None:
    assert not list(finished.rglob(".partial.*"))
    assert not list((finished / ".lgp" / "resume").rglob("state*"))


def test_every_folder_that_passes_between_stages_is_sealed_whole(finished: Path) -> None:
    arms = [finished / "models" / arm for arm in (*TRAINED, *BASELINES)]
    classifiers = [folder for arm in arms for folder in (arm / "classifiers").iterdir()]
    for folder in [finished / "data/prepared", finished / "data/labels", *classifiers]:
        there = {file.name for file in folder.iterdir()} - {"digests.json", "source_state"}
        assert set(json.loads((folder / "digests.json").read_text())) == there, folder
    for arm in arms:
        there = {file.name for file in (arm / "encoder").iterdir()} - {"digests.json"}
        beside = {f"../{file.name}" for file in arm.iterdir() if file.is_file()}
        assert set(json.loads((arm / "encoder/digests.json").read_text())) == there | beside, arm


def test_metric_files_hold_nothing_that_changes_by_itself(finished: Path) -> None:
    metrics = json.loads((finished / "metrics" / "graft-fewshot-1pct.json").read_text())
    assert {
        "test/top1",
        "test/top1_std",
        "test/top1_low",
        "test/top1_high",
        "val/top1",
        "labels",
        "subsets",
    } <= metrics.keys()
    assert not any("time" in key or "run" in key for key in metrics)


def test_compute_of_the_graft_includes_what_it_started_from(finished: Path) -> None:
    mim, graft = (json.loads((finished / "models" / arm / "metrics.json").read_text()) for arm in ("mim", "graft"))
    assert mim["train/pflop_total"] == mim["train/pflop"] > 0
    assert graft["train/pflop_total"] == pytest.approx(graft["train/pflop"] + mim["train/pflop_total"], rel=1e-6)


def test_metrics_of_an_evaluation_name_the_encoder(finished: Path) -> None:
    found = sorted((finished / "metrics").glob("*-*.json"))
    assert len(found) == 5 * 7 + 3
    for file in found:
        weights = (finished / "models" / file.stem.partition("-")[0] / "encoder" / "model.safetensors").read_bytes()
        assert json.loads(file.read_text())["encoder"] == hashlib.sha256(weights).hexdigest(), file


def test_contrastive_arms_keep_the_first_layer_of_their_projector(finished: Path) -> None:
    for arm in ("cl", "graft"):
        heads = load_file(finished / "models" / arm / "heads.safetensors")
        first_fc = load_first_fc(finished / "models" / arm)
        assert first_fc is not None
        assert torch.equal(first_fc, heads["projector.0.weight"])
        assert first_fc.shape == (32, 16)  # (hidden, width)
    assert load_first_fc(finished / "models" / "mim") is None


def test_plain_timm_without_lgp_gives_the_same_features(finished: Path, tmp_path: Path) -> None:
    data = labelled(finished)
    encoder = finished / "models" / "graft" / "encoder"
    ids = data.ids("test")
    ours = extract(features_of(load_encoder(encoder), torch.device("cpu")), data, ids)
    np.save(tmp_path / "images.npy", data.normalize(data.whole(ids)).numpy())
    code = f"""
import sys, numpy as np, timm, torch
model = timm.create_model("local-dir:{encoder}", pretrained=True, num_classes=0).eval()
with torch.inference_mode():
    np.save("theirs.npy", model(torch.from_numpy(np.load("images.npy"))).numpy())
assert "lgp" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert np.abs(np.load(tmp_path / "theirs.npy") - ours).max() < 1e-5
    assert timm.create_model(f"local-dir:{encoder}", pretrained=True, num_classes=0).num_features == 16


def test_every_stage_has_a_run_with_the_contracts_tags(finished: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{finished / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("lgp")
    found = client.search_runs([experiment.experiment_id], max_results=100)
    runs = {f"{r.data.tags['arm']} / {r.data.tags['task']}": r for r in found}
    assert runs["graft / fewshot-1pct"].info.run_name == "graft / fewshot-1pct · seed 0"
    assert len(runs) == len(COMMANDS) + 5  # selected images are evaluated twice
    assert all(r.info.status == "FINISHED" for r in runs.values())
    graft, evaluation = runs["graft / pretrain"], runs["graft / fewshot-1pct"]
    assert graft.data.tags["upstream_run"] == runs["mim / pretrain"].info.run_id
    assert evaluation.data.tags["upstream_run"] == graft.info.run_id
    assert {"git_commit", "git_dirty", "params_digest", "data_digest", "stage"} <= evaluation.data.tags.keys()
    assert graft.data.params["graft.epochs"] == "2"
    history = client.get_metric_history(graft.info.run_id, "train/loss")
    assert [m.step for m in history] == [1, 2]
    written = json.loads((finished / "metrics" / "graft-fewshot-1pct.json").read_text())
    numbers = {name: value for name, value in written.items() if isinstance(value, int | float)}
    assert evaluation.data.metrics == pytest.approx(numbers)
    pictures = {a.path for a in client.list_artifacts(evaluation.info.run_id)}
    assert "confusion.png" in pictures


@pytest.mark.parametrize("crowned", ["graft", None])
def test_crown_of_the_report_is_the_registrys(
    finished: Path, crowned: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First an arm is crowned, then nobody is: the alias goes."""
    import mlflow

    from lgp.report import report as module

    judge = module.judge
    monkeypatch.chdir(finished)
    win = {"champion": crowned, "crown": "by a clear win"}
    monkeypatch.setattr(module, "judge", lambda *given: dataclasses.replace(judge(*given), **win))
    assert lgp("report").exit_code == 0
    client = mlflow.MlflowClient(f"sqlite:///{finished / 'mlflow.db'}")
    aliases = client.get_registered_model("lgp-encoder").aliases
    written = json.loads((finished / "reports" / "champion.json").read_text())
    if crowned is None:
        assert written == {"arm": None, "encoder_digest": None}
        assert "champion" not in aliases
    else:
        tags = client.get_model_version("lgp-encoder", str(aliases["champion"])).tags
        weights = (finished / "models" / crowned / "encoder" / "model.safetensors").read_bytes()
        assert written == {"arm": crowned, "encoder_digest": hashlib.sha256(weights).hexdigest()}
        assert tags == {**written, "champion": "by a clear win"}


def test_promotion_by_hand_moves_the_aliases_and_an_experiment_does_not(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.chdir(finished)
    client = mlflow.MlflowClient(f"sqlite:///{finished / 'mlflow.db'}")

    def arms() -> list[str]:
        versions = [client.get_model_version_by_alias(name, "champion") for name in ("lgp-encoder", "lgp-classifier")]
        return [version.tags["arm"] for version in versions]

    assert "the arm pixels is a baseline" in error_of(lgp("promote", "pixels"))
    promoted = lgp("promote", "cl")
    assert promoted.exit_code == 0, promoted.output
    assert arms() == ["cl", "cl"]
    monkeypatch.setenv("DVC_EXP_NAME", "some-trial")
    assert "an experiment moves no alias of the registry" in lgp("report").output
    assert arms() == ["cl", "cl"]


def test_registered_encoder_turns_images_into_features_without_lgp(finished: Path, tmp_path: Path) -> None:
    import mlflow

    data = labelled(finished)
    ids = data.ids("test")
    np.save(tmp_path / "images.npy", data.whole(ids).permute(0, 2, 3, 1).numpy())
    store = f"sqlite:///{finished / 'mlflow.db'}"
    (version_of,) = mlflow.MlflowClient(store).search_model_versions("name='lgp-encoder' and tag.arm='graft'")
    code = f"""
import sys
sys.path = [p for p in sys.path if p not in ("", {str(ROOT)!r})]
sys.modules["lgp"] = None
import mlflow, numpy as np
mlflow.set_tracking_uri("{store}")
model = mlflow.pyfunc.load_model("models:/lgp-encoder/{version_of.version}")
np.save("theirs.npy", model.predict(np.load("images.npy")))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    encoder = load_encoder(finished / "models" / "graft" / "encoder")
    ours = extract(features_of(encoder, torch.device("cpu")), data, ids)
    assert np.abs(np.load(tmp_path / "theirs.npy") - ours).max() < 1e-5


def test_registered_classifier_predicts_as_lgp_does_without_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From encoded images and from arrays. The arm is crowned, as by a clear win."""
    from lgp.report import report as module

    judge = module.judge
    monkeypatch.chdir(finished)
    monkeypatch.setattr(module, "judge", lambda *given: dataclasses.replace(judge(*given), champion="graft"))
    assert lgp("report").exit_code == 0
    (tmp_path / "some").mkdir()
    data = labelled(finished)
    for i in data.ids("test")[:20].tolist():
        data.open_image(i).save(tmp_path / "some" / f"{i:04}.png")
    written = lgp(
        "predict", str(tmp_path / "some"), "--out", str(tmp_path / "p.csv"), "--with", best_of(finished, "graft")
    )
    assert written.exit_code == 0, written.output
    ours = pd.read_csv(tmp_path / "p.csv").sort_values("path")
    code = f"""
import base64, glob, sys
sys.path = [p for p in sys.path if p not in ("", {str(ROOT)!r})]
sys.modules["lgp"] = None
import mlflow, numpy as np, pandas as pd
from PIL import Image
mlflow.set_tracking_uri("sqlite:///{finished / "mlflow.db"}")
model = mlflow.pyfunc.load_model("models:/lgp-classifier@champion")
files = sorted(glob.glob("some/*.png"))
texts = [base64.b64encode(open(file, "rb").read()).decode() for file in files]
one = model.predict(pd.DataFrame({{"image": texts}}))
other = model.predict(np.stack([np.asarray(Image.open(file)) for file in files]))
assert one.equals(other)
one.drop(columns="probabilities").to_csv("theirs.csv", index=False)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    theirs = pd.read_csv(tmp_path / "theirs.csv")
    assert theirs["class"].astype(str).tolist() == ours["class"].astype(str).tolist()
    assert np.abs(theirs["probability"].to_numpy() - ours["probability"].to_numpy()).max() < 1e-5


@pytest.mark.parametrize("page", ["README.md", "docs/answers.md"])
def test_code_of_the_documentation_runs_without_lgp(finished: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    monkeypatch.chdir(finished)
    data = labelled(finished)
    data.open_image(int(data.ids("test")[3])).save("photo.png")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    alone = f"import sys\nsys.path = [p for p in sys.path if p not in ('', {str(ROOT)!r})]\nsys.modules['lgp'] = None\n"
    ended = subprocess.run([sys.executable, "-c", alone + code], capture_output=True, text=True, check=True)
    if page == "docs/answers.md":
        assert lgp("predict", "photo.png", "--out", "p.csv", "--with", "graft/fewshot-10pct").exit_code == 0
        assert ended.stdout.strip() == f"['{pd.read_csv('p.csv', dtype=str)['class'][0]}']"


def test_features_of_a_folder_find_an_image_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    data = labelled(finished)
    Path("some").mkdir()
    for i in data.ids("test")[:12].tolist():
        data.open_image(i).save(f"some/{i:04}.png")
    (Path("some") / "cut.png").write_bytes(b"no image")
    written = lgp("embed", "some", "--out", "e.parquet", "--dtype", "float16")
    assert "embed: 12 images by models/graft/encoder, 1 could not be read" in written.output, written.output
    wanted = sorted(Path("some").glob("0*.png"))[4]
    found = lgp("similar", str(wanted), "--among", "e.parquet", "--count", "3").output.splitlines()
    assert len(found) == 3
    assert found[0].split() == ["1.0000", wanted.name]
    assert "give a name that ends in .parquet" in error_of(lgp("embed", "some", "--out", "e.csv"))
    assert "has no embeddings" in error_of(lgp("similar", str(wanted), "--among", "params.yaml"))
    assert "there is no encoder of arm 'other'" in error_of(lgp("embed", "some", "--arm", "other"))


def best_of(project: Path, arm: str) -> str:
    """Return the name of an arm's classifier that the report registers."""
    return next(kept.name for kept in kept_classifiers(project / "models") if kept.name.startswith(f"{arm}/"))


def test_conflict_and_cut_of_an_arm(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    assert "no reports/conflict/mim.csv: run `lgp conflict mim` first" in error_of(lgp("suggest", "mim"))
    measured = lgp("conflict", "mim")
    assert measured.exit_code == 0, measured.output
    assert (finished / "reports/conflict/mim.png").read_bytes()[:4] == b"\x89PNG"
    assert (finished / "reports/conflict/mim.csv").read_text().startswith("block,batch,cosine,mim_norm,cl_norm")
    suggested = lgp("suggest", "mim")
    assert suggested.exit_code == 0, suggested.output
    assert "the MIM of mim had 2 epochs, fewer than 1,000" in " ".join(suggested.output.split())
    assert "policy: [stage_lr], stage_lr: {base_lrs: [0.008]}}  # one rate" in suggested.output
    assert lgp("conflict", "cl").exit_code == 0
    assert "`lgp mim` did not train cl" in lgp("suggest", "cl").output


def test_exported_checkpoint_comes_in_as_an_arm_and_is_grafted_on(
    finished: Path, project: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    assert lgp("export", "mim", str(project / "mae.pth")).exit_code == 0
    monkeypatch.chdir(project)
    assert lgp("prepare").exit_code == 0
    assert lgp("labels").exit_code == 0
    assert "the arm mim is trained by `lgp mim`" in error_of(lgp("import", "mae.pth", "--arm", "mim"))
    assert "the arm pixels is a baseline: choose another name" in error_of(lgp("import", "mae.pth", "--arm", "pixels"))
    assert "no file other.pth" in error_of(lgp("import", "other.pth", "--arm", "mae"))
    imported = lgp("import", "mae.pth", "--arm", "mae")
    assert imported.exit_code == 0, imported.output
    assert "decoder_blocks.*.attn.qkv.weight" in imported.output
    told = re.findall(r"^(blocks\.\S+) +\1 +encoder \(3 tensors\)$", imported.output, re.MULTILINE)
    assert len(told) == len(set(told)) == 12  # of each block
    assert re.search(r"^decoder_pred\.bias +– +decoder$", imported.output, re.MULTILINE)
    assert normalization_of(Path("models/mae/encoder")) == normalization_of(finished / "models/mim/encoder")
    arms = {"arms": ["mae", "graft"], "finetuned_arms": ["mae", "graft"]}
    write(merged(values, {**arms, "graft": {"start": "mae", "end": "mae"}}))
    tasks = ["linear", "fewshot-1pct", "fewshot-10pct", "propagate-1pct", "propagate-10pct", "selected-1pct"]
    tasks += ["finetune-10pct"]
    evaluations = [[t.split("-")[0], arm, *t.split("-")[1:]] for arm in ("mae", "graft") for t in tasks]
    for command in [["graft"], *evaluations, ["report"]]:
        result = lgp(*command)
        assert result.exit_code == 0, (command, result.output)
    of_file, of_mim = (
        json.loads((folder / f"metrics/{arm}-linear.json").read_text())["test/top1"]
        for folder, arm in ((project, "mae"), (finished, "mim"))
    )
    assert of_file == of_mim
    rows = (project / "reports" / "results.csv").read_text()
    assert "\nmae," in rows
    assert "\ncl," not in rows


@pytest.fixture
def colour(project: Path, values: dict[str, Any]) -> Params:
    """A project of colour images whose statistics are not ImageNet's, prepared."""
    write(merged(values, {"data": {"channels": 3}}))
    assert lgp("prepare").exit_code == 0
    assert lgp("labels").exit_code == 0
    return Params.model_validate(merged(values, {"data": {"channels": 3}}))


def test_imported_encoder_sees_images_as_its_own_project_shows_them(project: Path, colour: Params) -> None:
    theirs = timm.create_model(ARCHITECTURE, num_classes=0, **model_args(colour.model, colour.data)).eval()
    torch.save({"model": theirs.state_dict()}, "mae.pth")
    imported = lgp("import", "mae.pth", "--arm", "mae")
    assert (
        "normalised by mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225], from the code of MAE" in imported.output
    )
    data = labelled(project)
    assert f"the prepared images have {data.normalization}: to graft on it, set data.mean" in imported.output
    found = encoder_features(Path("models/mae/encoder"), data, colour, torch.device("cpu")).x["test"]
    of_mae = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    preprocess = transforms.Compose([transforms.ToTensor(), of_mae])
    with torch.inference_mode():
        expected = theirs(torch.stack([preprocess(data.open_image(i)) for i in data.ids("test")])).numpy()
        ours = theirs(data.normalize(data.whole(data.ids("test")))).numpy()
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(found - ours).max() > 0.1


def test_statistics_of_an_import_are_given_or_asked_for(colour: Params) -> None:
    theirs = timm.create_model(ARCHITECTURE, num_classes=0, **model_args(colour.model, colour.data))
    torch.save(theirs.state_dict(), "timm.pth")
    assert "one value a channel, e.g. --mean" in error_of(lgp("import", "timm.pth", "--arm", "of_timm"))
    assert "are no statistics: give both" in error_of(lgp("import", "timm.pth", "--arm", "of_timm", "--mean", "0.5"))
    given = ["--mean", "0.5,0.5,0.5", "--std", "0.5,0.4,0.3"]
    assert "from the command" in lgp("import", "timm.pth", "--arm", "of_timm", *given).output
    normalization = normalization_of(Path("models/of_timm/encoder"))
    assert (normalization.mean, normalization.std) == ((0.5, 0.5, 0.5), (0.5, 0.4, 0.3))
    provenance = json.loads(Path("models/of_timm/encoder/provenance.json").read_text())
    assert provenance["normalization_from"] == "the command"


def test_import_can_write_the_dimensions_of_the_file(project: Path, colour: Params) -> None:
    theirs = timm.create_model(ARCHITECTURE, num_classes=0, **model_args(colour.model, colour.data) | {"embed_dim": 32})
    torch.save({"model": theirs.state_dict()}, "mae.pth")
    before = (project / "params.yaml").read_text()
    assert "set `model` and `data` to the file's (--write sets `model`)" in error_of(
        lgp("import", "mae.pth", "--arm", "mae")
    )
    assert (
        "nothing tells the number of attention heads of mae.pth: set `model` to patch_size 2, width 32, depth 3 and "
        "its heads (most ViTs have width / 64), and import it without --write"
    ) in error_of(lgp("import", "mae.pth", "--arm", "mae", "--write"))
    assert (project / "params.yaml").read_text() == before
    Path("config.json").write_text('{"model_args": {"num_heads": 8}}')
    result = lgp("import", "mae.pth", "--arm", "mae", "--write")
    assert result.exit_code == 0, result.output
    assert "params.yaml: model is now patch_size 2, width 32, depth 3, heads 8" in result.output
    assert load_encoder(Path("models/mae/encoder")).blocks[0].attn.num_heads == 8
    Path("config.json").unlink()
    # a name of timm goes into the section too, and comes out of it again
    write(merged(yaml.safe_load((project / "params.yaml").read_text()), {"data": {"image_size": 32}}))
    named = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    torch.save({"model": named.state_dict() | {"blocks.0.ls1.gamma": torch.ones(192)}}, "named.pth")
    assert "no plain ViT of timm" in error_of(lgp("import", "named.pth", "--arm", "named", "--write"))
    # a file whose statistics are not known is not imported, and the parameters stay
    before = (project / "params.yaml").read_text()
    (project / "plain").mkdir()
    torch.save(named.state_dict(), "plain/weights.pth")
    Path("plain/config.json").write_text('{"model_args": {"num_heads": 3}}')
    command = ["import", "plain/weights.pth", "--arm", "plain", "--write"]
    assert "--mean" in error_of(lgp(*command))
    assert (project / "params.yaml").read_text() == before


def test_plan_needs_prepared_images_or_their_number(project: Path) -> None:
    assert "no prepared images to count: say how many with --images" in error_of(lgp("plan"))
    planned = lgp("plan", "--images", "1000", "--tflops", "1", "--gpus", "3")
    assert planned.exit_code == 0, planned.output
    assert "warning: cl.batch_size 64 does not divide among 3 GPUs" in planned.output
    rows = [line for line in planned.output.splitlines() if re.match(r"│ (mim|cl|graft) ", line)]
    assert [re.split(r"\s*│\s*", row)[1] for row in rows] == ["mim", "cl", "graft"]
    assert all(re.search(r"│ +[\d.]+ (s|min|h|days) │ +[\d.]+ (s|min|h|days) │$", row) for row in rows), rows


def test_tracking_that_fails_warns_once_and_loses_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(project / "params.yaml") + "/no-store")
    result = lgp("prepare")
    assert result.exit_code == 0, result.output
    assert result.output.count("warning: MLflow tracking failed") == 1
    lines = [json.loads(line) for f in (project / ".lgp/tracking").iterdir() for line in f.read_text().splitlines()]
    assert [line["metrics"]["images/train"] for line in lines if "metrics" in line] == [
        json.loads((project / "metrics" / "prepare.json").read_text())["images/train"]
    ]


@pytest.mark.parametrize(
    ("change", "command", "message"),
    [
        ({"mim": {"epoch": 5}}, ["mim"], "unknown key 'mim.epoch': did you mean 'epochs'?"),
        ({"cl": {"base_lr": -1}}, ["cl"], "cl.base_lr: -1 is not valid"),
        ({"data": {"source": "nowhere"}}, ["prepare"], "data.source 'nowhere' does not exist"),
        ({"data": {"source": "~nobody here/x"}}, ["prepare"], "data.source '~nobody here/x' does not exist"),
        ({}, ["mim"], "mim needs data/prepared, which does not exist: run `lgp prepare`"),
        ({}, ["labels"], "labels needs data/prepared, which does not exist: run `lgp prepare`"),
        ({}, ["baseline", "noise"], "no baseline 'noise': there are pixels, random"),
        ({}, ["finetune", "mim", "1pct"], "there is no recipe finetune.1pct, only 10pct: add it"),
        ({}, ["fewshot", "mim", "1pct"], "no labels in data/labels: run `lgp labels` first"),
        ({"data": {"leaks": "report"}}, ["prepare"], "unknown key 'data.leaks': it is now labels.leaks"),
        ({}, ["preset", "use", "cifar"], "no preset 'cifar': there are"),
        ({}, ["results"], "no results in reports/results.csv"),
        ({}, ["compare", "1shot"], "no finished run of 1shot is tracked: `dvc repro` makes those of linear, fewshot-"),
    ],
)
def test_mistake_is_one_line(project: Path, values: Any, change: Any, command: list[str], message: str) -> None:
    write(merged(values, change))
    assert message in error_of(lgp(*command))


@pytest.mark.parametrize("command", ["ui", "compare"])
def test_port_is_one(project: Path, command: str) -> None:
    refused = lgp(command, "--port", "70000")
    assert refused.exit_code == 2
    assert "less than or equal to 65535" in " ".join(refused.output.replace("│", " ").split())


def test_memory_that_runs_out_is_one_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 1. TiB for an array")

    monkeypatch.setattr("lgp.data.preparation.prepare", prepare)
    assert "memory ran out (Unable to allocate 1. TiB for an array): lower" in error_of(lgp("prepare"))


def test_mistakes_found_with_the_data_at_hand(project: Path, values: dict[str, Any]) -> None:
    assert lgp("prepare").exit_code == 0
    write(merged(values, {"run": {"accumulate": {"mim": 48}}}))
    assert "mim.batch_size 64 cannot be cut into 48 equal parts" in error_of(lgp("mim"))
    write(values)
    assert "linear needs data/labels, which does not exist: run `lgp labels`" in error_of(lgp("linear", "mim"))
    assert lgp("labels").exit_code == 0

    def absent(arm: str, how: str) -> str:
        return f"there is no encoder of arm {arm!r} yet (looked in models/{arm}/encoder): {how}"

    imported = "train mim, cl, graft, joint, reverse, or run `lgp import FILE --arm grfat`"
    assert absent("grfat", imported) in error_of(lgp("linear", "grfat"))
    assert "'a-b' is no name of an arm" in error_of(lgp("linear", "a-b"))
    assert absent("graft", "run `lgp graft`") in error_of(lgp("linear", "graft"))
    assert absent("random", "run `lgp baseline random`") in error_of(lgp("linear", "random"))
    assert absent("mim", "run `lgp mim`") in error_of(lgp("graft"))
    assert "no few-label subsets '5pct': there are 10pct, 1pct" in error_of(lgp("fewshot", "mim", "5pct"))
    assert not (project / "models" / "mim").exists()


def test_batch_of_more_images_than_there_are_is_lowered_and_told(project: Path, values: dict[str, Any]) -> None:
    write(merged(values, {"mim": {"batch_size": 4096, "epochs": 2}}))
    assert lgp("prepare").exit_code == 0
    trained = lgp("mim", "--accept")
    assert trained.exit_code == 0
    assert "warning: mim.batch_size 4096 is more than the 220 images of the training part: it is 220" in trained.output


def test_full_disk_is_one_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lgp("prepare").exit_code == 0
    usage = shutil.disk_usage(project)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    assert "disk full: " in error_of(lgp("mim"))

    assert "disk full: " in error_of(lgp("prepare"))
    monkeypatch.undo()
    monkeypatch.chdir(project)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "images.arrow")

    monkeypatch.setattr("lgp.data.writing._Pieces.end", full)
    assert "disk full while writing images.arrow: free some space and run again" in error_of(lgp("prepare"))
    assert not list(project.rglob(".partial.*"))


def test_debug_shows_the_traceback(project: Path, values: dict[str, Any]) -> None:
    write(merged(values, {"data": {"source": "nowhere"}}))
    result = lgp("prepare", "--debug")
    assert type(result.exception).__name__ == "NoSource"


def test_parameters_edited_while_a_stage_runs_fail_it(
    project: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lgp.data import preparation as module

    assert lgp("prepare").exit_code == 0
    before = (project / "metrics" / "prepare.json").read_bytes()
    parts_of = module._parts

    def edited_meanwhile(*args: Any) -> np.ndarray:
        write(merged(values, {"data": {"val_share": 0.2}}))
        return parts_of(*args)

    monkeypatch.setattr(module, "_parts", edited_meanwhile)
    assert "prepare: parameters changed while it ran" in error_of(lgp("prepare"))
    assert (project / "metrics" / "prepare.json").read_bytes() == before


def test_interrupted_stage_goes_on_in_the_same_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    from lgp.training.loop import Trainer

    assert lgp("prepare").exit_code == 0
    step = Trainer._step

    def interrupted(self: Trainer, batch: Any, total: int) -> None:
        if self.now.step == 4:
            raise KeyboardInterrupt
        step(self, batch, total)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        stopped = lgp("mim")
    assert stopped.exit_code == 130
    assert "stopped by Ctrl-C: run the same command again" in stopped.output
    assert not Path("models/mim").exists()
    resumed = lgp("mim")
    assert "mim: going on from step 3" in resumed.output
    encoder = Path("models/mim/encoder/model.safetensors").read_bytes()
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("lgp").experiment_id
    (run,) = client.search_runs([experiment], "tags.stage = 'mim'")
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2]
    again = lgp("mim", "--fresh")
    assert "going on" not in again.output
    assert Path("models/mim/encoder/model.safetensors").read_bytes() == encoder


def test_a_training_shows_how_it_does_by_knn_and_with_few_labels(
    project: Path, finished: Path, values: dict[str, Any]
) -> None:
    shutil.copytree(finished / "data", project / "data")
    write(merged(values, {"run": {"online_knn": {"every_epochs": 1}}}))
    assert lgp("mim", "--accept").exit_code == 0
    run, _ = run_of("mim", project)
    measured = {"val/online_knn_top1", "val/effective_rank", "val/online_ridge_top1"}
    assert measured <= run.data.metrics.keys()


@pytest.fixture
def collapsed(project: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which a training is over and `mim` failed its checks."""
    shutil.copytree(finished / "data", project / "data")
    monkeypatch.setattr("lgp.pretrain.sanity_checks.MIN_EFFECTIVE_RANK", 1e3)
    error = error_of(lgp("mim"))
    assert error.startswith("error: mim did not train: the features collapsed: effective rank ")
    assert error.endswith(
        "(alarm below 1000.0): lower the learning rate, or raise crop_scale_min; models/mim has it with "
        "`trained: false`, take it as it is with `lgp mim --accept`, or with run.accept: [mim] for `dvc repro`"
    )
    return project


def test_refined_arm_is_the_average_and_the_last_encoder_lies_beside_it(
    project: Path, finished: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("data", "models/mim"):
        shutil.copytree(finished / part, project / part)
    write(merged(values, {"contrastive": {"objective": "refine"}}))
    trained: list[Any] = []
    publish = publishing.publish_arm
    monkeypatch.setattr(publishing, "publish_arm", lambda *args: (trained.append(args[2].model), publish(*args)))
    assert lgp("graft", "--accept").exit_code == 0
    (model,), folder = trained, project / "models/graft/encoder"
    for saved, encoder in ((folder, model.averaged_encoder), (folder / "last", model.encoder)):
        loaded = timm.create_model(f"local-dir:{saved}", pretrained=True, num_classes=0).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in encoder.state_dict().items())
    assert not torch.equal(model.encoder.cls_token, model.averaged_encoder.cls_token)
    assert not list(project.glob("mlartifacts/**/last")) + list(project.glob("mlruns/**/last"))
    features = {"features/std", "features/effective_rank"}
    of_arm, of_last = (json.loads((at / "provenance.json").read_text())["metrics"] for at in (folder, folder / "last"))
    assert of_arm.keys() - of_last.keys() == features
    (folder / "last" / "model.safetensors").write_bytes(b"")
    with pytest.raises(LgpError, match=r"`lgp graft`"):
        load_encoder(folder / "last")


def checks_of(arm: str) -> dict[str, Any]:
    provenance = json.loads(Path("models", arm, "encoder", "provenance.json").read_text())
    metrics = read_arm_metrics(Path("models", arm))
    assert provenance["metrics"] == metrics
    checks: dict[str, Any] = provenance["checks"]
    return {"trained": metrics["trained"], **checks}


def run_of(arm: str, folder: Path) -> Any:
    """Return the one tracked pre-training of an arm, and how many encoders of it are registered."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("lgp").experiment_id
    (run,) = client.search_runs([experiment], f"tags.stage = '{arm}'")
    return run, len(client.search_model_versions(f"tag.arm = '{arm}'"))


def test_training_that_fails_its_checks_is_published_as_not_trained(collapsed: Path) -> None:
    checks = checks_of("mim")
    assert (checks["trained"], checks["accepted"]) == (False, False)
    assert [fault.split(":")[0] for fault in checks["faults"]] == ["the features collapsed"]
    assert {p.name for p in Path("models/mim").iterdir()} >= {"encoder", "curves.csv", "reconstructions.safetensors"}
    run, registered = run_of("mim", collapsed)
    assert (run.info.status, run.data.tags["trained"], run.data.metrics["trained"]) == ("FAILED", "false", 0.0)
    assert not registered


def test_stages_refuse_an_arm_that_did_not_train(collapsed: Path) -> None:
    assert lgp("labels").exit_code == 0
    refused = [["graft"], ["linear", "mim"], ["fewshot", "mim", "1pct"], ["finetune", "mim", "10pct"]]
    for command in [*refused, ["conflict", "mim"], ["export", "mim", "mim.pth"]]:
        error = error_of(lgp(*command))
        assert error.startswith("error: the arm mim did not train (the features collapsed: "), command
        assert error.endswith("or take it as it is with `lgp mim --accept`"), command
    assert not Path("models/graft").exists()
    assert not Path("mim.pth").exists()


@pytest.mark.parametrize("how", ["--accept", "run.accept"])
def test_finished_training_is_accepted_without_another_step(
    how: str, collapsed: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lgp.training.loop import Trainer

    encoder = Path("models/mim/encoder/model.safetensors").read_bytes()
    monkeypatch.setattr(Trainer, "_step", lambda *_: pytest.fail("trained again"))
    assert "mim did not train" in error_of(lgp("mim"))
    if how == "run.accept":
        write(merged(values, {"run": {"accept": ["mim"]}}))
    accepted = lgp("mim", *([how] if how == "--accept" else []))
    assert accepted.exit_code == 0, accepted.output
    assert "warning: mim did not train, and is accepted: the features collapsed" in accepted.output
    assert Path("models/mim/encoder/model.safetensors").read_bytes() == encoder
    checks = checks_of("mim")
    assert (checks["trained"], checks["accepted"]) == (False, True)
    run, registered = run_of("mim", collapsed)
    assert (run.info.status, run.data.tags["trained"], registered) == ("FINISHED", "false", 1)
    assert not list(Path(".lgp/resume").rglob("state*"))


def test_accepted_arm_is_used_with_a_warning(collapsed: Path) -> None:
    assert lgp("mim", "--accept").exit_code == 0
    assert lgp("labels").exit_code == 0
    for command in [["linear", "mim"], ["export", "mim", "mim.pth"]]:
        result = lgp(*command)
        assert result.exit_code == 0, result.output
        assert result.output.count("warning: the arm mim did not train (the features collapsed: ") == 1


def test_accepting_a_training_that_passes_changes_nothing(finished: Path, project: Path) -> None:
    shutil.copytree(finished / "data", project / "data")
    assert lgp("mim", "--accept").exit_code == 0
    assert checks_of("mim") == {"trained": True, "faults": {}, "warnings": [], "accepted": False}


def test_arms_that_trained_say_so(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    for arm in TRAINED:
        checks = checks_of(arm)
        # the loss of two epochs need not fall
        assert all(re.search("the loss (hardly fell|did not fall)", warning) for warning in checks.pop("warnings"))
        assert checks == {"trained": True, "faults": {}, "accepted": False}
        assert json.loads(Path("models", arm, "metrics.json").read_text())["train/epochs"] == 2
    run, registered = run_of("mim", finished)
    assert (run.data.tags["trained"], run.data.metrics["trained"], registered) == ("true", 1.0, 1)


def test_short_training_is_a_warning(finished: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(finished / "data", project / "data")
    monkeypatch.setattr("lgp.pretrain.sanity_checks.LOW_STD", 10.0)
    result = lgp("mim")
    assert result.exit_code == 0, result.output
    assert (
        "warning: mim: too few epochs, or a learning rate that is too low or too high: the features deviate by "
        in result.output
    )
    assert checks_of("mim")["trained"]
    assert [w.split(":")[0] for w in checks_of("mim")["warnings"]] == [
        "too few epochs, or a learning rate that is too low or too high"
    ]


def test_failed_checks_do_not_hide_an_edit_of_the_parameters(
    finished: Path, project: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lgp.pretrain import sanity_checks

    shutil.copytree(finished / "data", project / "data")
    check_features = sanity_checks.check_features

    def edited_meanwhile(features: Any) -> Any:
        write(merged(values, {"mim": {"epochs": 3}}))
        return check_features(features)

    monkeypatch.setattr(sanity_checks, "MIN_EFFECTIVE_RANK", 1e3)
    monkeypatch.setattr("lgp.pretrain.arm.check_features", edited_meanwhile)
    assert "mim: parameters changed while it ran" in error_of(lgp("mim"))
    assert not Path("models/mim").exists()


def test_stages_read_only_the_sections_they_list(
    project: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a stage reads beyond the sections that DVC watches would make DVC record a lie."""
    from lgp.workflow.pipeline import SECTIONS
    from lgp.workflow.stage import StageSpec

    read: set[str] = set()
    allowed: list[set[str]] = []
    plain, created = Params.__getattribute__, StageSpec.__init__

    def watched(self: Params, name: str) -> Any:
        if name in Params.model_fields:
            read.add(name)
        return plain(self, name)

    def noted(self: StageSpec, *args: Any, **kwargs: Any) -> None:
        created(self, *args, **kwargs)
        allowed.append({section.partition(".")[0] for section in self.sections})

    monkeypatch.setattr("lgp.pretrain.batch_checks.check_arms", lambda *_: None)  # looks at all arms, decides nothing
    monkeypatch.setattr("stages.pretraining._with_ridge", lambda session, _: session)  # a curve, decides nothing
    monkeypatch.setattr(StageSpec, "__init__", noted)
    augmented = merged(values, {"linear": {"method": "augmented", "epochs": 1}})  # the other code path of `linear`
    for command in [*COMMANDS[:-1], ["joint"], ["reverse"], ["conflict", "mim"], ["report"]]:
        with monkeypatch.context() as patch:
            loaded = Params.model_validate(augmented if command == ["linear", "random"] else values)
            for module in ("lgp.workflow.stage", "lgp.params.file"):
                patch.setattr(f"{module}.load_params", lambda _, loaded=loaded: loaded)
            patch.setattr(Params, "__getattribute__", watched)
            read.clear()
            result = lgp(*command)
            assert result.exit_code == 0, (command, result.output, result.exception)
            assert read - {"run"} <= allowed[-1], command
            assert allowed[-1] == {section.partition(".")[0] for section in SECTIONS[command[0]]}, command


def test_preset_use_keeps_edits_unless_forced(project: Path, values: dict[str, Any]) -> None:
    assert "has edits that no preset holds" in error_of(lgp("preset", "use", "digits"))
    assert lgp("preset", "use", "digits", "--force").exit_code == 0
    assert Path("params.yaml").read_text() == (ROOT / "presets" / "digits.yaml").read_text()
    assert lgp("preset", "use", "cifar10-cpu").exit_code == 0
    listed = [line.split()[0] for line in lgp("preset", "list").output.splitlines()]
    assert sorted(listed) == sorted(p.stem for p in (ROOT / "presets").glob("*.yaml"))


def test_version_is_shown() -> None:
    assert lgp("--version").output == f"{version('lgp')}\n"


LISTED = [
    "prepare",
    "labels",
    "mim",
    "cl",
    "graft",
    "baseline",
    "linear",
    "fewshot",
    "finetune",
    "semi",
    "report",
    "joint",
    "reverse",
    "init",
    "repro",
    "results",
    "ui",
    "plan",
    "compare",
    "conflict",
    "suggest",
    "select",
    "audit",
    "export",
    "bench",
    "import",
    "preset",
    "data",
    "propagate",
    "selected",
    "predict",
    "embed",
    "similar",
    "promote",
    "status",
    "clean",
    "tracking",
]


def test_help_lists_every_command_with_what_it_does() -> None:
    panels = lgp("--help").output
    rows = re.findall(r"^│ ([a-z]\S*) +(\S.*?) *│$", panels, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(LISTED)
    assert set(LISTED) == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    modules = {p.stem.removesuffix("_checkpoint") for p in (ROOT / "stages").glob("*.py")}
    assert set(LISTED) <= modules


@pytest.mark.parametrize("command", LISTED)
def test_every_command_explains_itself(command: str) -> None:
    shown = lgp(command, "--help")
    assert shown.exit_code == 0
    assert f"Usage: root {command} " in shown.output


HEAVY = {"torch", "torchvision", "timm", "kornia", "mlflow", "dvc", "pandas", "sklearn", "matplotlib", "scipy"}


def imported_by(*arguments: str, folder: Path) -> tuple["subprocess.CompletedProcess[str]", set[str]]:
    """Run `lgp` in a process of its own, and return also which of `HEAVY` it imported."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["lgp", *{list(arguments)!r}]
from cli import app
try:
    app()
finally:
    print("IMPORTED", *({HEAVY!r} & sys.modules.keys()))
"""
    kept = {k: v for k, v in os.environ.items() if k not in ("DVC_ROOT", "MLFLOW_TRACKING_URI")}
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=kept, capture_output=True, text=True)
    return run, set(run.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["graft", "--help"], ["preset", "list"]])
def test_help_imports_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    run, imported = imported_by(*command, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert imported == set()


@pytest.mark.parametrize(
    ("change", "command", "message"),
    [
        ({}, ["fewshot", "mim", "5pct"], "no few-label subsets '5pct': there are 10pct, 1pct"),
        ({}, ["finetune", "mim", "5pct"], "there is no recipe finetune.5pct, only 10pct"),
        ({}, ["finetune", "pixels", "10pct"], "the arm pixels has no encoder to fine-tune: choose another arm"),
        ({}, ["linear", "grfat"], "there is no encoder of arm 'grfat' yet"),
        ({}, ["fewshot", "grfat", "1pct"], "there is no encoder of arm 'grfat' yet"),
        ({}, ["finetune", "grfat", "10pct"], "there is no encoder of arm 'grfat' yet"),
        ({}, ["conflict", "grfat"], "there is no encoder of arm 'grfat' yet"),
        ({}, ["reverse"], "there is no encoder of arm 'cl' yet"),
        ({}, ["baseline", "noise"], "no baseline 'noise'"),
        ({"mim": {"epoch": 5}}, ["mim"], "unknown key 'mim.epoch': did you mean 'epochs'?"),
        ({"finetune": {"10pct": {"epoch": 5}}}, ["report"], "unknown key 'finetune.10pct.epoch'"),
        ({"arms": ["mim", "grfat"]}, ["report"], "finetuned_arms names cl, which is not among arms"),
        (None, ["mim"], "mim needs data/prepared, which does not exist: run `lgp prepare`"),
        (None, ["labels"], "labels needs data/prepared, which does not exist"),
        (None, ["linear", "mim"], "linear needs data/prepared, which does not exist"),
        (None, ["results"], "no results in reports/results.csv"),
        (None, ["prepare", "--params", "other.yaml"], "cannot read the parameter file other.yaml"),
    ],
)
def test_usage_error_is_one_line_at_once_and_leaves_no_run(
    change: dict[str, Any] | None,
    command: list[str],
    message: str,
    finished: Path,
    project: Path,
    values: dict[str, Any],
) -> None:
    """`change` is laid over the parameters; None: and nothing is prepared."""
    write(merged(values, change or {}))
    if change is not None:
        shutil.copytree(finished / "data", project / "data")
    run, imported = imported_by(*command, folder=project)
    assert run.returncode == 1
    assert re.fullmatch(r"error: [^\n]*\n", run.stderr), run.stderr
    assert message in run.stderr
    assert imported.isdisjoint({"torch", "mlflow"})
    assert not (project / "mlflow.db").exists()
    assert not (project / ".lgp" / "tracking").exists()


@pytest.mark.parametrize(
    ("change", "command", "message"),
    [
        ({"data": {"source": "nowhere"}}, ["prepare"], "data.source 'nowhere' does not exist"),
        ({"run": {"accumulate": {"mim": 48}}}, ["mim"], "mim.batch_size 64 cannot be cut into 48 equal parts"),
        ({"data": {"image_size": 16}}, ["reverse"], "was trained with"),
        ({"labels": {"shots": [500]}}, ["labels"], "labels.shots asks for 500 images of each class"),
        (
            {},
            ["conflict", "pixels"],
            "models/pixels/encoder stands for raw pixels, which have no encoder: choose another arm",
        ),
    ],
)
def test_mistake_that_a_stage_finds_later_leaves_no_run_either(
    change: dict[str, Any], command: list[str], message: str, finished: Path, project: Path, values: dict[str, Any]
) -> None:
    write(merged(values, change))
    for name in ("data", "models"):
        shutil.copytree(finished / name, project / name)
    before = {p for p in project.rglob("*") if p.parts[len(project.parts)] in ("data", "models")}
    assert message in error_of(lgp(*command))
    assert not (project / "mlflow.db").exists()
    assert not (project / ".lgp" / "tracking").exists()
    assert {p for p in project.rglob("*") if p.parts[len(project.parts)] in ("data", "models")} == before
