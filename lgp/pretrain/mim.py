"""Masked image modelling of the encoder (MAE, He et al. 2022). The graft starts from this encoder."""

from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp.compute.randomness import Stream, generator, seeded
from lgp.data.loading import Batch, CropDataset
from lgp.data.storage import Images
from lgp.models.encoder_folder import save_tensors
from lgp.models.mae import MAE
from lgp.models.vit import build_encoder, freeze_pooling, init_encoder_as_mae
from lgp.params.pretrain import MimParams
from lgp.pretrain.arm import LossOf, Objective, Pretrained, Session, fit_arm
from lgp.training.optimizer import peak_rate

BETAS = (0.9, 0.95)  # MAE, table 8
PICTURED_IMAGES = 10


def pretrain_mim(session: Session) -> Pretrained:
    """Train a masked autoencoder from scratch (MAE, He et al. 2022)."""
    data, params, mim = session.data, session.params, session.params.mim
    with seeded(params.seed, "mim/init"):
        encoder = build_encoder(params.model, params.data)
        init_encoder_as_mae(encoder)
        mae = build_mae(encoder, mim)
        freeze_pooling(encoder)
    crops = CropDataset(data, mim.views, 1, mim.batch_size, Stream(params.seed, "mim"))
    rate = peak_rate(mim.base_lr, mim.batch_size)
    rates = {name: rate for name, _ in mae.named_parameters()}
    objective = Objective("mim", mae, masked_loss_of("mim", mae, session), crops)
    return fit_arm(objective, rates, BETAS, mim, session)


def build_mae(encoder: VisionTransformer, mim: MimParams) -> MAE:
    """Put MAE's decoder on an encoder."""
    return MAE(encoder, mim.mask_ratio, mim.decoder_width, mim.decoder_depth, mim.decoder_heads)


def masked_loss_of(name: str, mae: MAE, session: Session) -> LossOf:
    """Return the function from a batch to its loss. The loss is of the first crop of each image.

    Args:
        name: of the stage. Each stage has its own random draws.
        mae: encoder and decoder.
        session: images and parameters.
    """
    patches = mae.encoder.patch_embed.num_patches

    def loss_of(batch: Batch) -> Tensor:
        images = batch.crops[:, 0]
        noise = torch.rand(batch.size, patches, generator=generator(session.params.seed, f"{name}/mask", batch.step))
        loss: Tensor = mae(session.data.normalize(images), noise[batch.rows].to(images.device))
        return loss

    return loss_of


def write_reconstructions(path: Path, result: Pretrained, data: Images, seed: int) -> dict[str, Tensor]:
    """Write validation images, their masked input and their reconstruction. The report draws them.

    Returns:
        The written tensors: `original`, `masked`, `painted`, each (B, C, H, W), in about [0, 1].
    """
    mae = result.model
    assert isinstance(mae, MAE)
    mae.eval()
    images = data.whole(data.ids("val")[:PICTURED_IMAGES])
    noise = torch.rand(len(images), mae.encoder.patch_embed.num_patches, generator=generator(seed, "mim/picture"))
    painted, masked = mae.reconstruct(data.normalize(images), noise)
    tensors = {
        "original": images.float() / 255,
        "masked": data.denormalize(masked),
        "painted": data.denormalize(painted),
    }
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return tensors
