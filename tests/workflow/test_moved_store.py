"""A project that is moved or copied: its store's addresses, in a real store of MLflow."""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import mlflow
import pytest

from lgp.workflow.moved_store import ADDRESSES, follow
from lgp.workflow.tracking import visitor

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


def addresses(root: Path) -> dict[str, list[str]]:
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        return {
            table: [value for (value,) in database.execute(f"SELECT {column} FROM {table} ORDER BY 1")]
            for table, column in ADDRESSES.items()
        }


def weights(folder: Path) -> Path:
    (folder / "weights").mkdir()
    (folder / "weights" / "weights.txt").write_text("some weights")
    return folder / "weights"


@pytest.fixture
def original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with a run that has an artifact, and a registered model. Its name has signs that SQL reads."""
    root = tmp_path / "it's 100_of"
    (root / "mlartifacts").mkdir(parents=True)
    uri, before = f"sqlite:///{root / 'mlflow.db'}", mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)  # a version is made of a model by this address
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("lgp", artifact_location=(root / "mlartifacts").as_uri())
    client.create_experiment("mine", artifact_location="file:///elsewhere/artifacts")
    run = client.create_run(experiment)
    client.log_text(run.info.run_id, "some text", "note.txt")
    model = client.create_logged_model(experiment, name="encoder", source_run_id=run.info.run_id)
    client.log_model_artifacts(model.model_id, str(weights(tmp_path)))
    client.create_registered_model("encoder")
    client.create_model_version("encoder", f"models:/{model.model_id}", model_id=model.model_id)
    yield root
    mlflow.set_tracking_uri(before)


def test_store_of_a_copy_leads_into_the_copy_alone(original: Path, tmp_path: Path) -> None:
    assert follow(original / "mlflow.db", original) == []
    before = addresses(original)
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    (tmp_path / "other").mkdir()
    assert follow(copy / "mlflow.db", tmp_path / "other") == []  # it may serve several projects
    assert addresses(copy) == before
    assert follow(copy / "mlflow.db", copy) == [(original / "mlartifacts").as_uri()]
    assert follow(copy / "mlflow.db", copy) == []
    assert addresses(original) == before
    found = addresses(copy)
    there, here = ((root / "mlartifacts").as_uri() for root in (original, copy))
    assert found == {table: sorted(v.replace(there, here) for v in values) for table, values in before.items()}
    assert {here, "file:///elsewhere/artifacts"} < set(found["experiments"])
    assert all(value.startswith(f"{here}/") for table in ("runs", "logged_models") for value in found[table])
    shutil.rmtree(original)
    client = mlflow.MlflowClient(f"sqlite:///{copy / 'mlflow.db'}")
    run = client.search_runs([client.get_experiment_by_name("lgp").experiment_id])[0]
    of_version = client.get_model_version_download_uri("encoder", "1")
    kept = ((run.info.artifact_uri, "note.txt", "some text"), (of_version, "weights.txt", "some weights"))
    for place, file, text in kept:
        assert place.startswith(f"{here}/")
        assert (Path(url2pathname(urlparse(place).path)) / file).read_text() == text


def test_new_store_has_nothing_to_follow(tmp_path: Path) -> None:
    assert follow(tmp_path / "mlflow.db", tmp_path) == []


def test_first_call_to_the_store_of_a_copy_follows(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    found = visitor(None, "lgp", copy).ask(lambda m: m.client.get_experiment(m.experiment_id).artifact_location)
    assert found == (copy / "mlartifacts").as_uri()
    said = f"MLflow's store came from {original / 'mlartifacts'}: its addresses are those of this folder now"
    assert said in capsys.readouterr().out
