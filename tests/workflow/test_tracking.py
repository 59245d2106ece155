"""A tracked run: it opens with the first thing logged, and began when its stage did."""

import signal
import time
from pathlib import Path

import mlflow
import pytest
import torch
from sqlalchemy import create_engine, make_url

from lgp.workflow.mlflow_store import file_of, has_store, store_uri
from lgp.workflow.tracking import Description, Tracker, tracked

ABOUT = Description("graft", "linear", {"stage": "linear"}, {"linear.knn_k": "20"}, None, "lgp", "graft / linear")


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow leaves the address of the last store in the environment."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def run_in(root: Path) -> mlflow.entities.Run:
    """Return the run whose id its stage noted."""
    # one process keeps to the store that it opened first, so other tests' runs may stand beside it
    return mlflow.MlflowClient(store_uri(None, root)).get_run((root / "run_id").read_text().strip())


def test_run_that_opens_late_began_with_its_stage(tmp_path: Path) -> None:
    before = int(time.time() * 1000)
    tracker = Tracker(ABOUT, tmp_path, tmp_path / "run_id")
    after = int(time.time() * 1000)
    time.sleep(0.05)
    tracker.log_metrics({"test/top1": 50.0})
    tracker.end("FINISHED")
    run = run_in(tmp_path)
    assert before <= run.info.start_time <= after
    assert run.data.metrics == {"test/top1": 50.0}
    assert run.data.params == ABOUT.values


def test_experiment_of_the_environment_goes_before_that_of_the_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {}
    for given in ("", "mine"):
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", given)
        tracker = Tracker(ABOUT, tmp_path, tmp_path / "run_id")
        tracker.log_metrics({"test/top1": 50.0})
        tracker.end("FINISHED")
        client = mlflow.MlflowClient(store_uri(None, tmp_path))
        names[given] = client.get_experiment(run_in(tmp_path).info.experiment_id).name
        (tmp_path / "run_id").unlink()  # the next run is another one
    assert names == {"": "lgp", "mine": "mine"}


@pytest.mark.parametrize("stopped", [ValueError, KeyboardInterrupt])
def test_stage_that_stops_before_it_logs_leaves_no_run(tmp_path: Path, stopped: type[BaseException]) -> None:
    with pytest.raises(stopped), tracked(ABOUT, tmp_path, tmp_path / "run_id"):
        raise stopped
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("stopped", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_stage_that_stops_after_an_epoch_keeps_it(tmp_path: Path, stopped: type[BaseException], status: str) -> None:
    def train() -> None:
        with tracked(ABOUT, tmp_path, tmp_path / "run_id") as tracker:
            tracker.log_epoch({"epoch": 1, "train/loss": 2.0})
            raise stopped

    with pytest.raises(stopped):
        train()
    run = run_in(tmp_path)
    assert run.info.status == status
    assert run.data.metrics == {"train/loss": 2.0}


def test_run_whose_stop_a_library_turned_into_an_error_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train() -> None:
        with tracked(ABOUT, tmp_path, tmp_path / "run_id") as tracker:
            tracker.log_epoch({"epoch": 1, "train/loss": 2.0})
            monkeypatch.setattr("lgp.compute.interruption._Unsaid.number", signal.SIGTERM)
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        train()
    assert run_in(tmp_path).info.status == "KILLED"


def test_cursor_that_a_stop_left_open_prints_no_traceback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Cursor:
        def close(self) -> None:
            raise ValueError("Cannot operate on a closed database")

    with tracked(ABOUT, tmp_path, tmp_path / "run_id") as tracker:
        tracker.log_epoch({"epoch": 1, "train/loss": 2.0})
    with create_engine("sqlite://").connect() as connection:
        connection._safe_close_cursor(Cursor())
    assert "cursor" not in caplog.text


def test_without_a_validation_image_no_reconstruction_is_drawn(tmp_path: Path) -> None:
    tracker = Tracker(ABOUT, tmp_path, tmp_path / "no.run")
    tracker.log_reconstructions(dict.fromkeys(("original", "masked", "painted"), torch.zeros(0, 1, 8, 8)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a?b", "?", "a%20b", "%3f", "q'\"q", "\udcff"])
def test_project_whose_path_no_address_holds_has_no_store_anywhere(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / name / "project"
    root.mkdir(parents=True)
    assert not has_store(None, root)
    with tracked(ABOUT, root, root / "run_id") as tracker:
        tracker.log_metrics({"test/top1": 50.0})
    (line,) = capsys.readouterr().out.splitlines()
    assert "MLflow cannot keep its store in" in line
    assert "rename the folder, or set run.tracking_uri" in line
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert not list(tmp_path.rglob("mlflow.db*"))
    assert len(list(root.glob(".lgp/tracking/*.jsonl"))) == 1


def test_store_of_an_odd_path_lies_in_its_project(tmp_path: Path) -> None:
    root = tmp_path / "50% #b 🐱"
    root.mkdir()
    with tracked(ABOUT, root, root / "run_id") as tracker:
        tracker.log_metrics({"test/top1": 50.0})
        assert tracker.answers
    assert (root / "mlflow.db").is_file()
    assert has_store(None, root)
    assert list(tmp_path.iterdir()) == [root]
    assert run_in(root).data.metrics == {"test/top1": 50.0}


@pytest.mark.parametrize("name", ["a b", "50%", "%%", "a#b", "%(here)s", "$HOME", "'q", "a\nb", "🐱"])
def test_address_leads_to_the_folder_of_the_project(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    address = store_uri(None, tmp_path / name)
    assert make_url(address).database == str(file_of(address)) == str(tmp_path / name / "mlflow.db")


def test_settings_in_an_address_belong_to_no_file() -> None:
    assert file_of("sqlite:////data/m.db?timeout=30") == Path("/data/m.db")
    assert file_of("http://localhost:5000/?a") is None
