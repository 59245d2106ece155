"""Labels that look wrong, from frozen features and perceptual hashes.

| kind | image | source |
|---|---|---|
| `duplicate` | the same as an image with another label, or nearly the same | `lgp.data.leaks` |
| `label` | logistic regression is confident of another class | confident learning, Northcutt et al. 2021 |
| `outlier` | much farther from its nearest neighbours than other images | Tukey 1977, "far out" |

A probability of a training image is out-of-fold: it comes from a regression that saw neither the image nor one of its
group or with its pixels. The regression of all training images gives those of val and test. What is said of a training
image does not depend on val and test.
"""

import importlib.util
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import softmax
from sklearn.model_selection import StratifiedGroupKFold

from lgp.data.labels import LabelledImages
from lgp.data.leaks import EXACT, Leak, find_leaks
from lgp.data.preparation import groups_of, identities_of
from lgp.errors import LgpError
from lgp.evaluate.few_labels import Images, fit_few_labels, scale_of
from lgp.evaluate.logistic import fit_logistic
from lgp.evaluate.regression import Problems
from lgp.features.cache import Features
from lgp.features.knn import K, nearest_neighbours
from lgp.params.evaluate import FewShotParams
from lgp.params.file import Params

PARTS = ("train", "val", "test")
DUPLICATE, LABEL, OUTLIER = KINDS = ("duplicate", "label", "outlier")  # in the order of the findings
FOLDS = 5
FAR_OUT = 3.0  # interquartile ranges above the upper quartile
HASH_BITS = 64
NOTHING = np.nan  # the score of an image of which a kind says nothing


@dataclass(frozen=True)
class Judged:
    """Class probabilities of labelled images, from regressions that saw none of them.

    Attributes:
        probabilities: (N, classes).
        seen: (N,) bool, False where the regression saw no image of the class that is the image's label. Such an image
            cannot be judged.
    """

    probabilities: np.ndarray
    seen: np.ndarray

    def suggestion(self, row: int, label: int) -> tuple[int | None, float | None]:
        """Return the most probable class of an image and the probability of its label; None where it is not judged."""
        if not self.seen[row]:
            return None, None
        return int(self.probabilities[row].argmax()), float(self.probabilities[row, label])

    def __add__(self, other: "Judged") -> "Judged":
        """Return the images of both."""
        probabilities = np.concatenate([self.probabilities, other.probabilities])
        return Judged(probabilities, np.concatenate([self.seen, other.seen]))


@dataclass(frozen=True)
class Finding:
    """An image whose label looks wrong.

    Attributes:
        image: its id.
        part: train, val or test.
        kinds: why, one or more of `KINDS` in their order.
        score: of the first kind; more is more suspicious. Duplicate: the share of equal bits of the two hashes, 1 for
            the same pixels. Label: the probability of the suggested class less that of the label. Outlier: the mean
            distance to the nearest neighbours, in medians of this distance.
        suggested: the most probable class. None: the image cannot be judged.
        probability: of the label, likewise.
        other: the nearest duplicate with another label, None without one.
    """

    image: int
    part: str
    kinds: tuple[str, ...]
    score: float
    suggested: int | None
    probability: float | None
    other: int | None


def check_auditable(data: LabelledImages) -> None:
    """Raise `LgpError` if cleanlab is missing, no class has two labelled training images, or one class has all."""
    if importlib.util.find_spec("cleanlab") is None:
        raise LgpError("`lgp audit` needs cleanlab: pip install 'lgp[audit]'")
    labels = data.labels[data.ids("train")]
    if not len(labels) or np.bincount(labels).max() < 2:
        raise LgpError(
            f"{len(labels)} training images have a label, no two of them the same: label more with "
            "`lgp labels add FILE`, an audit compares images of one label"
        )
    if len(np.unique(labels)) < 2:
        raise LgpError(
            f"all {len(labels)} labelled training images are of one class: label some of another with "
            "`lgp labels add FILE`, an audit compares classes"
        )


