"""Checkpoints of other projects: how they name their tensors, and what they tell of the encoder."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor

from lgp.data.normalization import Normalization, foreign_normalization
from lgp.errors import LgpError, one_line
from lgp.models.checkpoint_files import object_beside, read_tensors, shown, unwrapped
from lgp.models.files import CONFIG, is_remote, weights_at
from lgp.models.renaming import Rename, Renamed, by_timm, from_hugging_face
from lgp.models.vit import ARCHITECTURE
from lgp.params.architecture import architecture
from lgp.params.model import NUMBERS

Tensors = Mapping[str, Tensor]

DECODER = re.compile(r"(decoder_|mask_token)")
# LGP's classifier for 10 % of labels has two layers; MAE's linear probe has a BatchNorm before its layer
CLASSIFIER = re.compile(r"(head|head_dist|fc|head\.0|head\.1)\.\w+$")
# without these an encoder is another one, whatever else fits
VITAL = re.compile(r".*(pos_embed|cls_token|reg_token|register_tokens|norm_pre|ls[12]\.gamma|gamma_[12]|lambda_?[12])")
IMAGENET = Normalization(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
CLIP = Normalization(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
# width → heads of the sizes that a project published; no tensor shows the number
MAE_HEADS = {768: 12, 1024: 16, 1280: 16}
MOCO_HEADS = {384: 12, 768: 12, 1024: 16}
TIMM_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16}
PREPROCESSOR = "preprocessor_config.json"
POOLING = "pooling by attention"  # the reason to leave out a part of SigLIP
# the word for a width in timm's names
SIZES = {192: "tiny", 256: "xsmall", 384: "small", 512: "medium", 768: "base", 1024: "large", 1152: "so400m"}
SIZES |= {1280: "huge", 1408: "giant", 1536: "giant", 1664: "gigantic"}
PRETRAINED_CFG = "pretrained_cfg"  # timm's name for the record that holds an encoder's mean and std


@dataclass(frozen=True)
class Layout:
    """How a project names its tensors.

    Attributes:
        name: name of the project, for messages.
        container: the key of the tensors in the file, None if the file is the container.
        marks: names of tensors that show the layout.
        left_out: returns the reason to leave out a tensor, None if the encoder should have it.
        normalization: of the project's images, None if its encoders differ in it.
        heads: width → attention heads of the project's sizes.
        encoder: prefix of the names of the encoder's tensors.
        projector: prefix of the names of the projector's tensors, None without a projector.
        rename: gives the tensors timm's names, None if they have them.
    """

    name: str
    container: str | None
    marks: tuple[str, ...]
    left_out: Callable[[str], str | None]
    normalization: Normalization | None
    heads: Mapping[int, int]
    encoder: str = ""
    projector: str | None = None
    rename: Rename | None = None


def _moco_left_out(name: str) -> str | None:
    if name.startswith("module.momentum_encoder."):
        return "momentum encoder"
    return "predictor" if name.startswith("module.predictor.") else None


def _plain_left_out(name: str) -> str | None:
    if DECODER.match(name):
        return "decoder"
    if name.startswith("attn_pool."):
        return POOLING
    return "classifier" if CLASSIFIER.match(name) else None


FIRST_NORM = "blocks.0.norm1.weight"
LAYOUTS = (
    Layout(
        "MoCo v3 / LGP",
        "state_dict",
        (f"module.base_encoder.{FIRST_NORM}",),
        _moco_left_out,
        IMAGENET,
        MOCO_HEADS,
        encoder="module.base_encoder.",
        projector="module.base_encoder.head.",
    ),
    Layout("LGP (linear probe)", "backbone_state_dict", (FIRST_NORM,), _plain_left_out, IMAGENET, MOCO_HEADS),
    Layout("MAE", "model", (FIRST_NORM,), _plain_left_out, IMAGENET, MAE_HEADS),
    Layout("timm (in a training checkpoint)", "state_dict", (FIRST_NORM,), _plain_left_out, None, TIMM_HEADS),
    Layout(
        "DINOv2",
        None,
        (FIRST_NORM, "mask_token", "blocks.0.ls1.gamma"),
        _plain_left_out,
        IMAGENET,
        TIMM_HEADS,
        rename=by_timm,
    ),
    Layout("timm or lgp", None, (FIRST_NORM,), _plain_left_out, None, TIMM_HEADS),
    Layout("CLIP", None, ("visual.class_embedding",), _plain_left_out, CLIP, TIMM_HEADS, rename=by_timm),
    Layout("CLIP", "state_dict", ("visual.class_embedding",), _plain_left_out, CLIP, TIMM_HEADS, rename=by_timm),
    *(
        Layout(
            "Hugging Face's ViT",
            None,
            (f"{prefix}encoder.layer.0.layernorm_before.weight",),
            _plain_left_out,
            None,
            TIMM_HEADS,
            rename=from_hugging_face,
        )
        for prefix in ("vit.", "")
    ),
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of another project.

    Attributes:
        path: of the file.
        layout: how the project names its tensors.
        tensors: of the file, in timm's names behind the prefix of the layout.
        renamed: the names that they had in the file, and what has none of timm's.
        records: the file, and the configurations beside it: path → content.
    """

    path: Path
    layout: Layout
    tensors: Tensors
    renamed: Renamed
    records: Mapping[Path, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Read a file, or the weights in a folder, or fetch `timm:NAME` or `hf-hub:NAME`. Recognise the layout.

        Raises:
            LgpError: it is not there, cannot be fetched or read without running code, or has no known layout.
        """
        if is_remote(path):
            content: Any = _fetched(str(path))
            records = {path: content}
        else:
            path = weights_at(path)
            content = read_tensors(path)
            beside = {path.with_name(name): object_beside(path.with_name(name)) for name in (CONFIG, PREPROCESSOR)}
            records = {path: content, **beside}
        layout, tensors = recognise(content, path)
        activation = records.get(path.with_name(CONFIG), {}).get("hidden_act", "gelu")
        if layout.rename is from_hugging_face and activation != "gelu":
            raise LgpError(f"{path} ({layout.name}) has the activation {shown(activation)}: only gelu is taken")
        try:
            renamed = layout.rename(tensors) if layout.rename else Renamed(dict(tensors))
        except LgpError as e:
            raise LgpError(f"{path} ({layout.name}): {e}") from None
        return cls(path, layout, renamed.tensors, renamed, records)

    def numbers(self) -> dict[str, int]:
        """Return depth, and width, patch size and channels where tensors show them."""
        prefix = self.layout.encoder
        blocks = re.compile(rf"{re.escape(prefix)}blocks\.(\d{{1,4}})\.")
        numbers = [int(found[1]) for name in self.tensors if (found := blocks.match(name))]
        patch = self.tensors.get(f"{prefix}patch_embed.proj.weight")
        depth = {"depth": max(numbers, default=-1) + 1}
        if patch is None or patch.ndim != 4:
            return depth
        return {"width": len(patch)} | depth | {"patch_size": patch.shape[2], "channels": patch.shape[1]}

    def dimensions(self) -> str:
        """Return the dimensions of the ViT in the file as text."""
        numbers = self.numbers()
        if "width" not in numbers:
            return f"The file holds a ViT of depth {numbers['depth']}"
        return (
            f"The file holds a ViT of width {numbers['width']}, depth {numbers['depth']}, "
            f"patch {numbers['patch_size']}, {numbers['channels']} channels"
        )

    def heads(self) -> tuple[Any, str]:
        """Return the number of attention heads, None if nothing tells it, and what tells it."""
        for source, record in self.records.items():
            args = record.get("model_args") if isinstance(record, Mapping) else None
            if isinstance(args, Mapping) and "num_heads" in args:
                return args["num_heads"], str(source)
            if source.name == CONFIG and "num_attention_heads" in record:
                return record["num_attention_heads"], str(source)
        width = self.numbers().get("width", 0)
        return self.layout.heads.get(width), f"the ViT of width {width} of {self.layout.name}"

    def architecture(self) -> str | None:
        """Return timm's name of the architecture without the name of weights, None where nothing tells one."""
        named = next((record["architecture"] for record in self.records.values() if "architecture" in record), None)
        return named.partition(".")[0] if isinstance(named, str) else None

    def normalization(self) -> tuple[Normalization, str]:
        """Return the normalization of the images that the encoder was trained on, and where it is from.

        `lgp export` puts it into the file. Old configurations of timm have no `pretrained_cfg` of their own. Hugging
        Face has it in a file for the preprocessor.

        Raises:
            LgpError: nothing says it.
        """
        for source, record in self.records.items():
            own = record.get(PRETRAINED_CFG, record if source.name == CONFIG else None)
            if source.name == PREPROCESSOR:
                own = {key: record.get(f"image_{key}") for key in ("mean", "std")}
            if isinstance(own, Mapping) and None not in (own.get("mean"), own.get("std")):
                return foreign_normalization(own, source), str(source)
        if self.layout.normalization is not None:
            return self.layout.normalization, f"the code of {self.layout.name}"
        raise LgpError(
            f"neither {self.path} ({self.layout.name}) nor a {CONFIG} beside it says by which mean and standard "
            "deviation its images were normalised: give one value a channel, e.g. --mean 0.485,0.456,0.406 "
            "--std 0.229,0.224,0.225 (many ViTs of timm have 0.5,0.5,0.5 for both)"
        )


def _fetched(source: str) -> dict[str, Any]:
    """Fetch an encoder by timm, which keeps it. Return its tensors, its normalization and its heads.

    Raises:
        LgpError: timm cannot fetch it, or it is no plain ViT.
    """
    try:
        model = timm.create_model(source.removeprefix("timm:"), pretrained=True, num_classes=0)
    except Exception as e:  # noqa: BLE001 - of the network, of the hub, of timm
        raise LgpError(
            f"{source} cannot be fetched ({one_line(e)[:200]}): check the name and the network. Where there is no "
            "network, fetch the file elsewhere and give its path"
        ) from None
    name, cfg = model.pretrained_cfg["architecture"], model.pretrained_cfg
    try:
        heads = architecture(name).heads
    except ValueError as e:
        raise LgpError(f"{source}: {e}") from None
    return {
        **model.state_dict(),
        PRETRAINED_CFG: {"mean": cfg["mean"], "std": cfg["std"]},
        "model_args": {"num_heads": heads},
        "architecture": name,
    }


def recognise(content: Any, path: Path) -> tuple[Layout, Tensors]:
    """Return a file's layout, by its keys, and its tensors. Raise `LgpError` for an unknown layout."""
    for layout in LAYOUTS:
        inner = content.get(layout.container) if isinstance(content, dict) and layout.container else content
        for tensors in (inner, unwrapped(inner)) if isinstance(inner, dict) else ():
            if all(name in tensors for name in layout.marks):
                return layout, {n: t for n, t in tensors.items() if isinstance(t, Tensor) and isinstance(n, str)}
    raise LgpError(
        f"{path} has no known layout (its keys begin with {_first_keys(content)}): expected a ViT of "
        f"{', '.join(dict.fromkeys(layout.name for layout in LAYOUTS))}"
    )


def _first_keys(content: Any) -> str:
    """Return the first keys of a file, and of the containers in it, as text."""
    if not isinstance(content, dict):
        return type(content).__name__
    keys = [
        f"{shown(key)} ({', '.join(map(shown, list(value)[:2]))}, …)"
        if isinstance(value, dict) and value
        else shown(key)
        for key, value in list(content.items())[:5]
    ]
    return ", ".join(keys) or "none"


def model_of(path: Path) -> dict[str, Any]:
    """Return the section `model` that a checkpoint needs: its four numbers, and the name of timm's ViT if it has one.

    Raises:
        LgpError: it cannot be read, no ViT of timm has its tensors, several have them, or nothing tells its heads.
    """
    checkpoint = Checkpoint.read(path)
    numbers, (heads, _) = checkpoint.numbers(), checkpoint.heads()
    width, depth, patch = (numbers.get(name, 0) for name in ("width", "depth", "patch_size"))
    if not (width and depth and patch) or f"{checkpoint.layout.encoder}pos_embed" not in checkpoint.tensors:
        raise LgpError(f"{path} has no patch embedding and positions, which tell the dimensions: set `model` yourself")
    if _fits(checkpoint, ARCHITECTURE, embed_dim=width, depth=depth, patch_size=patch, num_heads=1):
        if not isinstance(heads, int) or heads < 1 or width % heads:
            raise LgpError(
                f"nothing tells the number of attention heads of {path}: set `model` to patch_size {patch}, width "
                f"{width}, depth {depth} and its heads (most ViTs have width / 64), and import it without --write"
            )
        return {"timm": None, "patch_size": patch, "width": width, "depth": depth, "heads": int(heads)}
    named = checkpoint.architecture()
    pattern = f"vit_{SIZES.get(width, '*')}_patch{patch}*"
    names = [named] if named else timm.list_models(pattern, module="vision_transformer")
    fitting = [name for name in names if _is_plain(name) and _fits(checkpoint, name)]
    # names that differ only in the size of images, at their end, are one architecture
    if len({re.sub(r"_\d+$", "", name) for name in fitting}) != 1:
        several = (
            f"several ViTs of timm have the tensors of {path} ({', '.join(fitting[:8])}): look up which it is, and"
        )
        none = f"no plain ViT of timm ({named or pattern}) has the tensors of {path}. {checkpoint.dimensions()}:"
        raise LgpError(f"{several if fitting else none} set model.timm yourself")
    return {"timm": fitting[0]} | {name: getattr(architecture(fitting[0]), name) for name in NUMBERS}


def _fits(checkpoint: Checkpoint, name: str, **dimensions: int) -> bool:
    """Return whether a plain ViT of timm has the tensors of a checkpoint, whatever the number of its patches."""
    layout, channels = checkpoint.layout, checkpoint.numbers()["channels"]
    with torch.device("meta"):  # shapes without memory
        model = timm.create_model(name, num_classes=0, in_chans=channels, **dimensions)
    theirs = {
        tensor.removeprefix(layout.encoder): value.shape
        for tensor, value in checkpoint.tensors.items()
        if tensor.startswith(layout.encoder)
        and not (layout.projector and tensor.startswith(layout.projector))
        and layout.left_out(tensor) in (None, POOLING)
    }
    ours = {tensor: value.shape for tensor, value in model.state_dict().items()}
    places, _ = theirs.pop("pos_embed"), ours.pop("pos_embed")
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    return ours == theirs and len(places) == 3 and is_square(places[1] - prefix)


def is_square(n: int) -> bool:
    """Return whether a number of patches is that of a square grid."""
    return n > 0 and round(n**0.5) ** 2 == n


def _is_plain(name: str) -> bool:
    try:
        architecture(name)
    except ValueError:
        return False
    return True
