"""Compare with `lightly`, in turns in one process: `python benchmarks/peers.py [--quick] [--threads N]`.

It needs the extra `bench`. It compares two things:

- Steps. The peer is lightly's MAE modules on the same timm ViT, and its MoCo v3-like loop (projection heads, NT-Xent
  over momentum keys, exponential moving average), as in its examples. The examples run in single precision; bf16
  autocast is measured too. Our figure includes everything, also the views. The peer's steps get ready batches, so its
  figure includes no views.
- Views. The peer is lightly's BYOL transforms, with MoCo v3's recipe, on PIL images.
"""

import argparse
import copy
import io
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
from lightly.models.modules.heads import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, get_at_index, patchify, random_token_mask, update_momentum
from lightly.models.utils import set_at_index as put_at_index
from lightly.transforms import BYOLView1Transform, BYOLView2Transform
from PIL import Image
from torch import Tensor, nn

from lgp import bench
from lgp.compute.device import choose_device
from lgp.compute.randomness import Stream
from lgp.data.loading import CropDataset
from lgp.models.vit import ARCHITECTURE, model_args
from lgp.params.file import Params, load_params
from lgp.workflow.presets import FOLDER

warnings.filterwarnings("ignore")


class PeerMAE(nn.Module):
    """MAE as in lightly's example. Its decoder is as large as ours."""

    def __init__(self, params: Params) -> None:
        """Build it as large as ours."""
        super().__init__()
        vit = timm.create_model(ARCHITECTURE, num_classes=0, **model_args(params.model, params.data))
        self.ratio, self.patch_size = params.mim.mask_ratio, params.model.patch_size
        self.backbone = MaskedVisionTransformerTIMM(vit)
        mim = params.mim
        self.embed = nn.Linear(params.model.width, mim.decoder_width)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            vit.patch_embed.num_patches, mim.decoder_width, mim.decoder_depth, mim.decoder_heads
        )
        self.predict = nn.Linear(mim.decoder_width, params.model.patch_size**2 * params.data.channels)

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss of images (B, C, S, S)."""
        length = self.backbone.sequence_length
        keep, mask = random_token_mask((len(images), length), self.ratio, device=images.device)
        encoded = self.backbone.encode(images, idx_keep=keep)
        tokens = self.decoder.mask_token.to(encoded.dtype).repeat(len(images), length, 1)
        tokens = put_at_index(tokens, keep, self.embed(encoded).type_as(tokens))
        predicted = self.predict(get_at_index(self.decoder(tokens), mask))
        target = get_at_index(patchify(images, self.patch_size), mask - 1)
        return nn.functional.mse_loss(predicted, target)


class PeerMoCo(nn.Module):
    """MoCo v3 from lightly's parts. Its heads are as large as ours."""

    def __init__(self, params: Params) -> None:
        """Build it as large as ours."""
        super().__init__()
        heads = params.contrastive
        self.backbone = timm.create_model(ARCHITECTURE, num_classes=0, **model_args(params.model, params.data))
        self.projector = MoCoProjectionHead(
            params.model.width, heads.projector_hidden, heads.projector_dim, num_layers=3, batch_norm=True
        )
        self.predictor = MoCoProjectionHead(
            heads.projector_dim, heads.predictor_hidden, heads.projector_dim, num_layers=2, batch_norm=True
        )
        self.momentum_backbone, self.momentum_projector = copy.deepcopy(self.backbone), copy.deepcopy(self.projector)
        deactivate_requires_grad(self.momentum_backbone)
        deactivate_requires_grad(self.momentum_projector)
        self.criterion, self.momentum = NTXentLoss(heads.temperature), heads.momentum

    def forward(self, views: Tensor) -> Tensor:
        """Return the loss of two views of each image, (2, B, C, S, S)."""
        update_momentum(self.backbone, self.momentum_backbone, m=self.momentum)
        update_momentum(self.projector, self.momentum_projector, m=self.momentum)
        queries = [self.predictor(self.projector(self.backbone(view))) for view in views]
        with torch.no_grad():
            keys = [self.momentum_projector(self.momentum_backbone(view)) for view in views]
        return 0.5 * (self.criterion(queries[0], keys[1]) + self.criterion(queries[1], keys[0]))


