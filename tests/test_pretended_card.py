"""Commands give on a CUDA device that is pretended what they give on the CPU: each tensor is where it is looked for."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from arrivals import SMALL_VIEWS
from conftest import ROOT, SMALL, Silent, merged
from PIL import Image
from pretended_card import CARD, CPU, pretended_card
from timm.models.vision_transformer import Block
from typer.testing import CliRunner

from cli import app
from lgp.data.labels import LabelledImages
from lgp.params.file import Params
from lgp.pretrain.arm import Pretrained, Session
from lgp.pretrain.cl import pretrain_cl
from lgp.pretrain.mim import pretrain_mim
from lgp.training.resume_states import StateStore

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")  # torch knows that there is no device


def test_device_is_pretended() -> None:
    with pretended_card():
        here, there = torch.ones(3), torch.ones(3, device=CARD)
        assert (here.device, there.device) == (CPU, CARD)
        assert (there + 1).device == there.new_zeros(2).device == here.to(CARD).device == CARD
        assert there.cpu().device == CPU
        with pytest.raises(RuntimeError, match="same device"):
            _ = here + there
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        rows = torch.arange(2)
        assert there[rows].device == there[rows.to(CARD)].device == CARD
        with pytest.raises(RuntimeError, match="same device"):
            _ = here[rows.to(CARD)]
        with pytest.raises(RuntimeError, match="same device"):
            there[rows.to(CARD)] = here[rows]
        there[:], here[:] = here, there  # copies cross
        assert (here.device, there.device) == (CPU, CARD)
        model = torch.nn.Linear(3, 2).to(CARD)
        model(there).sum().backward()
        assert model.weight.grad is not None
        assert model.weight.grad.device == model.weight.device == CARD
        assert {p.device for p in model.cpu().parameters()} == {CPU}


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("mim", {"run": {"accumulate": {"mim": 2}}}),
        ("mocov3", {"run": {"grad_checkpointing": ["cl"]}}),
        ("mocov3", {"contrastive": {"mask_ratio": 0.75, "masked": "one_sided"}}),
        ("vicreg", {"run": {"accumulate": {"cl": 2}}}),
        ("simclr", {"contrastive": {"small_views": SMALL_VIEWS}}),
        ("swav", {"contrastive": {"small_views": SMALL_VIEWS}}),
        ("refine", {"cl": {"clip_norm": 1.0}}),
    ],
)
def test_pretraining_is_that_of_the_cpu_and_returns_to_it(
    objective: str,
    changes: dict[str, Any],
    prepared: LabelledImages,
    values: dict[str, Any],
    tmp_path: Path,
) -> None:
    def trained(device: str) -> Pretrained:
        of_device = {"run": {"device": device, "precision": "fp32", "online_knn": {"every_epochs": 1}}}
        chosen = {} if objective == "mim" else {"contrastive": {"objective": objective}}
        params = Params.model_validate(merged(merged(merged(values, of_device), chosen), changes))
        train = pretrain_mim if objective == "mim" else pretrain_cl
        return train(Session(prepared, params, StateStore(tmp_path / device, "code"), Silent(), prepared))

    here = trained("cpu")
    with pretended_card():
        there = trained("cuda")
        assert {t.device for t in there.model.state_dict().values()} == {CPU}
    assert (here.computed["device"], there.computed["device"]) == ("cpu", "cuda")
    assert there.progression.history == here.progression.history
    assert there.checks == here.checks
    weights = here.model.state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in there.model.state_dict().items())


@pytest.mark.parametrize(
    ("arm", "run", "mode"),
    [
        ("mim", {}, "reduce-overhead"),
        ("mim", {"accumulate": {"mim": 2}}, "reduce-overhead"),
        ("cl", {}, "reduce-overhead"),
        ("cl", {"accumulate": {"cl": 2}}, "default"),
        ("cl", {"grad_checkpointing": ["cl"]}, "default"),
        ("cl", {"device": "cpu"}, "default"),
    ],
)
def test_compiled_blocks_run_as_cuda_graphs_unless_a_backward_pass_runs_them_again(
    arm: str,
    run: dict[str, Any],
    mode: str,
    prepared: LabelledImages,
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes, begun = set[tuple[str, bool]](), list[int]()
    monkeypatch.setattr(Block, "compile", lambda _, mode, dynamic: modes.add((mode, dynamic)))
    monkeypatch.setattr("torch.compiler.cudagraph_mark_step_begin", lambda: begun.append(1))
    of_run = {"device": "cuda", "precision": "fp32", "compile": True} | run
    params = Params.model_validate(merged(values, {"run": of_run}))
    train = pretrain_mim if arm == "mim" else pretrain_cl
    with pretended_card() if of_run["device"] == "cuda" else nullcontext():
        result = train(Session(prepared, params, StateStore(tmp_path, "code"), Silent()))
    assert modes == {(mode, False)}
    assert len(begun) == (result.progression.step if mode == "reduce-overhead" else 0)


COMMANDS = [
    ["prepare"],
    ["labels"],
    *([arm] for arm in ("mim", "cl", "graft", "joint", "reverse")),
    ["mim", "--replay", "1"],
    *(["baseline", name] for name in ("pixels", "random")),
    *(["linear", arm] for arm in ("pixels", "graft")),
    ["linear", "random", "--params", "params-augmented.yaml"],
    *([task, arm, "10pct"] for task in ("fewshot", "propagate", "selected") for arm in ("pixels", "graft")),
    ["finetune", "graft", "10pct"],
    ["semi", "graft", "10pct"],
    ["report"],
    ["conflict", "mim"],
    ["suggest", "mim"],
    ["audit", "--out", "audit.csv"],
    ["embed", "pictures", "--arm", "graft", "--out", "features.parquet"],
    ["similar", "pictures/0.png", "--among", "features.parquet", "--count", "2"],
    ["import", "models/mim/encoder", "--arm", "copy"],
    ["linear", "copy"],
    ["predict", "pictures", "--with", "graft/fewshot-10pct", "--out", "probed.csv"],
    ["predict", "pictures", "--with", "graft/finetune-10pct", "--out", "tuned.csv"],
    ["export", "graft", "exported.pt2"],
]
WITHOUT_DEVICE = ("prepare", "labels", "baseline", "report", "import", "export")
# pictures of reconstructions, the weights of a chosen head in float64, the similarity of blocks, and the exported model
WITH_PRODUCTS_OF_THE_CPU = ("mim", "linear", "suggest", "export")
WRITTEN = ("**/metrics.json", "metrics/*.json", "**/curves.csv", "*.csv", "reports/results.csv", "features.parquet")


def test_commands_give_on_the_device_what_they_give_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    few = {key: ["10pct"] for key in ("few_labels", "propagated", "selected", "finetuned", "semi_supervised")}
    changes = few | {
        "arms": ["pixels", "graft"],
        "finetuned_arms": ["graft"],
        "graft": {"head_warmup_epochs": 1},
        "finetune": {"10pct": {"drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.2}},
        "semi": {"epochs": 2, "warmup_epochs": 1},
    }
    base = merged(merged(yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text()), SMALL), changes)
    found: dict[str, dict[str, bytes]] = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        (folder / "pictures").mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), 80 * i).save(folder / "pictures" / f"{i}.png")
        monkeypatch.chdir(folder)
        values = merged(base, {"run": {"device": device, "precision": "fp32", "online_knn": {"every_epochs": 1}}})
        Path("params.yaml").write_text(yaml.safe_dump(values))
        augmented = merged(values, {"linear": {"method": "augmented", "base_lrs": [0.1], "weight_decays": [0]}})
        Path("params-augmented.yaml").write_text(yaml.safe_dump(augmented))
        with pretended_card() if device == "cuda" else nullcontext() as card:
            for command in COMMANDS:
                before = (card.operations, card.products) if card else (0, 0)
                result = CliRunner().invoke(app, command)
                assert result.exit_code == 0, (device, command, result.output, result.exception)
                if card is not None:
                    assert (card.operations == before[0]) == (command[0] in WITHOUT_DEVICE), command
                    assert card.products == before[1] or command[0] in WITH_PRODUCTS_OF_THE_CPU, command
        files = {str(f.relative_to(folder)): f for pattern in WRITTEN for f in folder.glob(pattern)}
        found[device] = {name: file.read_bytes() for name, file in files.items()}
    assert len(found["cpu"]) > 20
    assert [name for name, of_cpu in found["cpu"].items() if found["cuda"].get(name) != of_cpu] == []
