"""What each arm hands to the training that all arms share: weights, batches, loss and rates. Nothing is trained."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from arrivals import SETTINGS, saved_encoder
from conftest import Silent, merged
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgp.compute.randomness import Stream, generator, seeded
from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch, CropDataset, MultiCropDataset
from lgp.data.views import ColorJitter, color_jitter
from lgp.errors import LgpError
from lgp.models.contrastive import build_contrastive
from lgp.models.encoder_folder import load_encoder
from lgp.models.joint import Joint
from lgp.models.mae import MAE, random_masking
from lgp.models.refine import Drawn
from lgp.models.vit import View, build_encoder, init_encoder_as_mae, init_encoder_as_moco
from lgp.params.file import Params
from lgp.params.pretrain import SmallViews, TrainingParams, ViewParams
from lgp.pretrain import cl, controls, mim
from lgp.pretrain.arm import Objective, Pretrained, Session
from lgp.pretrain.cl import pretrain_cl
from lgp.pretrain.controls import pretrain_joint, pretrain_reverse
from lgp.pretrain.graft import pretrain_graft
from lgp.pretrain.mim import pretrain_mim
from lgp.training.resume_states import StateStore

ARMS = ("mim", "cl", "graft", "joint", "reverse")
MASK = {"contrastive": {"mask_ratio": 0.5}}
STEP, SEED = 5, 4


@dataclass(frozen=True)
class Handed:
    """The arguments of `fit_arm`."""

    objective: Objective
    rates: dict[str, float]
    betas: tuple[float, float]
    stage: TrainingParams
    session: Session


class Project:
    """Two encoders, and parameters of which every arm has its own numbers."""

    def __init__(self, folder: Path, values: dict[str, Any], prepared: LabelledImages) -> None:
        own = {section: of for section, of in SETTINGS.items() if section not in ("data", "labels", "few_labels")}
        self.values, self.data, self.folder = merged(values, own | {"seed": SEED}), prepared, folder
        params = self.params()
        self.mim = saved_encoder(folder / "mim" / "encoder", params, prepared, 1)
        self.cl = saved_encoder(folder / "cl" / "encoder", params, prepared, 2)

    def params(self, **changes: Any) -> Params:
        return Params.model_validate(merged(self.values, changes))

    def session(self, params: Params) -> Session:
        return Session(self.data, params, StateStore(self.folder / "state", "code"), Silent())

    def handed(self, arm: str, **changes: Any) -> Handed:
        """Return what an arm hands over."""
        session, given = self.session(self.params(**changes)), list[tuple[Any, ...]]()
        pretrain: dict[str, Callable[..., Pretrained]] = {
            "mim": pretrain_mim, "cl": pretrain_cl, "joint": pretrain_joint,
            "graft": lambda s: pretrain_graft(s, self.mim, self.cl), "reverse": lambda s: pretrain_reverse(s, self.cl),
        }  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            for module in (cl, mim, controls):
                patch.setattr(
                    module, "fit_arm", lambda *args: given.append(args) or SimpleNamespace(model=args[0].model)
                )
            pretrain[arm](session)
        (args,) = given
        return Handed(*args)


@pytest.fixture
def project(tmp_path: Path, values: dict[str, Any], prepared: LabelledImages) -> Project:
    return Project(tmp_path, values, prepared)


def autoencoder(encoder: VisionTransformer, params: Params) -> MAE:
    of = params.mim
    return MAE(encoder, of.mask_ratio, of.decoder_width, of.decoder_depth, of.decoder_heads)


def new_encoder(params: Params, init: Callable[[VisionTransformer], None]) -> VisionTransformer:
    encoder = build_encoder(params.model, params.data)
    init(encoder)
    return encoder


def built(arm: str, project: Project, params: Params) -> nn.Module:
    """Build the model of an arm, step by step. The order decides the random weights."""
    with seeded(SEED, f"{arm}/init"):
        if arm == "mim":
            return autoencoder(new_encoder(params, init_encoder_as_mae), params)
        if arm == "reverse":
            return autoencoder(load_encoder(project.cl), params)
        if arm == "graft":
            return build_contrastive(load_encoder(project.mim), params.contrastive)
        encoder = new_encoder(params, init_encoder_as_moco)
        contrastive = build_contrastive(encoder, params.contrastive)
        return contrastive if arm == "cl" else Joint(contrastive, autoencoder(encoder, params))


@pytest.mark.parametrize("arm", ARMS)
def test_weights_are_drawn_from_the_seed_and_the_arms_name_alone(arm: str, project: Project) -> None:
    torch.manual_seed(99)
    found, expected = (
        model.state_dict() for model in (project.handed(arm).objective.model, built(arm, project, project.params()))
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_new_upper_blocks_are_drawn_with_the_heads(project: Project) -> None:
    """The policy `scratch_end`: the new encoder comes before the heads."""
    params = project.params(graft={"policy": ["stage_lr", "scratch_end"]})
    found = project.handed("graft", graft={"policy": ["stage_lr", "scratch_end"]}).objective.model.state_dict()
    with seeded(SEED, "graft/init"):
        encoder = load_encoder(project.mim)
        state = encoder.state_dict()
        anew = new_encoder(params, init_encoder_as_moco).state_dict()
        encoder.load_state_dict(
            {n: anew[n] if n.startswith(("blocks.1", "blocks.2", "norm.")) else state[n] for n in state}
        )
        expected = build_contrastive(encoder, params.contrastive).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


BATCH = {"mim": 8, "cl": 10, "graft": 16, "joint": 12, "reverse": 14}


@pytest.mark.parametrize("arm", ARMS)
def test_batches_are_of_the_arms_views_size_and_stream(arm: str, project: Project) -> None:
    masked, params = arm in ("mim", "reverse"), project.params()
    views = ViewParams(crop_scale_min=0.5, flip_p=0.5, interpolation="bicubic") if masked else params.contrastive.views
    objective = project.handed(arm).objective
    expected = CropDataset(project.data, views, 1 if masked else 2, BATCH[arm], Stream(SEED, arm))
    assert torch.equal(objective.crops[STEP], expected[STEP])
    assert objective.crops.ids.tolist() == project.data.pretraining_ids.tolist()
    assert (objective.name, objective.crops.batch_size) == (arm, BATCH[arm])


@pytest.mark.parametrize("arm", ["cl", "graft", "joint"])
def test_small_views_are_cropped_for_every_contrastive_arm(arm: str, project: Project) -> None:
    small = SmallViews(count=2, size=4, crop_scale_min=0.2)
    crops = project.handed(arm, contrastive={"small_views": small.model_dump()}).objective.crops
    views = project.params().contrastive.views
    expected = MultiCropDataset(project.data, views, 2, BATCH[arm], Stream(SEED, arm), small)
    assert torch.equal(crops[STEP], expected[STEP])


@pytest.mark.parametrize("arm", ARMS)
def test_rates_betas_and_recipe_are_the_arms(arm: str, project: Project) -> None:
    handed = project.handed(arm)
    model, params, scale = handed.objective.model, handed.session.params, BATCH[arm] / 256
    assert handed.betas == ((0.9, 0.95) if arm in ("mim", "reverse") else (0.9, 0.999))
    assert handed.stage is getattr(params, arm)
    assert handed.session.data is project.data
    assert handed.rates.keys() == {name for name, _ in model.named_parameters()}
    thirds = {"graft": (0.003, 0.006, 0.03), "reverse": (0.005, 0.01, 0.05)}.get(arm)
    for name, rate in handed.rates.items():
        if thirds:
            learner = name.removeprefix("momentum_")
            block = int(learner.split(".")[2]) if learner.startswith("encoder.blocks.") else None
            lowest = learner.startswith("encoder.") and not learner.startswith("encoder.norm")
            assert rate == pytest.approx(scale * thirds[block if block is not None else 0 if lowest else 2]), name
        else:
            assert rate == pytest.approx(scale * {"mim": 0.01, "cl": 0.02, "joint": 0.04}[arm])


def part_of(objective: Objective, rows: slice) -> Batch:
    """Return some rows of a step's batch."""
    return Batch(objective.crops[STEP][rows], STEP, rows, objective.crops.batch_size)


