"""Evaluations in the store: whose metrics they are, how they are called, what is restored, who is champion."""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import yaml
from conftest import ROOT, SMALL, merged
from made_models import make_classifier, make_encoder

from lgp.models.files import PROVENANCE, classifier_digest, encoder_digest
from lgp.workflow.metric_files import write_metrics
from lgp.workflow.mlflow_store import CLASSIFIERS, ENVIRONMENT, has_store, store_uri
from lgp.workflow.origins import committed_values, flatten, run_name, values_behind
from lgp.workflow.pipeline import SECTIONS
from lgp.workflow.restored import KeptResult, log_restored
from lgp.workflow.stage import StageSpec, stage
from lgp.workflow.tracking import Tracker, visitor

TASK = "fewshot-1pct"
PARAMS = Path("params.yaml")


def files_of(arm: str, task: str) -> KeptResult:
    folder, name = Path("models", arm), f"{arm}-{task}"
    metrics, predictions = Path("metrics", f"{name}.json"), Path("predictions", f"{name}.parquet")
    return KeptResult(arm, task, metrics, predictions, folder / "classifiers" / task, folder / "encoder")


def make_arm(arm: str, channels: int, made_with: dict[str, Any]) -> None:
    """Write an encoder that was made with the given parameters."""
    folder = make_encoder(Path("models", arm, "encoder"), channels)
    record = {"params": made_with, "digests": {"inputs": {}}, "metrics": {}}
    (folder / PROVENANCE).write_text(json.dumps(record))


def evaluate(arm: str, task: str, top1: float) -> None:
    """Run an evaluation without any work, as `stages/evaluation.py` frames one."""
    files = files_of(arm, task)
    weights = [files.encoder / "model.safetensors", files.encoder / "config.json"]
    spec = StageSpec(
        "fewshot",
        SECTIONS["fewshot"],
        [Path("data/prepared"), Path("data/labels"), *weights],
        [files.metrics, files.predictions],
        arm,
        task,
    )
    with stage(spec, PARAMS) as run:
        run.tag_upstream(files.encoder)
        table = {"subset": [0, 0], "id": [1, 2], "label": [0, 1], "prediction": [0, 0]}
        pd.DataFrame(table).to_parquet(run.out(files.predictions))
        values = {"test/top1": top1, "labels": 10.0, "encoder": encoder_digest(files.encoder)}
        write_metrics(run, run.out(files.metrics), values)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project in git with two evaluated arms. The graft is made with another policy than the committed one."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        values = merged(yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text()), SMALL)
        PARAMS.write_text(yaml.safe_dump(values))
        person = ["-c", "user.name=a", "-c", "user.email=a@b"]
        for command in (["init", "-q"], ["add", "params.yaml"], [*person, "commit", "-q", "-m", "start"]):
            subprocess.run(["git", *command], check=True)
        for kind in ("prepared", "labels"):
            Path("data", kind).mkdir(parents=True)
            Path("data", kind, "meta.json").write_text(json.dumps({"digest": f"digest of {kind}"}))
        make_arm("graft", 1, {"seed": 7, "graft": {"policy": ["freeze"]}, "contrastive": {"objective": "vicreg"}})
        make_arm("cl", 3, {"seed": 0, "contrastive": {"objective": "mocov3"}})
        evaluate("graft", TASK, 70.0)
        evaluate("cl", TASK, 60.0)
        yield folder


