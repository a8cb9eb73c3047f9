"""The factors that all generated adapters share, and the core of each: ``ΔW = s · B K A`` per adapted module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lora_factory.adapters.layout import AdapterLayout

# Up to so many rows or columns, directions are found by a full SVD: 0.7 s for 1024 x 2048 on one core, 4.7 s for
# 2048 x 4096. Beyond, a randomised one computes some directions more than are kept, with power iterations: of what the
# best 32 directions hold of singular values 1/k it loses 9e-6 in 0.1 s; with 2 iterations 1.4e-4.
EXACT_COLUMNS = 1024
SPARE, POWER_ITERATIONS = 8, 4


class CoreBasis(nn.Module):
    """``A`` (R, in) and ``B`` (out, R) of every adapted module, shared by all adapters.

    An adapter is a core ``K``, an (R, R) matrix per module, or its diagonal: ``ΔW = s · B K A``, with s the layout's
    scaling. The cores of one adapter are kept side by side as a vector of shape ``(C,)``, C the sum of R² (of R for
    diagonal cores) over the modules. As a plain LoRA the adapter is ``A`` and ``B K``.

    Args:
        layout: The adapters as they leave: their modules, rank R and scaling.
        diagonal: Whether cores are diagonal.
    """

    def __init__(self, layout: AdapterLayout, *, diagonal: bool = False) -> None:
        super().__init__()
        self.layout, self.diagonal = layout, diagonal
        self.sizes = [module.rank if diagonal else module.rank**2 for module in layout.modules]
        self.factors = nn.Parameter(torch.zeros(layout.size))

    def identity(self) -> Tensor:
        """The cores ``(C,)`` whose adapter is ``A`` and ``B`` themselves."""
        eyes = [torch.eye(module.rank) for module in self.layout.modules]
        return torch.cat([eye.diagonal() if self.diagonal else eye.flatten() for eye in eyes])

    def matrices(self, cores: Tensor) -> list[Tensor]:
        """Cores ``(n, C)`` as one tensor ``(n, R, R)`` per module."""
        parts = cores.split(self.sizes, dim=-1)
        if self.diagonal:
            return [part.diag_embed() for part in parts]
        return [part.unflatten(-1, (m.rank, m.rank)) for part, m in zip(parts, self.layout.modules, strict=True)]

    def adapters(self, cores: Tensor) -> Tensor:
        """The adapters of cores ``(n, C)`` as vectors of the layout, ``(n, D)``. Differentiable."""
        if not torch.is_grad_enabled():
            return self._written(cores)
        factors, weights = self.layout.unflatten(self.factors), {}
        for module, core in zip(self.layout.modules, self.matrices(cores), strict=True):
            b = factors[module.key_b].flatten(1)
            weights[module.key_a] = factors[module.key_a].expand(len(cores), *module.shape_a)
            weights[module.key_b] = (b @ core).reshape(len(cores), *module.shape_b)
        return self.layout.flatten(weights, check=False)

    def _written(self, cores: Tensor) -> Tensor:
        """The same without gradients: the factors are copied once, and ``B K`` is written over ``B``."""
        vectors, start = self.factors.expand(len(cores), -1).clone(), 0
        for module, core in zip(self.layout.modules, self.matrices(cores), strict=True):
            start += math.prod(module.shape_a)
            shape = (math.prod(module.shape_b) // module.rank, module.rank)
            stop = start + math.prod(shape)
            b = self.factors[start:stop].view(shape)
            if len(cores) == 1:
                torch.mm(b, core[0], out=vectors[0, start:stop].view(shape))
            else:
                vectors[:, start:stop] = (b @ core).flatten(1)
            start = stop
        return vectors

    @contextmanager
    def in_batch(self, model: nn.Module, cores: Tensor) -> Iterator[None]:
        """A context in which every share of a batch runs with the adapter of its own core, in one forward pass.

        The first ``rows / n`` rows of a batch go through the first adapter, the next through the second, and so on.
        Memory grows with rows times R, not with the size of an adapter. Gradients flow into factors and cores; the
        base model's own parameters are left as they are.

        Args:
            model: The base model; adapters that PEFT has attached to it are active too, so switch them off.
            cores: Shape ``(n, C)``.

        Raises:
            LoraFactoryError: When the base model has not the layout's modules, a batch cannot be split into ``n``, or
                the rows of a module do not stay in the order of the batch.
        """
        from lora_factory.adapters.attach import add_shared_lora, check_order, hooked
        from lora_factory.adapters.live_models import plain_model

        check_order(self.layout, len(cores))
        factors, hooks = self.layout.unflatten(self.factors), {}
        for module, core in zip(self.layout.modules, self.matrices(cores), strict=True):
            b = factors[module.key_b].flatten(1) * module.scaling
            hooks[module.path] = partial(add_shared_lora, factors[module.key_a], core, b)
        with hooked(plain_model(model), self.layout, hooks):
            yield

    @torch.no_grad()
    def fit(self, adapters: Sequence[tuple[AdapterLayout, Tensor]]) -> None:
        """Set the factors to the leading directions of adapters: a joint low-rank factorisation of their ΔW.

        ``B`` gets orthonormal directions of the outputs, ``A`` of the inputs (Tucker's method: those of the stacked
        ΔW and of their transposes). ΔW is never formed; its thin factors are made orthogonal by QR. The result does
        not depend on the adapters' own factors, and is exact while their ranks together are at most R.

        Args:
            adapters: Pairs of a layout and vectors ``(n, D)``; a module that a layout lacks counts as zero.
        """
        thin, factors = [_thin(layout, vectors) for layout, vectors in adapters], {}
        for module in self.layout.modules:
            pairs = [pairs[module.path] for pairs in thin if module.path in pairs]
            outputs = torch.cat([(b @ torch.linalg.qr(a.mT).R.mT).mT.flatten(0, 1) for a, b in pairs])
            inputs = torch.cat([(torch.linalg.qr(b).R @ a).flatten(0, 1) for a, b in pairs])
            factors[module.key_a] = _directions(inputs, module.rank).view(module.shape_a)
            factors[module.key_b] = _directions(outputs, module.rank).mT.reshape(module.shape_b)
        self.factors.copy_(self.layout.flatten(factors))

    @torch.no_grad()
    def project(self, layout: AdapterLayout, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The cores that come nearest to adapters, and how near.

        Args:
            layout: The adapters' layout: of any rank, without some of the modules if need be.
            vectors: Shape ``(n, D)``.

        Returns:
            Cores ``(n, C)``, and for each adapter the share of its squared ΔW that lies outside the basis, ``(n,)``.
        """
        cores, factors = self.projector(layout)(vectors), self.layout.unflatten(self.factors.float())
        kept, total = vectors.new_zeros(2, len(vectors), dtype=torch.float32)
        for module, core in zip(self.layout.modules, self.matrices(cores), strict=True):
            a, b = factors[module.key_a].flatten(1), module.scaling * factors[module.key_b].flatten(1)
            kept += (b.mT @ b @ core @ a @ a.mT * core).sum((1, 2))
        for a, b in _thin(layout, vectors).values():
            total += ((a @ a.mT) * (b.mT @ b)).sum((1, 2))
        return cores, ((total - kept) / total.clamp_min(1e-30)).clamp(0, 1)

    @torch.no_grad()
    def projector(self, layout: AdapterLayout) -> Callable[[Tensor], Tensor]:
        """The function from adapters ``(n, D)`` of a layout to the nearest cores ``(n, C)``, ``K = B⁺ ΔW A⁺ / s``.

        A diagonal core d solves ``(BᵀB ∘ AAᵀ) d = diag(Bᵀ ΔW Aᵀ) / s``.
        """
        factors, maps = self.layout.unflatten(self.factors.double()), {}
        for module in self.layout.modules:
            a, b = factors[module.key_a].flatten(1), module.scaling * factors[module.key_b].flatten(1)
            grams = a @ a.mT, b.mT @ b
            if self.diagonal:
                parts = [a.mT, b.mT, _inverse(grams[0] * grams[1])]
            else:
                parts = [a.mT @ _inverse(grams[0]), _inverse(grams[1]) @ b.mT]
            maps[module.path] = [part.float() for part in parts]

        @torch.no_grad()
        def nearest(vectors: Tensor) -> Tensor:
            cores, own = [], {module.path: module for module in layout.modules}
            weights = layout.views(vectors.float())
            for wide, size in zip(self.layout.modules, self.sizes, strict=True):
                if (module := own.get(wide.path)) is None:
                    cores.append(vectors.new_zeros(len(vectors), size, dtype=torch.float32))
                    continue
                right, left, *diagonal = maps[wide.path]
                a, b = weights[module.key_a].flatten(2), weights[module.key_b].flatten(2)
                core = (left @ b) @ (a @ right) * module.scaling
                cores.append(core.diagonal(dim1=1, dim2=2) @ diagonal[0] if diagonal else core.flatten(1))
            return torch.cat(cores, 1)

        return nearest


