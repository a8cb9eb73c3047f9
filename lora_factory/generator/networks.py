"""The network over cores, and what it shares with the paper's in ``conv1d.py``: conditions, Gaussians, outputs.

Both networks map between standardised targets (cores here, weights there) and a Gaussian latent, given conditions, and
have the same four methods: ``posterior``, ``prior``, ``decode`` and ``loss``. Conditions are a dictionary of
coordinates ``(batch, directions)`` by modality; an empty one is no condition.

The modules are also built on the meta device, to check files. There ``torch.eye`` and random numbers import PyTorch's
compiler, which takes 2 s, so they are not used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils.generic import ModelOutput

CODE_SCALE = 0.3  # of the values that a code of unit variance adds to a core, before training
# Share of a vector's length up to which vectors count as equal. In batches of other sizes, vectors of the same text
# differ by up to 1.2e-6 (MiniLM) and 6.6e-6 (SmolLM2-135M, float32); in bfloat16 by 0.016, and count as
# different.
ROUNDING = 1e-5
SHRINKAGE = 0.1  # of the covariance of a task's examples, of which there may be fewer than directions
# The same of texts. On the grid's validation fold, paraphrases gain 0.124 nats (seen cells), 0.083 (combinations),
# 0.012 (languages) and 0.032 (kind) on the multi-task LoRA with unfiltered texts; with 0.1 0.135, 0.109, 0.019 and
# 0.054; with 0.3 0.133, 0.107, 0.019 and 0.047. On 32 sets of benchmarks/digits.py that are kept from 192 others, a
# description and one in new words have an accuracy of 0.951 and 0.853 unfiltered, 0.947 and 0.812 with 0.1, 0.948 and
# 0.863 with 0.3.
TEXT_SHRINKAGE = 0.3
# How much the code of a modality counts beside one of weight 1. On the grid's validation fold, a paraphrase with 16
# examples gains 0.158 nats (seen cells), 0.131 (combinations), 0.057 (languages) and 0.081 (kind) with a weight of 2,
# 0.159, 0.131, 0.058 and 0.080 with 3, 0.159, 0.131, 0.059 and 0.079 with 4; examples alone 0.157, 0.128, 0.058 and
# 0.073. With one example, 0.131, 0.107, 0.042 and 0.066; 0.128, 0.102, 0.041 and 0.062; 0.126, 0.098, 0.040 and 0.059.
# With 16 and gibberish for a text, 0.135, 0.106, 0.052 and 0.065; 0.144, 0.115, 0.055 and 0.068; 0.149, 0.119, 0.056
# and 0.070.
CODE_WEIGHTS = {"hidden": 3.0}


@dataclass
class GeneratorOutput(ModelOutput):
    """The output of ``CVAELoRAGenerator.forward``.

    Attributes:
        loss: The objective to minimise.
        reconstruction: Mean squared error of the standardised targets; about 1 is what no condition would reach.
        kl: KL(posterior, prior) in nats per adapter, batch mean.
        active_latents: How many latents carry more than 0.01 nats.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    active_latents: torch.Tensor | None = None

    @classmethod
    def of(cls, loss: torch.Tensor, error: torch.Tensor, kl: torch.Tensor) -> GeneratorOutput:
        """The output of a batch from its loss, its squared error, and the KL of every latent, ``(batch, latents)``."""
        return cls(loss, error, kl.sum(-1).mean(), (kl.mean(0) > 0.01).sum())


