"""The paper's network, ``decoder="conv1d"``: a conditional VAE of 1-D convolutions over flattened adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lora_factory.generator.networks import Gaussian, GeneratorOutput


class ConvCVAE(nn.Module):
    """The paper's CVAE: 1-D convolutions over ``[l; v]`` (Eq. 2), back from ``[z; v]`` (Eq. 5), prior N(0, I) (Eq. 7).

    Kernel 7, stride 2 (1 once nothing is left to halve), batch normalisation; the number of channels is the number of
    layers, 12 in the paper.

    Args:
        size: D, the number of weights of an adapter.
        widths: Width of every condition modality; their vectors are concatenated to v.
        channels: Output channels of the encoder's layers; the decoder mirrors them.
        latent_size: Size of z, 256 in the paper.
    """

    def __init__(self, size: int, widths: Mapping[str, int], *, channels: Sequence[int], latent_size: int) -> None:
        super().__init__()
        self.size, self.widths = size, dict(widths)
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

    def prior(self, conditions: Mapping[str, torch.Tensor], batch: int) -> Gaussian:
        """N(0, I), whatever the condition (Eq. 7)."""
        zeros = self.latent.weight.new_zeros(batch, self.latent_size)
        return Gaussian(zeros, zeros)

    def posterior(self, weights: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> Gaussian:
        """q(z | l, v) from ``[l; v]`` (Eq. 2 and 3)."""
        hidden = self.encoder(torch.cat([weights, self._joined(conditions, len(weights))], dim=-1)[:, None])
        return Gaussian.from_parameters(self.posterior_head(hidden.flatten(1)))

    def decode(self, latent: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The standardised weights, ``(batch, D)`` (Eq. 5 and 6)."""
        joined = torch.cat([latent, self._joined(conditions, len(latent))], dim=-1)
        return self.decoder(self.latent(joined).view(len(latent), *self.start))[:, 0, : self.size]

    def loss(
        self,
        weights: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
        kl_weight: float,
        source: torch.Generator | None = None,
    ) -> GeneratorOutput:
        """The published loss (Eq. 8): mean squared error, and the KL divergence times its weight."""
        posterior = self.posterior(weights, conditions)
        kl = posterior.kl(self.prior(conditions, len(weights)))
        error = (self.decode(posterior.sample(generator=source), conditions) - weights).square().mean()
        return GeneratorOutput.of(error + kl_weight * kl.sum(-1).mean(), error, kl)

    def _joined(self, conditions: Mapping[str, torch.Tensor], batch: int) -> torch.Tensor:
        """The task vector v: all modalities side by side, a missing one as zeros (the zoo's mean)."""
        absent = {name: self.latent.weight.new_zeros(batch, width) for name, width in self.widths.items()}
        return torch.cat([conditions.get(name, absent[name]) for name in self.widths], dim=-1)


def _expansion(channels_in: int, channels_out: int, stride: int) -> nn.ConvTranspose1d:
    """The transposed convolution that undoes one of the encoder's lengths, to at least what it was."""
    return nn.ConvTranspose1d(channels_in, channels_out, 7, stride=stride, padding=3, output_padding=stride - 1)


def _convolution(layer: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(layer, nn.BatchNorm1d(channels), nn.LeakyReLU())
