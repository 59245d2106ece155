"""`docs/minimal.md`, the method written a second time in plain torch and timm, agrees with `lgp` step by step."""

import re
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, SMALL, Silent, merged
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgp.compute.randomness import generator
from lgp.data.labels import LabelledImages
from lgp.data.views import ColorJitter, color_jitter
from lgp.evaluate.few_labels import evaluate_fewshot
from lgp.features.cache import Features
from lgp.models.encoder_folder import save_encoder
from lgp.params.evaluate import FeatureParams
from lgp.params.file import Params
from lgp.pretrain.arm import Session
from lgp.pretrain.graft import pretrain_graft
from lgp.pretrain.mim import pretrain_mim
from lgp.training.loop import Trainer
from lgp.training.resume_states import StateStore

PAGE = ROOT / "docs" / "minimal.md"
BATCH, PATCHES = 64, 16
SHORT = {"epochs": 4, "warmup_epochs": 1}  # of three batches each
STEPS, WARMUP = 12, 3
PAPERS_RULE = {"stage_lr": {"base_lrs": [8e-4, 8e-4, 8e-3]}}
CLOSE = 1e-6  # of a loss; the difference is 1e-8


@dataclass
class Run:
    """A pre-training by `lgp`: the weights before its first step, its batches, the loss of every step."""

    weights: dict[str, Tensor]
    crops: Any  # step → (B, V, 1, 8, 8) uint8
    losses: list[float]


@dataclass
class Trained:
    """MIM by `lgp`, the encoder that came out, and the graft on it."""

    mim: Run
    encoder: VisionTransformer
    graft: Run


def program() -> str:
    """Join the code blocks of the page."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def minimal() -> Any:
    """The program of the page, imported."""
    module = types.ModuleType("minimal")
    exec(compile(program(), PAGE.name, "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def digits() -> Params:
    """The preset with the paper's rule of rates, shortened."""
    preset = yaml.safe_load((ROOT / "presets" / "digits-paper.yaml").read_text())
    changes = {"data": SMALL["data"], "mim": SHORT, "graft": SHORT | PAPERS_RULE, "run": SMALL["run"]}
    return Params.model_validate(merged(preset, changes))


@pytest.fixture(scope="module")
def trained(digits: Params, prepared: LabelledImages, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Both pre-trainings by `lgp`, in double precision.

    In single precision the graft's losses part at the fourth step: after so few steps of MIM the class token hardly
    varies between images, and BatchNorm multiplies what rounding did.
    """
    folder, runs, fit, normalize = tmp_path_factory.mktemp("lgp"), [], Trainer.fit, LabelledImages.normalize

    def fit_recorded(trainer: Trainer) -> Any:
        trainer.model.double()
        weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        run, loss_of = Run(weights, trainer.crops, []), trainer.loss_of

        def loss_recorded(batch: Any) -> Tensor:
            loss = loss_of(batch)
            run.losses.append(loss.item())
            return loss

        trainer.loss_of = loss_recorded
        runs.append(run)
        return fit(trainer)

    def session(arm: str) -> Session:
        return Session(prepared, digits, StateStore(folder / arm, "code"), Silent())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", fit_recorded)
        patch.setattr(LabelledImages, "normalize", lambda data, images: normalize(data, images).double())
        encoder = pretrain_mim(session("mim")).model.encoder.float()
        save_encoder(folder / "encoder", encoder, digits.model, digits.data, prepared.normalization, {"metrics": {}})
        pretrain_graft(session("graft"), folder / "encoder", folder / "encoder")
    return Trained(runs[0], encoder, runs[1])


@pytest.fixture(scope="module")
def pixels(prepared: LabelledImages) -> Tensor:
    """Two pixels that have the mean and the deviation of all training images, to six digits as `lgp` keeps them."""
    (mean,), (std,) = prepared.mean, prepared.std
    return torch.tensor([mean - std, mean + std], dtype=torch.float64)


def load(module: nn.Module, weights: dict[str, Tensor], prefix: str = "") -> None:
    """Load the weights whose names begin with `prefix`; the fixed positions stay the module's own."""
    chosen = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix) and "pos_embed" not in k}
    missing, unexpected = module.load_state_dict(chosen, strict=False)
    assert not unexpected
    assert all("pos_embed" in name for name in missing)


