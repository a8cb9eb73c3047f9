"""COND P-DIFF (Jin et al. 2024): conditional diffusion over the latent space of an auto-encoder of LoRA weights.

Three departures make it work. The auto-encoder is not convolutional: each chunk of the weights has its own low-rank
linear map, since neighbouring weights share no pattern that a sliding kernel could find; parameters and memory are
O(D). Its latents have unit variance, which gives the latent noise a meaning. The denoiser predicts the clean latent,
not the noise (Ho et al. 2020, section 3.2): at late times an error in the noise is amplified some 150 times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from lora_factory.collection.optimise import take_steps
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.networks import ConditionStandardiser
from lora_factory.utils.extras import require
from lora_factory.utils.files import atomic_folder, write_json
from lora_factory.utils.folders import FolderKind
from lora_factory.utils.paths import local_path
from lora_factory.utils.progress import progress_bar
from lora_factory.utils.safe_files import read_json_object
from lora_factory.zoo.checkpoints import SnapshotRows, in_parts, mean_checkpoint

FORMAT_VERSION = 1
DIFFUSION_TIMES = 1000  # T
INPUT_NOISE, LATENT_NOISE = 0.001, 0.1  # standard deviations of P-diff's auto-encoder (Wang et al. 2024)
LEARNING_RATE = 1e-3  # of the denoiser's AdamW, at its peak
LATENT_BATCH = 4  # latents that the small denoiser sees for every checkpoint that the auto-encoder sees
CONFIG_FILE, WEIGHTS_FILE = "cond_p_diff.json", "model.safetensors"
_FOLDER = FolderKind(
    "a COND P-DIFF", r"cond_p_diff\.json|model\.safetensors", lambda folder: (folder / CONFIG_FILE).is_file()
)


class CondPDiff(nn.Module):
    """An auto-encoder of LoRA weight vectors and a denoiser of its latents; train with `train_cond_p_diff`.

    Args:
        size: Number of weights D.
        condition_width: Width of the task vectors.
        chunk: Number of weights per chunk.
        chunk_rank: Rank of each chunk's linear map; the auto-encoder has about ``2 * chunk_rank * D`` parameters.
        latent_size: Size of the latent.
        width: Hidden size of the denoiser, even.
        levels: Residual levels of the denoiser.
    """

    mean: Tensor
    scale: Tensor
    latent_mean: Tensor
    latent_scale: Tensor

    def __init__(
        self,
        size: int,
        condition_width: int,
        *,
        chunk: int = 1024,
        chunk_rank: int = 16,
        latent_size: int = 64,
        width: int = 128,
        levels: int = 4,
    ) -> None:
        """Initialise from PyTorch's global random state; the statistics are neutral until training sets them."""
        super().__init__()
        self.sizes = {"size": size, "condition_width": condition_width, "chunk": chunk, "chunk_rank": chunk_rank}
        self.sizes |= {"latent_size": latent_size, "width": width, "levels": levels}
        chunks = math.ceil(size / chunk)
        self.standardiser = ConditionStandardiser({"condition": condition_width}, {"condition": condition_width})
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(chunks))
        self.register_buffer("latent_mean", torch.zeros(latent_size))
        self.register_buffer("latent_scale", torch.ones(()))
        self.reduce = nn.Parameter(torch.randn(chunks, chunk, chunk_rank) / math.sqrt(chunk))
        self.encoder = nn.Linear(chunks * chunk_rank, latent_size)
        self.norm = nn.LayerNorm(latent_size, elementwise_affine=False)
        self.decoder = nn.Linear(latent_size, chunks * chunk_rank)
        self.expand = nn.Parameter(torch.randn(chunks, chunk_rank, chunk) / math.sqrt(chunk_rank))
        self.denoiser = Denoiser(latent_size, condition_width, width, levels)

    def standardise(self, weights: Tensor) -> Tensor:
        """Weights ``(batch, D)`` as chunks ``(batch, chunks, chunk)`` around 0 with a root mean square around 1."""
        padding = self.scale.numel() * self.sizes["chunk"] - self.sizes["size"]
        chunks = functional.pad(weights - self.mean, (0, padding)).unflatten(-1, (len(self.scale), -1))
        return chunks / self.scale[:, None]

    def encode(self, chunks: Tensor) -> Tensor:
        """Latents ``(batch, latent)`` of standardised chunks."""
        return self.norm(self.encoder(torch.einsum("bnc,ncr->bnr", chunks, self.reduce).flatten(1)))

    def decode(self, latents: Tensor) -> Tensor:
        """Standardised chunks of latents ``(batch, latent)``."""
        reduced = self.decoder(latents).unflatten(-1, (len(self.scale), -1))
        return torch.einsum("bnr,nrc->bnc", reduced, self.expand)

    def weights(self, chunks: Tensor) -> Tensor:
        """Weights ``(batch, D)`` of standardised chunks; undoes `standardise`."""
        return (chunks * self.scale[:, None]).flatten(1)[:, : self.sizes["size"]] + self.mean

    def standard_condition(self, vectors: torch.Tensor) -> torch.Tensor:
        """Project task vectors ``(..., width)`` to the training tasks' span and scale them to about 1 per feature."""
        width, spanned = self.sizes["condition_width"], self.standardiser.spanned("condition")
        return self.standardiser("condition", vectors) * math.sqrt(width / spanned)

    @torch.no_grad()
    def generate(self, vector: Tensor, seed: int = 0, *, steps: int | None = None) -> Tensor:
        """Sample one adapter.

        Args:
            vector: Task vector of shape ``(width,)``.
            seed: Seed of the sample.
            steps: Number of DDIM steps; default: DDPM's ancestral sampling over all 1000 times.

        Returns:
            Weights of shape ``(D,)``, float32, on the CPU.

        Raises:
            LoraFactoryError: When the vector has another width, or diffusers is not installed.
        """
        width = self.sizes["condition_width"]
        if vector.shape != (width,):
            raise LoraFactoryError(f"a task vector of shape {tuple(vector.shape)} does not fit; expected ({width},)")
        scheduler = _scheduler(deterministic=steps is not None)
        scheduler.set_timesteps(steps or DIFFUSION_TIMES)
        source = torch.Generator().manual_seed(seed)
        condition = self.standard_condition(vector.float().to(self.mean.device))[None]
        latent = torch.randn(1, len(self.latent_mean), generator=source).to(self.mean.device)
        for time in progress_bar(scheduler.timesteps, desc="sample COND P-DIFF", leave=False):
            clean = self.denoiser(latent, time.expand(1), condition)
            latent = scheduler.step(clean, time, latent, generator=source).prev_sample
        chunks = self.decode(latent * self.latent_scale + self.latent_mean)
        return self.weights(chunks)[0].cpu()

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write sizes and weights to a folder that appears by one rename."""
        with atomic_folder(folder, _FOLDER, overwrite=overwrite) as temporary:
            write_json(temporary / CONFIG_FILE, {"format_version": FORMAT_VERSION, **self.sizes})
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
            save_file(state, temporary / WEIGHTS_FILE, metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            LoraFactoryError: When a file is missing or damaged, or comes from a later version.
        """
        folder = local_path(folder)
        sizes = read_json_object(folder / CONFIG_FILE)
        fix = "save it again with CondPDiff.save"
        if sizes.pop("format_version", None) != FORMAT_VERSION:
            raise LoraFactoryError(f"{folder / CONFIG_FILE} is not of format version {FORMAT_VERSION}; {fix}")
        try:
            with torch.device("meta"):
                model = cls(**sizes)
            state = load_file(folder / WEIGHTS_FILE)
            model.load_state_dict(state, assign=True)
        except (OSError, SafetensorError, RuntimeError, TypeError) as error:
            raise LoraFactoryError(f"cannot load COND P-DIFF from {folder}: {error}; {fix}") from error
        damaged = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
        if damaged:
            raise LoraFactoryError(f"{damaged} in {folder / WEIGHTS_FILE} hold NaN or infinite values; {fix}")
        return model.eval()


