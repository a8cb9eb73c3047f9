"""One form for all factorisations of the same update: adapters of foreign origin become comparable with each other.

LoRA has a gauge freedom: ``(B G, G^-1 A)`` is the same adapter for any invertible G, so that two runs which agree in
what they do may share no weight. The canonical form is the balanced singular value decomposition of
``scaling * B A`` with fixed signs. It is made of thin QR and an r x r SVD, never from the product itself.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.errors import LoraFactoryError


def canonical_layout(layout: AdapterLayout, rank: int | None = None) -> AdapterLayout:
    """The layout of canonical adapters: one rank for all modules, scaling 1.

    Args:
        layout: That of the adapters as they are; ranks and scalings may differ between its modules.
        rank: By default the highest of the layout's modules; higher ones leave room for other adapters.

    Raises:
        LoraFactoryError: When a module's rank is above ``rank``.
    """
    highest = max(module.rank for module in layout.modules)
    rank = highest if rank is None else rank
    if rank < highest:
        raise LoraFactoryError(f"rank={rank} is below the rank {highest} of a module; weights would be lost")
    modules = tuple(replace(module.with_rank(rank), scaling=1.0) for module in layout.modules)
    config = dict(layout.lora_config) | {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
    return AdapterLayout(layout.base_model, layout.base_revision, modules, config | {"use_rslora": False})


def canonicalise(layout: AdapterLayout, vectors: Tensor, target: AdapterLayout | None = None) -> Tensor:
    """Write adapters in canonical form; what they do to the base model stays the same.

    Rank slices come in the order of falling singular values, with ``|A_i| = |B_i|`` and the entry of B_i that is
    largest in magnitude positive; slices that a module does not use are zero. Where two singular values are equal the
    form is not unique.

    Args:
        layout: The adapters' layout.
        vectors: Shape ``(..., D)``.
        target: ``canonical_layout(layout)`` by default, or another layout of the same modules, of no lower rank; its
            scaling is taken into account.

    Returns:
        Shape ``(..., D of target)``, in the precision of ``vectors``.
    """
    target = target or canonical_layout(layout)
    weights, canonical = layout.unflatten(vectors), {}
    for module, wide in zip(layout.modules, target.modules, strict=True):
        dimensions = len(module.shape_a), len(module.shape_b)
        a = weights[module.key_a].double().flatten(1 - dimensions[0])
        b = module.scaling / wide.scaling * weights[module.key_b].double().flatten(1 - dimensions[1])
        left, right = torch.linalg.qr(b), torch.linalg.qr(a.mT)
        u, values, v = torch.linalg.svd(left.R @ right.R.mT)
        columns, rows = left.Q @ u, v @ right.Q.mT
        largest = columns.abs().argmax(-2, keepdim=True)
        signs = torch.where(columns.gather(-2, largest) < 0, -1.0, 1.0)
        root = values.sqrt()
        columns, rows = columns * signs * root[..., None, :], rows * signs.mT * root[..., :, None]
        spare = wide.rank - rows.shape[-2]
        rows, columns = torch.nn.functional.pad(rows, (0, 0, 0, spare)), torch.nn.functional.pad(columns, (0, spare))
        canonical[wide.key_a] = rows.unflatten(-1, wide.shape_a[1:]).to(vectors)
        canonical[wide.key_b] = columns.reshape(*columns.shape[:-2], *wide.shape_b).to(vectors)
    return target.flatten(canonical, check=False)
