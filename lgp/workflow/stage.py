"""The frame of every stage: it digests the inputs before and after, tracks the run, and publishes all results at once.

It imports torch and MLflow only when a stage works or logs.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lgp.compute.launch import WorkerDone, launch, launched, launched_rank, machines
from lgp.compute.seals import check_sealed
from lgp.errors import LgpError, NotTrained, check_disk_space
from lgp.models.files import CLASSIFIERS, HEADS, WEIGHTS, check_beside, check_trained, encoder_digest, no_encoder
from lgp.params.arms import how_to_evaluate
from lgp.params.file import Params, load_params, restricted, section_values
from lgp.training.left_states import RESUME, expire, remove
from lgp.training.resume_states import StateStore
from lgp.workflow import tracking
from lgp.workflow.code_digest import code_digests
from lgp.workflow.mlflow_store import Evaluated
from lgp.workflow.origins import committed_values, encoder_values, flatten, run_name, values_behind
from lgp.workflow.provenance import git_state, input_digest, params_digest
from lgp.workflow.source_tree import source_root

SHOWN_DIGITS = 16  # of a digest, in a message
RESERVE_BYTES = 64 * 2**20  # what tracking, metrics and pictures may need beside the results


@dataclass(frozen=True)
class StageSpec:
    """One call of a stage.

    Attributes:
        name: mim, fewshot, …; also the name of its file in `stages/`.
        sections: sections of the parameters that it reads. It gets no others except `run`.
        reads: inputs, files or folders. All must exist.
        writes: outputs, files or folders.
        arm: the arm whose encoder it trains or evaluates; `data` or `all` where there is none.
        task: pretrain, linear, fewshot-1pct, …
        trains: whether it is a training. Several processes may share a training, and `resume` may continue it.
        into: a folder that gets the outputs instead of their places; None: they go to their places.
    """

    name: str
    sections: Sequence[str]
    reads: Sequence[Path]
    writes: Sequence[Path]
    arm: str
    task: str
    trains: bool = False
    into: Path | None = None

    @property
    def targets(self) -> list[Path]:
        """Where the outputs go."""
        return [path if self.into is None else self.into / path.name for path in self.writes]


@dataclass(frozen=True)
class StageRun:
    """A running stage: its parameters, where to write, how to log."""

    spec: StageSpec
    params: Params
    provenance: dict[str, Any]
    tracker: "tracking.Tracker"
    store: StateStore
    _partial: dict[Path, Path]

    def out(self, path: Path) -> Path:
        """Return where to write the output `path`. The output is moved to `path` at the end of the stage."""
        return self._partial[path]

    def tag_upstream(self, encoder: Path) -> None:
        """Tag the tracked run with the one that trained the encoder in this folder.

        Where it is the encoder of the run's own arm, the run evaluates it: its metrics are linked to it.
        """
        digest = encoder_digest(encoder)
        self.tracker.tag_upstream(digest)
        # one of several processes alone tracks, and has digests
        if encoder.parent.name == self.spec.arm and self.provenance:
            self.tracker.will_link(Evaluated(encoder, digest, self.provenance["digests"]["inputs"]))


@contextmanager
def stage(spec: StageSpec, params_file: Path, fresh: bool = False, resume: bool = False) -> Iterator[StageRun]:
    """Run the block as a stage.

    `fresh` discards the resume state of an interrupted run. `resume` continues from it even if other code wrote it.

    Inputs, parameters and code are digested at the start and again at the end. DVC records their state at the end of a
    command. A stage therefore fails where one of them changed while it ran, and the error names it.

    Where the same stage runs on the same inputs in another folder, as in a copy that DVC's queue makes, this one waits.

    A block that raises `NotTrained` has written its outputs. They are published before the stage fails. The resume
    state is kept, so that the same command with `--accept` does not train again.

    Raises:
        NotTrained: the block raised it.
        LgpError: the parameters are not valid, an input is missing or damaged, another process runs the same stage in
            this folder, or an input changed while the stage ran.
    """
    if fresh and resume:
        raise LgpError("--fresh ignores what an interrupted run left, --resume goes on from it: choose one")
    params = load_params(params_file)
    root = Path(os.environ.get("DVC_ROOT", "."))
    if launched() and not spec.trains:
        raise LgpError(f"{spec.name} runs in one process: call it without torchrun")
    with _with_other_machines(spec, params, root):
        yield from _worked(spec, params, params_file, root, fresh, resume)


def _worked(
    spec: StageSpec, params: Params, params_file: Path, root: Path, fresh: bool, resume: bool
) -> Iterator[StageRun]:
    """Check the inputs, yield the running stage, and publish."""
    _check_inputs(spec)
    checked = [check_trained(encoder) for encoder in _encoders(spec)]
    if spec.trains and params.run.processes > 1 and not launched():
        launch(spec.name, params.run.processes)
    visible = restricted(params, spec.sections)
    if launched_rank() > 0:
        yield from _as_worker(spec, visible, root)
        return
    for warning in filter(None, checked):
        print(warning, flush=True)
    check_disk_space(root, RESERVE_BYTES)
    before = digests_of(spec, params, root)
    git = git_state(source_root())
    provenance = {
        "stage": spec.name,
        "arm": spec.arm,
        "task": spec.task,
        "params": section_values(params, spec.sections),
        "digests": before,
        "lgp": version("lgp"),
        "torch": version("torch"),
        **git,
    }
    store = _state_store(spec, before, root)
    store.acquire(waits=not launched())  # the other processes of a training would not wait with this one
    succeeded = False
    partial: dict[Path, Path] = {}
    try:
        _choose_state(store, spec.name, fresh, resume)
        if store.adopted():
            provenance["resumed_from_code"] = store.adopted()
        partial = {path: _start_output(target) for path, target in zip(spec.writes, spec.targets, strict=True)}
        about = _description(spec, params, before, git, committed_values(params_file))
        with tracking.tracked(about, root, store.run_id_file) as tracker:
            failure = None
            try:
                yield StageRun(spec, visible, provenance, tracker, store, partial)
            except NotTrained as e:
                failure = e
            _check_unchanged(spec, before, params_file, root)
            for written, target in zip(partial.values(), spec.targets, strict=True):
                _publish(written, target)
            if failure is not None:
                raise failure
            # an encoder is registered, and a result identified, only after it is checked and published
            tracker.register()
            tracker.log_result(spec.targets)
        succeeded = True
        expire(store.folder, before["code"])
    finally:
        for written in partial.values():
            remove(written)
        store.close(succeeded)


@contextmanager
def unrecorded(spec: StageSpec, params_file: Path) -> Iterator[StageRun]:
    """Run the block on what a stage reads. Nothing is tracked, published or locked.

    The run has no outputs. Its store is the one of the stage: the block must not write to it.

    Raises:
        LgpError: the parameters are not valid, or an input is missing or damaged.
    """
    params = load_params(params_file)
    root = Path(os.environ.get("DVC_ROOT", "."))
    _check_inputs(spec)
    for warning in filter(None, [check_trained(encoder) for encoder in _encoders(spec)]):
        print(warning, flush=True)
    store = _state_store(spec, digests_of(spec, params, root), root)
    yield StageRun(spec, restricted(params, spec.sections), {}, tracking.Untracked(), store, {})


def digests_of(spec: StageSpec, params: Params, root: Path) -> dict[str, Any]:
    """Digest what a stage reads: `parameters`, `inputs` by path, and `code`."""
    return {
        "parameters": params_digest(params, spec.sections),
        "inputs": {path.as_posix(): input_digest(path, _remedy(path)) for path in spec.reads},
        "code": code_digests(root)[spec.name],
    }


def _state_store(spec: StageSpec, digests: dict[str, Any], root: Path) -> StateStore:
    """Return the resume states of the stage with these digests of its parameters, inputs and code."""
    key = sha256(json.dumps([digests["parameters"], digests["inputs"]], sort_keys=True).encode()).hexdigest()[:16]
    return StateStore(root / RESUME / f"{spec.arm}-{spec.task}" / key, digests["code"])


def _check_inputs(spec: StageSpec) -> None:
    """Raise `LgpError` for an input that is missing, or is not as it was sealed."""
    for path in spec.reads:
        if not path.exists():
            raise LgpError(f"{spec.name} needs {path}, which does not exist: {_remedy(path)}, or `dvc repro`")
        if path.name == HEADS:
            check_beside(path.parent, HEADS)
        check_sealed(path, _remedy(path))


def _choose_state(store: StateStore, name: str, fresh: bool, resume: bool) -> None:
    """Discard, adopt or keep the resume states, as the options say."""
    if fresh:
        store.forget()
    if resume:
        store.adopt()
    elif not fresh and not store.has_state() and any(store.folder.rglob("state-*.pt")):
        print(
            f"{name}: other code wrote a resume state of this training: it is used only with --resume, and is removed "
            "when this training is finished",
            flush=True,
        )
    if not store.has_state():
        store.run_id_file.unlink(missing_ok=True)


def _description(
    spec: StageSpec, params: Params, digests: dict[str, Any], git: dict[str, Any], committed: dict[str, str]
) -> tracking.Description:
    """Describe the run for tracking: name, tags, and the parameters that the stage reads.

    The seed of an evaluation is that of its encoder.
    """
    own, encoders = flatten(section_values(params, spec.sections)), _encoders(spec)
    evaluated = [encoder for encoder in encoders if encoder.parent.name == spec.arm]
    behind: dict[str, str] = {}
    for encoder in encoders:
        behind |= values_behind(encoder)
    made_with = own | behind if evaluated else behind | own
    of_encoder = encoder_values(behind, encoder_digest(evaluated[0])) if evaluated else {}
    tags = {
        "stage": spec.name,
        "arm": spec.arm,
        "task": spec.task,
        "git_commit": git["commit"],
        "git_dirty": str(git["dirty"]).lower(),
        "params_digest": digests["parameters"],
        "code_digest": digests["code"],
        "data_digest": next((d for p, d in digests["inputs"].items() if p.endswith("prepared")), ""),
        "encoder_params": json.dumps(behind) if evaluated else "",
        "dvc_experiment": os.environ.get("DVC_EXP_NAME", ""),
        "mlflow.source.name": f"lgp {spec.name}",
    }
    values = own | of_encoder | {"arm": spec.arm, "task": spec.task}
    tags = {name: value for name, value in tags.items() if value}
    name = run_name(spec.arm, spec.task, made_with, committed)
    return tracking.Description(spec.arm, spec.task, tags, values, params.run.tracking_uri, params.run.experiment, name)


def _encoders(spec: StageSpec) -> list[Path]:
    """Return the folders of the encoders that a stage reads."""
    return [path.parent for path in spec.reads if path.name == WEIGHTS]


@contextmanager
def _with_other_machines(spec: StageSpec, params: Params, root: Path) -> Iterator[None]:
    """Meet the other machines that `torchrun` started, if any, and compare what they start from."""
    if machines() == 1:
        yield
        return
    from lgp.compute.machines import together

    def facts() -> dict[str, str]:
        decisive = params.run.model_dump(mode="json", include={"accumulate", "precision"})
        values = flatten(section_values(params, spec.sections) | {"run": decisive})
        inputs = {path.as_posix(): input_digest(path, _remedy(path)) for path in spec.reads if path.exists()}
        digests = inputs | {"code": code_digests(root)[spec.name]}
        return values | {name: digest[:SHOWN_DIGITS] for name, digest in digests.items()}

    versions = {package: version(package) for package in ("torch", "timm")}
    with together(spec.name, facts, versions, params.run.lost_after_s):
        yield


def _as_worker(spec: StageSpec, params: Params, root: Path) -> Iterator[StageRun]:
    """Take part in a training. Only its first process reads states, logs and writes."""
    store = StateStore(root / RESUME, "worker")
    with contextlib.suppress(WorkerDone):
        yield StageRun(spec, params, {}, tracking.Untracked(), store, {})


def _remedy(path: Path) -> str:
    if path.name == WEIGHTS:
        return no_encoder(path.parent)
    if path.parts[0] == "metrics":
        arm, _, task = path.stem.partition("-")
        return how_to_evaluate(arm, task)
    return (
        f"run `lgp {'labels' if path.name == 'labels' else 'prepare'}`"
        if path.parts[0] == "data"
        else ("run the stage that writes it")
    )


def _check_unchanged(spec: StageSpec, before: dict[str, Any], params_file: Path, root: Path) -> None:
    after = digests_of(spec, load_params(params_file), root)
    changed = [name for name in ("parameters", "code") if after[name] != before[name]]
    changed += [path for path, digest in after["inputs"].items() if digest != before["inputs"][path]]
    if changed:
        raise LgpError(
            f"{spec.name}: {', '.join(changed)} changed while it ran, so its result belongs to neither state and is "
            "not kept: run again"
        )


def _start_output(path: Path) -> Path:
    """Return where an output is written first: beside `path`, so that one rename moves it there."""
    partial = path.with_name(f".partial.{path.name}")  # the suffix is kept: some libraries choose a format by it
    remove(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    if not path.suffix:
        partial.mkdir()
    return partial


def _publish(written: Path, path: Path) -> None:
    """Move an output to its place. The classifiers of an arm stay: they are outputs of other stages."""
    if (path / CLASSIFIERS).is_dir():
        (path / CLASSIFIERS).replace(written / CLASSIFIERS)
    remove(path)
    written.replace(path)
