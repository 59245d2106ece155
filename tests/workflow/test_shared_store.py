"""A store that several people share: it goes away and comes back, says who ran what, and has one champion."""

import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from made_models import make_encoder
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore

from lgp.models.files import WEIGHTS, encoder_digest
from lgp.workflow.kept_runs import AFTER_REPORT, KEPT, send
from lgp.workflow.mlflow_store import ENCODERS, Store, store_uri
from lgp.workflow.tracking import Description, Tracker, _said


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project")


@pytest.fixture
def store(root: Path) -> Store:
    return Store(store_uri(None, root), "lgp", root)


def tracker_of(root: Path, name: str, task: str = "pretrain") -> Tracker:
    about = Description("mim", task, {"stage": "mim"}, {"mim.epochs": "3"}, store_uri(None, root), "lgp", name)
    return Tracker(about, root, root / f"{name}.run")


def run_of(root: Path, store: Store, name: str) -> tuple[str, dict[str, str], list[int]]:
    """Return the status, the tags and the logged epochs of a run."""
    run = store.client.get_run((root / f"{name}.run").read_text().strip())
    history = store.client.get_metric_history(run.info.run_id, "train/loss")
    return run.info.status, run.data.tags, [point.step for point in history]


def fails(*_: object, **__: object) -> None:
    raise OSError("no answer")


def log(tracker: Tracker, *epochs: int) -> None:
    for epoch in epochs:
        tracker.log_epoch({"epoch": epoch, "train/loss": 1 / epoch})
        tracker.flush()


