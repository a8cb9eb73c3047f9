"""Stage 1: fit a generator to the adapters of a zoo, the evidence lower bound over checkpoints, in episodes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from lora_factory.arguments import TrainArguments
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.generator.networks import TokenCVAE, spread_over_weights
from lora_factory.generator.recall import measure_recall
from lora_factory.generator.task_vectors import random_subset
from lora_factory.models.hidden_states import FEATURE_EXAMPLES
from lora_factory.zoo.checkpoints import SnapshotRows, mean_checkpoint

# Noise on a task vector, as a share of the typical length of one. It is almost orthogonal to the few directions in
# which tasks differ, so that much of it teaches the network to listen to these alone: paraphrases land on their task.
CONDITION_NOISE = 0.05
HEAD_NOISE = 0.025  # the same while the heads are solved, where less of it leaves a smaller error on known texts
MAX_SUPPORT = 32  # examples in the largest support set
HEAD_EPISODES = 16  # batches that the closed-form heads are fitted to, half of them with latents from the posterior
PRIOR_FITS = 4  # how often the prior is made narrower at most; how much z spreads samples is not linear
SPREAD_SAMPLES = 8  # sampled adapters a task that calibrate the spread
CHUNK_BYTES = 16 << 20  # of adapters that the token decoder looks at together; a larger batch goes in parts
RECALL_BYTES = 512 << 20  # of the known tasks' adapters that a generator keeps at most; beyond, it keeps none
HEAD_RIDGE = 1e-5  # ridge penalty in units of the features' mean square
WARMUP_RATIO = 0.05  # of the steps, in which the learning rate rises; then it falls in a cosine
MAX_GRAD_NORM = 1.0
KL_WARMUP = 0.3  # share of the steps over which the KL term rises to its weight


def fit(
    generator: CVAELoRAGenerator,
    weights: Mapping[str, SnapshotRows],
    features: Mapping[str, Mapping[str, torch.Tensor]],
    arguments: TrainArguments,
    accelerator: Accelerator,
) -> list[dict[str, float]]:
    """Stage 1: minimise the negative evidence lower bound (Eq. 8) over (checkpoint, description) pairs.

    Args:
        generator: Its statistics must be fitted.
        weights: Checkpoints ``(n, D)`` of every task.
        features: For every modality the rows ``(n, width)`` of every task.
        arguments: Steps, batch size, learning rate and seed.
        accelerator: Device and progress bar.

    Returns:
        One record about every fiftieth step: loss, reconstruction, KL and active latents.
    """
    generator.to(accelerator.device).train()
    parameters = [parameter for parameter in generator.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=0.01)
    warmup = math.ceil(arguments.steps * WARMUP_RATIO)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, arguments.steps)
    source = torch.Generator().manual_seed(arguments.seed)
    history = []
    solve_heads(generator, weights, features, arguments.batch_size, source)
    bar = tqdm(total=arguments.steps, desc="train generator", disable=not accelerator.is_local_main_process)
    for step in range(arguments.steps):
        adapters, conditions = sample_episode(generator, weights, features, arguments.batch_size, source)
        kl_factor = min(1.0, (step + 1) / (KL_WARMUP * arguments.steps))
        record = dict.fromkeys(("loss", "reconstruction", "kl", "active_latents"), 0.0)
        for rows in parts_of(generator, len(adapters)):
            share = len(adapters[rows]) / len(adapters)
            part = {name: vectors[rows] for name, vectors in conditions.items()}
            output = generator(adapters[rows], part, kl_factor=kl_factor, generator=source)
            accelerator.backward(share * output.loss)
            record = {name: value + share * output[name].item() for name, value in record.items()}
        if not math.isfinite(record["loss"]):
            raise LoraFactoryError(
                f"the generator's loss is {record['loss']} at step {step}; lower learning_rate "
                f"(now {arguments.learning_rate})"
            )
        accelerator.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.update()
        if step % 50 == 0 or step == arguments.steps - 1:
            record = {name: round(value, 6) for name, value in record.items()}
            history.append({"step": step, **record})
            bar.set_postfix(error=f"{record['reconstruction']:.4f}", kl=f"{record['kl']:.1f}")
    bar.close()
    solve_heads(generator, weights, features, arguments.batch_size, source)
    if isinstance(generator.network, TokenCVAE) and 4 * len(weights) * generator.layout.size <= RECALL_BYTES:
        remember(generator, weights, features)
    return history


@torch.no_grad()
def remember(
    generator: CVAELoRAGenerator,
    weights: Mapping[str, SnapshotRows],
    features: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    """Keep the mean checkpoint of every task, for conditions that mean this task: no network need be exact on these.

    Nothing is kept where no modality tells the tasks apart.

    Args:
        generator: Its statistics must be fitted.
        weights: Checkpoints ``(n, D)`` of every task.
        features: For every modality the rows ``(n, width)`` of every task.
    """
    recall = measure_recall(copy.deepcopy(generator.standardiser).cpu(), features)
    if not recall:
        return
    means = torch.stack([mean_checkpoint(rows) for rows in weights.values()]).to(generator.device)
    generator.register_buffer("known_adapters", (means - generator.bias) / generator.weight_scale)
    generator.config.recall = recall


@torch.no_grad()
def solve_heads(
    generator: CVAELoRAGenerator,
    weights: Mapping[str, SnapshotRows],
    features: Mapping[str, Mapping[str, torch.Tensor]],
    batch_size: int,
    source: torch.Generator,
) -> None:
    """Set the token decoder's linear heads to the ridge solution for the features that its blocks give them now.

    The mean squared error is quadratic in the heads, so its minimum is a linear system of ``width + 1`` unknowns a
    token group: under a second for what gradient descent needs hundreds of steps to approach. Before training it is
    a warm start, after training it removes the error that the heads have left.
    """
    network = generator.network
    if not isinstance(network, TokenCVAE):
        return
    groups = network.layout.groups
    heads = [head for head in network.outputs if isinstance(head, nn.Linear)]
    sizes = [head.in_features + 1 for head in heads]
    like: dict[str, Any] = {"dtype": torch.float64, "device": generator.device}
    grams = [torch.zeros(size, size, **like) for size in sizes]
    products = [torch.zeros(size, head.out_features, **like) for size, head in zip(sizes, heads, strict=True)]
    for episode in range(HEAD_EPISODES):
        drawn = sample_episode(generator, weights, features, batch_size, source, noise=HEAD_NOISE)
        for part in parts_of(generator, batch_size):
            conditions = {name: vectors[part] for name, vectors in drawn[1].items()}
            standard, condition = generator.encode_inputs(drawn[0][part], conditions)
            prior = network.prior(condition)
            latent = network.posterior(standard, condition).sample(generator=source) if episode % 2 else prior.mean
            tokens = network.layout.to_tokens(standard)
            for index, (group, hidden) in enumerate(zip(groups, network.features(latent, condition), strict=True)):
                rows = functional.pad(hidden, (0, 1), value=1.0).flatten(0, 1).double()
                grams[index] += rows.T @ rows
                products[index] += rows.T @ tokens[group.name].flatten(0, 1).double()
    for head, gram, product in zip(heads, grams, products, strict=True):
        ridge = HEAD_RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        solution = torch.linalg.solve(gram + ridge, product).to(head.weight.dtype)
        head.weight.copy_(solution[:-1].T)
        head.bias.copy_(solution[-1])


@torch.no_grad()
def calibrate_spread(
    generator: CVAELoRAGenerator,
    within: torch.Tensor,
    features: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    """Let samples at temperature 1 spread as real checkpoints of a task do.

    Where sampling z alone spreads them further, the prior is made as much narrower. What a token's weights vary within
    a task, less what they vary by sampling z, is left to the token decoder's ``log_std``, independent noise.

    Args:
        generator: A trained one, in evaluation mode.
        within: Mean variance within a task, shape ``(D,)``: `ZooStatistics.within`.
        features: For every modality the rows ``(n, width)`` of every task.
    """
    network = generator.network
    if not isinstance(network, TokenCVAE):
        return
    network.log_std.fill_(-math.inf)
    last: Any = network.prior_head[-1]
    log_variances = last.bias[generator.config.latent_size :]
    for _ in range(PRIOR_FITS):
        sampled = _sampled_variance(generator, features)
        excess = float(sampled.sum() / within.sum().clamp_min(1e-30))
        if excess <= 1:
            break
        log_variances -= math.log(excess)
    missing = within - sampled
    scale = spread_over_weights(network.layout, generator.token_scale).cpu()
    per_token = [rows.mean(-1) for rows in network.layout.to_tokens(missing / scale.square()).values()]
    network.log_std.copy_(0.5 * torch.cat(per_token).clamp_min(1e-8).log())


def _sampled_variance(
    generator: CVAELoRAGenerator, features: Mapping[str, Mapping[str, torch.Tensor]]
) -> torch.Tensor:
    """The mean over tasks of what the weights vary in samples at temperature 1, shape ``(D,)``."""
    name, tasks = next(iter(features.items()))
    total = torch.zeros(generator.layout.size)
    for rows in tasks.values():
        conditions = {name: rows.mean(0, keepdim=True).expand(SPREAD_SAMPLES, -1).to(generator.device)}
        total += generator.generate_vector(conditions, temperature=1.0).cpu().var(0)
    return total / len(tasks)


def sample_episode(
    generator: CVAELoRAGenerator,
    weights: Mapping[str, SnapshotRows],
    features: Mapping[str, Mapping[str, torch.Tensor]],
    batch_size: int,
    source: torch.Generator,
    *,
    noise: float = CONDITION_NOISE,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Draw tasks without replacement (with, once all are drawn), a checkpoint and a condition of each.

    A condition is one of the task's descriptions and/or the mean over a random support set of its examples' hidden
    states (Eq. 1) or of its images, so that every subset of the modalities is a valid condition later.

    Returns:
        Adapters ``(batch, D)`` and conditions ``(batch, width)`` with noise, on the generator's device.
    """
    names = list(weights)
    rounds = math.ceil(batch_size / len(names))
    order = torch.cat([torch.randperm(len(names), generator=source) for _ in range(rounds)])[:batch_size]
    tasks = [names[index] for index in order.tolist()]
    adapters = torch.stack([_draw(weights[task], source) for task in tasks])
    conditions = {}
    for name in random_subset(list(features), source):
        support = {"text": 1, "image": FEATURE_EXAMPLES}.get(name, MAX_SUPPORT)
        drawn = torch.stack([_support_mean(features[name][task], support, source) for task in tasks])
        drawn = drawn + noise * generator.standardiser.length(name) * torch.randn(drawn.shape, generator=source)
        conditions[name] = drawn.to(generator.device)
    return adapters.to(generator.device), conditions


def parts_of(generator: CVAELoRAGenerator, batch_size: int) -> list[slice]:
    """A batch in parts of an even number of rows that fit into `CHUNK_BYTES`; whole for the convolutional decoder.

    That one normalises over the batch; the token decoder's batch is only a mean over its rows.
    """
    fitting = CHUNK_BYTES // (4 * generator.layout.size) // 2 * 2
    size = max(2, fitting) if isinstance(generator.network, TokenCVAE) else batch_size
    return [slice(start, min(start + size, batch_size)) for start in range(0, batch_size, size)]


def _support_mean(rows: torch.Tensor, largest: int, source: torch.Generator) -> torch.Tensor:
    """Mean over one to ``largest`` rows, drawn without replacement."""
    count = int(torch.randint(1, min(largest, len(rows)) + 1, (), generator=source))
    return rows[torch.randperm(len(rows), generator=source)[:count]].mean(0)


def _draw(rows: SnapshotRows, source: torch.Generator) -> torch.Tensor:
    return rows[int(torch.randint(len(rows), (), generator=source))]
