"""A prototype of the next generator, for grid.py: ΔW = s · B (I + Z(c)) A, a shared basis and generated cores.

The package does not use it yet. `factorise` and `CoreNetwork.elbo`, for training from a zoo, ran on made-up data.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


class CoreBasis(nn.Module):
    """The factors that all tasks share: ``A`` (R, in) and ``B`` (out, R) of every adapted linear module.

    A task differs from another by its core alone, an (R, R) matrix a module. The core's deviation from the identity,
    ``Z``, is what a network generates; ``Z = 0`` is the multi-task LoRA.

    Args:
        shapes: ``(out, in)`` of every adapted module by its name.
        rank: R.
        scale: s; PEFT's ``lora_alpha / r``.

    Attributes:
        names: The modules, in the order in which cores are stacked: cores have the shape ``(tasks, modules, R, R)``.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], rank: int = 16, scale: float = 1.0) -> None:
        """Start as PEFT does: ``A`` random, ``B`` zero."""
        super().__init__()
        self.names = tuple(shapes)
        self.rank, self.scale = rank, scale
        self.a = nn.ParameterList([torch.randn(rank, width) / width**0.5 for _, width in shapes.values()])
        self.b = nn.ParameterList([torch.zeros(height, rank) for height, _ in shapes.values()])

    @property
    def core_shape(self) -> tuple[int, int, int]:
        """Shape of one task's ``Z``: ``(modules, R, R)``."""
        return len(self.names), self.rank, self.rank

    @contextmanager
    def attached(self, model: nn.Module, cores: Tensor | None) -> Iterator[None]:
        """Let the model compute with the adapters, one a row of the batch; nothing of the model is changed.

        Args:
            model: The frozen base; it has a linear module of every name.
            cores: ``Z`` of each row, ``(rows, modules, R, R)``; ``(1, modules, R, R)`` for all rows; None for the
                multi-task LoRA. Rows that repeat a task are made by ``cores.repeat_interleave``.
        """
        handles = []
        for index, name in enumerate(self.names):
            core = None if cores is None else cores[:, index]
            handles.append(model.get_submodule(name).register_forward_hook(self._hook(index, core)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int, core: Tensor | None):
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            a, b = self.a[index], self.b[index]
            low = functional.linear(inputs[0].to(a.dtype), a)
            if core is not None:
                flat = low.reshape(low.shape[0], -1, self.rank)
                low = low + torch.matmul(flat, core.transpose(-1, -2)).view_as(low)
            return output + (self.scale * functional.linear(low, b)).to(output.dtype)

        return add

    def adapter(
        self, core: Tensor | None = None, rank: int | None = None
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
        """One task's adapter as plain LoRA factors.

        Args:
            core: ``Z``, ``(modules, R, R)``; None for the multi-task LoRA.
            rank: A smaller rank than the basis's, reached by the best approximation of every module's ΔW.

        Returns:
            ``(A, B)`` of every module with ``s · B A`` its ΔW, and the share of the squared norm that is lost by rank.
        """
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        lost = total = 0.0
        for index, name in enumerate(self.names):
            a, b = self.a[index].detach(), self.b[index].detach()
            b = b if core is None else b + b @ core[index]
            if rank is not None and rank < self.rank:
                left, upper = torch.linalg.qr(b)
                right, lower = torch.linalg.qr(a.T)
                u, values, v = torch.linalg.svd(upper @ lower.T)
                lost += values[rank:].square().sum().item()
                total += values.square().sum().item()
                root = values[:rank].sqrt()
                a, b = (root[:, None] * v[:rank]) @ right.T, left @ u[:, :rank] * root
            factors[name] = a, b
        return factors, lost / total if total else 0.0


@dataclass(frozen=True)
class Factorised:
    """A zoo in a shared basis.

    Attributes:
        basis: ``A`` and ``B`` of every module; ``Z = 0`` is the zoo's mean as far as the basis holds it.
        cores: ``Z`` of every task, ``(tasks, modules, R, R)``.
        errors: Share of each task's squared ΔW that lies outside the basis, ``(tasks,)``; 0 while it is exact.
    """

    basis: CoreBasis
    cores: Tensor
    errors: Tensor


def factorise(zoo: Sequence[Mapping[str, tuple[Tensor, Tensor]]], rank: int, scale: float = 1.0) -> Factorised:
    """Bring a zoo of LoRAs into one basis: the leading left and right directions of the tasks' ΔW's.

    ΔW's are never materialised: a module's ``B_i A_i`` of all tasks stay thin factors, each of which is made
    orthonormal by QR. The result is the same whatever the tasks' ranks and gauges are, and exact where the ranks of
    all tasks together are at most R. A module that a task lacks counts as zero.

    Args:
        zoo: ``(A, B)`` by module name for every task, with the task's own scale already in ``B``.
        rank: R of the basis.
        scale: s of the basis.

    Returns:
        Basis, cores and errors.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for task in zoo:
        for name, (a, b) in task.items():
            shapes.setdefault(name, (b.shape[0], a.shape[1]))
    basis = CoreBasis(shapes, rank, scale)
    cores = torch.zeros(len(zoo), *basis.core_shape)
    lost, total = torch.zeros(len(zoo)), torch.zeros(len(zoo))
    for index, name in enumerate(basis.names):
        rows = [i for i, task in enumerate(zoo) if name in task]
        thin = [_balanced(*zoo[i][name]) for i in rows]
        left = _directions(torch.cat([b for _, b in thin], dim=1), rank)
        right = _directions(torch.cat([a for a, _ in thin]).T, rank)
        inner = torch.zeros(len(zoo), rank, rank)
        for i, (a, b) in zip(rows, thin, strict=True):
            inner[i, : left.shape[1], : right.shape[1]] = (left.T @ b) @ (a @ right)
            norm = ((a @ a.T) * (b.T @ b)).sum()
            total[i] += norm
            lost[i] += (norm - inner[i].square().sum()).clamp_min(0)
        # The middle matrix is I for the mean task. The mean need not be invertible, so half its size is put on the
        # diagonal: B carries the middle, Z the deviation, and any invertible middle gives the same adapters.
        mean = inner.mean(0)
        middle = mean + 0.5 * torch.linalg.matrix_norm(mean, 2).clamp_min(1e-6) * torch.eye(rank)
        cores[:, index] = torch.linalg.solve(middle, inner) - torch.eye(rank)
        with torch.no_grad():
            basis.a[index].zero_()[: right.shape[1]] = right.T
            basis.b[index].copy_(functional.pad(left, (0, rank - left.shape[1])) @ middle / scale)
    return Factorised(basis, cores, lost / total.clamp_min(1e-30))


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with factors that weigh directions by the root of ΔW's singular values: free of the gauge."""
    left, upper = torch.linalg.qr(b.float())
    right, lower = torch.linalg.qr(a.float().T)
    u, values, v = torch.linalg.svd(upper @ lower.T)
    return (values.sqrt()[:, None] * v) @ right.T, left @ u * values.sqrt()


def _directions(columns: Tensor, rank: int) -> Tensor:
    """Orthonormal leading directions of a matrix's columns, at most ``rank``; those of no weight are left out."""
    u, values, _ = torch.linalg.svd(columns, full_matrices=False)
    keep = int((values > 1e-6 * values[0].clamp_min(1e-30)).sum())
    return u[:, : min(rank, max(keep, 1))]


@dataclass(frozen=True)
class Prior:
    """p(z | c) of every row.

    Attributes:
        mean: ``(rows, codes)``; near zero, the multi-task LoRA, where the condition is like nothing known.
        explained: ``(rows, 1)``, between 0 and 1: the share of the condition that the known tasks' conditions explain.
    """

    mean: Tensor
    explained: Tensor


class CorePrior(nn.Module):
    """p(z | c): an MLP's code, times the share of the condition that the known tasks' conditions explain.

    The share is the squared length of the condition in the directions in which known conditions differ, each direction
    weighted by ``v / (v + ridge)``, v its variance, over the whole squared length: a Gaussian process's explained
    variance under a linear kernel. It has nothing to learn, and stores no task.

    Args:
        known: Conditions of the known tasks, several wordings each, ``(wordings, width)``.
        codes: Width of a code.
        hidden: Width of the MLP's hidden layer.
        ridge: Share of the conditions' variance below which a direction counts as unknown; measured: 0.1 over 732.
    """

    def __init__(self, known: Tensor, codes: int = 64, hidden: int = 256, ridge: float = 1.4e-4) -> None:
        """Start with a mean of zero."""
        super().__init__()
        mean, deviation = known.mean(0), known.std(0)
        values, vectors = torch.linalg.eigh((known - mean).T @ (known - mean) / len(known))
        values = values.clamp_min(0)
        weights = (values / (values + ridge * values.sum())).sqrt()
        self.register_buffer("center", mean)
        self.register_buffer("deviation", deviation.clamp_min(1e-6))
        self.register_buffer("spanned", vectors * weights)
        self.layers = nn.Sequential(nn.Linear(known.shape[1], hidden), nn.SiLU(), nn.Linear(hidden, codes))
        nn.init.zeros_(self.layers[2].weight)
        nn.init.zeros_(self.layers[2].bias)

    def explained(self, conditions: Tensor) -> Tensor:
        """The explained share of conditions ``(rows, width)``: ``(rows, 1)``."""
        centred = conditions - self.center
        share = (centred @ self.spanned).square().sum(1) / centred.square().sum(1).clamp_min(1e-12)
        return share.clamp(0, 1)[:, None]

    def code(self, conditions: Tensor) -> Tensor:
        """The MLP's code alone, as it is trained; ``(rows, codes)``."""
        return self.layers((conditions - self.center) / self.deviation)

    def forward(self, conditions: Tensor) -> Prior:
        """Predict codes of conditions ``(rows, width)``."""
        explained = self.explained(conditions)
        return Prior(explained * self.code(conditions), explained)


class CoreNetwork(nn.Module):
    """Prior, posterior and decoder of cores: a conditional VAE whose codes are short.

    Args:
        prior: p(z | c).
        core_shape: ``(modules, R, R)``.
    """

    def __init__(self, prior: CorePrior, core_shape: tuple[int, int, int], hidden: int = 256) -> None:
        """Start with Z = 0."""
        super().__init__()
        codes = prior.layers[2].out_features
        self.prior, self.core_shape = prior, core_shape
        size = core_shape[0] * core_shape[1] * core_shape[2]
        self.decoder = nn.Parameter(torch.randn(codes, size) * 0.3 / codes**0.5)
        self.register_buffer("deviation", torch.ones(size))  # of the known tasks' cores, where a zoo is given
        self.posterior = nn.Sequential(nn.Linear(size + codes, hidden), nn.SiLU(), nn.Linear(hidden, 2 * codes))
        self.log_spread = nn.Parameter(torch.full((codes,), -1.0))

    def decode(self, codes: Tensor) -> Tensor:
        """p(Z | z): cores ``(rows, modules, R, R)`` of codes ``(rows, codes)``; linear, so cores add as codes do."""
        return (codes @ self.decoder * self.deviation).view(-1, *self.core_shape)

    def forward(self, conditions: Tensor, temperature: float = 0.0) -> Tensor:
        """Cores of conditions; at temperature 0 those of the prior's mean, which depend on nothing random."""
        prior = self.prior(conditions)
        codes = prior.mean
        if temperature:
            codes = codes + temperature * self._spread(prior) * torch.randn_like(codes)
        return self.decode(codes)

    def elbo(self, cores: Tensor, conditions: Tensor, kl_weight: float = 0.005) -> Tensor:
        """Loss of known cores: squared error in standard deviations, and KL(q(z | Z, c) || p(z | c)), a row."""
        prior = self.prior(conditions)
        standard = cores.flatten(1) / self.deviation
        mean, log_deviation = self.posterior(torch.cat([standard, prior.mean.detach()], 1)).chunk(2, -1)
        mean, spread = mean + prior.mean, self._spread(prior)
        codes = mean + log_deviation.exp() * torch.randn_like(mean)
        error = (codes @ self.decoder - standard).square().mean(1)
        ratio = (2 * (log_deviation - spread.log())).exp()
        kl = 0.5 * (ratio + ((mean - prior.mean) / spread).square() - 1 - ratio.log()).sum(1)
        return error + kl_weight * kl

    def _spread(self, prior: Prior) -> Tensor:
        """Standard deviation of p(z | c): that of checkpoints of one task, and more where c is unknown."""
        return self.log_spread.exp() * (2 - prior.explained).sqrt()


Batch = tuple[list[int], Tensor]
"""The tasks of a step's rows, each once, and the loss's inputs, of which each task has equally many."""


@dataclass(frozen=True)
class Settings:
    """What training is set to; the defaults were chosen on a fold that no table shows.

    Attributes:
        shared_steps: Steps of the multi-task LoRA alone, at a constant rate.
        core_steps: Steps of basis and cores together; every rate falls to zero.
        basis_rate: Rate of ``A`` and ``B``.
        rate: Rate of the network.
        without: Share of a step's tasks that get no condition; half of them an unrelated text in its place.
        noise: Noise on conditions, in standard deviations of each dimension.
    """

    shared_steps: int
    core_steps: int
    basis_rate: float = 3e-3
    rate: float = 1e-3
    without: float = 0.3
    noise: float = 0.5


def train_from_data(
    basis: CoreBasis,
    network: CoreNetwork,
    *,
    draw: Callable[[], Batch],
    loss: Callable[[Tensor, Tensor | None], Tensor],
    condition: Callable[[int, random.Random], Tensor],
    unrelated: Tensor,
    settings: Settings,
    seed: int = 0,
) -> None:
    """Train the multi-task LoRA, then basis and cores, in place.

    Args:
        basis: The factors; trained in both parts.
        network: Makes the cores; trained in the second part.
        draw: The next step's tasks and inputs.
        loss: Mean loss of inputs under cores ``(tasks, modules, R, R)``, or under the multi-task LoRA for None.
        condition: A text vector ``(width,)`` of a task: one of its wordings, sometimes a damaged one.
        unrelated: Vectors of texts that describe no task, ``(texts, width)``.
        settings: Steps, rates, dropout and noise.
        seed: Of everything random here.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    first = torch.optim.Adam(basis.parameters(), lr=settings.basis_rate, betas=(0.9, 0.99))
    for step in range(settings.shared_steps):
        first.param_groups[0]["lr"] = settings.basis_rate * min(1.0, (step + 1) / 50)
        _, inputs = draw()
        _update(first, loss(inputs, None))
    prior = network.prior
    second = torch.optim.Adam(network.parameters(), lr=settings.rate, betas=(0.9, 0.99))
    for step in range(settings.core_steps):
        left = 1 - step / settings.core_steps
        first.param_groups[0]["lr"] = settings.basis_rate * left
        second.param_groups[0]["lr"] = settings.rate * left * min(1.0, (step + 1) / 30)
        tasks, inputs = draw()
        vectors = torch.stack([condition(task, rng) for task in tasks])
        vectors = vectors + settings.noise * prior.deviation * torch.randn_like(vectors)
        told = torch.ones(len(tasks), 1)
        for row in range(len(tasks)):
            if rng.random() < settings.without:
                if rng.random() < 0.5:
                    vectors[row] = unrelated[rng.randrange(len(unrelated))]
                else:
                    told[row] = 0.0
        cores = network.decode(prior.code(vectors) * told)  # the explained share is applied at generation alone
        _update(first, loss(inputs, cores), second)


def _update(first: torch.optim.Optimizer, loss: Tensor, second: torch.optim.Optimizer | None = None) -> None:
    optimisers = [first] if second is None else [first, second]
    for optimiser in optimisers:
        optimiser.zero_grad()
    loss.backward()
    for optimiser in optimisers:
        torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
        optimiser.step()