def audit(features: Features, data: LabelledImages, params: Params, device: torch.device) -> list[Finding]:
    """Find the labelled images of train, val and test whose labels look wrong, the most suspicious first.

    Args:
        features: of an encoder.
        data: the same images, as `check_auditable` allows them.
        params: `fewshot` sets the regression, `labels.near_duplicate_bits` what a duplicate is.
        device: where neighbours are searched, and regressions fitted.
    """
    ids, labels = (np.concatenate([of[part] for part in PARTS]) for of in (features.ids, features.y))
    judged = judge(features, _groups(data)[features.ids["train"]], params.fewshot, params.seed, device)
    twins = contradictions(data, ids, params.labels.near_duplicate_bits)
    scores = {
        DUPLICATE: np.array([_agreement(twins[i]) if i in twins else NOTHING for i in ids.tolist()]),
        LABEL: label_scores(judged, labels, len(features.ids["train"])),
        OUTLIER: outlier_scores(features, device),
    }
    parts = [part for part in PARTS for _ in features.ids[part]]
    findings = []
    for row, image in enumerate(ids.tolist()):
        kinds = tuple(kind for kind in KINDS if not np.isnan(scores[kind][row]))
        if kinds:
            suggestion = judged.suggestion(row, labels[row])
            other = twins[image].learnt if image in twins else None
            findings.append(Finding(image, parts[row], kinds, float(scores[kinds[0]][row]), *suggestion, other))
    return sorted(findings, key=lambda finding: (KINDS.index(finding.kinds[0]), -finding.score, finding.image))


def judge(
    features: Features, groups: np.ndarray, params: FewShotParams, seed: int, device: torch.device | None = None
) -> Judged:
    """Return class probabilities of the labelled images of train, val and test, in this order.

    The strength of the regularisation is chosen once, for all training images. Where the parameters say that val
    chooses it, cross-validation does.

    Args:
        features: of an encoder.
        groups: (N,) group of each labelled training image. Images of one group are left out together.
        params: scaling and strength of the regression, which is logistic.
        seed: of the folds.
        device: where regressions are fitted; the CPU unless given.
    """
    scale, classes = scale_of(features, params), features.classes
    train = Images(scale(features.x["train"]), features.y["train"])
    (fitted,) = fit_few_labels([train], None, classes, params.model_copy(update={"method": "logistic"}), device)
    judged = out_of_fold(train, groups, classes, fitted.c, params.intercept, seed, device)
    for part in PARTS[1:]:
        probabilities = softmax(fitted.head.logits(scale(features.x[part])), axis=1)
        judged += Judged(probabilities, np.isin(features.y[part], train.y))
    return judged


def out_of_fold(
    images: Images,
    groups: np.ndarray,
    classes: int,
    c: float,
    intercept: bool,
    seed: int,
    device: torch.device | None = None,
) -> Judged:
    """Return class probabilities of images, each from a logistic regression that saw no image of its group.

    Args:
        images: N scaled features and labels. Some class has two images.
        groups: (N,) group of each image.
        classes: number of classes.
        c: inverse strength of the regression.
        intercept: whether it has one.
        seed: of the folds.
        device: where to compute; the CPU unless given.
    """
    x, y = images.x, images.y
    judged = Judged(np.zeros((len(y), classes)), np.zeros(len(y), dtype=bool))
    folds = min(FOLDS, int(np.bincount(y).max()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)  # these are not `seen`
        splits = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(x, y, groups))
    usable = [(rest, left_out) for rest, left_out in splits if len(left_out) and len(np.unique(y[rest])) > 1]
    if not usable:
        return judged
    kept = np.zeros((1, len(usable), len(y)), dtype=bool)
    for fold, (rest, _) in enumerate(usable):
        kept[0, fold, rest] = True
    problems = Problems(x[None], np.broadcast_to(y, kept.shape), kept, classes, intercept, device)
    (found,) = fit_logistic(problems, [c])
    for fold, (rest, left_out) in enumerate(usable):
        judged.probabilities[left_out] = softmax(found.head(0, fold).logits(x[left_out]), axis=1)
        judged.seen[left_out] = np.isin(y[left_out], y[rest])
    return judged


