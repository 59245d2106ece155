"""A project so small that every stage takes a second: its parameters, its commands, and what they leave."""

import functools
import hashlib
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from forks import Ended, Fork, take_signals

from lgp.compute.interruption import stopped_by_signals

TRAINED = ["mim", "cl", "graft", "joint", "reverse"]
ROOT = Path(__file__).resolve().parents[2]
# what a run leaves beside its results: it may differ from run to run
BESIDE = (".lgp", "mlflow.db", "mlflow.db-wal", "mlflow.db-shm", "mlartifacts")
SMALL: dict[str, Any] = {
    "arms": ["random", "graft"],
    "few_labels": ["10pct"],
    "propagated": ["10pct"],
    "selected": ["10pct"],
    "finetuned_arms": ["graft"],
    "data": {"max_train_images": 120, "max_test_images": 40},
    "model": {"width": 16, "depth": 3, "heads": 2},
    "contrastive": {"projector_hidden": 16, "projector_dim": 8, "predictor_hidden": 16},
    "mim": {"epochs": 3, "warmup_epochs": 1, "decoder_width": 16},
    "cl": {"epochs": 3, "warmup_epochs": 1},
    "graft": {"epochs": 3, "warmup_epochs": 1},
    "joint": {"epochs": 3, "warmup_epochs": 1},
    "reverse": {"epochs": 3, "warmup_epochs": 1},
    "linear": {"epochs": 3, "base_lrs": [0.1, 1.0]},
    "fewshot": {"c_grid": [0.1, 1.0]},
    "propagation": {"k": [5], "alpha": [0.95]},
    "finetune": {"10pct": {"epochs": 3, "warmup_epochs": 1, "base_lr": 2e-2}},
    # a state after every step, so that a kill also falls into the saving
    "run": {"device": "cpu", "save_every_s": 1e-6, "online_knn": {"every_epochs": 1}, "accept": TRAINED},
}
ARMS = ("random", "graft")
COMMANDS: list[list[str]] = [
    ["prepare"],
    ["labels"],
    *([arm] for arm in TRAINED),
    ["baseline", "random"],
    *(["linear", arm] for arm in ARMS),
    *(["fewshot", arm, "10pct"] for arm in ARMS),
    *(["propagate", arm, "10pct"] for arm in ARMS),
    *(["selected", arm, "10pct"] for arm in ARMS),
    ["finetune", "graft", "10pct"],
    ["report"],
]


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Lay nested changes over a nested base."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


@functools.cache
def preset() -> dict[str, Any]:
    """Return the preset `digits` as nested values, which nobody changes."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text(encoding="utf-8"))
    return values


def command(arguments: Sequence[str]) -> Callable[[], int]:
    """Return what a fork runs for `lgp ARGUMENTS`."""

    def work() -> int:
        from lgp.__main__ import main

        sys.argv = ["lgp", *arguments]
        with stopped_by_signals():
            take_signals()  # in the command, as in a process of its own
            main()
        return 0

    return work


def start(arguments: Sequence[str], folder: Path) -> Fork:
    """Begin `lgp ARGUMENTS` in a folder."""
    return Fork(command(arguments), folder)


def run(arguments: Sequence[str], folder: Path, limit_s: float = 120.0) -> Ended:
    """Run `lgp ARGUMENTS` in a folder to its end."""
    return start(arguments, folder).wait(limit_s)


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file of a project that is a result, by its path."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    of_path = {file.relative_to(folder).as_posix(): file for file in files}
    return {
        path: hashlib.sha256(file.read_bytes()).hexdigest()
        for path, file in of_path.items()
        if path.split("/")[0] not in BESIDE
    }


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Return the paths that are missing, too many or of other bytes."""
    return sorted(path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path))


class Template:
    """The project after each of its stages, made once.

    Attributes:
        seconds: how long each command took.
    """

    def __init__(self, folder: Path) -> None:
        """Run all stages in `folder`, and keep the project as it was before each, and the digests after each."""
        self.folder = folder
        self.seconds: dict[int, float] = {}
        self._made: list[dict[str, str]] = []
        work = folder / "work"
        work.mkdir(parents=True)
        (work / "params.yaml").write_text(yaml.safe_dump(merged(preset(), SMALL)), encoding="utf-8")
        for number, arguments in enumerate(COMMANDS):
            shutil.copytree(work, folder / f"before-{number}")
            ended = run(arguments, work, 600.0)
            if ended.code:
                raise SystemExit(f"lgp {' '.join(arguments)} fails without an attack: {ended.output}")
            self.seconds[number] = ended.seconds
            self._made.append(digests(work))

    def before(self, number: int, folder: Path) -> Path:
        """Make a copy of the project before a command, at `folder`."""
        return Path(shutil.copytree(self.folder / f"before-{number}", folder))

    def expected(self, number: int) -> dict[str, str]:
        """Return the digests of the results after a command."""
        return self._made[number]
