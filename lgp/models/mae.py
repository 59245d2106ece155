"""Masked autoencoder (MAE, He et al. 2022, arXiv 2111.06377)."""

from functools import partial

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from lgp.models.roles import PretrainingModel
from lgp.models.vit import embed, encode_tokens, init_as_mae, keep_patches, sincos_positions, through

NORM_EPS = 1e-6


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches: (B, C, H, W) → (B, N, p·p·C), row by row, channels last within a patch."""
    b, c, height, width = images.shape
    p = patch_size
    patches = images.reshape(b, c, height // p, p, width // p, p)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(b, (height // p) * (width // p), p * p * c)


def unpatchify(patches: Tensor, patch_size: int, channels: int) -> Tensor:
    """Invert `patchify` for square images: (B, N, p·p·C) → (B, C, H, W)."""
    b, n, _ = patches.shape
    grid, p = int(n**0.5), patch_size
    images = patches.reshape(b, grid, grid, p, p, channels)
    return images.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, grid * p, grid * p)


def normalize_patches(patches: Tensor) -> Tensor:
    """Give each patch zero mean and unit (unbiased) variance: the target of MAE (section 3)."""
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + NORM_EPS).sqrt()


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the visible patches by sorting noise: those of the smallest noise stay visible.

    Args:
        noise: (B, N) uniform noise.
        mask_ratio: fraction of hidden patches.

    Returns:
        ids_keep (B, n) with n = int(N · (1 - mask_ratio)); ids_restore (B, N), the inverse of the sorting
        permutation; mask (B, N), 0 is keep, 1 is remove.
    """
    keep = int(noise.shape[1] * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= keep).to(noise.dtype)
    return ids_shuffle[:, :keep], ids_restore, mask


class MAE(PretrainingModel):
    """An encoder on the visible patches and a light decoder that predicts the hidden patches."""

    def __init__(
        self, encoder: VisionTransformer, mask_ratio: float, decoder_width: int, decoder_depth: int, decoder_heads: int
    ) -> None:
        """Put a decoder on `encoder`. The decoder is initialised here. The encoder is not changed."""
        super().__init__()
        self.encoder = encoder
        self.mask_ratio = mask_ratio
        projection = encoder.patch_embed.proj
        self.patch_size, self.channels = projection.kernel_size[0], projection.in_channels
        grid = encoder.patch_embed.grid_size[0]
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.prefix = encoder.num_prefix_tokens
        positions = sincos_positions(decoder_width, grid, self.prefix)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.Sequential(
            *(Block(decoder_width, decoder_heads, qkv_bias=True, norm_layer=norm) for _ in range(decoder_depth))
        )
        self.decoder_norm = norm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, self.patch_size**2 * self.channels)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_norm, self.decoder_pred):
            init_as_mae(module)
        nn.init.normal_(self.mask_token, std=0.02)

    def encode(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the visible patches. Return latent (B, P + n, D), mask (B, N), ids_restore (B, N).

        P is the number of prefix tokens: 1, the class token, in the paper's encoder.
        """
        ids_keep, ids_restore, mask = random_masking(noise, self.mask_ratio)
        kept = keep_patches(embed(self.encoder, images), ids_keep)
        return encode_tokens(self.encoder, kept), mask, ids_restore

    def decode(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Predict every patch, (B, N, p·p·C), from the latent of the visible patches."""
        tokens = self.decoder_embed(latent)
        b, n = ids_restore.shape
        mask_tokens = self.mask_token.to(tokens.dtype).expand(b, self.prefix + n - tokens.shape[1], -1)
        patches = torch.cat([tokens[:, self.prefix :], mask_tokens], dim=1)
        patches = keep_patches(patches, ids_restore)
        tokens = torch.cat([tokens[:, : self.prefix], patches], dim=1) + self.decoder_pos_embed
        tokens = through(self.decoder_blocks, tokens, self.encoder.grad_checkpointing)
        return self.decoder_pred(self.decoder_norm(tokens))[:, self.prefix :]

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return the loss: squared error to the normalised patches, averaged over the hidden patches.

        Args:
            images: (B, C, H, W), normalised per channel.
            noise: (B, N) uniform noise. It decides the mask.
        """
        latent, mask, ids_restore = self.encode(images, noise)
        prediction = self.decode(latent, ids_restore)
        target = normalize_patches(patchify(images, self.patch_size))
        loss = (prediction.to(target.dtype) - target).square().mean(dim=-1)
        return (loss * mask).sum() / mask.sum()

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction and the masked input, both (B, C, H, W).

        The decoder predicts normalised patches. They are painted with the mean and variance of the original patch, as
        in MAE's demonstration. Visible patches are shown unchanged.
        """
        latent, mask, ids_restore = self.encode(images, noise)
        prediction = self.decode(latent, ids_restore)
        patches = patchify(images, self.patch_size)
        std = (patches.var(dim=-1, keepdim=True) + NORM_EPS).sqrt()
        painted = prediction * std + patches.mean(dim=-1, keepdim=True)
        removed = mask[:, :, None]
        result = unpatchify(painted * removed + patches * (1 - removed), self.patch_size, self.channels)
        # in normalised space 0 is the mean colour
        return result, unpatchify(patches * (1 - removed), self.patch_size, self.channels)