def test_page_is_short_and_without_lgp() -> None:
    lines = PAGE.read_text().splitlines()
    assert len(lines) <= 150
    assert max(len(line) for line in lines) <= 120
    assert "lgp" not in program()


def test_mim_has_the_losses_of_the_page(minimal: Any, trained: Trained, pixels: Tensor, digits: Params) -> None:
    run = trained.mim

    def batch(step: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(BATCH, PATCHES, generator=generator(digits.seed, "mim/mask", step))
        return minimal.normalize(run.crops[step][:, 0].float() / 255, pixels).double(), noise

    mae = minimal.MAE().double()
    load(mae, run.weights)
    losses = minimal.train_mim(mae, (batch(step) for step in range(STEPS)), STEPS, WARMUP)
    assert run.losses == pytest.approx(losses, rel=CLOSE)
    assert losses[-1] < 0.6 * losses[0]


def test_graft_has_the_losses_of_the_page(minimal: Any, trained: Trained, pixels: Tensor, digits: Params) -> None:
    run, params = trained.graft, digits.contrastive.views

    def view(step: int, number: int) -> Tensor:
        colours = ColorJitter.draw(BATCH, number, params, generator(digits.seed, "graft/colours", step, number))
        images = color_jitter(run.crops[step][:, number].float() / 255, colours, params)
        return minimal.normalize(images, pixels).double()

    assert not torch.equal(view(0, 0), view(0, 1))
    encoder = minimal.MAE().encoder
    load(encoder, trained.encoder.state_dict())
    moco = minimal.MoCo(encoder).double()
    for head in ("projector", "predictor"):
        load(moco.get_submodule(head), run.weights, f"{head}.")
    load(moco.momentum_projector, run.weights, "projector.")
    losses = minimal.train_graft(moco, ((view(step, 0), view(step, 1)) for step in range(STEPS)), STEPS, WARMUP)
    assert run.losses == pytest.approx(losses, rel=CLOSE)


def test_first_weights_have_the_deviation_of_the_page(minimal: Any, trained: Trained) -> None:
    mae = minimal.MAE()
    moco = minimal.MoCo(mae.encoder)
    heads = [(name, p) for name, p in moco.named_parameters() if name.startswith(("projector", "predictor"))]
    for run, drawn in ((trained.mim, [*mae.named_parameters()]), (trained.graft, heads)):
        for name, parameter in drawn:
            expected, given = parameter.detach(), run.weights[name].float()
            if given.std() > 0 and "pos_embed" not in name:
                expected, given = expected.std(), given.std()
            # five standard errors
            assert torch.allclose(given, expected, rtol=5 / parameter.numel() ** 0.5), name


def test_images_are_normalised_as_on_the_page(minimal: Any, prepared: LabelledImages) -> None:
    images = prepared.whole(prepared.pretraining_ids)
    expected = minimal.normalize(images.double() / 255, images.double() / 255)
    assert torch.allclose(prepared.normalize(images).double(), expected, rtol=0, atol=1e-5)


def test_few_labels_give_the_accuracy_of_the_page(minimal: Any, prepared: LabelledImages, digits: Params) -> None:
    ids = {split: prepared.ids(split) for split in ("train", "val", "test")}
    x = {split: prepared.whole(of_split).flatten(1).float() for split, of_split in ids.items()}
    y = {split: prepared.labels[of_split] for split, of_split in ids.items()}
    subsets = prepared.subsets("1pct")
    arrays = {split: pixels.numpy() for split, pixels in x.items()}
    features = Features(arrays | {"unlabeled": arrays["train"][:0]}, y, ids, 10, {}, FeatureParams())
    outcome = evaluate_fewshot(features, subsets, digits.fewshot)
    rows = [ids["train"].searchsorted(few) for few in subsets]
    accuracy = minimal.accuracy(nn.Identity(), x["train"], y["train"], x["test"], y["test"], rows)
    assert outcome.metrics["test/top1"] == pytest.approx(accuracy, abs=1e-3)


def test_program_prints_accuracies(minimal: Any, capsys: pytest.CaptureFixture[str]) -> None:
    minimal.main(mim_epochs=1, graft_epochs=1)
    printed = capsys.readouterr().out
    accuracies = [float(value) for value in re.findall(r"([\d.]+) %", printed)]
    assert [line.split(",")[0] for line in printed.splitlines()] == ["MIM", "graft"]
    assert len(accuracies) == 4
    assert all(0 < accuracy <= 100 for accuracy in accuracies)
