"""The networks of the conditional VAE: the token CVAE (default) and the paper's 1-D convolutional one.

Both map between standardised weights, shape ``(batch, D)``, and a Gaussian latent of shape ``(batch, latent)``, given
a condition, and have the same four methods: ``embed_condition``, ``posterior``, ``prior`` and ``decode``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers.utils.generic import ModelOutput

from lora_factory.adapters.layout import AdapterLayout, TokenGroup

SHRINKAGE = 0.1  # of the covariance of a task's examples, of which there may be fewer than directions


@dataclass
class GeneratorOutput(ModelOutput):
    """The output of ``CVAELoRAGenerator.forward``.

    Attributes:
        loss: The objective to minimise.
        reconstruction: Mean squared error of the standardised weights; 1 is what the bias adapter alone would reach.
        kl: KL(posterior, prior) in nats per adapter, batch mean.
        active_latents: How many latents carry more than 0.01 nats.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    active_latents: torch.Tensor | None = None


@dataclass
class Gaussian:
    """A diagonal Gaussian; both tensors have the shape ``(batch, size)``."""

    mean: torch.Tensor
    log_variance: torch.Tensor

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
    """Task vectors as coordinates in the directions in which the zoo's tasks differ, a modality each.

    Minus the mean task vector, times a basis of the span of the tasks' deviations from it, over their root mean
    square coordinate. What a task vector says beyond that span, no task could teach the network to understand: left
    in, it would move the adapters of unseen tasks at random. The basis is orthonormal, or where it is known how the
    examples of one task differ, orthonormal after whitening by that (linear discriminants). The statistics are
    persistent buffers, so that a downloaded generator has them.

    Args:
        widths: Width of every modality's task vectors.
        directions: How many directions are kept of a modality; all by default.
    """

    def __init__(self, widths: Mapping[str, int], directions: Mapping[str, int]) -> None:
        super().__init__()
        self.widths = {name: min(width, directions.get(name, width)) for name, width in widths.items()}
        for name, width in widths.items():
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_basis", torch.eye(width)[: self.widths[name]])
            self.register_buffer(f"{name}_scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, features: Mapping[str, torch.Tensor], within: Mapping[str, torch.Tensor] | None = None) -> None:
        """Set the statistics from what differs.

        Args:
            features: For every modality a row a task, or group of examples, shape ``(rows, width)``.
            within: For some of them, how examples differ from the mean of their task, shape ``(examples, width)``.
        """
        for name, rows in features.items():
            mean, basis = rows.mean(0), self.get_buffer(f"{name}_basis")
            white = _whitening((within or {}).get(name, rows[:0]))
            _, lengths, directions = torch.linalg.svd((rows - mean).double() @ white, full_matrices=False)
            lengths = lengths[: len(basis)]
            spanned = (lengths > 1e-4 * lengths[0].clamp_min(1e-12)).sum().clamp_min(1)
            basis.zero_()
            basis[:spanned] = (directions[:spanned] @ white.T).to(basis)
            self.get_buffer(f"{name}_mean").copy_(mean)
            variance = lengths.square().sum() / (len(rows) * spanned)
            self.get_buffer(f"{name}_scale").copy_(variance.sqrt().clamp_min(1e-6))

    def forward(self, name: str, vector: torch.Tensor) -> torch.Tensor:
        """Coordinates ``(batch, widths[name])`` of one modality's task vectors, shape ``(batch, width)``."""
        centred = vector - self.get_buffer(f"{name}_mean")
        return centred @ self.get_buffer(f"{name}_basis").T / self.get_buffer(f"{name}_scale")

    def all(self, conditions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The coordinates of several modalities' task vectors."""
        return {name: self(name, vectors) for name, vectors in conditions.items()}

    def length(self, name: str) -> float:
        """The root mean square distance of task vectors from their mean, in the units of the encoder."""
        spanned = self.spanned(name)
        stretch = self.get_buffer(f"{name}_basis")[:spanned].norm(dim=1).mean().clamp_min(1e-12)
        return float(self.get_buffer(f"{name}_scale") / stretch) * math.sqrt(spanned)

    def spanned(self, name: str) -> int:
        """The number of directions in which the fitted task vectors differ, at least 1."""
        return max(1, int(self.get_buffer(f"{name}_basis").any(1).sum()))


class ConditionEncoder(nn.Module):
    """Standardised task vectors of any subset of the modalities to one condition of shape ``(batch, width)``."""

    def __init__(self, widths: Mapping[str, int], width: int) -> None:
        super().__init__()
        self.projections = nn.ModuleDict({name: nn.Linear(size, width) for name, size in widths.items()})
        self.absent = nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name in widths})
        self.mix = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, vectors: Mapping[str, torch.Tensor], batch: int) -> torch.Tensor:
        """Modalities that ``vectors`` lacks are replaced by a learned vector."""
        total = sum(
            projection(vectors[name]) if name in vectors else self.absent[name].expand(batch, -1)
            for name, projection in self.projections.items()
        )
        return total + self.mix(total)


