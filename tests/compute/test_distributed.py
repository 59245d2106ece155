"""Several processes (gloo) against one process with the whole batch."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import Silent, merged
from torch import Tensor, nn

from lgp.compute import distributed
from lgp.compute.distributed import SyncBatchNorm1d, gather, joined, send_bytes, send_state
from lgp.compute.launch import WorkerDone
from lgp.compute.precision import place
from lgp.data.labels import LabelledImages
from lgp.data.storage import Images
from lgp.errors import LgpError
from lgp.models.moco import contrastive_loss
from lgp.models.refine import neighbour_loss
from lgp.models.simclr import nt_xent
from lgp.models.swav import swapped_loss
from lgp.models.vicreg import vicreg_loss
from lgp.params.file import Params
from lgp.params.pretrain import SwavParams, VicregWeights
from lgp.pretrain import arm as arm_module
from lgp.pretrain.arm import Checks, Session
from lgp.pretrain.batch_checks import check_batch
from lgp.pretrain.cl import pretrain_cl
from lgp.pretrain.graft import pretrain_graft
from lgp.pretrain.mim import pretrain_mim
from lgp.training import loop as engine
from lgp.training.agreement import Agreement
from lgp.training.resume_states import StateStore

PROCESSES, ROWS, WIDTH = 2, 5, 6

Loss = Callable[[Tensor, Tensor], Tensor]
PROTOTYPES = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2))
SMALL_VIEWS = {"count": 2, "size": 4}
LOSSES: dict[str, Loss] = {
    "mocov3": lambda a, b: contrastive_loss(a, b.detach(), 0.2),
    "simclr": lambda a, b: nt_xent(a, b, 0.5),
    "vicreg": lambda a, b: vicreg_loss(a, b, VicregWeights()),
    "swav": lambda a, b: swapped_loss([a, b, a + b], PROTOTYPES, 0.2, SwavParams(prototypes=4)),
    "refine": lambda a, b: neighbour_loss(a, b.detach(), b.detach().flip(1), 0.2),
}


def embeddings() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of all processes, and the weight that stands for a model."""
    rng = torch.Generator().manual_seed(1)
    return tuple(torch.randn(n, WIDTH, generator=rng) for n in (PROCESSES * ROWS, PROCESSES * ROWS, WIDTH))  # type: ignore[return-value]


