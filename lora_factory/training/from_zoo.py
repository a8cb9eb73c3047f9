"""Train a generator on a zoo's weights: the shared basis in closed form, then the conditional VAE."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from lora_factory.arguments import MAX_DEFAULT_RANK, TrainArguments
from lora_factory.collection.optimise import take_steps
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.generator.networks import CODE_SCALE, CoreCVAE, GeneratorOutput
from lora_factory.training.conditions import draw_conditions, index_of
from lora_factory.utils.progress import progress_bar
from lora_factory.zoo.checkpoints import SnapshotRows, in_parts, mean_checkpoint, open_checkpoints, zoo_statistics
from lora_factory.zoo.store import AdapterZoo

_LOGGER = logging.getLogger(__name__)
Found = TypeVar("Found")
# With two on two cores, 40 tasks of benchmarks/zoo.py take 34 s instead of 42 s; each has 0.4 GB for its checkpoints.
THREADS = 4
WARMUP_RATIO = 0.05  # of the steps, in which the learning rate rises; then it falls in a cosine
# Peak learning rates. On the digits' validation sets 5e-3 reads 0.002 (text) to 0.009 (images) better than 1.5e-3.
RATES = {"core": 5e-3, "conv1d": 1.5e-3}
# Share of an adapter's squared ΔW, outside the basis or missed by the network, from which on training says so. After
# 200 steps on zoos of 6 and 13 text tasks the network misses 0.0002 to 0.004.
POOR_ERROR = 0.2


def basis_rank(zoo: AdapterZoo, arguments: TrainArguments) -> int:
    """The rank of the basis: that which ``arguments`` give, else one that holds all runs of a zoo, 32 at most.

    Raises:
        LoraFactoryError: When the rank that is given is below that of the zoo's own adapters, or above what any module
            can hold.
    """
    highest = max(module.rank for module in zoo.layout.modules)
    runs = sum(len(zoo.runs(task)) for task in zoo.tasks)
    modules = [(m.rank, math.prod(m.shape_a) // m.rank, math.prod(m.shape_b) // m.rank) for m in zoo.layout.modules]
    most = max(max(own, min(inputs, outputs)) for own, inputs, outputs in modules)
    rank = arguments.rank or max(highest, min(highest * runs, MAX_DEFAULT_RANK, most))
    if rank < highest:
        raise LoraFactoryError(
            f"rank={rank} is below that of the zoo's adapters, {highest}; give {highest} or more, or 0 for the rank "
            "that holds them all. For an adapter of a lower rank, give rank= (--rank) when it is generated"
        )
    if rank > most:
        raise LoraFactoryError(f"rank={rank} is above what any module's weight can have, {most}; give {most} or less")
    return rank


def fit(
    generator: CVAELoRAGenerator,
    zoo: AdapterZoo,
    features: Mapping[str, Mapping[str, Tensor]],
    arguments: TrainArguments,
    accelerator: Accelerator,
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Fit basis, center and decoder, then the network by the evidence lower bound (Eq. 8) over (adapter, condition).

    With cores every step takes a checkpoint of every task. The decoder stays as it was fitted, so that a step is one
    on codes and costs the same for any base model.

    Args:
        generator: A new one of ``basis_rank``; ``fit_conditions`` has been called.
        zoo: The zoo.
        features: For every modality the rows ``(n, width)`` of every task.
        arguments: Steps, batch size, learning rate and seed.
        accelerator: Device and progress bar.

    Returns:
        One record about every fiftieth step: loss, reconstruction, KL and active latents. For every task, the share
        of its runs' squared ΔW that lies outside the basis: 0 while the basis is exact; empty for ``conv1d``.
    """
    weights, source = open_checkpoints(zoo), torch.Generator().manual_seed(arguments.seed)
    network, kl_weight, names = generator.network, generator.config.kl_weight, list(weights)
    if not isinstance(network, CoreCVAE):
        _fit_weights(generator, weights)
        generator.to(accelerator.device).train()

        def weights_loss() -> GeneratorOutput:
            rounds = math.ceil(arguments.batch_size / len(names))
            order = torch.cat([torch.randperm(len(names), generator=source) for _ in range(rounds)])
            tasks = [names[index] for index in order[: arguments.batch_size].tolist()]
            rows = torch.stack([weights[task][index_of(weights[task], source)] for task in tasks])
            conditions = generator.standardiser.all(draw_conditions(generator, features, tasks, source))
            return network.loss(generator.targets(rows.to(generator.device)), conditions, kl_weight, source)

        return _minimise(weights_loss, [*network.parameters()], arguments, accelerator), {}

    codes, errors = _fit_basis(generator, zoo, weights, accelerator)
    generator.to(accelerator.device).train()
    gram = (network.decoder @ network.decoder.T).detach()
    trained = [parameter for parameter in network.parameters() if parameter is not network.decoder]

    def codes_loss() -> GeneratorOutput:
        tasks = [names[index] for index in torch.randperm(len(names), generator=source).tolist()]
        rows = torch.stack([codes[task][index_of(codes[task], source)] for task in tasks]).to(generator.device)
        conditions = generator.standardiser.all(draw_conditions(generator, features, tasks, source))
        return network.loss_of(rows[:, 1:], rows[:, 0], gram, conditions, kl_weight, source)

    history = _minimise(codes_loss, trained, arguments, accelerator)
    _warn_of_missed(generator, codes, features["text"], arguments.steps)
    set_spread(network, [rows[:, 1:] for rows in codes.values()])
    _wake_spare(network, source)
    return history, errors