ROWS = slice(2, 6)


@pytest.mark.parametrize("arm", ["mim", "reverse"])
def test_masked_loss_is_of_the_rows_with_the_noise_of_the_whole_batch(arm: str, project: Project) -> None:
    objective = project.handed(arm).objective
    noise = torch.rand(BATCH[arm], 16, generator=generator(SEED, f"{arm}/mask", STEP))
    batch = part_of(objective, ROWS)
    expected = objective.model(project.data.normalize(batch.crops[:, 0]), noise[ROWS])
    assert torch.equal(objective.loss_of(batch), expected)


def shown(session: Session, stream: str, crops: Tensor) -> tuple[View, View]:
    """Return the views of the rows `ROWS` of crops (B, 2, C, S, S): colours and masks are drawn for the whole batch."""
    params, views, size = session.params.contrastive, [], len(crops)
    for view in (0, 1):
        jitter = ColorJitter.draw(size, view, params.views, generator(SEED, f"{stream}/colours", STEP, view))
        coloured = color_jitter(crops[ROWS, view].float() / 255, jitter[ROWS], params.views)
        noise = torch.rand(size, 16, generator=generator(SEED, f"{stream}/mask", STEP, view))
        ids_keep = random_masking(noise[ROWS], 0.5)[0] if params.mask_ratio else None
        views.append(View(session.data.normalize(coloured), ids_keep))
    return views[0], views[1]


