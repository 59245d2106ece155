"""What a data source has, before it is prepared: counts of everything, and what an even sample looks like decoded.

Counts are of all images. Sizes, colours and copies are of the sample: all images, or as many as wanted, evenly spaced.
"""

import io
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from PIL import Image

from lgp.compute.processes import pool
from lgp.data.conversion import FORMATS, TIFF_STARTS, Undecodable, decode, plain
from lgp.data.held_out import Draw, HeldOut, draw_held_out
from lgp.data.label_notes import notes_on_names
from lgp.data.preparation import class_indices, faults_of, given_parts
from lgp.data.reading import content_of
from lgp.data.sources.offers import Offers, Read, Skipped
from lgp.params.data import DataParams

SAMPLE = 2000
GREY_MODES = {"1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"}
ALONE = 256  # so many images are decoded faster than other processes start
CHUNK = 64  # images that wait for a process
MEASURED_SIDE = 256  # mean and deviation are of every k-th pixel, so that about so many are left on the shorter side


class Spread(NamedTuple):
    """The smallest, the middle and the largest of some numbers."""

    least: float
    median: float
    most: float


@dataclass(frozen=True)
class Sample:
    """What the decoded images are.

    Attributes:
        images: number of images that were read.
        formats: how they are stored → number of images.
        modes: what a pixel is (L, RGB, I;16, …) → number of images.
        transparent: number of images with transparency.
        short_side: in pixels, of upright images.
        aspect: longer side by shorter side.
        channels: 1 if all images are grey, 3 if one has colours, the number of bands above 4.
        grey_in_colour: number of images that are stored with colours and have none.
        mean: per channel, of pixels in [0, 1]. Every image counts the same.
        std: standard deviation, likewise.
        copies: paths of images that have the same pixels, a list for each.
        contradictions: those of `copies` that have different labels.
        unreadable: images that cannot be read, with the reason.
        seconds: to read and decode one image, in one process.
    """

    images: int
    formats: dict[str, int]
    modes: dict[str, int]
    transparent: int
    short_side: Spread
    aspect: Spread
    channels: int
    grey_in_colour: int
    mean: list[float]
    std: list[float]
    copies: list[list[str]]
    contradictions: list[list[str]]
    unreadable: list[Skipped]
    seconds: float


@dataclass(frozen=True)
class Inspection:
    """What a data source has.

    Attributes:
        splits: train, val or test → number of images, as the source gives them.
        classes: class → number of its labelled images.
        unlabelled: number of images without a label.
        groups: number of groups.
        grouped: number of images with a group.
        parts: train, val or test → number of images once parts are held out. Train has the unlabelled ones too.
        train_labels: class → number of labelled training images that are then left.
        faults: what makes `prepare` or `labels` stop.
        notes: what else is to be told of the sources.
        skipped: what is no image of the data set, with the reason.
        clutter: files of operating systems, and of other kinds by their names.
        sample: of decoded images.
    """

    splits: dict[str, int]
    classes: dict[str, int]
    unlabelled: int
    groups: int
    grouped: int
    parts: dict[str, int]
    train_labels: dict[str, int]
    faults: list[str]
    notes: list[str]
    skipped: list[Skipped]
    clutter: list[Skipped]
    sample: Sample

    @property
    def images(self) -> int:
        """The number of images that the source has."""
        return sum(self.splits.values())

    @property
    def offered(self) -> str:
        """What was found, in a line: images, skipped and clutter together are everything."""
        found = self.images + len(self.skipped) + len(self.clutter)
        return (
            f"{found:,} files and rows: {self.images:,} images, {len(self.skipped):,} skipped, {len(self.clutter):,} "
            "of no image by their names"
        )


