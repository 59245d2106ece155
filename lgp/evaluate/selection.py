"""Which unlabelled images to label next, from frozen features.

| method | image | source |
|---|---|---|
| `typicality` | the most typical one of each large cluster without a label | TypiClust, Hacohen et al. 2022 |
| `coverage` | the one whose ball covers most images that no ball covers yet | ProbCover, Yehuda et al. 2022 |
| `centroid` | the one nearest to each centre of k-means | |
| `margin` | of each cluster, the one whose two most probable classes are nearest to each other | |
| `random` | any | |

`typicality` and `coverage` are for few labels. `margin` needs labels. Features are (N, D) and have length 1. The memory
is linear in N: distances are computed in blocks. `coverage` computes N² of them, twice.
"""

import heapq
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import pairwise_distances_argmin_min, pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors

from lgp.compute.randomness import counted_seed
from lgp.data.labels import LabelledImages
from lgp.errors import LgpError
from lgp.evaluate.few_labels import SCALINGS, Images, fit_few_labels
from lgp.features.cache import Features
from lgp.params.evaluate import FewShotParams
from lgp.params.selection import Method

MOST_CLUSTERS = 500  # as in TypiClust
SMALL = 5  # images; TypiClust takes no image of so small a cluster, we take them last
NEIGHBOURS = 20  # as in TypiClust
PURITY = 0.95  # as in ProbCover
EXACT = 4 * 10**6  # distances between images and centres; above, k-means takes random batches
BATCH = 5000
BLOCK_MIB = 128  # of distances


@dataclass(frozen=True)
class Selection:
    """Chosen images in the order of choice, (budget,), and the cluster of each, (budget,)."""

    images: np.ndarray
    clusters: np.ndarray

    def of(self, names: np.ndarray) -> "Selection":
        """Return the selection with each image by its name. Names are an array (N,)."""
        return Selection(names[self.images], self.clusters)


def check_selectable(data: LabelledImages, method: Method, budget: int) -> None:
    """Raise `LgpError` if there are fewer unlabelled training images than `budget`, or too few labels for `margin`."""
    unlabelled, classes = len(data.ids("unlabeled")), len(np.unique(data.labels[data.ids("train")]))
    if not unlabelled:
        raise LgpError("every training image has a label: there is nothing to select")
    if budget > unlabelled:
        raise LgpError(f"--budget {budget} is more than there are unlabelled training images: give 1 to {unlabelled}")
    if method is Method.MARGIN and classes < 2:
        raise LgpError(
            f"margin needs labelled training images of two classes or more, there are {classes}: choose typicality, or "
            "add labels with `lgp labels add FILE`"
        )


def select(features: Features, method: Method, budget: int, seed: int, params: FewShotParams) -> Selection:
    """Choose unlabelled training images, by their ids. Images and labels of val and test have no part in it.

    Args:
        features: of an encoder.
        method: how to choose.
        budget: number of images, as `check_selectable` allows it.
        seed: of k-means and of the random choice.
        params: of the logistic regression of `margin`.
    """
    ids = np.concatenate([features.ids[split] for split in ("train", "unlabeled")])
    labels = np.concatenate([features.y[split] for split in ("train", "unlabeled")])
    order = np.argsort(ids)  # where an image stands does not depend on the labels
    x = unit(np.concatenate([features.x[split] for split in ("train", "unlabeled")])[order])
    return _choose(x, labels[order], method, budget, seed, features.classes, params).of(ids[order])


def _choose(
    x: np.ndarray, labels: np.ndarray, method: Method, budget: int, seed: int, classes: int, params: FewShotParams
) -> Selection:
    """Choose images without a label (-1), by their rows."""
    known = labels >= 0
    match method:
        case Method.TYPICALITY:
            return typicality(x, known, budget, seed)
        case Method.COVERAGE:
            return coverage(x, known, budget, seed, classes or budget)
        case Method.CENTROID:
            return centroid(x, known, budget, seed)
        case Method.MARGIN:
            return margin(x, labels, budget, seed, params)
        case Method.RANDOM:
            return at_random(known, budget, seed)


