"""A project of the user's own: its files, and what git leaves out."""

import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from dvc.repo import Repo

from lgp.errors import LgpError
from lgp.workflow.project import init_project

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that DVC uses

WRITTEN = {"params.yaml", "dvc.yaml", "controls/dvc.yaml", ".dvc/config", ".dvcignore", ".gitignore"}
CHECKPOINTS = ("public.pth", "other/moco.pth.tar", "clip.pt", "timm/model.safetensors")


def unknown_to_git(folder: Path) -> set[str]:
    said = subprocess.run(["git", "status", "--porcelain", "-uall"], cwd=folder, capture_output=True, check=True)
    return {line[3:] for line in said.stdout.decode().splitlines()}


def test_project_in_git_has_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    said = init_project(folder, "digits-paper", git=True)
    assert said[0] == f"{folder} is a project now, with the parameters of the preset digits-paper"
    assert "which `dvc exp` needs" in said[1]
    assert (folder / "params.yaml").read_text() == (ROOT / "presets" / "digits-paper.yaml").read_text()
    monkeypatch.chdir(folder)
    with Repo() as repo:
        assert "report" in {stage.addressing for stage in repo.index.stages}
        assert repo.config["core"]["analytics"] is False
    assert "autostage = false" in Path(".dvc/config").read_text()  # whatever the user's own configuration says
    assert unknown_to_git(folder) >= WRITTEN


def test_what_is_large_stays_out_of_git(tmp_path: Path) -> None:
    init_project(tmp_path, "digits", git=True)
    before = unknown_to_git(tmp_path)
    for name in ("models/mim/metrics.json", "data/prepared/a", ".lgp/a", "mlflow.db", *CHECKPOINTS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert unknown_to_git(tmp_path) == before
    ours, theirs = ((of / ".gitignore").read_text().splitlines() for of in (ROOT, tmp_path))
    assert {line.strip("/") for line in theirs} <= {line.strip("/") for line in ours}


def test_project_below_a_git_repository_keeps_its_ignore_file(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / ".gitignore").write_text("notes\n")
    init_project(folder, "digits", git=True)
    assert not (folder / ".git").exists()
    assert (folder / ".gitignore").read_text().startswith("notes\n# written by the pipeline")


@pytest.mark.parametrize("there", ["params.yaml", "dvc.yaml", ".dvc"])
def test_folder_with_a_project_is_refused_and_stays_as_it_is(there: str, tmp_path: Path) -> None:
    (tmp_path / there).touch()
    with pytest.raises(LgpError, match=f"has {there} already: choose an empty folder"):
        init_project(tmp_path, "digits", git=False)
    assert [file.name for file in tmp_path.iterdir()] == [there]


def test_project_without_git_says_what_does_not_work(tmp_path: Path) -> None:
    said = init_project(tmp_path / "mine", "digits", git=False)
    assert said[1] == "it is not in git: `dvc repro` works, `dvc exp` needs `lgp init --git`"
    with Repo(str(tmp_path / "mine")) as repo:
        assert repo.config["core"]["no_scm"]