@pytest.fixture
def client(project: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(store_uri(None, project))


def experiment(client: mlflow.MlflowClient) -> str:
    found = client.get_experiment_by_name("lgp")
    assert found is not None
    return str(found.experiment_id)


def run_of(client: mlflow.MlflowClient, arm: str, task: str = TASK) -> mlflow.entities.Run:
    (run,) = client.search_runs([experiment(client)], f"tags.arm = '{arm}' AND tags.task = '{task}'")
    return client.get_run(run.info.run_id)  # a search leaves out the models that a run evaluates


def model_of(client: mlflow.MlflowClient, arm: str) -> mlflow.entities.LoggedModel:
    (model,) = client.search_logged_models([experiment(client)], f"tags.arm = '{arm}'")
    return model


def test_metrics_belong_to_the_model_of_their_encoder(client: mlflow.MlflowClient) -> None:
    for arm, top1 in (("graft", 70.0), ("cl", 60.0)):
        model = model_of(client, arm)
        assert model.tags["encoder_digest"] == encoder_digest(Path("models", arm, "encoder"))
        assert {(m.key, m.value) for m in model.metrics} == {("test/top1", top1)}
        assert [m.model_id for m in run_of(client, arm).inputs.model_inputs] == [model.model_id]


def test_prepared_data_and_labels_are_the_dataset_of_the_metrics(client: mlflow.MlflowClient) -> None:
    read = {"data/labels": "digest of labels", "data/prepared": "digest of prepared"}
    digest = hashlib.sha256(json.dumps(read).encode()).hexdigest()[:8]
    for arm in ("graft", "cl"):
        (given,) = run_of(client, arm).inputs.dataset_inputs
        assert (given.dataset.name, given.dataset.digest) == (TASK, digest)
        assert json.loads(given.dataset.profile) == read
        assert {(m.dataset_name, m.dataset_digest) for m in model_of(client, arm).metrics} == {(TASK, digest)}


def test_models_are_ranked_by_the_metric_of_one_task(client: mlflow.MlflowClient) -> None:
    by = {"field_name": "metrics.test/top1", "dataset_name": TASK, "ascending": True}
    for ascending, arms in ((False, ["graft", "cl"]), (True, ["cl", "graft"])):
        ranked = client.search_logged_models([experiment(client)], order_by=[by | {"ascending": ascending}])
        assert [model.tags["arm"] for model in ranked] == arms


def test_run_is_named_by_what_differs_from_the_commit_and_by_the_encoders_seed(client: mlflow.MlflowClient) -> None:
    named = run_of(client, "graft").info.run_name
    assert named == f"graft / {TASK} · graft.policy=['freeze'], contrastive.objective=vicreg · seed 7"
    assert run_of(client, "cl").info.run_name == f"cl / {TASK} · seed 0"


def test_parameters_are_tracked_without_passwords() -> None:
    source = ["https://team:S3cretPw@host/a.tar?token=S3cretPw", "photos"]
    assert flatten({"data": {"source": source}}) == {"data.source": "['https://host/a.tar?…', 'photos']"}


def test_own_parameters_that_differ_are_named_and_long_lists_are_cut() -> None:
    committed = {"a": "1", "b": "2", "c": "3", "d": "4", "seed": "0"}
    assert run_name("cl", "linear", {"a": "1", "b": "5"}, committed) == "cl / linear · b=5"
    changed = dict.fromkeys("abcd", "x" * 50)
    shown = ", ".join(f"{key}={'x' * 39}…" for key in "abc")
    assert run_name("cl", "linear", changed, committed) == f"cl / linear · {shown}, 1 more"
    assert run_name("cl", "linear", changed | {"seed": "3"}, {}) == "cl / linear · seed 3"


def test_parameters_of_the_start_are_behind_an_encoder_and_a_copy_of_itself_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    starts = {"graft": ["mim"], "mim": ["mim", "gone"]}
    of_arm = {"graft": {"seed": 2, "graft": {"start": "mim"}}, "mim": {"seed": 1, "mim": {"epochs": 9}}}
    for arm, names in starts.items():
        Path("models", arm, "encoder").mkdir(parents=True)
        inputs = dict.fromkeys([f"models/{name}/encoder/model.safetensors" for name in names], "a digest")
        record = {"params": of_arm[arm], "digests": {"inputs": inputs | {"data/prepared": "another"}}}
        Path("models", arm, "encoder", PROVENANCE).write_text(json.dumps(record))
    behind = values_behind(Path("models/graft/encoder"))
    assert behind == {"seed": "2", "graft.start": "mim", "mim.epochs": "9"}


def test_parameters_without_a_commit_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    assert committed_values(tmp_path / "params.yaml") == {}


def test_evaluation_says_policy_objective_seed_and_digest_of_its_encoder(client: mlflow.MlflowClient) -> None:
    params = run_of(client, "graft").data.params
    assert params["encoder.policy"] == "['freeze']"
    assert (params["encoder.objective"], params["encoder.seed"]) == ("vicreg", "7")
    assert params["encoder.digest"] == encoder_digest(Path("models/graft/encoder"))
    assert params["fewshot.folds"] == "5"


def test_result_without_a_run_is_restored_once(project: Path, client: mlflow.MlflowClient) -> None:
    files = files_of("cl", "linear")
    values = {"test/top1": 88.0, "labels": 300.0, "encoder": encoder_digest(files.encoder)}
    files.metrics.write_text(json.dumps(values))
    files.classifier.mkdir(parents=True)
    inputs = {"data/prepared": "digest of prepared", "models/cl/encoder/model.safetensors": values["encoder"]}
    record = {"params": {"linear": {"epochs": 10}}, "metrics": values, "commit": "abc", "digests": {"inputs": inputs}}
    (files.classifier / PROVENANCE).write_text(json.dumps(record))
    everything = [files, files_of("cl", TASK), files_of("graft", TASK), files_of("mim", TASK)]
    assert [log_restored(everything, visitor(None, "lgp", project), PARAMS) for _ in range(2)] == [1, 0]
    run = run_of(client, "cl", "linear")
    assert run.info.run_name == "cl / linear · seed 0 (restored)"
    assert (run.data.tags["restored"], run.data.tags["git_commit"], run.info.status) == ("true", "abc", "FINISHED")
    assert run.data.tags["result_digest"] == hashlib.sha256(files.metrics.read_bytes()).hexdigest()
    assert (run.data.params["linear.epochs"], run.data.params["encoder.objective"]) == ("10", "mocov3")
    assert run.data.metrics == {"test/top1": 88.0, "labels": 300.0}
    assert {m.value for m in model_of(client, "cl").metrics if m.dataset_name == "linear"} == {88.0}


def test_restored_result_of_an_encoder_that_is_gone_has_no_model(project: Path, client: mlflow.MlflowClient) -> None:
    files = files_of("graft", "linear")
    files.metrics.write_text(json.dumps({"test/top1": 1.0, "labels": 1.0, "encoder": "of another encoder"}))
    assert log_restored([files], visitor(None, "lgp", project), PARAMS) == 1
    run = run_of(client, "graft", "linear")
    assert run.data.params["encoder.digest"] == "of another encoder"
    assert not run.inputs.model_inputs
    assert not run.inputs.dataset_inputs
    assert all(m.value != 1.0 for m in model_of(client, "graft").metrics)


def test_original_and_restored_run_have_the_same_digest(client: mlflow.MlflowClient) -> None:
    digest = hashlib.sha256(files_of("graft", TASK).metrics.read_bytes()).hexdigest()
    assert run_of(client, "graft").data.tags["result_digest"] == digest


def test_predictions_of_a_run_are_read_back(project: Path, client: mlflow.MlflowClient) -> None:
    store = visitor(None, "lgp", project)
    found = store.ask(lambda m: m.results(f"tags.task = '{TASK}' AND tags.arm = 'cl'"))
    assert found is not None
    table = store.predictions_of(found[0])
    assert table is not None
    assert table.equals(pd.read_parquet(files_of("cl", TASK).predictions))


def test_champion_says_why_and_a_former_one_does_not(project: Path, client: mlflow.MlflowClient) -> None:
    store = Tracker(visitor(None, "lgp", project).description, project, project / ".lgp" / "crown.run")
    for arm in ("cl", "graft"):
        folder = Path("models", arm, "encoder")
        store.set_champions(folder, arm, encoder_digest(folder), None, f"{arm} is ahead")
    store.end("FINISHED")
    version = client.get_model_version_by_alias("lgp-encoder", "champion")
    assert (version.tags["arm"], version.tags["champion"]) == ("graft", "graft is ahead")
    assert version.source == f"models:/{model_of(client, 'graft').model_id}"
    (former,) = client.search_model_versions("name = 'lgp-encoder' AND tag.arm = 'cl'")
    assert "champion" not in former.tags


def test_champion_classifier_is_the_projects_own_or_else_the_registrys_copy(project: Path) -> None:
    store = visitor(None, "lgp", project)
    assert store.champion_classifier(Path("models")) is None
    folder = make_classifier(Path("models/cl/classifiers") / TASK, Path("models/cl/encoder"))
    digest = classifier_digest(folder)
    crowning = Tracker(store.description, project, project / ".lgp" / "crown.run")
    crowning.set_champion_classifier(folder, "cl", digest, "best")
    crowning.end("FINISHED")
    assert store.champion_classifier(Path("models")) == folder
    config = folder / "config.json"
    config.write_text(config.read_text().replace("ant", "emmet"))  # a class is renamed
    copy = store.champion_classifier(Path("models"))
    assert copy is not None
    assert copy != folder
    assert classifier_digest(copy) == digest
    assert (copy / "config.json").exists()


def test_store_that_fails_ends_no_evaluation(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("lgp.workflow.tracking.Store.link", failing)
    evaluate("cl", "fewshot-10pct", 80.0)
    assert capsys.readouterr().out.count("MLflow tracking failed (OSError: no space)") == 1
    assert json.loads(files_of("cl", "fewshot-10pct").metrics.read_text())["test/top1"] == 80.0


def test_settings_of_mlflow_exist_in_the_installed_version() -> None:
    from mlflow import environment_variables

    assert all(hasattr(environment_variables, name) for name in ENVIRONMENT if name != "MLFLOW_LOGGING_LEVEL")
    assert CLASSIFIERS.registry == "lgp-classifier"


def test_project_without_runs_has_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow itself sets it in this process
    assert not has_store(None, tmp_path)
    assert has_store("http://127.0.0.1:5000", tmp_path)
