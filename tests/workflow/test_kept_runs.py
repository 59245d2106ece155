"""Runs that MLflow did not take: they are kept, and sent later; runs of killed processes are closed."""

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import mlflow
import pandas as pd
import psutil
import pytest

from lgp.compute.liveness import ProcessName
from lgp.workflow.kept_runs import KEPT, kept_files, send
from lgp.workflow.mlflow_store import PROCESS, Evaluated, Store, store_uri
from lgp.workflow.tracking import Description, Tracker

ABOUT = Description("graft", "linear", {"stage": "linear"}, {"linear.knn_k": "20"}, None, "lgp", "graft / linear")
NOBODY = ProcessName(f"{ProcessName.own().text.rsplit(' ', 2)[0]} 1 12.00")  # process 1 began at another time
PREDICTIONS = pd.DataFrame({"label": [0, 1], "prediction": [0, 0]})


def fails(*_: object, **__: object) -> None:
    raise OSError("no answer")


def evaluate(root: Path) -> Tracker:
    """Track an evaluation, with a picture and predictions."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow keeps the address of the store that it opened last there
    tracker = Tracker(ABOUT, root, root / "run_id")
    tracker.will_link(Evaluated(None, "e" * 64, {"data/labels": "d" * 64}))
    tracker.log_epoch({"epoch": 1, "train/loss": 2.0})
    tracker.log_metrics({"test/top1": 50.0})
    tracker.log_confusion(PREDICTIONS, ["ant", "bee"])
    tracker.tag("trained", "true")
    file = root / ".partial.report" / "predictions.parquet"
    file.parent.mkdir()
    PREDICTIONS.to_parquet(file)
    tracker.log_figure(file)
    shutil.rmtree(file.parent)  # the output is moved to its place
    tracker.end("FINISHED")
    return tracker


def store_of(root: Path) -> Store:
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    return Store(store_uri(None, root), "lgp", root)


def runs(root: Path) -> list[mlflow.entities.Run]:
    store = store_of(root)
    return list(store.client.search_runs([store.experiment_id]))


def content(run: mlflow.entities.Run, root: Path) -> tuple[object, ...]:
    """Return what a run has, but for its id and who wrote it."""
    client = store_of(root).client
    tags = {name: value for name, value in run.data.tags.items() if name != PROCESS}
    files = sorted(file.path for file in client.list_artifacts(run.info.run_id))
    data = [(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs]
    return run.info.run_name, run.info.status, tags, run.data.params, run.data.metrics, files, data


@pytest.mark.parametrize("broken", ["start", "log", "link"])
def test_run_that_was_kept_is_sent_as_it_would_have_been_tracked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    whole, kept = tmp_path / "whole", tmp_path / "kept"
    whole.mkdir()
    kept.mkdir()
    evaluate(whole)
    with monkeypatch.context() as patch:
        patch.setattr(Store, broken, fails)
        evaluate(kept)
    assert capsys.readouterr().out.count("`lgp tracking sync` sends it from") == 1
    ((file,), _) = kept_files(kept)
    assert send(file, store_of(kept)) == "linear"
    (run,) = runs(kept)
    assert content(run, kept) == content(*runs(whole), whole)
    assert "confusion.png" in str(content(run, kept))
    assert not list((kept / KEPT).iterdir())


def test_store_that_fails_again_keeps_the_file_and_gets_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Store, "start", fails)
        evaluate(tmp_path)
    ((file,), _) = kept_files(tmp_path)
    monkeypatch.setattr(Store, "link", fails)
    with pytest.raises(OSError, match="no answer"):
        send(file, store_of(tmp_path))
    monkeypatch.undo()
    send(file, store_of(tmp_path))
    assert len(runs(tmp_path)) == 1


def test_file_of_a_running_stage_is_left_alone_and_that_of_a_killed_one_ends_as_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(Store, "start", fails)
    Tracker(ABOUT, tmp_path, tmp_path / "run_id").log_metrics({"test/top1": 50.0})
    monkeypatch.undo()
    ready, left = kept_files(tmp_path)
    assert (ready, len(left)) == ([], 1)
    assert "may still write it" in left[0]
    (file,) = (tmp_path / KEPT).glob("*.jsonl")
    file.write_text(file.read_text().replace(ProcessName.own().text, NOBODY.text) + '{"metrics": {"test/')
    assert kept_files(tmp_path) == ([file], [])
    send(file, store_of(tmp_path))
    (run,) = runs(tmp_path)
    assert (run.info.status, run.data.metrics) == ("KILLED", {"test/top1": 50.0})


@pytest.mark.parametrize(
    "text", ["", "{}\n", "not json\n", '[1]\n{"status": "FINISHED"}\n', '{"run": "x"}\n{"a": 1}\n']
)
def test_damaged_file_is_named_and_keeps_no_other_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(Store, "start", fails)
    evaluate(tmp_path)
    (tmp_path / KEPT / "a.jsonl").write_text(text)
    ready, left = kept_files(tmp_path)
    assert [file.name != "a.jsonl" for file in ready] == [True]
    assert "a.jsonl is damaged" in left[0]


def test_run_of_another_machine_is_named_and_taken_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(Store, "start", fails)
    Tracker(ABOUT, tmp_path, tmp_path / "run_id").log_metrics({"test/top1": 50.0})
    (file,) = (tmp_path / KEPT).glob("*.jsonl")
    file.write_text(file.read_text().replace(ProcessName.own().text, "elsewhere 7 12.00"))
    assert kept_files(tmp_path) == ([], [f"{file} is left: its process (elsewhere 7 12.00) may still write it"])
    assert kept_files(tmp_path, all_machines=True) == ([file], [])


@pytest.mark.parametrize("since", ["finished", "runs"])
def test_run_that_went_on_since_gets_what_is_missing_and_keeps_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, since: str
) -> None:
    """A store fails in the middle of a training, which is stopped, and goes on in the same run when it answers."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(ABOUT, tmp_path, tmp_path / "run_id")
    tracker.tag("trained", "false")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "log", fails)
        tracker.log_metrics({"train/loss": 2.0})
        tracker.end("KILLED")
    store, run_id = store_of(tmp_path), (tmp_path / "run_id").read_text().strip()
    parent = psutil.Process(os.getppid())
    writer = f"{ProcessName.own().text.rsplit(' ', 2)[0]} {parent.pid} {parent.create_time():.2f}"
    store.client.set_tag(run_id, PROCESS, writer)
    if since == "finished":
        store.client.set_terminated(run_id, "FINISHED")
    ((file,), _) = kept_files(tmp_path)
    send(file, store)
    (run,) = runs(tmp_path)
    assert run.info.status == ("FINISHED" if since == "finished" else "RUNNING")
    assert (run.data.metrics, run.data.tags[PROCESS]) == ({"train/loss": 2.0}, writer)


