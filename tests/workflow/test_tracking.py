"""A tracked run: it opens with the first thing logged, and began when its stage did."""

import time
from pathlib import Path

import mlflow
import pytest
import torch

from lgp.workflow.mlflow_store import store_uri
from lgp.workflow.tracking import Description, Tracker, tracked

ABOUT = Description("graft", "linear", {"stage": "linear"}, {"linear.knn_k": "20"}, None, "lgp", "graft / linear")


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


def test_without_a_validation_image_no_reconstruction_is_drawn(tmp_path: Path) -> None:
    tracker = Tracker(ABOUT, tmp_path, tmp_path / "no.run")
    tracker.log_reconstructions(dict.fromkeys(("original", "masked", "painted"), torch.zeros(0, 1, 8, 8)))
    assert not list(tmp_path.iterdir())