class FiLMBlock(nn.Module):
    """Residual MLP block whose normalised input is scaled and shifted by the condition (adaptive LayerNorm)."""

    def __init__(self, width: int, condition_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(condition_width, 2 * width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """``hidden`` has shape ``(batch, tokens, width)``, ``condition`` ``(batch, condition width)``."""
        scale, shift = self.modulation(condition)[:, None].chunk(2, dim=-1)
        modulated = self.norm(hidden) * (1 + scale) + shift
        return hidden + self.contract(functional.gelu(self.expand(modulated)))


class TokenIdentity(nn.Module):
    """Which token this is: embeddings of its group (module kind and factor), its layer and its rank slice."""

    def __init__(self, layout: AdapterLayout, width: int) -> None:
        super().__init__()
        groups = layout.groups
        self.group = nn.Embedding(len(groups), width)
        self.layer = nn.Embedding(1 + max(max(group.layers) for group in groups), width)
        self.rank = nn.Embedding(1 + max(max(group.ranks) for group in groups), width)
        self.group_layer = nn.Linear(width, width, bias=False)

    def forward(self, index: int, group: TokenGroup) -> torch.Tensor:
        """Embeddings of one group's tokens, shape ``(tokens, width)``."""
        device = self.group.weight.device
        layers = self.layer(torch.tensor(group.layers, device=device))
        ranks = self.rank(torch.tensor(group.ranks, device=device))
        kind = self.group.weight[index]
        return kind + layers + ranks + self.group_layer(kind * layers) + self.group_layer(layers * ranks)


class TokenCVAE(nn.Module):
    """CVAE over adapter tokens (method, section 2-4): shared blocks, one linear head a token group, learned prior.

    ``log_std`` is the log standard deviation of every token's weights around the decoded mean, in standardised units
    (the variance of Eq. 6): fitted to the spread of real checkpoints after training.

    Args:
        layout: The adapters' layout.
        widths: Width of every condition modality.
        width: Hidden size.
        depth: Residual blocks of the decoder.
        latent_size: Size of z.
    """

    log_std: torch.Tensor

    def __init__(
        self, layout: AdapterLayout, widths: Mapping[str, int], *, width: int, depth: int, latent_size: int
    ) -> None:
        super().__init__()
        self.layout = layout
        groups = layout.groups
        self.condition = ConditionEncoder(widths, width)
        self.prior_head = _gaussian_head(width, latent_size)
        self.identity = TokenIdentity(layout, width)
        self.inputs = nn.ModuleList(nn.Linear(group.length, width) for group in groups)
        self.encoder = FiLMBlock(width, width)
        self.posterior_head = _gaussian_head(2 * width, latent_size)
        self.latent = nn.Linear(latent_size, width)
        self.blocks = nn.ModuleList(FiLMBlock(width, 2 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.outputs = nn.ModuleList(nn.Linear(width, group.length) for group in groups)
        self.register_buffer("log_std", torch.full((layout.num_tokens,), -10.0))
        # The latent starts without influence and at no cost: it is used once it explains what the condition does not.
        for parameter in (
            *self.latent.parameters(),
            *self.prior_head[-1].parameters(),
            *self.posterior_head[-1].parameters(),
        ):
            nn.init.zeros_(parameter)

    def embed_condition(self, vectors: Mapping[str, torch.Tensor], batch: int) -> torch.Tensor:
        """Condition of shape ``(batch, width)`` from standardised task vectors."""
        return self.condition(vectors, batch)

    def prior(self, condition: torch.Tensor) -> Gaussian:
        """The learned conditional prior p(z | c)."""
        return _gaussian(self.prior_head(condition))

    def posterior(self, weights: torch.Tensor, condition: torch.Tensor) -> Gaussian:
        """q(z | weights, c) from standardised weights of shape ``(batch, D)`` (Eq. 3)."""
        tokens = self.layout.to_tokens(weights)
        embedded = [
            layer(tokens[group.name]) + self.identity(index, group)
            for index, (layer, group) in enumerate(zip(self.inputs, self.layout.groups, strict=True))
        ]
        pooled = self.encoder(torch.cat(embedded, dim=1), condition).mean(dim=1)
        return _gaussian(self.posterior_head(torch.cat([pooled, condition], dim=-1)))

    def decode(self, latent: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log standard deviation of the standardised weights (Eq. 6), each ``(batch, D)``."""
        heads = zip(self.layout.groups, self.features(latent, condition), self.outputs, strict=True)
        mean = self.layout.from_tokens({group.name: output(part) for group, part, output in heads})
        return mean, spread_over_weights(self.layout, self.log_std).expand_as(mean)

    def features(self, latent: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the linear heads read: one tensor ``(batch, tokens, width)`` a token group."""
        signal = torch.cat([self.latent(latent), condition], dim=-1)
        identities = [self.identity(index, group) for index, group in enumerate(self.layout.groups)]
        hidden = torch.cat(identities).expand(len(latent), -1, -1)
        for block in self.blocks:
            hidden = block(hidden, signal)
        return self.norm(hidden).split([len(identity) for identity in identities], dim=1)


class ConvCVAE(nn.Module):
    """The paper's CVAE: 1-D convolutions over ``[l; v]`` (Eq. 2), back from ``[z; v]`` (Eq. 5), prior N(0, I) (Eq. 7).

    Kernel 7, stride 2 (1 once nothing is left to halve), batch normalisation; the number of channels is the number of
    layers, 12 in the paper.

    Args:
        layout: The adapters' layout.
        widths: Width of every condition modality; their vectors are concatenated to v.
        channels: Output channels of the encoder's layers; the decoder mirrors them.
        latent_size: Size of z, 256 in the paper.
    """

    def __init__(
        self, layout: AdapterLayout, widths: Mapping[str, int], *, channels: Sequence[int], latent_size: int
    ) -> None:
        super().__init__()
        self.size, self.widths = layout.size, dict(widths)
        condition = sum(self.widths.values())
        length, strides = self.size + condition, []
        pairs = list(zip([1, *channels[:-1]], channels, strict=True))
        for _ in pairs:
            strides.append(2 if length > 1 else 1)
            length = math.ceil(length / strides[-1])
        self.start = (channels[-1], length)
        layers = list(zip(pairs, strides, strict=True))
        self.encoder = nn.Sequential(
            *(_convolution(nn.Conv1d(i, o, 7, stride=stride, padding=3), o) for (i, o), stride in layers)
        )
        self.posterior_head = nn.Linear(channels[-1] * length, 2 * latent_size)
        self.latent = nn.Linear(latent_size + condition, channels[-1] * length)
        inner = [_convolution(_expansion(o, i, stride), i) for (i, o), stride in reversed(layers[1:])]
        self.decoder = nn.Sequential(*inner, _expansion(channels[0], 1, strides[0]))
        self.latent_size = latent_size

    def embed_condition(self, vectors: Mapping[str, torch.Tensor], batch: int) -> torch.Tensor:
        """The task vector v: all modalities side by side, a missing one as zeros (the zoo's mean)."""
        reference = self.latent.weight
        absent = {name: reference.new_zeros(batch, width) for name, width in self.widths.items()}
        return torch.cat([vectors.get(name, absent[name]) for name in self.widths], dim=-1)

    def prior(self, condition: torch.Tensor) -> Gaussian:
        """N(0, I), whatever the condition (Eq. 7)."""
        zeros = condition.new_zeros(len(condition), self.latent_size)
        return Gaussian(zeros, zeros)

    def posterior(self, weights: torch.Tensor, condition: torch.Tensor) -> Gaussian:
        """q(z | l, v) from ``[l; v]`` (Eq. 2 and 3)."""
        hidden = self.encoder(torch.cat([weights, condition], dim=-1)[:, None])
        return _gaussian(self.posterior_head(hidden.flatten(1)))

    def decode(self, latent: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and (zero-noise) log standard deviation of the standardised weights, each ``(batch, D)``."""
        hidden = self.latent(torch.cat([latent, condition], dim=-1)).view(len(latent), *self.start)
        mean = self.decoder(hidden)[:, 0, : self.size]
        return mean, torch.full_like(mean, -math.inf)


def token_scales(layout: AdapterLayout, deviation: torch.Tensor) -> torch.Tensor:
    """Root mean square deviation of every token's weights from their centre, shape ``(tokens,)``.

    Floored at a twentieth of its group's mean, which is also that of tokens that no adapter uses.

    Args:
        layout: The adapters' layout.
        deviation: Mean square deviation of every weight, shape ``(D,)``.
    """
    scales = []
    for rows in layout.to_tokens(deviation).values():
        scale = rows.mean(-1).sqrt()
        used = torch.where(scale > 0, scale, scale[scale > 0].mean().nan_to_num(0.0))
        scales.append(torch.maximum(used, 0.05 * used.mean()).clamp_min(1e-8))
    return torch.cat(scales)


def spread_over_weights(layout: AdapterLayout, per_token: torch.Tensor) -> torch.Tensor:
    """One number a token, shape ``(tokens,)`` in the order of the groups, as one a weight, shape ``(D,)``."""
    parts = per_token.split([len(group.layers) for group in layout.groups])
    return layout.from_tokens(
        {group.name: part[:, None].expand(-1, group.length) for group, part in zip(layout.groups, parts, strict=True)}
    )


def _expansion(channels_in: int, channels_out: int, stride: int) -> nn.ConvTranspose1d:
    """The transposed convolution that undoes one of the encoder's lengths, to at least what it was."""
    return nn.ConvTranspose1d(channels_in, channels_out, 7, stride=stride, padding=3, output_padding=stride - 1)


def _convolution(layer: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(layer, nn.BatchNorm1d(channels), nn.LeakyReLU())


def _gaussian_head(width: int, latent_size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 2 * latent_size))


def _gaussian(parameters: torch.Tensor) -> Gaussian:
    """Split into mean and log-variance; the latter is kept within e^±10, where half precision still holds it."""
    mean, log_variance = parameters.chunk(2, dim=-1)
    return Gaussian(mean, log_variance.clamp(-10, 10))


def _whitening(deviations: torch.Tensor) -> torch.Tensor:
    """The matrix that turns rows of ``(n, width)`` into ones of about unit covariance; float64, ``(width, width)``.

    The covariance is shrunk by a tenth towards an isotropic one; where it is zero or unknown nothing is changed.
    """
    width = deviations.shape[1]
    identity = torch.eye(width, dtype=torch.float64, device=deviations.device)
    covariance = deviations.double().T @ deviations.double() / max(1, len(deviations))
    variance = covariance.diagonal().mean()
    if not variance > 0:
        return identity
    shrunk = (1 - SHRINKAGE) * covariance / variance + SHRINKAGE * identity
    return torch.linalg.inv(torch.linalg.cholesky(shrunk)).T


def group_means(rows: torch.Tensor) -> torch.Tensor:
    """Means over four consecutive rows each, and over the rest."""
    return torch.stack([group.mean(0) for group in rows.split(4)])
