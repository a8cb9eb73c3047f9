"""A lower rank for an adapter: the nearest one in every module's ΔW."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from lora_factory.adapters.layout import AdapterLayout


def truncate(
    layout: AdapterLayout, state_dict: Mapping[str, Tensor], rank: int
) -> tuple[AdapterLayout, dict[str, Tensor], float]:
    """Bring an adapter to another rank, by the singular value decomposition of every module's ΔW (Eckart and Young).

    ΔW is never formed: it is that of an R x R matrix between orthogonal factors.

    Args:
        layout: The adapter's layout.
        state_dict: Its weights.
        rank: The rank of all modules; where a module has a lower one, the rest is zero.

    Returns:
        The layout of the new rank, its weights in float32, and the share of the squared norm of ΔW that is lost.
    """
    target, weights, lost, total = layout.with_rank(rank), {}, 0.0, 0.0
    for module, new in zip(layout.modules, target.modules, strict=True):
        a, b = state_dict[module.key_a].double().flatten(1), state_dict[module.key_b].double().flatten(1)
        left, right = torch.linalg.qr(b), torch.linalg.qr(a.mT)
        u, values, v = torch.linalg.svd(left.R @ right.R.mT)
        norms = (module.scaling * values).square()
        lost, total = lost + float(norms[rank:].sum()), total + float(norms.sum())
        root = (module.scaling / new.scaling * values[:rank]).sqrt()
        a, b = root[:, None] * (v[:rank] @ right.Q.mT), left.Q @ u[:, :rank] * root
        spare = rank - len(root)
        weights[new.key_a] = functional.pad(a, (0, 0, 0, spare)).reshape(new.shape_a).float()
        weights[new.key_b] = functional.pad(b, (0, spare)).reshape(new.shape_b).float()
    return target, weights, lost / total if total else 0.0