class Denoiser(nn.Module):
    """Predicts clean latents from noisy ones; the sum of time and condition embeddings enters at every level."""

    def __init__(self, latent_size: int, condition_width: int, width: int, levels: int) -> None:
        """Widths of latent, condition and hidden layers, and the number of levels."""
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Sequential(nn.Linear(condition_width, width), nn.SiLU(), nn.Linear(width, width))
        self.input = nn.Linear(latent_size, width)
        self.levels = nn.ModuleList(_Level(width) for _ in range(levels))
        self.output = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, latent_size))

    def forward(self, latents: Tensor, times: Tensor, conditions: Tensor) -> Tensor:
        """Clean latents from noisy ones, times ``(batch,)`` and standardised conditions ``(batch, width)``."""
        embedding = self.time(_sinusoids(times.to(latents.device), self.width)) + self.condition(conditions)
        hidden = self.input(latents)
        for level in self.levels:
            hidden = level(hidden, embedding)
        return self.output(hidden)


class _Level(nn.Module):
    """Residual MLP block with an additive embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inject = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return hidden + self.mlp(self.norm(hidden) + self.inject(embedding))


def train_cond_p_diff(
    weights: Mapping[str, SnapshotRows],
    features: Mapping[str, Tensor],
    *,
    seed: int = 0,
    autoencoder_steps: int = 500,
    diffusion_steps: int = 1500,
    batch_size: int = 32,
    autoencoder_learning_rate: float = 5e-3,
    condition_noise: float = 0.2,
    device: str | torch.device = "cpu",
) -> CondPDiff:
    """Train the auto-encoder on the zoo's checkpoints, then the denoiser on their latents; every task counts the same.

    Args:
        weights: Checkpoints of shape ``(n, D)`` by task.
        features: Task vectors of shape ``(m, width)`` by task: one for each description, or for each support set.
        seed: Seed of the initial weights and of all draws.
        autoencoder_steps: Optimizer steps of the auto-encoder.
        diffusion_steps: Optimizer steps of the denoiser.
        batch_size: Checkpoints per step of the auto-encoder; the denoiser takes four times as many latents per step.
        autoencoder_learning_rate: Peak learning rate of the auto-encoder's AdamW, with a cosine to zero.
        condition_noise: Standard deviation of the noise added to standardised task vectors.
        device: Where to train.

    Returns:
        The trained model on the CPU, in evaluation mode.

    Raises:
        LoraFactoryError: When tasks or shapes do not fit, a loss is not finite, or diffusers is not installed.
    """
    _check(weights, features)
    scheduler = _scheduler()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CondPDiff(*(next(iter(tasks.values()))[0].numel() for tasks in (weights, features)))
    _fit_statistics(model, weights, features)
    model.to(device)
    source = torch.Generator().manual_seed(seed)
    snapshots = [(rows, index) for rows in weights.values() for index in range(len(rows))]
    snapshot_counts = [len(rows) for rows in weights.values()]

    def reconstruction() -> Tensor:
        picked = _rows(snapshot_counts, _tasks(len(weights), batch_size, source), source)
        drawn = torch.stack([rows[row] for rows, row in (snapshots[index] for index in picked.tolist())])
        chunks = model.standardise(drawn.to(device, torch.float32))
        latents = model.encode(chunks + INPUT_NOISE * _noise(chunks, source))
        return functional.mse_loss(model.decode(latents + LATENT_NOISE * _noise(latents, source)), chunks)

    parameters = [parameter for name, parameter in model.named_parameters() if not name.startswith("denoiser.")]
    _optimise(reconstruction, parameters, autoencoder_steps, autoencoder_learning_rate, "auto-encoder")
    latents = _fit_latents(model, weights.values())
    conditions = model.standard_condition(torch.cat([features[task] for task in weights]).float().to(device))

    def denoising() -> Tensor:
        tasks = _tasks(len(weights), LATENT_BATCH * batch_size, source)
        clean = latents[_rows(snapshot_counts, tasks, source)]
        condition = conditions[_rows([len(features[task]) for task in weights], tasks, source)]
        condition = condition + condition_noise * _noise(condition, source)
        times = torch.randint(DIFFUSION_TIMES, (len(clean),), generator=source).to(device)
        noisy = scheduler.add_noise(clean, _noise(clean, source), times)
        return functional.mse_loss(model.denoiser(noisy, times, condition), clean)

    _optimise(denoising, list(model.denoiser.parameters()), diffusion_steps, LEARNING_RATE, "denoiser")
    return model.cpu().eval()


def _check(weights: Mapping[str, SnapshotRows], features: Mapping[str, Tensor]) -> None:
    missing = sorted(set(weights) ^ set(features))
    if not weights or missing:
        raise LoraFactoryError(f"weights and features must hold the same tasks, one at least; one lacks {missing}")
    everything: dict[str, Mapping[str, SnapshotRows]] = {"weights": weights, "features": features}
    for name, tasks in everything.items():
        widths = [rows[0].numel() for rows in tasks.values() if len(rows)]
        for task, rows in tasks.items():
            fit = (part.ndim == 2 and part.shape[1] == widths[0] and part.isfinite().all() for part in in_parts(rows))
            if not len(rows) or not all(fit):
                found = tuple(rows[:].shape)
                raise LoraFactoryError(
                    f"{name} of task {task!r}, shape {found}: expected finite rows of shape (n, {widths[0]})"
                )


@torch.no_grad()
def _fit_statistics(model: CondPDiff, weights: Mapping[str, SnapshotRows], features: Mapping[str, Tensor]) -> None:
    """Set the mean adapter, a floored deviation for every chunk, and the task vectors' standardisation."""
    squares = torch.zeros_like(model.standardise(model.mean[None])[0])
    for rows in weights.values():
        model.mean += mean_checkpoint(rows) / len(weights)
    for rows in weights.values():
        for part in in_parts(rows):
            squares += model.standardise(part.float()).square().sum(0) / (len(rows) * len(weights))
    weight_counts = model.standardise(model.mean[None] + 1)[0].sum(-1)  # the last chunk is padded
    scale = (squares.sum(-1) / weight_counts).sqrt()
    model.scale.copy_(torch.maximum(scale, 0.05 * scale.mean()).clamp_min(1e-8))
    model.standardiser.fit({"condition": torch.stack([features[task].float().mean(0) for task in weights])})