def inspect(offers: Offers, params: DataParams, sample: int = SAMPLE) -> Inspection:
    """Look at a source. It is read once, nothing is written.

    Args:
        offers: of the source.
        params: the shares that are held out.
        sample: number of images to decode, evenly spaced. All are decoded if there are no more.
    """
    labels = class_indices(offers)
    given = given_parts(offers, labels)
    parts = _after_holding_out(offers, labels, given, params)
    in_train = labels[(parts == "train") & (labels >= 0)]
    return Inspection(
        splits={split: offers.splits.count(split) for split in ("train", "val", "test")},
        classes=_counts(labels[labels >= 0], offers.classes),
        unlabelled=int((labels < 0).sum()),
        groups=len({group for group in offers.groups if group is not None}),
        grouped=sum(group is not None for group in offers.groups),
        parts={part: int((parts == part).sum()) for part in ("train", "val", "test")},
        train_labels={name: count for name, count in _counts(in_train, offers.classes).items() if count},
        faults=_faults(offers, labels, given),
        notes=[*offers.notes, *notes_on_names(offers.labels)],
        skipped=offers.skipped,
        clutter=offers.clutter,
        sample=_sample(offers, even(len(offers), sample)),
    )


def even(images: int, wanted: int) -> list[int]:
    """Return `wanted` evenly spaced positions, or all if there are no more."""
    return list(range(images)) if images <= wanted else [i * images // wanted for i in range(wanted)]


def _counts(labels: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    return dict(zip(classes, np.bincount(labels, minlength=len(classes)).tolist(), strict=True))


def _after_holding_out(offers: Offers, labels: np.ndarray, given: np.ndarray, params: DataParams) -> np.ndarray:
    """Return the part of each image once parts are held out. Which images they are may differ, their number hardly."""
    drawn = draw_held_out(
        HeldOut(Draw(0, params.test_share, params.val_share)), offers.paths, labels, offers.groups, given
    )
    parts = np.where(given == "train", drawn.parts(offers.paths, offers.groups), given)
    parts[(parts != "train") & (labels < 0)] = "dropped"
    return parts


def _faults(offers: Offers, labels: np.ndarray, given: np.ndarray) -> list[str]:
    """Return what makes `prepare` or `labels` stop, a line each."""
    of_train = np.unique(labels[(given == "train") & (labels >= 0)]).tolist()
    only = [f"the only class is {offers.classes[c]!r}: evaluation needs two or more, label others" for c in of_train]
    return faults_of(offers, labels, given) + (only if len(only) == 1 else [])


class _Kind(NamedTuple):
    """How an image is stored, and the number of channels that it is decoded to."""

    format: str
    mode: str
    transparent: bool
    channels: int


class _Look(NamedTuple):
    """One decoded image. `fault` says why it could not be decoded."""

    kind: _Kind
    height: int
    width: int
    channels: int
    digest: bytes
    mean: np.ndarray
    squares: np.ndarray
    seconds: float
    fault: str = ""


def _sample(offers: Offers, positions: Sequence[int]) -> Sample:
    looks = list(zip(positions, _looks(offers.reads(positions), len(positions)), strict=True))
    seen = [look for _, look in looks if not look.fault]
    channels = _common_channels(seen)
    copies = _copies([(i, look.digest) for i, look in looks if not look.fault])
    mean, std = _statistics([look for look in seen if look.channels in (1, channels)], channels)
    return Sample(
        images=len(looks),
        formats=_by_number(look.kind.format for look in seen),
        modes=_by_number(look.kind.mode for look in seen),
        transparent=sum(look.kind.transparent for look in seen),
        short_side=_spread([min(look.height, look.width) for look in seen]),
        aspect=_spread([max(look.height, look.width) / min(look.height, look.width) for look in seen]),
        channels=channels,
        grey_in_colour=sum(look.kind.channels == 3 and look.channels == 1 for look in seen),
        mean=mean,
        std=std,
        copies=[[offers.paths[i] for i in same] for same in copies],
        contradictions=[[offers.paths[i] for i in same] for same in copies if _labels_differ(offers, same)],
        unreadable=[Skipped(offers.paths[i], look.fault) for i, look in looks if look.fault],
        seconds=sum(look.seconds for _, look in looks) / max(len(looks), 1),
    )


def _looks(reads: Iterable[Read], number: int) -> Iterator[_Look]:
    """Decode images in order. Many are decoded by several processes, a chunk at a time."""
    if number <= ALONE:
        yield from map(_look, reads)
        return
    pending = iter(reads)
    with pool() as processes:
        while chunk := list(islice(pending, CHUNK)):
            yield from processes.map(_look, chunk, chunksize=4)


def _look(read: Read) -> _Look:
    started = time.perf_counter()
    kind = _Kind("", "", False, 0)
    try:
        data = read()
        kind = _kind_of(data)
        pixels = decode(data, kind.channels)
    except Undecodable as e:
        fault = str(e)
    except Exception as e:  # noqa: BLE001 - a `Read` may raise any error
        fault = plain(e)
    else:
        return _measured(kind, _without_colours(pixels), started)
    return _Look(kind, 0, 0, 0, b"", np.empty(0), np.empty(0), time.perf_counter() - started, fault)


def _measured(kind: _Kind, pixels: np.ndarray, started: float) -> _Look:
    height, width, channels = pixels.shape
    step = max(min(height, width) // MEASURED_SIDE, 1)
    values = pixels[::step, ::step].reshape(-1, channels) / 255.0
    content = content_of(pixels)
    seconds = time.perf_counter() - started
    return _Look(kind, height, width, channels, content, values.mean(0), (values**2).mean(0), seconds)


def _without_colours(pixels: np.ndarray) -> np.ndarray:
    """Return the single channel of an image whose red, green and blue are equal."""
    is_grey = pixels.shape[2] == 3 and bool((pixels[..., :1] == pixels[..., 1:]).all())
    return pixels[..., :1] if is_grey else pixels


def _kind_of(data: bytes | np.ndarray) -> _Kind:
    """Look how an image is stored, without decoding it. What is no image has no format and no mode."""
    if isinstance(data, np.ndarray):
        bands = data.shape[2] if data.ndim == 3 else 1
        return _Kind("array", f"{bands} × {data.dtype}", bands in (2, 4), _decoded_channels(bands))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                channels = 1 if image.mode in GREY_MODES else 3
                return _Kind(image.format or "", image.mode, image.has_transparency_data, channels)
        except Exception:  # noqa: BLE001 - damaged files raise any exception; decoding says what is wrong
            bands = _bands(data)
            return _Kind("TIFF" if bands else "", f"{bands} bands" if bands else "", False, _decoded_channels(bands))


def _decoded_channels(bands: int) -> int:
    return bands if bands > 4 else 1 if bands in (1, 2) else 3


def _bands(data: bytes) -> int:
    """Return the number of bands of a TIFF that Pillow does not open, 0 if it is none."""
    if data[:4] not in TIFF_STARTS:
        return 0
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            series = file.series[0]
            sides = [series.shape[series.axes.index(axis)] for axis in "YX"]
            return int(series.size // (sides[0] * sides[1]))
    except Exception:  # noqa: BLE001 - damaged files raise any exception; decoding says what is wrong
        return 0


def _common_channels(looks: Sequence[_Look]) -> int:
    """Return 1 if all images are grey, else the number of channels that most of the others have."""
    with_colours = Counter(look.channels for look in looks if look.channels > 1)
    return with_colours.most_common(1)[0][0] if with_colours else 1


def _statistics(looks: Sequence[_Look], channels: int) -> tuple[list[float], list[float]]:
    if not looks:
        return [], []
    mean = np.mean([np.broadcast_to(look.mean, channels) for look in looks], axis=0)
    squares = np.mean([np.broadcast_to(look.squares, channels) for look in looks], axis=0)
    std = np.sqrt(np.maximum(squares - mean**2, 0))
    return [round(m, 4) for m in mean.tolist()], [round(s, 4) for s in std.tolist()]


def _spread(numbers: Sequence[float]) -> Spread:
    return Spread(min(numbers), float(np.median(numbers)), max(numbers)) if numbers else Spread(0, 0, 0)


def _by_number(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _copies(digests: Iterable[tuple[int, bytes]]) -> list[list[int]]:
    """Return the positions of images that have the same pixels, a list for each that occurs several times."""
    places: dict[bytes, list[int]] = {}
    for position, digest in digests:
        places.setdefault(digest, []).append(position)
    return [same for same in places.values() if len(same) > 1]


def _labels_differ(offers: Offers, same: Sequence[int]) -> bool:
    return len({offers.labels[i] for i in same} - {None}) > 1