def test_contrastive_loss_is_of_two_coloured_masked_views_and_the_progress(project: Project) -> None:
    for arm, changes in (("cl", MASK), ("cl", {}), ("graft", MASK), ("joint", MASK)):
        handed = project.handed(arm, **changes)
        objective = handed.objective
        model = objective.model.contrastive if isinstance(objective.model, Joint) else objective.model
        total = handed.stage.epochs * objective.crops.steps_per_epoch
        expected = copy.deepcopy(model)(*shown(handed.session, arm, objective.crops[STEP]), STEP / total)
        loss, batch = objective.loss_of(part_of(objective, ROWS)), part_of(objective, ROWS)
        if isinstance(objective.model, Joint):  # masked modelling sees the first crop without colours
            noise = torch.rand(BATCH[arm], 16, generator=generator(SEED, "joint/mim/mask", STEP))[ROWS]
            expected = expected + 0.7 * objective.model.mae(project.data.normalize(batch.crops[:, 0]), noise)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5), arm


def test_progress_ends_at_one_however_many_steps_follow(project: Project) -> None:
    objective, given = project.handed("cl").objective, list[float]()
    objective.model.forward = lambda *args: given.append(args[2]) or torch.zeros(())  # type: ignore[assignment,func-returns-value]
    total = 3 * objective.crops.steps_per_epoch
    for step in (0, total - 1, total, total + 5):
        objective.loss_of(Batch.whole(objective.crops[0], step))
    assert given == pytest.approx([0, 1 - 1 / total, 1, 1])


def test_without_heads_to_warm_and_without_a_penalty_nothing_of_both_is_handed_over(project: Project) -> None:
    for arm in ARMS:
        objective = project.handed(arm).objective
        assert (objective.head_warmup, objective.regularized) == (None, frozenset())