def selected_subsets(
    features: Features, random: Sequence[np.ndarray], method: Method, seed: int, params: FewShotParams
) -> list[np.ndarray]:
    """Choose the images of as many subsets as `random` has, each of the same number of images, by their ids.

    Only labelled training images can be chosen, since the answer must be known. No label has a part in the choice. The
    subsets differ by the seed of the choice. The random subsets have images of every class; a selection need not.

    Args:
        features: of an encoder.
        random: arrays of image ids.
        method: how to choose, without a label.
        seed: of the run.
        params: as for `select`.

    Raises:
        LgpError: the chosen images are of a single class.
    """
    x, ids_of_rows, labels = unit(features.x["train"]), features.ids["train"], features.y["train"]
    hidden = np.full(len(x), -1)
    found = []
    for number, ids in enumerate(random):
        of_subset = counted_seed(seed, "selected", number) % 2**32
        rows = np.sort(_choose(x, hidden, method, len(ids), of_subset, features.classes, params).images)
        if len(np.unique(labels[rows])) < 2:
            raise LgpError(
                f"the {len(ids)} images that {method} chose are all of one class, and evaluation needs two: drop these "
                "labels from `selected`, or take more of them"
            )
        found.append(ids_of_rows[rows])
    return found


def unit(features: np.ndarray) -> np.ndarray:
    """Return features (N, D) divided by their lengths, float32."""
    lengths = np.linalg.norm(features.astype(np.float32), axis=1, keepdims=True)
    return (features / np.maximum(lengths, 1e-12)).astype(np.float32)


def typicality(x: np.ndarray, known: np.ndarray, budget: int, seed: int) -> Selection:
    """Choose the most typical image of each cluster, first of the largest clusters without a label (TypiClust).

    There are as many clusters as labelled and chosen images together, at most 500. An image is typical if the mean
    distance to its 20 nearest neighbours in the cluster is small. In a smaller cluster all others are neighbours.

    Args:
        x: (N, D) features of length 1.
        known: (N,) bool, True where labelled.
        budget: number of images.
        seed: of k-means.
    """
    clusters, _ = _k_means(x, min(int(known.sum()) + budget, MOST_CLUSTERS), seed)
    return _in_turn(clusters, mean_distances(x, clusters), known, budget, SMALL)


