"""Evaluation with all labels: the linear probe, k-NN, and k-NN after each block."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lgp.compute.precision import choose_precision, place
from lgp.compute.randomness import Stream, generator
from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch, CropDataset
from lgp.errors import LgpError
from lgp.evaluate.outcome import Logits, Outcome, accuracy_metrics, over_subsets, percent
from lgp.evaluate.probe import LinearHeads, choose_head, head_settings, train_heads
from lgp.features.cache import Features
from lgp.features.knn import knn_predict
from lgp.features.of_encoder import live_features_of
from lgp.models.classifier_folder import Classifier, Head
from lgp.models.encoder_folder import images_for
from lgp.params.evaluate import LinearParams
from lgp.params.pretrain import ViewParams
from lgp.params.run import RunParams
from lgp.pretrain.arm import Session
from lgp.training.loop import Trainer
from lgp.training.optimizer import warmup_cosine


def evaluate_linear(
    features: Features, params: LinearParams, seed: int, device: torch.device, settings: RunParams
) -> Outcome:
    """Train all heads on cached features, and evaluate the head that is best on val. Evaluate k-NN too."""
    heads = _heads(features, params, seed)
    precision = choose_precision(settings, device, features.x["train"].shape[1])
    place(heads, device, precision)
    x, y = features.x["train"], features.y["train"]
    train_heads(heads, x, y, params.epochs, _batch_size(params, len(x)), seed, precision)
    return _outcome(heads, features, params, device)


def evaluate_linear_augmented(
    features: Features, encoder: Path, data: LabelledImages, session: Session, device: torch.device
) -> Outcome:
    """Train all heads on the features of random crops and flips, as in LGP. The rest is as in `evaluate_linear`.

    Args:
        features: of whole images, for the choice of the head and for the test.
        encoder: folder of the encoder that made `features`.
        data: images and labels.
        session: parameters, resume states, observer.
        device: where to train.
    """
    linear, run, data = session.params.linear, session.params.run, images_for(encoder, data)
    encode = live_features_of(encoder, session.params.features, device)
    heads = _heads(features, linear, session.params.seed)
    precision = choose_precision(run, device, features.x["train"].shape[1])
    place(heads, device, precision)
    views = ViewParams(crop_scale_min=linear.crop_scale_min, flip_p=linear.flip_p)
    ids = features.ids["train"]
    crops = CropDataset(data, views, 1, _batch_size(linear, len(ids)), Stream(session.params.seed, "linear"), ids)
    data.keep_decoded(run.decoded_gib * 2**30)
    labels = torch.tensor(data.labels, device=device)

    def loss_of(batch: Batch) -> Tensor:
        # in single precision, like the cached features
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            of_batch = encode(data.normalize(batch.crops[:, 0]))
        return heads.loss(of_batch, labels[torch.from_numpy(crops.ids_of(batch.step)[batch.rows]).to(device)])

    optimizer, steps = heads.optimizer(), linear.epochs * crops.steps_per_epoch
    Trainer(
        name="linear",
        model=heads,
        loss_of=loss_of,
        crops=crops,
        optimizer=optimizer,
        schedule=warmup_cosine(optimizer, steps, 0),
        epochs=linear.epochs,
        device=device,
        precision=precision,
        settings=run,
        store=session.store,
        observer=session.observer,
    ).fit()
    return _outcome(heads, features, linear, device)


def _heads(features: Features, params: LinearParams, seed: int) -> LinearHeads:
    images, width = features.x["train"].shape
    settings = head_settings(params, _batch_size(params, images))
    return LinearHeads(width, features.classes, settings, params.batch_norm, generator(seed, "linear/init"))


def _batch_size(params: LinearParams, images: int) -> int:
    """Return `linear.batch_size`, or the number of images where that is smaller."""
    return min(params.batch_size, images)


def _outcome(heads: LinearHeads, features: Features, params: LinearParams, device: torch.device) -> Outcome:
    chosen = choose_head(heads, params, features.x["val"], features.y["val"])
    if chosen.val < 0:
        raise LgpError("linear: the weights of every head stopped being finite: lower linear.base_lrs")
    held_out = ("val", "test")
    of_head = {s: heads.logits(features.x[s], chosen.head).double().numpy() for s in held_out}
    logits = Logits(of_head, features.y, features.ids)
    temperature = logits.temperature_on_val()
    head = Head(*heads.head(chosen.head), features.params.pool, features.params.blocks)
    classifier = Classifier(temperature, head.divided_by(temperature))
    outcome = over_subsets([logits.scored(temperature)], len(features.y["train"]), classifier)
    knn: dict[str, float] = {}
    for split in ("test", "val"):
        knn |= accuracy_metrics(f"{split}/knn_top1", _knn(features, split, -1, params, device)[None])
    depth = len(features.by_block["train"])
    by_depth = {
        f"test/knn_top1_block{b}": percent(_knn(features, "test", b, params, device)) for b in range(depth) if depth > 1
    }
    picked = {"base_lr": chosen.base_lr, "weight_decay": chosen.weight_decay, "knn_k": float(params.knn_k)}
    return replace(outcome, metrics=outcome.metrics | knn | by_depth | picked)


def _knn(features: Features, split: str, block: int, params: LinearParams, device: torch.device) -> np.ndarray:
    """Return which images of a part k-NN gets right, (images,) bool.

    It compares the features after `block`; -1: those of the last `features.blocks` together.
    """
    train, queries = (features.x[s] if block < 0 else features.by_block[s][block] for s in ("train", split))
    k, temperature = params.knn_k, params.knn_temperature
    predicted = knn_predict(train, features.y["train"], queries, features.classes, k, temperature, device)
    return predicted == features.y[split]
