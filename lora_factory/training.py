"""Train a generator on a zoo: stage 1, the evidence lower bound over checkpoints, in episodes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from lora_factory.arguments import TrainArguments
from lora_factory.baselines import train_multitask
from lora_factory.conditions import random_subset
from lora_factory.configuration import CVAELoRAConfig, paper_channels
from lora_factory.encoders import TextEncoder
from lora_factory.errors import LoraFactoryError
from lora_factory.factory import AdapterFactory, settings_of
from lora_factory.features import FEATURE_EXAMPLES, example_features
from lora_factory.files import atomic_folder, read_json, sha256_text, write_json, write_text
from lora_factory.image_encoders import ImageEncoder, image_vectors
from lora_factory.image_tasks import ImageTask, language_tasks
from lora_factory.images import ImageLike
from lora_factory.layout import AdapterLayout
from lora_factory.model_card import generator_card
from lora_factory.modeling import CVAELoRAGenerator
from lora_factory.networks import TokenCVAE, spread_over_weights
from lora_factory.open_factory import open_factory
from lora_factory.snapshots import SnapshotRows, open_snapshots
from lora_factory.tasks import Task
from lora_factory.through_base import TaskData, start_from, train_through_base
from lora_factory.training_state import TrainingCheckpoint
from lora_factory.zoo import AdapterZoo

# Noise on a task vector, as a share of the typical length of one. It is almost orthogonal to the few directions in
# which tasks differ, so that much of it teaches the network to listen to these alone: paraphrases land on their task.
CONDITION_NOISE = 0.05
HEAD_NOISE = 0.025  # the same while the heads are solved, where less of it leaves a smaller error on known texts
MAX_SUPPORT = 32  # examples in the largest support set
HEAD_EPISODES = 16  # batches that the closed-form heads are fitted to, half of them with latents from the posterior
SPREAD_SAMPLES = 8  # sampled adapters a task that calibrate the spread
HEAD_RIDGE = 1e-5  # ridge penalty in units of the features' mean square
KL_WARMUP = 0.3  # share of the steps over which the KL term rises to its weight


def train_generator(
    zoo: AdapterZoo | str | Path,
    output_dir: str | Path,
    arguments: TrainArguments | None = None,
    *,
    tasks: Sequence[Task | ImageTask] | None = None,
    images: Mapping[str, Sequence[ImageLike]] | None = None,
    base_model: str | Path | None = None,
    bias_adapter: torch.Tensor | None = None,
) -> CVAELoRAGenerator:
    """Train a generator on the adapters of a zoo and save it.

    Args:
        zoo: A zoo or its folder, with two tasks or more.
        output_dir: Folder of the generator, replaced when it is there; it appears complete or not at all.
        arguments: Decoder, steps, learning rate, seed and text encoder.
        tasks: The zoo's tasks, when the generator is to listen to hidden states of their examples as well as to texts;
            or to the images of an `ImageTask`.
        images: Images by the name of the task, when the generator is to listen to images as well as to texts.
        base_model: Base model for these hidden states (Eq. 1) and for stage 2; default: the one that the zoo names.
        bias_adapter: The multi-task LoRA that ``arguments.multitask_steps`` asks for, shape ``(D,)``, where it is at
            hand already; trained here by default.

    Returns:
        The trained generator, on the CPU, in evaluation mode.

    Raises:
        LoraFactoryError: When the zoo has fewer than two tasks, or the loss is not finite.
    """
    arguments = arguments or TrainArguments()
    zoo = zoo if isinstance(zoo, AdapterZoo) else AdapterZoo(zoo)
    if len(zoo.tasks) < 2:
        raise LoraFactoryError(
            f"the zoo {zoo.folder} holds {len(zoo.tasks)} task(s), a generator needs at least two to tell apart; "
            "collect more with collect_adapters"
        )
    if any(isinstance(task, ImageTask) for task in tasks or ()):
        images = images or {task.name: task.images() for task in tasks or () if isinstance(task, ImageTask)}
        tasks = None
    if arguments.base_steps and images is not None:
        raise LoraFactoryError(
            f"base_steps={arguments.base_steps}: stage 2 does not read images; pass base_steps=0, or leave images out"
        )
    if arguments.base_steps and tasks is None:
        raise LoraFactoryError(
            f"base_steps={arguments.base_steps} needs the tasks' examples; pass tasks=, the task file of the zoo"
        )
    accelerator = Accelerator()
    encoder = TextEncoder(arguments.text_encoder)
    layout = zoo.layout
    if arguments.base_steps and arguments.base_rank:
        layout = layout.with_rank(arguments.base_rank)
    weights = open_snapshots(zoo, layout)
    features = {"text": {task: encoder.encode(list(zoo.descriptions(task))) for task in zoo.tasks}}
    factory = None
    if tasks is not None:
        tasks = _known(zoo, language_tasks(tasks))
        factory = zoo_factory(zoo, base_model, accelerator, layout, tasks)
        features["hidden"] = example_features(factory, tasks)
    if images is not None:
        arguments = replace(arguments, image_encoder=arguments.image_encoder or str(base_model or layout.base_model))
        known = {task: images.get(task, ()) for task in zoo.tasks}
        features["image"] = image_vectors(ImageEncoder(arguments.image_encoder, device=accelerator.device), known)
    widths = {name: next(iter(rows.values())).shape[1] for name, rows in features.items()}
    generator = build_generator(zoo, arguments, widths, layout)
    statistics = generator.fit_statistics(weights, features)
    checkpoint = None
    if arguments.base_steps and factory is not None and tasks is not None:
        data = {
            task.name: TaskData.read(task, factory, features["text"][task.name], features["hidden"][task.name])
            for task in tasks
        }
        start_from(generator, _first_bias(factory, tasks, arguments) if bias_adapter is None else bias_adapter)
        facts = [asdict(arguments), zoo.fingerprint(), [task.fingerprint() for task in tasks], layout.fingerprint()]
        checkpoint = TrainingCheckpoint(f"{output_dir}.training", sha256_text(json.dumps(facts)))
        history = train_through_base(generator, factory, data, arguments, checkpoint=checkpoint)
        earlier = arguments.multitask_steps * factory.tokens_a_step
        history = [row | {"tokens": row["tokens"] + earlier} for row in history]
    else:
        history = fit(generator, weights, features, arguments, accelerator)
    generator = generator.cpu().eval()
    calibrate_spread(generator, statistics.within, features)
    if accelerator.is_main_process:
        save_generator(generator, output_dir, {"arguments": asdict(arguments), "history": history})
        if checkpoint is not None:
            checkpoint.remove()
    accelerator.wait_for_everyone()
    return generator


def build_generator(
    zoo: AdapterZoo, arguments: TrainArguments, modalities: dict[str, int], layout: AdapterLayout | None = None
) -> CVAELoRAGenerator:
    """A generator of the zoo's layout, or a wider one, with weights initialised from ``arguments.seed``."""
    sizes: dict[str, Any] = {"width": arguments.width, "depth": arguments.depth}
    if arguments.decoder == "conv1d":
        sizes = {"kl_weight": 0.005, "latent_size": 256, "channels": paper_channels(arguments.conv_depth)}
    tasks = []
    for task in zoo.tasks:
        record = zoo.record(task, zoo.runs(task)[0])
        about = {"license": record.license, "dataset": record.dataset}
        tasks.append({"name": task, "descriptions": list(record.descriptions), **about})
    config = CVAELoRAConfig(
        layout=(layout or zoo.layout).to_dict(),
        modalities=modalities,
        text_encoder=arguments.text_encoder,
        image_encoder=arguments.image_encoder if "image" in modalities else None,
        tasks=tasks,
        zoo_fingerprint=zoo.fingerprint(),
        decoder=arguments.decoder,
        **sizes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(arguments.seed)
        return CVAELoRAGenerator(config)


def fit(
    generator: CVAELoRAGenerator,
    weights: Mapping[str, SnapshotRows],
    features: Mapping[str, Mapping[str, torch.Tensor]],
    arguments: TrainArguments,
    accelerator: Accelerator,
) -> list[dict[str, float]]:
    """Stage 1: minimise the negative evidence lower bound (Eq. 8) over (snapshot, description) pairs.

    Args:
        generator: Its statistics must be fitted.
        weights: Snapshots ``(n, D)`` of every task.
        features: For every modality the rows ``(n, width)`` of every task.
        arguments: Steps, batch size, learning rate and seed.
        accelerator: Device and progress bar.

    Returns:
        One record about every fiftieth step: loss, reconstruction, KL and active latents.
    """
    generator.to(accelerator.device).train()
    parameters = [parameter for parameter in generator.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=0.01)
    warmup = math.ceil(arguments.steps * arguments.warmup_ratio)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, arguments.steps)
    source = torch.Generator().manual_seed(arguments.seed)
    history = []
    solve_heads(generator, weights, features, arguments.batch_size, source)
    bar = tqdm(total=arguments.steps, desc="train generator", disable=not accelerator.is_local_main_process)
    for step in range(arguments.steps):
        adapters, conditions = sample_episode(generator, weights, features, arguments.batch_size, source)
        kl_factor = min(1.0, (step + 1) / (KL_WARMUP * arguments.steps))
        output = generator(adapters, conditions, kl_factor=kl_factor, generator=source)
        if not torch.isfinite(output.loss):
            raise LoraFactoryError(
                f"the generator's loss is {output.loss.item()} at step {step}; lower learning_rate "
                f"(now {arguments.learning_rate})"
            )
        accelerator.backward(output.loss)
        accelerator.clip_grad_norm_(parameters, arguments.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.update()
        if step % 50 == 0 or step == arguments.steps - 1:
            record = {name: round(value.item(), 6) for name, value in output.items()}
            history.append({"step": step, **record})
            bar.set_postfix(error=f"{record['reconstruction']:.4f}", kl=f"{record['kl']:.1f}")
    bar.close()
    solve_heads(generator, weights, features, arguments.batch_size, source)
    return history


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
        adapters, conditions = sample_episode(generator, weights, features, batch_size, source, noise=HEAD_NOISE)
        standard, condition = generator.encode_inputs(adapters, conditions)
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
    """Set the token decoder's ``log_std`` so that samples at temperature 1 spread as real checkpoints of a task do.

    What a token's weights vary within a task, less what they vary already by sampling z, is left to independent noise.

    Args:
        generator: A trained one, in evaluation mode.
        within: Mean variance within a task, shape ``(D,)``: `ZooStatistics.within`.
        features: For every modality the rows ``(n, width)`` of every task.
    """
    network = generator.network
    if not isinstance(network, TokenCVAE):
        return
    missing = within.clone()
    network.log_std.fill_(-math.inf)
    name, tasks = next(iter(features.items()))
    for rows in tasks.values():
        conditions = {name: rows.mean(0, keepdim=True).expand(SPREAD_SAMPLES, -1).to(generator.device)}
        sampled = generator.generate_vector(conditions, temperature=1.0).cpu()
        missing -= sampled.var(0) / len(tasks)
    scale = spread_over_weights(network.layout, generator.token_scale).cpu()
    per_token = [rows.mean(-1) for rows in network.layout.to_tokens(missing / scale.square()).values()]
    network.log_std.copy_(0.5 * torch.cat(per_token).clamp_min(1e-8).log())


def sample_episode(
    generator: CVAELoRAGenerator,
    weights: Mapping[str, SnapshotRows],
    features: Mapping[str, Mapping[str, torch.Tensor]],
    batch_size: int,
    source: torch.Generator,
    *,
    noise: float = CONDITION_NOISE,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Draw tasks without replacement (with, once all are drawn), a snapshot and a condition of each.

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


def save_generator(generator: CVAELoRAGenerator, output_dir: str | Path, training: Mapping[str, object]) -> None:
    """Write the generator's folder in one rename: config, weights, ``training.json`` and card."""
    with atomic_folder(Path(output_dir), overwrite=True) as folder:
        generator.save_pretrained(folder)
        write_json(folder / "training.json", training)
        write_text(folder / "README.md", generator_card(generator, Path(output_dir).name))
    generator.config.name_or_path = str(output_dir)  # where a push finds training.json


def training_history(folder: str | Path) -> list[dict[str, float]]:
    """The training losses that a generator's folder has in ``training.json``; none where there is no such file."""
    path = Path(folder) / "training.json"
    return list(read_json(path)["history"]) if path.is_file() else []


def zoo_factory(
    zoo: AdapterZoo,
    base_model: str | Path | None,
    accelerator: Accelerator,
    layout: AdapterLayout,
    tasks: Sequence[Task] = (),
) -> AdapterFactory:
    """The base model with one slot of ``layout``, and the settings that the zoo's runs were made with."""
    config = layout.lora_config
    settings = replace(settings_of(zoo), rank=config["r"], lora_alpha=config["lora_alpha"])
    revision = None if base_model else zoo.layout.base_revision
    name = zoo.layout.base_model
    source = base_model or name
    factory = open_factory(source, settings, accelerator, tasks, base_model_name=name, revision=revision)
    factory.keep_tokens(zoo.folder)
    return factory


def _first_bias(factory: AdapterFactory, tasks: Sequence[Task], arguments: TrainArguments) -> torch.Tensor:
    """Where stage 2's bias adapter starts, ``(D,)``: the LoRA initialisation, or one LoRA trained on all tasks."""
    if not arguments.multitask_steps:
        return factory.initial
    settings = factory.arguments
    factory.arguments = replace(settings, learning_rate=arguments.multitask_learning_rate)
    vector = train_multitask(factory, tasks, seed=arguments.seed, steps=arguments.multitask_steps)
    factory.arguments = settings
    return vector


def _known(zoo: AdapterZoo, tasks: Sequence[Task]) -> list[Task]:
    """The zoo's tasks, in its order."""
    known = {task.name: task for task in tasks}
    if missing := [name for name in zoo.tasks if name not in known]:
        raise LoraFactoryError(f"no examples of the zoo's tasks {missing}; pass the task file that it was made of")
    return [known[name] for name in zoo.tasks]


def _support_mean(rows: torch.Tensor, largest: int, source: torch.Generator) -> torch.Tensor:
    """Mean over one to ``largest`` rows, drawn without replacement."""
    count = int(torch.randint(1, min(largest, len(rows)) + 1, (), generator=source))
    return rows[torch.randperm(len(rows), generator=source)[:count]].mean(0)


def _draw(rows: SnapshotRows, source: torch.Generator) -> torch.Tensor:
    return rows[int(torch.randint(len(rows), (), generator=source))]