def mean_distances(x: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return the mean distance (N,) of images to their 20 nearest neighbours in their cluster, 0 without any."""
    means = np.zeros(len(x))
    for cluster in np.unique(clusters):
        members = np.flatnonzero(clusters == cluster)
        neighbours = min(NEIGHBOURS, len(members) - 1)
        if neighbours:
            search = NearestNeighbors(n_neighbors=neighbours, algorithm="brute").fit(x[members])
            means[members] = search.kneighbors()[0].mean(axis=1)
    return means


def coverage(x: np.ndarray, known: np.ndarray, budget: int, seed: int, classes: int) -> Selection:
    """Choose images whose balls cover most images, one after the other (ProbCover).

    A ball has the images that are nearer than `pure_radius` to its centre. Labelled and chosen images have balls. Once
    these cover all images, the image that is farthest from all of them comes next.

    Args:
        x: (N, D) features of length 1.
        known: (N,) bool, True where labelled.
        budget: number of images.
        seed: of k-means.
        classes: number of clusters that stand for the classes in the choice of the radius; 2 or more.
    """
    clusters, _ = _k_means(x, max(classes, 2), seed)
    radius = pure_radius(x, clusters)
    nearest = np.full(len(x), np.inf)  # distance to the nearest labelled or chosen image
    if known.any():
        nearest = pairwise_distances_argmin_min(x, x[known])[1].astype(np.float64)
    gains = _within(x, nearest >= radius, radius)
    taken, chosen = known.copy(), []
    for _ in range(budget):
        wanted = gains if gains[~taken].max() > 0 else nearest
        best = int(np.argmax(np.where(taken, -1, wanted)))
        chosen.append(best)
        taken[best] = True
        distances = pairwise_distances_argmin_min(x, x[[best]])[1]
        distances[best] = 0
        newly = (nearest >= radius) & (distances < radius)
        nearest = np.minimum(nearest, distances)
        gains -= _within(x, newly, radius)
    return Selection(np.array(chosen), clusters[chosen])


def pure_radius(x: np.ndarray, clusters: np.ndarray) -> float:
    """Return the largest radius of balls of which 95 % are pure: all images in them are of one cluster.

    It is infinite if there is one cluster. Images at the radius itself are not in the ball.
    """

    def nearest_of_others(distances: np.ndarray, start: int) -> np.ndarray:
        same = clusters[start : start + len(distances), None] == clusters
        distances[same] = np.inf
        return distances.min(axis=1)

    blocks = pairwise_distances_chunked(x, reduce_func=nearest_of_others, working_memory=BLOCK_MIB)
    pure_to = np.sort(np.concatenate(list(blocks)))
    # by a little less, for one distance computed twice may differ by rounding
    return float(pure_to[len(x) - math.ceil(PURITY * len(x))]) * (1 - 1e-5)


def _within(x: np.ndarray, counted: np.ndarray, radius: float) -> np.ndarray:
    """Return how many of the images `counted` (N,) bool are nearer than `radius` to each image, (N,)."""
    if not counted.any():
        return np.zeros(len(x), dtype=np.int64)

    def near(distances: np.ndarray, _start: int) -> np.ndarray:
        return (distances < radius).sum(axis=1)

    blocks: Iterator[np.ndarray] = pairwise_distances_chunked(x, x[counted], reduce_func=near, working_memory=BLOCK_MIB)
    return np.concatenate(list(blocks))


def centroid(x: np.ndarray, known: np.ndarray, budget: int, seed: int) -> Selection:
    """Choose the unlabelled image nearest to each of `budget` centres. Those of large clusters come first.

    The centres are of unlabelled images.

    Args:
        x: (N, D) features of length 1.
        known: (N,) bool, True where labelled.
        budget: number of images.
        seed: of k-means.
    """
    rows = np.flatnonzero(~known)
    clusters, distances = _k_means(x[rows], budget, seed)
    return _in_turn(clusters, distances, known[rows], budget).of(rows)


def margin(x: np.ndarray, labels: np.ndarray, budget: int, seed: int, params: FewShotParams) -> Selection:
    """Choose of each of `budget` clusters the unlabelled image whose class logistic regression is least sure of.

    That is the smallest difference between the probabilities of its two most probable classes.

    Args:
        x: (N, D) features of length 1.
        labels: (N,) class indices, -1 without a label. Two classes or more have labels.
        budget: number of images.
        seed: of k-means.
        params: of the regression, which is logistic. Cross-validation chooses its strength where they name val.
    """
    known, rows = labels >= 0, np.flatnonzero(labels < 0)
    scale, classes = SCALINGS[params.scaling](x), int(labels.max()) + 1
    of_known = Images(scale(x[known]), labels[known])
    (fitted,) = fit_few_labels([of_known], None, classes, params.model_copy(update={"method": "logistic"}))
    two = np.sort(softmax(fitted.head.logits(scale(x[rows])), axis=1), axis=1)[:, -2:]
    clusters, _ = _k_means(x[rows], budget, seed)
    return _in_turn(clusters, two[:, 1] - two[:, 0], known[rows], budget).of(rows)


def at_random(known: np.ndarray, budget: int, seed: int) -> Selection:
    """Choose any unlabelled images. They are one cluster.

    Args:
        known: (N,) bool, True where labelled.
        budget: number of images.
        seed: of the choice.
    """
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(~known))[:budget]
    return Selection(rows, np.zeros(budget, dtype=np.int64))


def _k_means(x: np.ndarray, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the cluster of each image, (N,), and its distance to the centre, (N,).

    It is the best of ten runs on all images, or of random batches where there are many.
    """
    clusters = min(clusters, len(x))
    if len(x) * clusters <= EXACT:
        model = KMeans(clusters, n_init=10, random_state=seed)
    else:
        model = MiniBatchKMeans(clusters, batch_size=BATCH, n_init=3, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different images than clusters
        model.fit(x)
    labels: np.ndarray = model.labels_
    return labels.astype(np.int64), np.linalg.norm(x - model.cluster_centers_[labels], axis=1)


def _in_turn(clusters: np.ndarray, scores: np.ndarray, known: np.ndarray, budget: int, small: int = 0) -> Selection:
    """Choose image after image. Each comes from the cluster with the fewest labelled and chosen images.

    Of such clusters the largest gives its image of the lowest score. Clusters of up to `small` images come last.

    Args:
        clusters: (N,) cluster of each image.
        scores: (N,).
        known: (N,) bool, True where labelled. At least `budget` are False.
        budget: number of images.
        small: number of images.
    """
    order = np.lexsort((scores, clusters))
    order = order[~known[order]]
    waiting = {cluster: iter(order[clusters[order] == cluster]) for cluster in np.unique(clusters[order]).tolist()}
    sizes, labelled = np.bincount(clusters), np.bincount(clusters[known], minlength=int(clusters.max()) + 1)
    turns = [(bool(sizes[c] <= small), int(labelled[c]), -int(sizes[c]), c) for c in waiting]
    heapq.heapify(turns)
    chosen: list[int] = []
    while len(chosen) < budget:
        last, count, size, cluster = heapq.heappop(turns)
        image = next(waiting[cluster], None)
        if image is not None:
            chosen.append(int(image))
            heapq.heappush(turns, (last, count + 1, size, cluster))
    return Selection(np.array(chosen), clusters[chosen])
