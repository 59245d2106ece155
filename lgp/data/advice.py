"""What to set for a data source, and what will go wrong with it."""

from dataclasses import dataclass
from typing import Any

from lgp.data.inspection import Inspection
from lgp.data.preparation import FEW_FILES
from lgp.data.splits import notes_on_classes
from lgp.params.file import Params
from lgp.params.labels import ALL_LABELS, shot_name

CPU_SIZE, CUDA_SIZE = 64, 224  # pixels that a square of a photograph is shrunk to
LEAST_SIZE = 8
PATCHES_A_SIDE = 4  # or more: 16 patches are the fewest that learn
LARGEST_PATCH = 16
LARGEST_BATCH = 128
STEPS = 4  # or more in an epoch
DIGIT_SIZE = 12  # pixels, up to which a crop must keep most of an image
SHARES = {"1pct": 0.01, "10pct": 0.1}
SHOTS = (1, 5)
MOST_FEW = 2_000  # labels that are few enough to evaluate all of them on frozen features, in seconds
SPARE = 1.5  # the smallest class has so many times the labels of a shot, as a copy or a damaged image may be lost
LONG = 2.0  # ratio of the sides from which a centred square misses half of an image
SHOWN = 5


@dataclass(frozen=True)
class Settings:
    """What suits the images: pixels a side, values a pixel, pixels a side of a patch, images a step."""

    image_size: int
    channels: int
    patch_size: int
    batch_size: int


@dataclass(frozen=True)
class FewLabels:
    """Few labels that a data source has enough for: `labels.shares`, `labels.shots`, and the names of both.

    Attributes:
        shares: name → share of the labels.
        shots: images of each class.
        all_are_few: whether a classifier of all labels on frozen features takes seconds, and is the one to use.
    """

    shares: dict[str, float]
    shots: list[int]
    all_are_few: bool = False

    @property
    def parts(self) -> list[str]:
        """The names of parts of the labels, fewest first."""
        return [*map(shot_name, self.shots), *self.shares]

    @property
    def names(self) -> list[str]:
        """The names, fewest labels first, with that of all labels if these are few."""
        return [*self.parts, *([ALL_LABELS] if self.all_are_few else [])]


def suggest_settings(inspection: Inspection, cuda: bool) -> Settings:
    """Choose the size of images, patches and batches by the median image, and the channels by all of them.

    Args:
        inspection: of the source.
        cuda: whether a GPU trains. A CPU takes photographs of 64 pixels, a GPU of 224.
    """
    size = _image_size(inspection.sample.short_side.median, CUDA_SIZE if cuda else CPU_SIZE)
    return Settings(size, inspection.sample.channels, _patch_size(size), batch_size(inspection.parts["train"]))