def loss_and_gradient(loss: Loss, x1: Tensor, x2: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.clone().requires_grad_()
    value = loss(x1 @ weight, x2 @ weight)
    value.backward()
    assert weight.grad is not None
    return value.detach(), weight.grad


def one_of_many(rank: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    distributed.PIECE_BYTES = 50
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    x1, x2, weight = embeddings()
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    results = {}
    for name, loss in LOSSES.items():
        value, gradient = loss_and_gradient(loss, x1[mine], x2[mine], weight)
        for tensor in (value, gradient):  # what DistributedDataParallel does with gradients
            dist.all_reduce(tensor)
            tensor /= PROCESSES
        results[name] = (value, gradient)
    results["gathered"] = (gather(x1[mine]), gather(x1[mine].requires_grad_()).detach())
    results["sent"] = (send_bytes(b"state" if rank == 0 else None), send_bytes(None))
    results["followed"] = followed(rank)
    received = send_state(nested() if rank == 0 else {"not": "read"}, torch.device("cpu"))
    results["state"], results["strides"] = received, [t.stride() for t in received["weights"].values()]
    results["none"] = send_state(None, torch.device("cpu"))
    results["norm"] = normalised(SyncBatchNorm1d(WIDTH), x1[mine])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def followed(rank: int) -> list[tuple[int, int]]:
    """The exchanges of a training that the second process, which is slower, wants to stop after its tenth step."""
    training, found = Agreement(0), list[tuple[int, int]]()
    for step in range(1, 31):
        time.sleep(0.02 * rank)
        if training.is_due(step):
            found.append((step, training.reach(step, 2 if rank and step >= 10 else 0)))
    return found


def nested() -> dict[str, Any]:
    """A state of several types and layouts, of which a piece is shorter than a tensor."""
    rng = torch.Generator().manual_seed(3)
    image = torch.randn(2, 3, 4, 4, generator=rng)
    tensors = {"a": image, "last": image.to(memory_format=torch.channels_last), "half": image.bfloat16()}
    tensors |= {"flags": image > 0, "empty": torch.zeros(0, 3), "count": torch.tensor(7), "t": image[0, 0].T}
    return {"weights": tensors, "groups": [{"betas": (0.9, 0.95), "lr": 0.1, "steps": [torch.ones(3), None]}]}


def normalised(norm: nn.BatchNorm1d, x: Tensor) -> dict[str, Tensor]:
    """Two training steps of a normalisation with weights, and one in evaluation."""
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, WIDTH))
        norm.bias.copy_(torch.linspace(-1, 1, WIDTH))
    x = x.clone().requires_grad_()
    first = norm(x)
    first.pow(3).sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is not None
    second = norm(2 * x.detach() + 1)
    outputs = {"first": first, "second": second, "evaluated": norm.eval()(x), "gradient": x.grad}
    return {k: v.detach() for k, v in outputs.items()} | {"weight_gradient": norm.weight.grad, **norm.state_dict()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[Tensor, Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    mp.spawn(one_of_many, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_the_whole_batch(
    name: str, results: list[dict[str, tuple[Tensor, Tensor]]]
) -> None:
    value, gradient = loss_and_gradient(LOSSES[name], *embeddings())
    for of_rank in results:
        assert torch.allclose(of_rank[name][0], value, rtol=1e-5)
        assert torch.allclose(of_rank[name][1], gradient, rtol=1e-5, atol=1e-6)


def test_gather_puts_rows_in_the_order_of_ranks(results: list[dict[str, tuple[Tensor, Tensor]]]) -> None:
    for of_rank in results:
        for gathered in of_rank["gathered"]:
            assert torch.equal(gathered, embeddings()[0])


def test_bytes_are_sent_from_the_first_process(results: list[dict[str, tuple[Tensor, Tensor]]]) -> None:
    assert [of_rank["sent"] for of_rank in results] == [(b"state", None)] * PROCESSES


def test_all_processes_follow_a_request_after_the_same_step(results: list[dict[str, Any]]) -> None:
    """Processes that asked after other steps would wait for one another for ever."""
    assert results[0]["followed"] == results[1]["followed"]
    steps, requests = zip(*results[0]["followed"], strict=True)
    assert requests == tuple(2 if step >= 10 else 0 for step in steps)


def test_state_of_the_first_process_comes_to_all_in_its_types_and_layouts(results: list[dict[str, Any]]) -> None:
    expected = nested()
    for of_rank in results:
        found = of_rank["state"]
        assert list(found) == list(expected)
        assert found["groups"][0]["betas"] == (0.9, 0.95)
        steps = found["groups"][0].pop("steps")
        assert steps[0].tolist() == [1, 1, 1]
        assert steps[1] is None
        for name, tensor in expected["weights"].items():
            assert found["weights"][name].dtype == tensor.dtype
            assert torch.equal(found["weights"][name], tensor), name
        assert of_rank["strides"] == [tensor.stride() for tensor in expected["weights"].values()]
        assert of_rank["none"] is None


def test_norm_over_processes_is_batchnorm_of_the_whole_batch(results: list[dict[str, dict[str, Tensor]]]) -> None:
    whole = normalised(nn.BatchNorm1d(WIDTH), embeddings()[0])
    theirs = [of_rank["norm"] for of_rank in results]
    for name in ("first", "second", "evaluated", "gradient"):
        assert torch.allclose(torch.cat([t[name] for t in theirs]), whole[name], rtol=1e-5, atol=1e-5), name
    assert torch.allclose(sum(t["weight_gradient"] for t in theirs), whole["weight_gradient"], rtol=1e-5)  # type: ignore[arg-type]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert all(torch.allclose(t[name], whole[name], rtol=1e-6) for t in theirs), name


def test_norm_of_one_process_is_batchnorm_itself() -> None:
    ours, theirs = (normalised(norm, embeddings()[0]) for norm in (SyncBatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH)))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_batch_that_cannot_be_shared_equally_is_told() -> None:
    check_batch("mim", 64, 64, 4, {"mim": 4})
    check_batch("cl", 96, 96, 4, {"mim": 4})
    with pytest.raises(LgpError, match=r"cl\.batch_size 64 cannot be cut into 3 equal parts"):
        check_batch("cl", 64, 1000, 3, {})
    with pytest.raises(LgpError, match=r"mim\.batch_size 64 cannot be cut into 48 equal parts .* run\.accumulate 24"):
        check_batch("mim", 64, 1000, 2, {"mim": 24})


# In double precision, for contrastive learning is chaotic: what the processes round differently grows a hundred
# thousand times within 50 steps, in one process too. In single precision the losses agree to 1e-5 on some CPUs, and to
# 3e-3 on others.
PAPERS = {"base_lr": 1.5e-4, "epochs": 40}
SHARED = {"mim": {**PAPERS, "batch_size": 60}, "cl": {**PAPERS, "batch_size": 60}}


def losses_of(
    params: Params, prepared: Path, folder: Path, steps: int, start: Path | None = None
) -> dict[str, list[float]]:
    """Train both objectives, or a graft on `start`, for some steps in double precision. Return the losses of each."""
    losses: dict[str, list[float]] = {}
    normalize = Images.normalize
    arms: dict[str, Callable[[Session], object]] = {"mim": pretrain_mim, "cl": pretrain_cl}
    if start is not None:
        arms = {"graft": lambda session: pretrain_graft(session, start, start)}
    for arm, pretrain in arms.items():
        seen = losses.setdefault(arm, [])
        take_step, mean = engine.Trainer._step, engine.average

        def step(self: engine.Trainer, *rest: object, step: object = take_step) -> None:
            if self.now.step == steps:
                raise WorkerDone
            step(self, *rest)  # type: ignore[operator]

        def average(values: Tensor, seen: list[float] = seen, mean: Callable[..., Tensor] = mean) -> Tensor:
            seen += mean(values).tolist()
            return mean(values)

        store = StateStore(folder / arm / os.environ.get("RANK", "0"), "code")
        session = Session(Images(prepared), params, store, Silent())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "CHECK_EVERY", 1)
            patch.setattr(engine.Trainer, "_step", step)
            patch.setattr(engine, "average", average)
            patch.setattr(arm_module, "place", lambda model, *rest: place(model.double(), *rest))
            patch.setattr(Images, "normalize", lambda self, images: normalize(self, images).double())
            with pytest.raises(WorkerDone):
                pretrain(session)
    return losses


def one_trainer(
    rank: int, processes: int, port: int, values: str, prepared: str, folder: str, steps: int, start: str | None = None
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes),
    }  # fmt: skip
    params, of_start = Params.model_validate(json.loads(values)), start and Path(start)
    losses = losses_of(params, Path(prepared), Path(folder), steps, of_start or None)
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_one_two_and_four_processes_have_the_same_losses(
    tmp_path: Path, values: dict[str, Any], prepared: LabelledImages
) -> None:
    shared = merged(values, SHARED)
    alone = losses_of(Params.model_validate(shared), prepared.folder, tmp_path / "alone", 50)
    assert [len(of_arm) for of_arm in alone.values()] == [50, 50]
    for processes in (2, 4):
        folder = tmp_path / str(processes)
        folder.mkdir()
        # in parts besides, whose gradients are averaged with the last one only
        run = {"accumulate": {"mim": 3} | ({"cl": 3} if processes == 2 else {}), "grad_checkpointing": ["mim"]}
        in_parts = json.dumps(merged(shared, {"run": run}))
        given = (processes, free_port(), in_parts, str(prepared.folder), str(folder), 50)
        mp.spawn(one_trainer, args=given, nprocs=processes)
        together = json.loads((folder / "losses.json").read_text())
        for arm, of_arm in alone.items():
            assert together[arm] == pytest.approx(of_arm, rel=1e-9), (arm, processes)