def _thin(layout: AdapterLayout, vectors: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """``A`` (n, r, in) and ``scaling · B`` (n, out, r) of every module of adapters ``(n, D)``, in float32."""
    weights = layout.views(vectors.float())
    return {m.path: (weights[m.key_a].flatten(2), m.scaling * weights[m.key_b].flatten(2)) for m in layout.modules}


def _inverse(gram: Tensor) -> Tensor:
    """The pseudo-inverse of a float64 Gram matrix, for which what float32 factors lose in rounding counts as zero."""
    return torch.linalg.pinv(gram, hermitian=True, rtol=1e-12)


def _directions(rows: Tensor, count: int) -> Tensor:
    """The leading right singular vectors of rows ``(n, d)``: orthonormal, ``(count, d)``; zeros where there are fewer.

    Those of a singular value near zero count as zeros too.
    """
    if min(rows.shape) > EXACT_COLUMNS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, values, basis = torch.svd_lowrank(rows, count + SPARE, niter=POWER_ITERATIONS)
        found = basis.mT
    else:
        _, values, found = torch.linalg.svd(rows, full_matrices=False)
    found = found[:count] * (values[:count, None] > 1e-6 * values[0].clamp_min(1e-30))
    return torch.cat([found, found.new_zeros(count - len(found), rows.shape[1])])