@dataclass
class Gaussian:
    """A diagonal Gaussian; both tensors have the shape ``(batch, size)``."""

    mean: torch.Tensor
    log_variance: torch.Tensor

    @classmethod
    def from_parameters(cls, parameters: torch.Tensor) -> Gaussian:
        """Split a network's output into mean and log-variance, which is kept where half precision holds e^±10."""
        mean, log_variance = parameters.chunk(2, dim=-1)
        return cls(mean, log_variance.clamp(-10, 10))

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw one sample a row by reparameterisation (Eq. 4); ``temperature`` scales the standard deviation."""
        if temperature == 0:
            return self.mean
        device = generator.device if generator is not None else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + temperature * torch.exp(0.5 * self.log_variance) * noise.to(self.mean.device)

    def kl(self, other: Gaussian) -> torch.Tensor:
        """KL divergence from ``other`` in nats for every latent, shape ``(batch, size)``."""
        log_ratio = self.log_variance - other.log_variance
        distance = (self.mean - other.mean) ** 2 * torch.exp(-other.log_variance)
        return 0.5 * (torch.exp(log_ratio) + distance - 1 - log_ratio)


class ConditionStandardiser(nn.Module):
    """Task vectors as coordinates of one size, a modality each.

    Those of texts keep their dimensions: by what a text says beyond the directions in which known ones differ, the
    network tells texts that mean no task. Where texts of one task differ more than tasks do, little is left of them
    (a Wiener filter). Those of images and examples, of which single ones differ much within a task, become coordinates
    in the span of the tasks' deviations from their mean, over their root mean square coordinate; the basis is
    orthonormal, or where it is known how the examples of one task differ, orthonormal after whitening by that (linear
    discriminants). The statistics are persistent buffers, so that a downloaded generator has them.

    Args:
        widths: Width of every modality's task vectors.
        directions: At most so many coordinates are made of a modality; one that is not named keeps its own.
        noisy: Modalities whose vectors of one task differ: single vectors are filtered where a modality keeps its own
            coordinates, and means of a few are read by `expected` where it has others.

    Attributes:
        coordinates: Number of coordinates of every modality.
    """

    def __init__(self, widths: Mapping[str, int], directions: Mapping[str, int], noisy: Iterable[str] = ()) -> None:
        super().__init__()
        self.coordinates = {**widths, **directions}
        for name in noisy:
            if name in directions:
                self.register_buffer(f"{name}_noise", torch.zeros(directions[name]))
            else:
                self.register_buffer(f"{name}_filter", torch.zeros(widths[name], widths[name]).fill_diagonal_(1))
        for name, width in widths.items():
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_scale", torch.ones(()))
            if name in directions:
                self.register_buffer(f"{name}_basis", torch.zeros(directions[name], width).fill_diagonal_(1))

    @torch.no_grad()
    def fit(self, features: Mapping[str, torch.Tensor], within: Mapping[str, torch.Tensor] | None = None) -> None:
        """Set the statistics from what differs.

        Args:
            features: For every modality a row a task, or group of examples, shape ``(rows, width)``.
            within: For some of them, how examples differ from the mean of their task, shape ``(examples, width)``.
        """
        for name, rows in features.items():
            mean, basis, scale = rows.mean(0), self._basis(name), self.get_buffer(f"{name}_scale")
            self.get_buffer(f"{name}_mean").copy_(mean)
            apart = rows - mean
            differ = apart.norm() > ROUNDING * rows.norm()
            scatter = (within or {}).get(name, rows[:0])
            if basis is None:
                if differ and (filtering := self._buffers.get(f"{name}_filter")) is not None:
                    filtering.copy_(_wiener(apart, scatter))
                    apart = apart @ filtering.mT
                # a text far from tasks that do not differ is no reason for large coordinates
                scale.copy_((apart if differ else rows).square().mean().sqrt().clamp_min(1e-6))
                continue
            basis.zero_()
            if not differ:  # it says nothing
                scale.fill_(1)
                continue
            white = _whitening(scatter, rows.square().mean())
            _, lengths, directions = torch.linalg.svd(apart.double() @ white, full_matrices=False)
            lengths = lengths[: len(basis)]
            spanned = (lengths > 1e-4 * lengths[0]).sum()
            basis[:spanned] = (directions[:spanned] @ white.T).to(basis)
            scale.copy_((lengths.square().sum() / (len(rows) * spanned)).sqrt())
            if (noise := self._buffers.get(f"{name}_noise")) is not None:
                between = (apart @ basis.mT).square().mean(0)
                inside = (scatter @ basis.mT).square().sum(0) / max(1, len(scatter) - len(rows))
                noise.copy_(torch.where(between > 0, inside / between, 0))

    def forward(self, name: str, vector: torch.Tensor) -> torch.Tensor:
        """Coordinates ``(batch, coordinates[name])`` of one modality's task vectors, shape ``(batch, width)``."""
        centred, basis = vector - self.get_buffer(f"{name}_mean"), self._basis(name)
        if basis is None:
            basis = self._buffers.get(f"{name}_filter")
        return (centred if basis is None else centred @ basis.T) / self.get_buffer(f"{name}_scale")

    def expected(self, name: str, means: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """The task vectors to be expected of tasks of which a few examples are known.

        With variance b of tasks and w of a task's examples along a coordinate, it is the posterior mean, b / (b + w/n)
        times the mean of n examples (probabilistic linear discriminants; Ioffe 2006). What the modality's coordinates
        do not show, or a modality that is not `noisy`, stays as it is.

        Args:
            name: The modality.
            means: Means of the examples' vectors, ``(batch, width)``.
            counts: How many examples each is the mean of.
        """
        noise, basis = self._buffers.get(f"{name}_noise"), self._basis(name)
        if noise is None or basis is None:
            return means
        noise, basis = noise.to(means), basis.to(means)
        share = noise / (noise + means.new_tensor(counts)[:, None])
        found = (means - self.get_buffer(f"{name}_mean").to(means)) @ basis.mT
        inverse = torch.linalg.pinv((basis @ basis.mT).double(), hermitian=True).to(means)
        return means - (share * found) @ inverse @ basis

    def all(self, conditions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The coordinates of several modalities' task vectors."""
        return {name: self(name, vectors) for name, vectors in conditions.items()}

    def length(self, name: str) -> float:
        """The root mean square distance of task vectors from their mean, in the units of the encoder."""
        spanned, basis, stretch = self.spanned(name), self._basis(name), 1.0
        if basis is not None:
            stretch = float(basis[:spanned].norm(dim=1).mean()) or math.inf
        return float(self.get_buffer(f"{name}_scale")) / stretch * math.sqrt(spanned)

    def spanned(self, name: str) -> int:
        """The number of directions in which the fitted task vectors differ, at least 1."""
        basis = self._basis(name)
        return self.coordinates[name] if basis is None else max(1, int(basis.any(1).sum()))

    def _basis(self, name: str) -> torch.Tensor | None:
        """The rows that turn a modality's centred vectors into coordinates; None where these are the vectors."""
        return self._buffers.get(f"{name}_basis")


class CoreCVAE(nn.Module):
    """The conditional VAE over standardised cores: an MLP turns a condition into a code, a matrix that into cores.

    The decoder is linear, so that codes add as cores do, and no condition is the code 0: the centre, which all tasks
    share. The prior ``p(z | c)`` has a mean from the MLP and a variance per latent; the posterior ``q(z | Z, c)``
    corrects the code that comes nearest to Z.

    Args:
        size: C, the number of values of one adapter's cores.
        widths: Number of coordinates of every modality.
        latents: Length of a code.
        width: Hidden size of the MLP.
        depth: Hidden layers of the MLP.
    """

    def __init__(self, size: int, widths: Mapping[str, int], *, latents: int, width: int, depth: int) -> None:
        super().__init__()
        self.size = size
        self.inputs = nn.ModuleDict({name: nn.Linear(count, width) for name, count in widths.items()})
        layers = [layer for _ in range(depth - 1) for layer in (nn.SiLU(), nn.Linear(width, width))]
        self.hidden = nn.Sequential(*layers, nn.SiLU())
        self.prior_mean = nn.Linear(width, latents)
        self.correction = nn.Sequential(nn.Linear(width + latents, width), nn.SiLU(), nn.Linear(width, 2 * latents))
        self.decoder = nn.Parameter(torch.zeros(latents, size))
        if not self.decoder.is_meta:
            with torch.no_grad():
                self.decoder.normal_().mul_(CODE_SCALE).div_(latents**0.5)
        self.prior_log_variance = nn.Parameter(torch.zeros(latents))
        for parameter in (*self.prior_mean.parameters(), *self.correction[-1].parameters()):
            nn.init.zeros_(parameter)  # at first every condition is as good as none

    def prior(
        self,
        conditions: Mapping[str, torch.Tensor],
        batch: int,
        present: Mapping[str, torch.Tensor] | None = None,
    ) -> Gaussian:
        """p(z | c); without a condition the mean is 0.

        Args:
            conditions: Coordinates by modality.
            batch: The number of rows.
            present: Which rows have which modality, bool ``(batch, 1)`` by modality; default: all have all.
        """
        hidden = self._hidden(conditions, batch, present)
        mean = self.prior_mean(hidden) if conditions else hidden.new_zeros(batch, len(self.decoder))
        if present is not None:
            mean = mean * torch.stack([*present.values()]).any(0)
        return Gaussian(mean, self.prior_log_variance.expand_as(mean))

    def posterior(self, targets: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> Gaussian:
        """q(z | Z, c) of standardised cores ``(batch, C)``."""
        return self.posterior_of(self.code(targets), conditions)

    def posterior_of(self, codes: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> Gaussian:
        """q(z | Z, c) of the codes ``(batch, latents)`` that come nearest to Z."""
        inputs = torch.cat([codes, self._hidden(conditions, len(codes))], dim=-1)
        found = Gaussian.from_parameters(self.correction(inputs))
        return Gaussian(codes + found.mean, found.log_variance)

    def code(self, targets: torch.Tensor) -> torch.Tensor:
        """The codes ``(batch, latents)`` whose cores come nearest to standardised ones ``(batch, C)``."""
        return targets @ torch.linalg.pinv(self.decoder)

    def decode(self, latent: torch.Tensor, conditions: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Standardised cores ``(batch, C)`` of codes; the condition is in the code already."""
        return latent @ self.decoder

    def loss(
        self,
        targets: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
        kl_weight: float,
        source: torch.Generator | None = None,
    ) -> GeneratorOutput:
        """The negative evidence lower bound of standardised cores ``(batch, C)``; see `loss_of`."""
        codes = self.code(targets)
        missed = (targets - self.decode(codes)).square().mean(-1)
        return self.loss_of(codes, missed, self.decoder @ self.decoder.T, conditions, kl_weight, source)

    def loss_of(
        self,
        codes: torch.Tensor,
        missed: torch.Tensor,
        gram: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
        kl_weight: float,
        source: torch.Generator | None = None,
    ) -> GeneratorOutput:
        """The negative evidence lower bound per value: half the squared error, and the KL divergence over C.

        Every other row is decoded from the prior's mean, which generation at temperature 0 uses. The decoder is
        linear, so the error needs no cores: it is that of the nearest code, and a quadratic form of the difference.

        Args:
            codes: The nearest codes, ``(batch, latents)``.
            missed: Mean squared error of the nearest codes' cores, ``(batch,)``.
            gram: The decoder times its transpose, ``(latents, latents)``.
            conditions: Coordinates by modality.
            kl_weight: Factor of the KL divergence.
            source: Of the latent noise.
        """
        posterior, prior = self.posterior_of(codes, conditions), self.prior(conditions, len(codes))
        kl = posterior.kl(prior)
        even = torch.arange(len(codes), device=codes.device)[:, None] % 2 == 0
        apart = torch.where(even, prior.mean, posterior.sample(generator=source)) - codes
        errors = missed + (apart @ gram * apart).sum(-1) / self.size
        loss = 0.5 * errors.mean() + kl_weight * kl.sum(-1).mean() / self.size
        return GeneratorOutput.of(loss, errors[::2].mean(), kl)

    def _hidden(
        self,
        conditions: Mapping[str, torch.Tensor],
        batch: int,
        present: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """What the MLP makes of conditions, ``(batch, width)``.

        In training, it reads the mean of the inputs of the modalities that a row has. At generation, it reads each
        modality alone, and the results, and with them the codes, are averaged with `CODE_WEIGHTS`: a text that says
        nothing of a task leaves three quarters of the code of the task's examples. On the grid's validation fold,
        training on that average makes paraphrases gain 0.02 nats less on seen cells, combinations and languages.
        """
        if not conditions:
            return self.prior_mean.weight.new_zeros(batch, self.prior_mean.in_features)
        given = torch.stack([self.inputs[name](vectors) for name, vectors in conditions.items()])
        weights = given.new_tensor([1.0 if self.training else CODE_WEIGHTS.get(name, 1.0) for name in conditions])
        weights = weights[:, None, None]
        if present is not None:
            weights = weights * torch.stack([present[name] for name in conditions])
        shares = weights / weights.sum(0).clamp_min(1)
        if self.training:
            return self.hidden((shares * given).sum(0))
        return (shares * self.hidden(given)).sum(0)


def _whitening(deviations: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """The matrix that turns rows of ``(n, width)`` into ones of about unit covariance; float64, ``(width, width)``.

    The covariance is shrunk by a tenth towards its diagonal, so that the units of the columns do not matter; where it
    is unknown, or no more than the rounding of vectors of mean square ``size``, nothing is changed.
    """
    width = deviations.shape[1]
    covariance = deviations.double().T @ deviations.double() / max(1, len(deviations))
    variances = covariance.diagonal()
    if not variances.mean() > ROUNDING**2 * size:
        return torch.eye(width, dtype=torch.float64, device=deviations.device)
    diagonal = torch.diag(variances.clamp_min(1e-8 * variances.mean()))  # below, it is rounding
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * diagonal
    return torch.linalg.inv(torch.linalg.cholesky(shrunk)).T


def _wiener(apart: torch.Tensor, scatter: torch.Tensor) -> torch.Tensor:
    """The matrix ``(width, width)`` that makes of one text's deviation the one to be expected of its task's texts.

    It is ``B (B + W)⁻¹``, with B the covariance of tasks ``apart`` and W that of the texts of one task, of which
    ``scatter`` has the deviations. Both are shrunk towards their mean variance: in directions that no known text has,
    tasks and texts of one task differ as they do elsewhere.
    """

    def shrunk(rows: torch.Tensor, freedom: int) -> torch.Tensor:
        covariance = rows.double().mT @ rows.double() / max(1, freedom)
        mean = covariance.diagonal().mean().expand(len(covariance))
        return (1 - TEXT_SHRINKAGE) * covariance + TEXT_SHRINKAGE * torch.diag(mean)

    between, inside = shrunk(apart, len(apart)), shrunk(scatter, len(scatter) - len(apart))
    return torch.linalg.solve(between + inside, between).mT


def group_means(rows: torch.Tensor) -> torch.Tensor:
    """Means over four consecutive rows each, and over the rest."""
    return torch.stack([group.mean(0) for group in rows.split(4)])