@torch.no_grad()
def _fit_latents(model: CondPDiff, weights: Iterable[SnapshotRows]) -> Tensor:
    """Set the latents' mean and scale; returns the standardised latents of all checkpoints."""
    parts = (part for rows in weights for part in in_parts(rows))
    latents = torch.cat([model.encode(model.standardise(part.to(model.mean))) for part in parts])
    model.latent_mean.copy_(latents.mean(0))
    model.latent_scale.copy_((latents - model.latent_mean).square().mean().sqrt().clamp_min(1e-6))
    return (latents - model.latent_mean) / model.latent_scale


def _optimise(
    objective: Callable[[], Tensor], parameters: list[nn.Parameter], steps: int, learning_rate: float, label: str
) -> None:
    """Minimise with AdamW and a cosine schedule."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.05 * steps), steps)

    def gradients(step: int) -> float:
        loss = objective()
        loss.backward()
        return loss.item()

    advice = f"lower its learning rate (now {learning_rate})"
    for _ in take_steps(gradients, optimizer, steps, label=f"COND P-DIFF {label}", advice=advice, schedule=schedule):
        pass


def _tasks(count: int, batch: int, source: torch.Generator) -> Tensor:
    """Draw tasks evenly: without replacement until all are drawn."""
    rounds = math.ceil(batch / count)
    return torch.cat([torch.randperm(count, generator=source) for _ in range(rounds)])[:batch]


def _rows(counts: Sequence[int], tasks: Tensor, source: torch.Generator) -> Tensor:
    """Draw one row of every task in ``tasks``, as indices into the rows of all tasks one after the other."""
    lengths = torch.tensor(counts)
    starts = lengths.cumsum(0) - lengths
    drawn = torch.rand(len(tasks), generator=source, dtype=torch.float64) * lengths[tasks]
    return starts[tasks] + drawn.long()


def _noise(like: Tensor, source: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=source).to(like)


def _sinusoids(times: Tensor, width: int) -> Tensor:
    """Sinusoidal time embedding (Ho et al. 2020), shape ``(batch, width)``."""
    angles = times[:, None] * torch.logspace(0, -4, width // 2, device=times.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _scheduler(*, deterministic: bool = False) -> Any:  # noqa: ANN401 - diffusers hides its schedulers' methods
    """The published noise schedule, T = 1000 and linear in beta, from diffusers: DDPM, or DDIM where deterministic."""
    require("baselines", "COND P-DIFF", "diffusers")
    from diffusers import DDIMScheduler, DDPMScheduler

    kind = DDIMScheduler if deterministic else DDPMScheduler
    return kind(DIFFUSION_TIMES, 1e-4, 0.02, "linear", clip_sample=False, prediction_type="sample")