@pytest.mark.parametrize("contrastive", [{}, {"objective": "refine", "small_views": SMALL_VIEWS}], ids=str)
def test_heads_learn_the_same_in_two_processes_before_the_encoder_does(
    contrastive: dict[str, Any], tmp_path: Path, values: dict[str, Any], prepared: LabelledImages, encoder_folder: Path
) -> None:
    graft = {"start": "mim", "epochs": 9, "head_warmup_epochs": 1, "batch_size": 60}
    shared = merged(values, {"graft": graft, "contrastive": contrastive})
    alone = losses_of(Params.model_validate(shared), prepared.folder, tmp_path / "alone", 8, encoder_folder)
    heads = len(prepared.pretraining_ids) // 60
    assert len(alone["graft"]) == heads + 8
    given = (2, free_port(), json.dumps(shared), str(prepared.folder), str(tmp_path), 8, str(encoder_folder))
    mp.spawn(one_trainer, args=given, nprocs=2)
    assert json.loads((tmp_path / "losses.json").read_text())["graft"] == pytest.approx(alone["graft"], rel=1e-9)


def one_dead_trainer(rank: int, port: int, values: str, prepared: str, folder: str) -> None:
    """Train until the first process finds the training dead after its first epoch, and write the steps done."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    steps: list[int] = []
    take_step = engine.Trainer._step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checks, "find_dead", lambda _, now: rank == 0 and len(now.history) == 1)
        patch.setattr(
            engine.Trainer, "_step", lambda self, *rest: (steps.append(self.now.step), take_step(self, *rest))
        )
        session = Session(
            Images(Path(prepared)),
            Params.model_validate(json.loads(values)),
            StateStore(Path(folder), "code"),
            Silent(),
        )
        with contextlib.suppress(WorkerDone):
            pretrain_mim(session)
    Path(folder, f"{rank}.json").write_text(json.dumps(steps))


def test_dead_training_ends_in_all_processes(tmp_path: Path, values: dict[str, Any], prepared: LabelledImages) -> None:
    given = (free_port(), json.dumps(values), str(prepared.folder), str(tmp_path))
    mp.spawn(one_dead_trainer, args=given, nprocs=2)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [[0, 1, 2]] * 2


def test_accumulated_parts_have_the_losses_of_the_whole_batch(
    tmp_path: Path, values: dict[str, Any], prepared: LabelledImages
) -> None:
    whole, parts = (
        losses_of(
            Params.model_validate(merged(values, merged(SHARED, {"run": {"accumulate": {"mim": n}}}))),
            prepared.folder,
            tmp_path / str(n),
            20,
        )
        for n in (1, 4)
    )
    assert parts["mim"] == pytest.approx(whole["mim"], rel=1e-9)
    assert parts["cl"] == whole["cl"]


@pytest.mark.parametrize(
    ("fails", "machines", "line"),
    [
        (
            "meeting",
            "1",
            r"^mim: process 1 of 2 cannot connect to another one \(gloo/transport/tcp: no\): processes must",
        ),
        ("work", "1", r"^mim: process 1 of 2 lost another one \(gloo/transport/tcp: no\): run again, it goes on"),
        (
            "work",
            "2",
            r"^mim: process 1 of 2 lost another one \(gloo/transport/tcp: no\): run again on all machines, it",
        ),
    ],
)
def test_a_process_out_of_reach_is_told_in_one_line(
    fails: str, machines: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("gloo/transport/tcp:\nno")

    for name, value in {
        "TORCHELASTIC_RUN_ID": "test", "RANK": "1", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": machines
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", fail if fails == "meeting" else lambda *_, **__: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append("left"))
    with pytest.raises(LgpError, match=line), joined("mim", torch.device("cpu")):
        fail()
    assert left == ([] if fails == "meeting" else ["left"])