def test_heads_are_warmed_on_draws_of_their_own_over_their_epochs(project: Project) -> None:
    handed = project.handed("graft", graft={"head_warmup_epochs": 7}, **MASK)
    warmup, objective = handed.objective.head_warmup, handed.objective
    assert warmup is not None
    assert warmup.epochs == 7
    own = CropDataset(project.data, handed.session.params.contrastive.views, 2, 16, Stream(SEED, "graft/heads"))
    assert torch.equal(warmup.crops[STEP], own[STEP])
    views = shown(handed.session, "graft/heads", own[STEP])
    expected = copy.deepcopy(objective.model)(*views, STEP / (7 * own.steps_per_epoch))
    batch = Batch(own[STEP][ROWS], STEP, ROWS, 16)
    assert warmup.loss_of(batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_l1_is_added_to_the_loss_with_its_weight_and_names_what_it_holds(project: Project) -> None:
    policy = {"policy": ["stage_lr", "l1"], "l1": {"lower_blocks": 1, "weight": 0.25}, "head_warmup_epochs": 2}
    handed, plain = project.handed("graft", graft=policy), project.handed("graft")
    encoder = handed.objective.model.encoder
    lower = ("cls_token", "blocks.0.")  # the patch embedding is frozen
    held = {f"encoder.{name}" for name, _ in encoder.named_parameters() if name.startswith(lower)}
    assert handed.objective.regularized == held
    assert handed.objective.head_warmup is not None
    with torch.no_grad():
        for of in (handed, plain):
            of.objective.model.encoder.cls_token.add_(0.5)
    batch = part_of(plain.objective, ROWS)
    added = handed.objective.loss_of(batch) - plain.objective.loss_of(batch)
    assert added.item() == pytest.approx(0.25 * 0.5 * 16, rel=1e-4)


@pytest.mark.parametrize("arm", ["joint", "reverse"])
def test_control_without_its_section_is_refused(arm: str, project: Project) -> None:
    project.values[arm] = None
    with pytest.raises(LgpError, match=f"there is no section {arm} in the parameters: add it"):
        project.handed(arm)


REFINE = {"contrastive": {"objective": "refine"}}


@pytest.mark.parametrize("heads", [False, True])
def test_refine_is_given_the_images_of_the_rows_a_draw_of_each_and_the_steps(heads: bool, project: Project) -> None:
    handed = project.handed("graft", graft={"head_warmup_epochs": 7}, **REFINE)
    objective, given = handed.objective, list[Drawn]()
    objective.model.forward = lambda *args: given.append(args[2]) or torch.zeros(())  # type: ignore[assignment,func-returns-value]
    training = objective.head_warmup if heads else objective
    assert training is not None
    training.loss_of(Batch(training.crops[STEP][ROWS], STEP, ROWS, 16))
    (drawn,) = given
    assert drawn.ids.tolist() == training.crops.ids_of(STEP)[ROWS].tolist()
    assert drawn.steps == (7 if heads else handed.stage.epochs) * objective.crops.steps_per_epoch
    whole = torch.rand(2, 16, generator=generator(SEED, "graft/neighbours", STEP))
    assert torch.equal(drawn.neighbour, torch.zeros(2, 4) if heads else whole[:, ROWS])  # heads: the nearest


def test_refine_in_joint_is_given_its_own_images_and_steps(project: Project) -> None:
    handed = project.handed("joint", **REFINE)
    objective, given = handed.objective, list[Drawn]()
    objective.model.contrastive.forward = lambda *args: given.append(args[2]) or torch.zeros(())  # type: ignore[assignment,func-returns-value,union-attr]
    objective.loss_of(part_of(objective, ROWS))
    (drawn,) = given
    assert drawn.ids.tolist() == objective.crops.ids_of(STEP)[ROWS].tolist()
    assert drawn.steps == handed.stage.epochs * objective.crops.steps_per_epoch


@pytest.mark.parametrize(("accumulate", "parts"), [({}, 1), ({"joint": 3, "mim": 2}, 3)])
def test_joint_cuts_its_batch_into_its_own_parts(accumulate: dict[str, int], parts: int, project: Project) -> None:
    objective, cut = project.handed("joint", run={"accumulate": accumulate}).objective, list[int]()
    assert objective.model.contrastive.parts == parts  # type: ignore[union-attr]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controls, "mean_in_parts", lambda _, parts: cut.append(len(parts)) or torch.zeros(()))  # type: ignore[func-returns-value]
        objective.loss_of(Batch.whole(objective.crops[STEP], STEP))
    assert cut == [parts]


@pytest.mark.parametrize("arm", ["cl", "graft", "joint"])
def test_queue_of_refine_is_bounded_by_the_images(arm: str, project: Project) -> None:
    model = project.handed(arm, **REFINE).objective.model
    refine = model.contrastive if isinstance(model, Joint) else model
    assert [len(head.queue.ids) for head in refine._heads()] == [len(project.data.pretraining_ids) // 2]  # type: ignore[union-attr,operator]