def _image_size(short_side: float, largest: int) -> int:
    """Return a multiple of 4, or of 16 above 64, of at most the shorter side. Small images keep their size."""
    most = min(int(short_side), largest)
    multiple = LARGEST_PATCH if most > CPU_SIZE else PATCHES_A_SIDE
    return max(most // multiple * multiple, LEAST_SIZE)


def _patch_size(image_size: int) -> int:
    """Return the largest patch, of at most 16 pixels, that leaves 16 patches or more."""
    most = min(image_size // PATCHES_A_SIDE, LARGEST_PATCH)
    return next(size for size in range(most, 0, -1) if image_size % size == 0)


def batch_size(images: int) -> int:
    """Return the largest power of two of at most 128 and a quarter of the images, two or more."""
    most = min(images // STEPS, LARGEST_BATCH)
    return max(1 << most.bit_length() - 1, 2) if most else 2


def suggest_few_labels(inspection: Inspection) -> FewLabels:
    """Choose shares that give each class a label of its own, else images per class.

    A share must give two labels a class beside `1shot`. Without labels, the usual shares are returned.
    """
    labels = list(inspection.train_labels.values())
    if not labels:
        return FewLabels(dict(SHARES), [])
    few = sum(labels) <= MOST_FEW
    per_class = {name: share * sum(labels) / len(labels) for name, share in SHARES.items()}
    if per_class["1pct"] >= 1:
        return FewLabels(dict(SHARES), [], few)
    shots = [shot for shot in SHOTS if shot == 1 or shot * SPARE <= min(labels)]
    if round(per_class["10pct"]) < 2:
        return FewLabels({}, shots, few)
    return FewLabels({"10pct": SHARES["10pct"]}, shots[:1], few)


def advise(inspection: Inspection, params: Params, cuda: bool) -> list[str]:
    """Return what will go wrong with these parameters, and what to set, a line each."""
    return [
        *inspection.faults,
        *_about_files(inspection, params),
        *_about_settings(inspection, params, cuda),
        *_about_crops(inspection, params),
        *_about_labels(inspection),
        *_about_few_labels(inspection, params),
    ]


def _about_files(inspection: Inspection, params: Params) -> list[str]:
    sample, lines = inspection.sample, []
    share = len(sample.unreadable) / max(sample.images, 1)
    if share > params.data.max_unreadable_share and share * inspection.images > FEW_FILES:
        lines.append(
            f"{share:.1%} of the images cannot be read, `lgp prepare` stops above data.max_unreadable_share "
            f"{params.data.max_unreadable_share:.1%}: remove them, or raise it"
        )
    if sample.contradictions:
        lines.append(
            f"{len(sample.contradictions)} images stand under several labels: {_listed(sample.contradictions)}"
        )
    if sample.grey_in_colour:
        lines.append(f"{sample.grey_in_colour} images are stored in colour and are grey")
    if sample.transparent:
        lines.append(
            f"{sample.transparent} images have transparency: data.channels 3 lays them on white, 4 keeps it as a "
            "channel"
        )
    return lines


def _listed(copies: list[list[str]]) -> str:
    """Return the names of the first copies."""
    more = f", and {len(copies) - SHOWN} more" if len(copies) > SHOWN else ""
    return "; ".join(" = ".join(same[:SHOWN]) for same in copies[:SHOWN]) + more


def _about_settings(inspection: Inspection, params: Params, cuda: bool) -> list[str]:
    """Compare the sizes with what suits the images."""
    good = suggest_settings(inspection, cuda)
    side = f"the images have a median shorter side of {inspection.sample.short_side.median:g} pixels"
    grey = "all images are grey" if good.channels == 1 else f"images have {good.channels} channels"
    patches = (params.data.image_size // params.model.patch_size) ** 2
    found = [
        ("data.image_size", params.data.image_size, good.image_size, f"{side}, and this trains on a {_device(cuda)}"),
        ("data.channels", params.data.channels, good.channels, grey),
    ]
    lines = [f"set {key} to {value}, it is {now}: {why}" for key, now, value, why in found if now != value]
    few = patches < PATCHES_A_SIDE**2 or params.data.image_size != good.image_size
    if few and params.model.timm is None:
        lines.append(
            f"set model.patch_size to {good.patch_size}, it is {params.model.patch_size}: "
            f"{good.image_size} pixels are then {(good.image_size // good.patch_size) ** 2} patches, 16 or more learn"
        )
    for arm in ("mim", "cl", "graft"):
        now = getattr(params, arm).batch_size
        if now > good.batch_size:
            images = f"an epoch of {inspection.parts['train']:,} images"
            lines.append(
                f"set {arm}.batch_size to {good.batch_size}, it is {now}: {images} has four steps or more then"
            )
    return lines


def _device(cuda: bool) -> str:
    return "GPU" if cuda else "CPU"


def smallest_crop(image_size: int) -> float:
    """Return `crop_scale_min` of contrastive views: tiny images keep 0.4 of their area, photographs 0.08 (paper)."""
    return 0.4 if image_size <= DIGIT_SIZE else 0.2 if image_size <= CPU_SIZE else 0.08


def _about_crops(inspection: Inspection, params: Params) -> list[str]:
    views, lines = params.contrastive.views, []
    least = smallest_crop(params.data.image_size)
    if views.crop_scale_min < least:
        lines.append(
            f"set contrastive.views.crop_scale_min to {least}, it is {views.crop_scale_min}: smaller crops of "
            f"{params.data.image_size} pixels show nothing"
        )
    if views.flip_p or params.mim.flip_p:
        lines.append("images are mirrored: set every flip_p to 0 if that makes them something else (letters, digits)")
    if inspection.sample.aspect.most >= LONG:
        lines.append(
            f"the longest image is {inspection.sample.aspect.most:.1f} times as long as wide: evaluation sees the "
            "square in its middle, crop such images to what matters"
        )
    return lines


def _about_labels(inspection: Inspection) -> list[str]:
    lines = [*inspection.notes, *notes_on_classes(inspection.classes, held_out=False)]
    if any(inspection.classes.values()) and not inspection.parts["test"]:
        lines.append("no labelled test image: accuracy is not measured; raise data.test_share, or label test images")
    return lines


def _about_few_labels(inspection: Inspection, params: Params) -> list[str]:
    """Find shares of less than a label a class, and shots that a class has not."""
    labels = inspection.train_labels
    if not labels:
        return []
    few = suggest_few_labels(inspection)
    remedy = f"set labels.shares to {few.shares}, labels.shots to {few.shots}, and few_labels to {few.names}"
    lines = []
    for name, share in params.labels.shares.items():
        each = share * sum(labels.values()) / len(labels)
        if each < 1:
            lines.append(f"{name} of the labels is {each:.2g} a class, so it is one of each: {remedy}")
    fewest = min(labels, key=lambda name: labels[name])
    if params.labels.shots and max(params.labels.shots) > labels[fewest]:
        lines.append(
            f"labels.shots asks for {max(params.labels.shots)} of each class, and {fewest} has {labels[fewest]} to "
            f"train with: {remedy}"
        )
    return lines


def label_values(few: FewLabels) -> dict[str, Any]:
    """Return few labels as keys of the parameter file."""
    return {"labels.shares": few.shares, "labels.shots": few.shots, "few_labels": few.names}
