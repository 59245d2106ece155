"""What `lgp repro` would run, in plain words."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import merged
from dvc.repo import Repo

from lgp.errors import LgpError
from lgp.workflow.inputs import write_inputs
from lgp.workflow.pending import Pending, pending

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that DVC uses

STAGES = {
    "inputs": {"cmd": "true", "always_changed": True, "outs": ["inputs"]},
    "mim": {
        "cmd": "true",
        "deps": ["inputs/code/mim", "data/prepared"],
        "params": ["seed", "mim"],
        "outs": ["models/mim"],
    },
    "prepare": {"cmd": "true", "deps": ["inputs/images"], "outs": ["data/prepared"]},
    "linear": {"cmd": "true", "deps": ["models/mim"], "outs": ["predictions/mim-linear.parquet"]},
    "report": {"cmd": "true", "deps": ["predictions"], "outs": ["report"]},
    "cl": {"cmd": "true", "deps": ["inputs/code/cl"], "params": ["seed", "cl"], "outs": ["models/cl"]},
}
CODE = {"mim": "1", "cl": "1"}


@pytest.fixture
def project(tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which DVC believes that everything ran."""
    monkeypatch.chdir(tmp_path)
    code = dict(CODE)
    monkeypatch.setattr("lgp.workflow.inputs.code_digests", lambda _root: code)
    monkeypatch.setitem(globals(), "CODE", code)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    write_inputs(Path("inputs"), Path("params.yaml"), tmp_path)
    for name in ("models/mim", "models/cl", "data/prepared", "predictions/mim-linear.parquet", "report"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    with Repo.init(no_scm=True) as repo:
        repo.commit(force=True)
    return tmp_path


def edit(values: dict[str, Any], change: dict[str, Any]) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(merged(values, change)))


def test_nothing_changed(project: Path) -> None:
    assert pending(Path()) == Pending({}, [])


def test_each_change_is_told_in_plain_words(project: Path, values: dict[str, Any]) -> None:
    edit(values, {"mim": {"epochs": 7}})
    assert pending(Path()) == Pending({"mim": ["parameters changed: mim.epochs 2 → 7"]}, ["linear", "report"])
    edit(values, {"data": {"source": "nowhere"}})
    assert pending(Path()).changed == {"prepare": ["images of the source came, went or changed"]}
    edit(values, {})
    CODE["mim"] = "2"
    Path("predictions/mim-linear.parquet").unlink()
    before = Path("inputs/code/mim").read_bytes()
    assert pending(Path()).changed == {
        "mim": ["its code changed"],
        "linear": ["its output predictions/mim-linear.parquet is missing"],
        "report": ["predictions changed"],
    }
    assert Path("inputs/code/mim").read_bytes() == before
    CODE["mim"] = "1"
    Path("models/mim").write_text("another")
    assert pending(Path()).changed["linear"][0] == "models/mim changed"
    assert pending(Path()).changed["mim"] == ["its output models/mim is not as the stage wrote it"]


def test_what_no_arm_of_the_report_needs_is_left_out(project: Path, values: dict[str, Any]) -> None:
    edit(values, {"cl": {"epochs": 7}})
    CODE["cl"] = "2"
    Path("models/cl").unlink()
    assert pending(Path()) == Pending({}, [])


def test_a_control_that_the_report_needs_is_told(project: Path, values: dict[str, Any]) -> None:
    Path("controls").mkdir()
    joint = {"cmd": "true", "wdir": "..", "params": ["joint"], "outs": ["models/joint"]}
    of_joint = {"cmd": "true", "deps": ["models/joint"], "outs": ["predictions/joint-linear.parquet"]}
    Path("controls/dvc.yaml").write_text(yaml.safe_dump({"stages": {"joint": joint}}))
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES | {"linear_joint": of_joint}}))
    for name in ("models/joint", "predictions/joint-linear.parquet"):
        Path(name).write_text(name)
    with Repo() as repo:
        repo.commit(force=True)
    edit(values, {"joint": {"epochs": 7}})
    found = pending(Path())
    assert found.changed.keys() == {"controls/dvc.yaml:joint"}
    assert found.behind == ["linear_joint", "report"]


def test_a_pipeline_without_a_report_is_refused(project: Path) -> None:
    stages = {name: stage for name, stage in STAGES.items() if name != "report"}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    with pytest.raises(LgpError, match=r"dvc\.yaml has no stage report: copy dvc"):
        pending(Path())


def test_many_parameters_are_counted(project: Path, values: dict[str, Any]) -> None:
    changes = {"epochs": 7, "batch_size": 32, "base_lr": 1.0, "mask_ratio": 0.5, "flip_p": 0.1}
    edit(values, {"mim": changes})
    (said,) = pending(Path()).changed["mim"]
    assert said == "parameters changed: mim.base_lr 0.008 → 1.0, mim.batch_size 64 → 32, mim.epochs 2 → 7, 2 more"


def test_a_stage_that_never_ran_is_told_so(project: Path) -> None:
    Path("dvc.lock").unlink()
    assert pending(Path()).changed["mim"] == ["it has not run yet"]


def test_without_dvc_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LgpError, match=r"there is no dvc\.yaml here: `lgp init` makes a folder a project"):
        pending(Path())
    Path("dvc.yaml").write_text("stages: {}")
    with pytest.raises(LgpError, match="DVC cannot say what it would run: you are not inside of a DVC repository"):
        pending(Path())
