"""Precision: what is computed in bf16, what stays in single precision, and who decides."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Silent, merged
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lgp.compute.device import choose_device
from lgp.compute.distributed import SyncBatchNorm1d
from lgp.compute.precision import choose_precision, in_single_precision
from lgp.data.labels import LabelledImages
from lgp.errors import LgpError
from lgp.models.moco import contrastive_loss
from lgp.params.file import Params
from lgp.params.run import RunParams
from lgp.pretrain.arm import Session
from lgp.pretrain.cl import pretrain_cl
from lgp.pretrain.mim import pretrain_mim
from lgp.training.resume_states import StateStore

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("native", "width", "expected"), [(True, 48, "bf16"), (True, 47, "fp32"), (False, 768, "fp32")]
)
def test_auto_takes_bf16_on_a_cpu_where_it_pays(
    native: bool, width: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    assert choose_precision(RunParams(), CPU, width) == types[expected]
    for precision in ("bf16", "fp32"):
        assert choose_precision(RunParams(precision=precision), CPU, width) == types[precision]


def test_cuda_device_without_bf16_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old one")
    assert choose_precision(RunParams(), torch.device("cuda"), 768) == torch.float32
    with pytest.raises(LgpError, match=r"run\.precision is bf16, which an old one lacks: set it to fp32"):
        choose_precision(RunParams(precision="bf16"), torch.device("cuda"), 768)


def test_more_processes_than_cuda_devices_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(LgpError, match=r"process 2 .* no CUDA device of its own, there are 2: set run\.processes"):
        choose_device(RunParams(device="cuda"))


def test_every_library_gets_the_threads_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a library that is loaded later."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = """
import torch
from threadpoolctl import threadpool_info
from lgp.compute.device import choose_device
from lgp.params.run import RunParams
for threads in (1, 2, 1):
    choose_device(RunParams(device="cpu", threads=threads))
    import sklearn.cluster  # its threads are one per core, unless it is told before it is loaded
    assert {pool["num_threads"] for pool in threadpool_info()} == {threads}, threadpool_info()
    assert torch.get_num_threads() == threads
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


def test_losses_and_norms_are_computed_in_single_precision() -> None:
    seen: list[torch.dtype] = []

    @in_single_precision
    def product(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a @ b).dtype)
        return a @ b

    x = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        assert product(x.bfloat16(), x).dtype == torch.float32
        queries, keys = torch.randn(8, 5), torch.randn(8, 5)
        rounded = [t.bfloat16().float() for t in (queries, keys)]
        assert torch.equal(
            contrastive_loss(queries.bfloat16(), keys.bfloat16(), 0.2), in_fp32(contrastive_loss, *rounded, 0.2)
        )
        of_list = in_single_precision(lambda tensors: tensors[0] @ tensors[1])
        assert of_list([x.bfloat16(), x.bfloat16()]).dtype == torch.float32
        assert SyncBatchNorm1d(4)(x.bfloat16()).dtype == torch.float32
    assert product(x.double(), x.double()).dtype == torch.float64
    assert seen == [torch.float32, torch.float64]


def in_fp32(function: Any, *args: Any) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return function(*args)


@pytest.mark.parametrize("pretrain", [pretrain_mim, pretrain_cl])
def test_bf16_trains_single_precision_weights_to_about_the_same_loss(
    pretrain: Any, tmp_path: Path, values: Any, prepared: LabelledImages
) -> None:
    results = {}
    for precision in ("fp32", "bf16"):
        params = Params.model_validate(merged(values, {"run": {"precision": precision}}))
        store = StateStore(tmp_path / precision, "code")
        results[precision] = pretrain(Session(prepared, params, store, Silent()))
    first = {p: r.progression.history[0]["train/loss"] for p, r in results.items()}
    assert first["bf16"] != first["fp32"]
    assert first["bf16"] == pytest.approx(first["fp32"], rel=0.02)
    assert {t.dtype for t in results["bf16"].model.state_dict().values()} == {torch.float32, torch.int64} - (
        {torch.int64} if pretrain is pretrain_mim else set()
    )


class Operations(TorchDispatchMode):
    """Keeps the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("precision", "fused"), [("bf16", False), ("fp32", True)])
def test_attention_trains_in_plain_products_in_bf16_on_a_cpu(
    precision: str, fused: bool, tmp_path: Path, values: Any, prepared: LabelledImages
) -> None:
    run = {"precision": precision, "device": "cpu"}
    params = Params.model_validate(merged(values, {"run": run, "cl": {"epochs": 1, "warmup_epochs": 0}}))
    with Operations() as operations:
        pretrain_cl(Session(prepared, params, StateStore(tmp_path / precision, "code"), Silent()))
    backward = {name for name in operations.names if "scaled_dot_product" in name and "backward" in name}
    assert bool(backward) == fused


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_blocks_train_to_the_same_loss(tmp_path: Path, values: Any, prepared: LabelledImages) -> None:
    losses = []
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        params = Params.model_validate(merged(values, {"run": {"compile": compiled}}))
        result = pretrain_mim(Session(prepared, params, StateStore(tmp_path / str(compiled), "code"), Silent()))
        losses.append([epoch["train/loss"] for epoch in result.progression.history])
        assert not any("_orig_mod" in name for name in result.model.state_dict())
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == compiled
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