@torch.no_grad()
def set_spread(network: CoreCVAE, codes: Iterable[Tensor]) -> None:
    """Let samples of a code at temperature 1 spread as codes of one task do, each ``(n, latents)``.

    The prior's variance in training counts what the network gets wrong as well.
    """
    variance = torch.stack([(rows - rows.mean(0)).square().mean(0) for rows in codes]).mean(0)
    network.prior_log_variance.copy_(variance.clamp_min(math.exp(-10)).log())


@torch.no_grad()
def _wake_spare(network: CoreCVAE, source: torch.Generator) -> None:
    """Give latents that no task needs a direction, so that ``base_steps`` can train them; their codes stay at 0.

    With codes and directions at 0 neither would ever have a gradient.
    """
    decoder, spare = network.decoder, ~network.decoder.any(1)
    drawn = torch.randn(decoder.shape, generator=source).to(decoder)
    decoder[spare] = CODE_SCALE / math.sqrt(len(decoder)) * drawn[spare]


@torch.no_grad()
def _fit_basis(
    generator: CVAELoRAGenerator, zoo: AdapterZoo, weights: Mapping[str, SnapshotRows], accelerator: Accelerator
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Set basis, center, scales, decoder, and the spread of samples, of a generator with cores from a zoo.

    The basis is the joint factorisation of every run's mean checkpoint. A task's core is the mean over its runs, the
    center the mean over tasks; the decoder's rows are the principal directions of the tasks' cores, so that codes of
    tasks have unit variance.

    Returns:
        For every task the mean squared error and the nearest code of its checkpoints, ``(n, 1 + latents)``; and the
        tasks' errors.
    """
    basis, network = generator.basis, generator.network
    assert basis is not None and isinstance(network, CoreCVAE)
    runs = _of_every_task(lambda task: _run_means(zoo, task, weights[task]), weights, "mean adapters", accelerator)
    basis.fit([(zoo.layout, rows) for rows in runs.values()])
    projected = {task: basis.project(zoo.layout, rows) for task, rows in runs.items()}
    errors = {task: round(float(error.mean()), 6) for task, (_, error) in projected.items()}
    cores = torch.stack([rows.mean(0) for rows, _ in projected.values()])
    generator.center.copy_(cores.mean(0))
    deviation = _per_module(generator, (cores - generator.center).square().mean(0)).sqrt()
    rounding = 1e-6 * cores.square().mean().sqrt().clamp_min(1e-6)  # all that equal adapters differ by
    generator.scale.copy_(deviation.clamp_min(torch.maximum(1e-3 * deviation.max(), rounding)))
    scale = generator.spread_over(generator.scale)
    standard = (cores - generator.center) / scale
    _, values, directions = torch.linalg.svd(standard, full_matrices=False)
    kept = min(len(network.decoder), int((values > 1e-5 * values[0]).sum()))
    network.decoder.zero_()
    network.decoder[:kept] = values[:kept, None] * directions[:kept] / math.sqrt(len(cores))
    nearest, inverse = basis.projector(zoo.layout), torch.linalg.pinv(network.decoder)

    @torch.no_grad()
    def coded(task: str) -> tuple[Tensor, Tensor]:
        targets = (torch.cat([nearest(part) for part in in_parts(weights[task])]) - generator.center) / scale
        own = targets @ inverse
        missed = targets - network.decode(own)
        codes = torch.cat([missed.square().mean(-1, keepdim=True), own], 1)
        return codes, (missed - missed.mean(0)).square().mean(0)

    found = _of_every_task(coded, weights, "cores of checkpoints", accelerator)
    rest = sum((missed for _, missed in found.values()), torch.zeros_like(generator.center)) / len(found)
    generator.spread.copy_(_per_module(generator, rest).sqrt())
    _warn_of_poor(errors, generator.layout.modules[0].rank)
    return {task: codes for task, (codes, _) in found.items()}, errors


def _of_every_task(
    compute: Callable[[str], Found], tasks: Iterable[str], label: str, accelerator: Accelerator
) -> dict[str, Found]:
    """What a function makes of every task, on several threads: most of it is hashing and copying of checkpoints."""
    names = list(tasks)
    with ThreadPoolExecutor(min(THREADS, torch.get_num_threads())) as threads:
        hidden = not accelerator.is_local_main_process
        found = progress_bar(
            threads.map(compute, names), total=len(names), desc=label, unit="tasks", leave=False, disable=hidden
        )
        return dict(zip(names, found, strict=True))


def _warn_of_poor(errors: Mapping[str, float], rank: int) -> None:
    """Say so when adapters do not fit into a basis, so that the generator cannot write them."""
    if poor := {task: error for task, error in errors.items() if error > POOR_ERROR}:
        worst = max(poor, key=poor.__getitem__)
        _LOGGER.warning(
            "%d of %d tasks have more than %.0f %% of their squared ΔW outside the basis of rank %d, %s the most "
            "(%.0f %%): the generator cannot write these adapters. Give a higher rank= (--rank), or leave out "
            "adapters that share no directions with the others",
            *(len(poor), len(errors), 100 * POOR_ERROR, rank, worst, 100 * poor[worst]),
        )


@torch.no_grad()
def _warn_of_missed(
    generator: CVAELoRAGenerator, codes: Mapping[str, Tensor], texts: Mapping[str, Tensor], steps: int
) -> None:
    """Say so when the network has not learned to make tasks' adapters of their own first descriptions."""
    network = generator.network
    assert isinstance(network, CoreCVAE)
    own = torch.stack([rows[:, 1:].mean(0) for rows in codes.values()]).to(generator.device)
    wanted = generator.restored(network.decode(own))
    described = torch.stack([texts[task][0] for task in codes]).to(generator.device)
    scaling = generator.spread_over(generator.scale.new_tensor([m.scaling for m in generator.layout.modules]))
    missed = (scaling * (generator.cores({"text": described}, len(codes)) - wanted)).square().sum(1)
    sizes = (scaling * wanted).square().sum(1)
    shares = dict(zip(codes, (missed / sizes.clamp_min(1e-30)).tolist(), strict=True))
    if poor := {task: share for task, share in shares.items() if share > POOR_ERROR}:
        worst, largest = max(poor, key=poor.__getitem__), list(codes)[int(sizes.argmax())]
        _LOGGER.warning(
            "of %d of %d tasks, the generator misses more than %.0f %% of the squared ΔW when it is given their own "
            "description, of %s the most (%.0f %%). Train with more steps= (--steps; now %d), let descriptions "
            "say in which way tasks differ, or leave out adapters that are far larger than the others: that of %s has "
            "%.3g times the median norm",
            *(len(poor), len(shares), 100 * POOR_ERROR, worst, 100 * poor[worst], steps),
            *(largest, float((sizes.max() / sizes.median().clamp_min(1e-30)).sqrt())),
        )


@torch.no_grad()
def _fit_weights(generator: CVAELoRAGenerator, weights: Mapping[str, SnapshotRows]) -> None:
    """Set center and scales of a ``conv1d`` generator: the zoo's mean, and one standard deviation per factor."""
    statistics = zoo_statistics(weights)
    generator.center.copy_(statistics.mean)
    deviation = _per_module(generator, statistics.deviation).sqrt()
    generator.scale.copy_(torch.where(deviation > 0, deviation, deviation[deviation > 0].mean().nan_to_num(1.0)))


def _run_means(zoo: AdapterZoo, task: str, rows: SnapshotRows) -> Tensor:
    """The mean checkpoint of every run of a task, ``(runs, D)``: only within a run do factors mean the same."""
    means, start = [], 0
    for run in zoo.runs(task):
        count = len(zoo.record(task, run).snapshot_steps)
        means.append(mean_checkpoint(rows[start : start + count]))
        start += count
    return torch.stack(means)


def _per_module(generator: CVAELoRAGenerator, values: Tensor) -> Tensor:
    """Means of one value per target over every module (every factor, for ``conv1d``)."""
    return torch.stack([part.mean() for part in values.split(generator.sizes)])


def _minimise(
    loss: Callable[[], GeneratorOutput],
    parameters: list[torch.nn.Parameter],
    arguments: TrainArguments,
    accelerator: Accelerator,
) -> list[dict[str, float]]:
    """Take ``arguments.steps`` steps of AdamW; returns one record about every fiftieth step."""
    rate = arguments.learning_rate or RATES[arguments.decoder]
    optimizer, history = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, fused=True), []
    warmup = math.ceil(arguments.steps * WARMUP_RATIO)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, arguments.steps)
    outputs: list[dict[str, float]] = []

    def gradients(step: int) -> float:
        output: Any = loss()
        accelerator.backward(output.loss)
        outputs.append({name: value.item() for name, value in output.items()})
        return outputs[-1]["loss"]

    steps = take_steps(
        gradients,
        optimizer,
        arguments.steps,
        label="train generator",
        advice=f"lower learning_rate (now {rate})",
        schedule=schedule,
        disable=not accelerator.is_local_main_process,
    )
    for step, _, bar in steps:
        if step % 50 == 1 or step == arguments.steps:
            history.append({"step": step - 1, **{name: round(value, 6) for name, value in outputs[-1].items()}})
            error = sum(output["reconstruction"] for output in outputs) / len(outputs)
            bar.set_postfix(error=f"{error:.4f}")  # of one step it depends on what was drawn
            outputs.clear()
    return history
