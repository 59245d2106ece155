"""The multi-layer heads of contrastive learning."""

from torch import nn

from lgp.compute.distributed import SyncBatchNorm1d


def mlp(layers: int, width_in: int, hidden: int, width_out: int, last_norm: bool = True) -> nn.Sequential:
    """Build a head: linear layers without bias, each followed by BatchNorm, ReLU between (MoCo v3, section 4).

    BatchNorm is over the rows of all processes. The last one has no affine parameters. Without `last_norm` it is left
    out (VICReg's expander).
    """
    modules: list[nn.Module] = []
    for i in range(layers):
        last = i == layers - 1
        wide_in, wide_out = width_in if i == 0 else hidden, width_out if last else hidden
        modules.append(nn.Linear(wide_in, wide_out, bias=False))
        if not last:
            modules += [SyncBatchNorm1d(wide_out), nn.ReLU(inplace=True)]
        elif last_norm:
            modules.append(SyncBatchNorm1d(wide_out, affine=False))
    return nn.Sequential(*modules)