def test_passwords_are_neither_said_nor_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = "http://team:S3cretPw@127.0.0.1:9/"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)

    def refuse(*_: object) -> None:
        raise OSError(f"no answer from {address}")

    monkeypatch.setattr(Store, "__init__", refuse)
    about = Description("graft", "linear", {}, {}, address, "lgp", "graft / linear")
    tracker = Tracker(about, tmp_path, tmp_path / "run_id")
    tracker.log_metrics({"test/top1": 50.0})
    tracker.end("FINISHED")
    ((file,), _) = kept_files(tmp_path)
    said = capsys.readouterr().out
    assert "127.0.0.1:9" in said
    assert "S3cretPw" not in said + file.read_text()


def test_server_that_is_down_is_said_without_the_inside_of_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    Tracker(ABOUT, tmp_path, tmp_path / "run_id").log_metrics({"test/top1": 50.0})
    assert "tracking failed (the server does not answer) at http://127.0.0.1:9;" in capsys.readouterr().out


def test_disk_that_is_full_for_both_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = OSError(28, "No space left on device")

    def refuse(*_: object, **__: object) -> None:
        raise full

    monkeypatch.setattr(Store, "log", refuse)
    monkeypatch.setattr("lgp.workflow.kept_runs.KeptRun.write", refuse)
    tracker = evaluate(tmp_path)
    said = capsys.readouterr().out
    assert "or set TMPDIR to another folder" in said
    assert said.count("cannot be written either") == 1
    assert not tracker.answers


def test_picture_that_cannot_be_drawn_ends_nothing_and_tracking_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lgp.report.figures.plot_confusion", fails)
    evaluate(tmp_path)
    assert "warning: confusion.png was not drawn (OSError: no answer)" in capsys.readouterr().out
    (run,) = runs(tmp_path)
    assert (run.info.status, run.data.tags["trained"]) == ("FINISHED", "true")


def test_runs_of_processes_that_are_gone_are_closed_by_the_next_run(tmp_path: Path) -> None:
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    for process in (ProcessName.own(), NOBODY, ProcessName("elsewhere 1 12.00")):
        tracker = Tracker(ABOUT, tmp_path, tmp_path / "run_id")
        tracker.tag("trained", "true")
        run_id = (tmp_path / "run_id").read_text().strip()
        store_of(tmp_path).client.set_tag(run_id, PROCESS, process.text)
        (tmp_path / "run_id").unlink()
    Tracker(ABOUT, tmp_path, tmp_path / "run_id").log_metrics({"test/top1": 50.0})
    states = {run.data.tags[PROCESS].split()[0]: run.info.status for run in runs(tmp_path) if run.data.metrics == {}}
    assert states.pop("elsewhere") == "RUNNING"
    assert sorted(run.info.status for run in runs(tmp_path)) == ["KILLED", "RUNNING", "RUNNING", "RUNNING"]


def test_process_lives_until_it_ends() -> None:
    code = "from lgp.compute.liveness import ProcessName; print(ProcessName.own().text, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout is not None
        name = ProcessName(p.stdout.readline().strip())
        assert name.may_live()
        p.communicate("\n")
    assert not name.may_live()
    assert not NOBODY.may_live()
    assert ProcessName("no name").may_live()


def change(root: Path, statement: str) -> None:
    with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        database.execute(statement)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE experiments SET lifecycle_stage = 'deleted'", "experiments restore --experiment-id 1"),
        ("UPDATE alembic_version SET version_num = 'ffffffffffff'", "a newer MLflow than"),
        ("UPDATE alembic_version SET version_num = '451aebb31d03'", "python -m mlflow db upgrade sqlite:///"),
    ],
)
def test_store_that_cannot_be_used_as_it_is_comes_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statement: str, said: str
) -> None:
    evaluate(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    change(tmp_path, statement)
    # MLflow looks at the version of a database once in a process
    script = (
        "import sys; from pathlib import Path; from lgp.workflow.tracking import Description, Tracker\n"
        "root = Path(sys.argv[1]); about = Description('graft', 'linear', {}, {}, None, 'lgp', 'graft / linear')\n"
        "tracker = Tracker(about, root, root / 'other.run')\n"
        "tracker.log_metrics({'test/top1': 1.0}); tracker.end('FINISHED')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert said in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