@pytest.mark.parametrize("task", ["pretrain", "report"])
def test_run_that_was_cut_off_is_whole_at_its_end_if_the_store_answers_again(
    root: Path, store: Store, task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOGNAME", "ann")
    tracker = tracker_of(root, f"cut off {task}", task)
    log(tracker, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "log", fails)
        log(tracker, 2, 3)
    assert list((root / KEPT).glob("*.jsonl"))
    tracker.end("FINISHED")
    status, tags, epochs = run_of(root, store, f"cut off {task}")
    assert (status, epochs, tags["mlflow.user"]) == ("FINISHED", [1, 2, 3], "ann")
    assert not list((root / KEPT).iterdir())
    warning, answer, *rest = capsys.readouterr().out.splitlines()
    assert warning.endswith("later, or this run itself if the store answers again")
    assert answer == "MLflow answers again: it has what was logged meanwhile"
    assert rest == ([AFTER_REPORT] if task == "report" else [])


def test_long_training_goes_on_in_the_store_as_soon_as_it_answers(
    root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lgp.workflow.tracking.ASK_AGAIN_S", 0.0)
    tracker = tracker_of(root, "long")
    log(tracker, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "log", fails)
        log(tracker, 2)
        assert not tracker.answers
    tracker._asked_again = time.monotonic()
    log(tracker, 3)
    assert tracker.answers
    log(tracker, 4)
    assert run_of(root, store, "long")[::2] == ("RUNNING", [1, 2, 3, 4])
    tracker.end("FINISHED")


def test_store_that_answers_slowly_is_asked_again_rarely(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = tracker_of(root, "slow")
    monkeypatch.setattr(Store, "start", fails)
    log(tracker, 1)
    times = iter([100.0, 130.0])  # an attempt of 30 seconds
    monkeypatch.setattr("lgp.workflow.tracking.time.monotonic", lambda: next(times))
    tracker._ask_again()
    assert tracker._asked_again == 130.0 + 30.0 / 0.02


@pytest.mark.parametrize(("broken", "status"), [("log", "KILLED"), ("start", "FINISHED")])
def test_who_is_stopped_or_was_never_heard_does_not_ask_again(
    root: Path, broken: str, status: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = tracker_of(root, f"{broken} broken")
    if broken == "log":
        tracker.tag("trained", "false")
    with monkeypatch.context() as patch:
        patch.setattr(Store, broken, fails)
        log(tracker, 1)
    monkeypatch.setattr(Tracker, "_ask_again", lambda _: pytest.fail("asked"))
    tracker.end(status)
    (file,) = (root / KEPT).glob("*.jsonl")
    assert f'"status": "{status}"' in file.read_text()
    assert ("or this run itself" in capsys.readouterr().out) == (broken == "log")
    file.unlink()


@pytest.mark.parametrize(
    ("code", "said"),
    [(401, "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"), (403, "docs/teams.md names the permissions")],
)
def test_refusal_of_a_server_comes_with_the_remedy(code: int, said: str) -> None:
    text = (
        f"API request to endpoint /api/2.0/mlflow/runs/create failed with error code {code} != 200. Response body: ''"
    )
    assert said in _said(mlflow.exceptions.MlflowException(text))
    assert "endpoint" not in _said(mlflow.exceptions.MlflowException(text))


def test_mlflow_prints_no_address_which_may_hold_a_password(store: Store) -> None:
    assert mlflow.environment_variables.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.get()


def test_experiment_that_another_made_at_the_same_time_is_taken(
    root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, find = [], mlflow.MlflowClient.get_experiment_by_name

    def late(client: mlflow.MlflowClient, name: str) -> Any:
        asked.append(name)
        return None if len(asked) == 1 else find(client, name)

    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", late)
    assert Store(store_uri(None, root), "lgp", root).experiment_id == store.experiment_id
    assert len(asked) == 2


def test_one_version_alone_says_that_it_is_champion_and_the_alias_is_never_gone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, name = store.client, ENCODERS.registry
    client.create_registered_model(name)
    for number in "123":
        client.create_model_version(name, f"file:///{number}")
    store.crown(ENCODERS, "1", "first")
    client.set_model_version_tag(name, "2", "champion", "of somebody who crowned at the same time")
    monkeypatch.setattr(mlflow.MlflowClient, "delete_registered_model_alias", fails)
    store.crown(ENCODERS, "3", "third")
    tags = {v.version: v.tags.get("champion") for v in client.search_model_versions(f"name='{name}'")}
    assert {str(number): why for number, why in tags.items()} == {"1": None, "2": None, "3": "third"}
    assert str(client.get_model_version_by_alias(name, "champion").version) == "3"


class Once:
    """A call that fails once as MLflow's client does for a server that is coming back, and then goes through."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.call, self.failed = getattr(owner, name), False
        patch.setattr(owner, name, lambda *a, **k: self(*a, **k))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.failed:
            return self.call(*args, **kwargs)
        self.failed = True
        raise mlflow.exceptions.MlflowException("API request to endpoint failed with error code 503 != 200")


@pytest.mark.parametrize("call", ["get_run", "update_run"])
def test_run_is_not_begun_anew_because_one_call_to_a_server_that_comes_back_failed(
    root: Path, store: Store, call: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"one {call} failed"
    tracker = tracker_of(root, name)
    log(tracker, 1)
    run_id = (root / f"{name}.run").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Store, "log", fails)
        log(tracker, 2)
    with monkeypatch.context() as patch:
        once = Once(patch, mlflow.MlflowClient, call)
        tracker._ask_again()
    assert once.failed
    assert not tracker.answers
    assert "MLflow answers again" not in capsys.readouterr().out
    tracker.end("FINISHED")
    assert (root / f"{name}.run").read_text() == run_id
    assert run_of(root, store, name)[::2] == ("FINISHED", [1, 2])


def test_kept_run_is_not_begun_anew_because_the_store_failed_once(
    root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = tracker_of(root, "sent later")
    log(tracker, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "log", fails)
        log(tracker, 2)
        tracker.end("KILLED")
    file = tracker._kept.file
    store.client.set_terminated((root / "sent later.run").read_text().strip(), "FINISHED")
    with monkeypatch.context() as patch:
        Once(patch, mlflow.MlflowClient, "get_run")
        with pytest.raises(mlflow.exceptions.MlflowException, match="503"):
            send(file, store)
    send(file, store)
    assert run_of(root, store, "sent later")[::2] == ("FINISHED", [1, 2])


def test_run_that_somebody_deleted_is_begun_anew(root: Path, store: Store) -> None:
    tracker = tracker_of(root, "deleted")
    log(tracker, 1)
    tracker.end("KILLED")
    deleted = (root / "deleted.run").read_text().strip()
    store.client.delete_run(deleted)
    tracker = tracker_of(root, "deleted")
    log(tracker, 1, 2)
    assert tracker.answers
    tracker.end("FINISHED")
    assert (root / "deleted.run").read_text().strip() != deleted
    assert run_of(root, store, "deleted")[::2] == ("FINISHED", [1, 2])
    assert not store.attach(deleted)


@pytest.mark.parametrize("back", ["while it trains", "at its end", "later"])
def test_continued_training_whose_server_was_away_at_its_start_stays_one_run(
    root: Path, store: Store, back: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"continued, back {back}"
    tracker = tracker_of(root, name)
    log(tracker, 1, 2)
    tracker.end("KILLED")
    run_id = (root / f"{name}.run").read_text()
    tracker = tracker_of(root, name)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "__init__", fails)
        log(tracker, 1, 2, 3)  # a training that continues logs its history first
    if back != "later":
        tracker._asked_again = time.monotonic()
    if back == "while it trains":
        log(tracker, 4)
    else:
        tracker.log_epoch({"epoch": 4, "train/loss": 1 / 4})
    tracker.end("FINISHED")
    if back == "later":
        assert tracker._kept.file.exists()
        send(tracker._kept.file, store)
    assert (root / f"{name}.run").read_text() == run_id
    assert run_of(root, store, name)[::2] == ("FINISHED", [1, 2, 3, 4])
    assert len(store.client.search_runs([store.experiment_id], f"attributes.run_name = '{name}'")) == 1


def test_epoch_that_a_server_took_before_it_died_counts_once(
    root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Store.log

    def die(*args: Any) -> None:
        take(*args)
        fails()

    tracker = tracker_of(root, "taken")
    log(tracker, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "log", die)
        log(tracker, 2)
    tracker.end("FINISHED")
    assert run_of(root, store, "taken")[::2] == ("FINISHED", [1, 2])


def test_empty_note_of_a_run_to_continue_is_none(root: Path) -> None:
    (root / "empty.run").write_text("\n")  # a server refuses an empty id as invalid, and not as missing
    assert tracker_of(root, "empty")._run_to_continue() is None


@pytest.mark.parametrize(
    ("channels", "owner", "call"),
    [(1, SqlAlchemyStore, "create_model_version"), (3, mlflow.MlflowClient, "log_model_artifacts")],
)
def test_encoder_whose_registration_failed_once_has_one_version_with_its_files_at_the_end(
    root: Path, store: Store, channels: int, owner: type, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_encoder(root / call / "encoder", channels)
    digest = encoder_digest(folder)
    asked = f"name='{ENCODERS.registry}' and tag.encoder_digest='{digest}'"
    tracker = tracker_of(root, call)
    tracker.will_register(folder, "mim", digest)
    with monkeypatch.context() as patch:
        once = Once(patch, owner, call)
        tracker.register()
    assert once.failed
    tracker.end("FINISHED")
    assert run_of(root, store, call)[0] == "FINISHED"
    (version,) = store.client.search_model_versions(asked)
    assert version.tags["arm"] == "mim"
    files = Path(mlflow.artifacts.download_artifacts(f"models:/{ENCODERS.registry}/{version.version}"))
    assert list(files.rglob(WEIGHTS))
    again = tracker_of(root, f"{call} again")
    again.will_register(folder, "mim", digest)
    again.register()
    again.end("FINISHED")
    assert len(store.client.search_model_versions(asked)) == 1
