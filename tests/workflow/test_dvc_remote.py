"""A DVC remote on S3: a fresh clone that pulls has nothing to run."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from dvc.repo import Repo

moto_server = pytest.importorskip("moto.server", reason="an S3 server for tests: pip install 'moto[server]'")
pytest.importorskip("dvc_s3", reason="DVC's remotes on S3: pip install dvc-s3")

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries that DVC and the server use

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
STAGES = {name: PIPELINE[name] | {"cmd": "false"} for name in ("prepare", "labels", "mim")}  # a stage that runs fails
INPUTS = PIPELINE["inputs"] | {"cmd": f"{sys.executable} -m lgp.workflow.inputs"}
PERSON = ["-c", "user.name=a", "-c", "user.email=a@b"]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server with a bucket; yields its address."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    import boto3

    boto3.client("s3", endpoint_url=address, region_name="us-east-1").create_bucket(Bucket="lgp")
    yield address
    server.stop()


def git(*command: str) -> None:
    subprocess.run(["git", *PERSON, *command], check=True, capture_output=True)


def write_outputs(stage: dict[str, Any]) -> None:
    for out in stage.get("outs", []) + stage.get("metrics", []):
        path = Path(next(iter(out)) if isinstance(out, dict) else out)
        if not path.suffix:
            path = path / "meta.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{path}\n")


def test_fresh_clone_that_pulls_runs_the_stage_inputs_alone(
    tmp_path: Path, bucket: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    with contextlib.chdir(first):
        Path("params.yaml").write_text(yaml.safe_dump(values))
        Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"inputs": INPUTS, **STAGES}}))
        Path(".gitignore").write_text("/inputs/\n/data/\n/models/\n/.lgp/\n")
        git("init", "--quiet")
        with Repo.init() as repo, repo.config.edit() as config:
            config["core"] = {"analytics": False, "remote": "s3"}
            config["remote"] = {"s3": {"url": "s3://lgp/store", "endpointurl": bucket, "region": "us-east-1"}}
        subprocess.run(INPUTS["cmd"].split(), check=True)
        for stage in STAGES.values():
            write_outputs(stage)
        with Repo() as repo:
            repo.commit(force=True)
            git("add", "--all")
            git("commit", "--quiet", "--message", "Start")
            assert repo.push() > 0
    git("clone", "--quiet", str(first), str(second))
    shutil.rmtree(first)
    with contextlib.chdir(second), Repo() as repo:
        assert repo.pull()["stats"]["fetched"] > 0
        assert list(repo.status()) == ["inputs"]
        assert [stage.addressing for stage in repo.reproduce()] == ["inputs"]
        assert Path("models/mim/encoder/meta.json").read_text() == "models/mim/encoder/meta.json\n"