def label_scores(judged: Judged, labels: np.ndarray, train: int) -> np.ndarray:
    """Score the labels that confident learning takes for wrong.

    Args:
        judged: all labelled images, those of train first.
        labels: (N,) their labels.
        train: number of training images.

    Returns:
        (N,) the probability of the most probable class less that of the label; NaN where nothing is wrong.
    """
    first, seen = np.arange(len(labels)) < train, judged.seen
    wrong = np.zeros(len(labels), dtype=bool)
    for judging, of in ((seen & first, first), (seen, ~first)):
        found = np.zeros(len(labels), dtype=bool)
        found[judging] = confident_errors(labels[judging], judged.probabilities[judging])
        wrong |= found & of
    margins = judged.probabilities.max(axis=1) - judged.probabilities[np.arange(len(labels)), labels]
    return np.where(wrong, margins, NOTHING)


def confident_errors(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return which labels are wrong by confident learning, (N,) bool: the counts off the diagonal of the joint.

    An image is confidently of a class if its probability of this class is at least the mean of the images that have
    this label (Northcutt et al. 2021, equations 1 and 2). cleanlab deviates from the paper in two points: of several
    such classes the most probable class of all counts, and a label that is itself the most probable class stays.

    Args:
        labels: (N,) class indices.
        probabilities: (N, classes), from models that saw none of the images.
    """
    from cleanlab.filter import find_label_issues

    if len(np.unique(labels)) < 2:
        return np.zeros(len(labels), dtype=bool)
    wrong: np.ndarray = find_label_issues(labels, probabilities, filter_by="confident_learning", n_jobs=1)
    return wrong


def outlier_scores(features: Features, device: torch.device) -> np.ndarray:
    """Score the images that are far from all training images.

    The distance is 1 - cosine, to the nearest training images, labelled or not. Far is what is more than three
    interquartile ranges above the upper quartile of the labelled training images.

    Returns:
        The mean distance of the labelled images of train, val and test to their 20 nearest, in medians of train; NaN
        where an image is not far.
    """
    known = np.concatenate([features.x["train"], features.x["unlabeled"]])
    of_parts = [mean_distances(known, features.x[part], part == "train", device) for part in PARTS]
    distances = np.concatenate(of_parts)
    lower, median, upper = np.quantile(of_parts[0], [0.25, 0.5, 0.75])
    far = distances > upper + FAR_OUT * (upper - lower)
    return np.where(far, distances / max(median, np.finfo(np.float32).eps), NOTHING)


def mean_distances(known: np.ndarray, queries: np.ndarray, among: bool, device: torch.device) -> np.ndarray:
    """Return the mean distance (M,) of images to their 20 nearest.

    Args:
        known: (N, D) features to search in.
        queries: (M, D) features.
        among: whether the queries are among `known`, where each then finds itself first.
        device: where to compute.
    """
    first = int(among)
    blocks = nearest_neighbours(known, queries, K + first, device)
    means = [1 - cosines[:, first:].mean(dim=1).cpu().numpy() for cosines, _ in blocks]
    return np.concatenate([np.zeros(0), *means])


def contradictions(data: LabelledImages, ids: np.ndarray, most_bits: int | None) -> dict[int, Leak]:
    """Find images that also occur with another label.

    Args:
        data: images and labels.
        ids: the labelled images to compare.
        most_bits: the most bits in which the hashes of near duplicates differ. None finds the same pixels only.

    Returns:
        For each such image the nearest one with another label, as `find_leaks` names it.
    """
    content, hashes = data.index["content"].to_numpy(), data.index["hash"].to_numpy().astype(np.uint64)
    found = []
    for label in np.unique(data.labels[ids]):
        same = data.labels[ids] == label
        found += find_leaks(content, hashes, ids[same], ids[~same], most_bits)[0]
    return {leak.test: leak for leak in found}


def _agreement(twin: Leak) -> float:
    return 1.0 if twin.bits == EXACT else 1 - twin.bits / HASH_BITS


def _groups(data: LabelledImages) -> np.ndarray:
    """Return the group of each image, (N,). Without one, images of the same pixels are a group."""
    pairs = zip(groups_of(data.index), identities_of(data.index), strict=True)
    return np.array([f"group {group}" if group is not None else identity for group, identity in pairs])