def peer_epoch(arm: str, params: Params, batch: int, steps: int, mixed: bool) -> Callable[[], float]:
    """Return the function that trains the peer for some steps and returns the seconds."""
    torch.manual_seed(0)
    model: nn.Module = PeerMAE(params) if arm == "mim" else PeerMoCo(params)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    size, channels = params.data.image_size, params.data.channels
    images = torch.randn(*(() if arm == "mim" else (2,)), batch, channels, size, size)

    def train() -> float:
        started = time.perf_counter()
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = model(images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return time.perf_counter() - started

    train()
    return train


def compare_steps(quick: bool) -> list[dict[str, Any]]:
    """Train both in turns, at the size of digits and at width 192 on 32×32."""
    rows, rounds = [], 2 if quick else 4
    for workload in bench.workloads(torch.device("cpu"), quick=True):
        with tempfile.TemporaryDirectory() as name:
            folder, batch = Path(name), 64
            data = bench.prepared_for(workload.params, 6 * batch, folder)
            steps = len(data.pretraining_ids) // batch
            params = bench.shortened(workload.params, batch, 3)
            threads = torch.get_num_threads()
            params = params.model_copy(update={"run": params.run.model_copy(update={"threads": threads})})
            for arm in ("mim", "cl"):
                peer = peer_epoch(arm, params, batch, steps, mixed=False)
                peer_mixed = peer_epoch(arm, params, batch, steps, mixed=True)
                ours, theirs, theirs_mixed = [], [], []
                for i in range(rounds):
                    scratch = folder / f"{arm}-{i}"
                    scratch.mkdir()
                    ours.append(min(bench.train_timed(arm, params, data, scratch)))
                    theirs.append(min(peer(), peer()))
                    theirs_mixed.append(min(peer_mixed(), peer_mixed()))
                rate = [steps * batch / min(seconds) for seconds in (ours, theirs, theirs_mixed)]
                rows.append(
                    {
                        "size": workload.name,
                        "arm": arm,
                        "ours_images_per_s": round(rate[0], 1),
                        "lightly_images_per_s": round(rate[1], 1),
                        "ratio": round(rate[0] / rate[1], 2),
                        "lightly_bf16_images_per_s": round(rate[2], 1),
                        "ratio_to_bf16": round(rate[0] / rate[2], 2),
                    }
                )
                print(rows[-1], flush=True)
    return rows


def pil_views(image: Image.Image | io.BytesIO, view1: Callable[..., Any], view2: Callable[..., Any], _: int) -> None:
    """Decode an image if it is encoded, and make two views of it."""
    decoded = Image.open(image).convert("RGB") if isinstance(image, io.BytesIO) else image
    view1(decoded)
    view2(decoded)


def compare_views(quick: bool) -> list[dict[str, Any]]:
    """Make two views of each image with both libraries in turns, on one core."""
    torch.set_num_threads(1)
    rows, seconds, rounds = [], 1.0 if quick else 3.0, 2 if quick else 4
    for preset, name, batch in (("cifar10", "32×32", 64), ("imagenet-vit-b16", "JPEG 640×427 → 224×224", 8)):
        params = load_params(FOLDER / f"{preset}.yaml")
        size = params.data.image_size
        view1, view2 = (t(input_size=size) for t in (BYOLView1Transform, BYOLView2Transform))
        photo = bench.photographs()[0]
        encoded = io.BytesIO()
        photo.save(encoded, "JPEG", quality=95)
        small = photo.resize((32, 32))
        peer = partial(pil_views, small if size == 32 else encoded, view1, view2)
        with tempfile.TemporaryDirectory() as folder:
            data = bench.prepared_for(params, 10 * batch, Path(folder))
            crops = CropDataset(data, bench.RECIPE, 2, batch, Stream(0, "peers"))
            work = {
                "all": bench.two_views(data, crops),
                "read_and_crop": crops.__getitem__,
            }

            best: dict[str, float] = {}
            for _ in range(rounds):
                for key, make, count in [("pil", peer, 1), *((k, w, batch) for k, w in work.items())]:
                    best[key] = max(best.get(key, 0.0), bench.rate_of(make, count, seconds))
        rows.append(
            {
                "images": name,
                "pil_images_per_s": round(best["pil"], 1),
                "ours_images_per_s": round(best["all"], 1),
                "ratio": round(best["all"] / best["pil"], 2),
                "ours_read_and_crop_per_s": round(best["read_and_crop"], 1),
                "ratio_of_reading": round(best["read_and_crop"] / best["pil"], 2),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Compare, and write `benchmarks/DATE-DEVICE-peers.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--threads", type=int, help="for the steps; default: all cores")
    arguments = parser.parse_args()
    run = load_params(FOLDER / "digits.yaml").run.model_copy(update={"device": "cpu"})
    choose_device(run.model_copy(update={"threads": arguments.threads or torch.get_num_threads()}))
    result = {
        "machine": bench.machine(torch.device("cpu")),
        "steps": compare_steps(arguments.quick),
        "views_per_core": compare_views(arguments.quick),
    }
    stem = f"{result['machine']['date']}-{result['machine']['device']}-peers"
    folder = Path(__file__).parent
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / f"{stem}.md").write_text(bench.markdown(result))


if __name__ == "__main__":
    main()
