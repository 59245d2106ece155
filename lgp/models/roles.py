"""The role of each parameter of a model: encoder (with its depth), head, or momentum copy.

A model defines the roles once, by its modules. Learning rates, frozen blocks, penalties, sanity checks, plans and
published files follow from them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

EMBED, NORM, HEADS = "embed", "norm", "heads"


@dataclass(frozen=True)
class Role:
    """The role of a parameter.

    Attributes:
        part: `embed`, `block0` …, `norm` (of the encoder), `heads`, or the name of a momentum copy.
        layer: depth in the encoder: 0 for embeddings, 1 + i for block i, depth + 1 for the final norm and the heads.
        follows: the name of the parameter that a momentum copy follows, None for all others.
    """

    part: str
    layer: int
    follows: str | None = None


def encoder_roles(encoder: VisionTransformer) -> dict[str, Role]:
    """Return the role of each parameter of an encoder, by its name in the encoder."""
    depth = len(encoder.blocks)
    norms = [(NORM, depth + 1, norm) for norm in (encoder.norm, encoder.fc_norm)]
    modules = [*norms, *((f"block{i}", 1 + i, b) for i, b in enumerate(encoder.blocks))]
    by_id = {id(p): Role(part, layer) for part, layer, module in modules for p in module.parameters()}
    return {name: by_id.get(id(p), Role(EMBED, 0)) for name, p in encoder.named_parameters()}


class PretrainingModel(nn.Module):
    """A model that trains an encoder.

    A subclass sets `encoder`, and `projector` if it has one. All other modules are heads, except momentum copies.

    Attributes:
        encoder: that is trained.
        parts: in which a contrastive model encodes the images of a batch. Losses and gradients are the same with any.
    """

    encoder: VisionTransformer
    parts: int = 1

    @property
    def published_encoder(self) -> VisionTransformer:
        """The encoder that is evaluated and published: the trained one, or an average of it."""
        return self.encoder

    def momentum_copies(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (copy, module that it follows) of each momentum copy."""
        return []

    def roles(self) -> dict[str, Role]:
        """Return the role of each parameter, by its name in this model."""
        of_encoder = encoder_roles(self.encoder)
        by_id = {id(p): of_encoder[name] for name, p in self.encoder.named_parameters()}
        head = Role(HEADS, len(self.encoder.blocks) + 1)
        names = {id(p): name for name, p in self.named_parameters()}
        for copy, learner in self.momentum_copies():
            part = next(name for name, module in self.named_modules() if module is copy).rsplit(".", 1)[-1]
            for copied, learnt in zip(copy.parameters(), learner.parameters(), strict=True):
                by_id[id(copied)] = Role(part, by_id.get(id(learnt), head).layer, names[id(learnt)])
        return {name: by_id.get(id(p), head) for name, p in self.named_parameters()}

    def heads(self) -> dict[str, Tensor]:
        """Return the tensors of the heads, buffers included, by their names in this model."""
        others = {id(t) for module in (self.encoder, *(c for c, _ in self.momentum_copies())) for t in _tensors(module)}
        return {name: t.detach() for name, t in self.state_dict(keep_vars=True).items() if id(t) not in others}

    def first_fc(self) -> str | None:
        """Return the name of the weight (hidden, width) of the projector's first layer, None without a projector."""
        projector = getattr(self, "projector", None)
        if projector is None:
            return None
        weight = projector[0].weight
        return next(name for name, parameter in self.named_parameters() if parameter is weight)


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    return module.state_dict(keep_vars=True).values()
