"""Train a generator on a zoo: its two stages in their order, from folder to folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.arguments import TrainArguments
from lora_factory.collection.multitask import train_multitask
from lora_factory.collection.trainer import LoRATrainer, open_trainer, settings_of
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.configuration import CVAELoRAConfig, paper_channels
from lora_factory.generator.hub import generator_card
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.hub.cards import handwritten, with_handwritten
from lora_factory.models.hidden_states import example_features
from lora_factory.models.image_encoders import ImageEncoder, image_vectors
from lora_factory.models.loading import base_source
from lora_factory.models.text_encoders import TextEncoder
from lora_factory.tasks.image_files import ImageLike
from lora_factory.tasks.images import ImageTask, language_tasks
from lora_factory.tasks.task import Task
from lora_factory.tasks.task_file import check_tasks
from lora_factory.training.from_data import TaskData, start_from, train_through_base
from lora_factory.training.from_zoo import calibrate_spread, fit
from lora_factory.training.specialists import specialise
from lora_factory.utils.cache import TensorCache
from lora_factory.utils.checkpoint import TrainingCheckpoint
from lora_factory.utils.files import atomic_folder, remove_folder, write_json, write_text
from lora_factory.utils.folders import GENERATOR, WORKING, check_folder
from lora_factory.utils.paths import local_path, recorded_name, sha256_text
from lora_factory.utils.safe_files import read_json_object, reading
from lora_factory.zoo.checkpoints import open_checkpoints
from lora_factory.zoo.store import AdapterZoo


def train_generator(
    zoo: AdapterZoo | str | Path,
    output_dir: str | Path,
    arguments: TrainArguments | None = None,
    *,
    tasks: Sequence[Task | ImageTask] | None = None,
    images: Mapping[str, Sequence[ImageLike]] | None = None,
    base_model: str | Path | None = None,
    bias_adapter: torch.Tensor | None = None,
    overwrite: bool = False,
) -> CVAELoRAGenerator:
    """Train a generator on the adapters of a zoo and save it.

    Args:
        zoo: A zoo or its folder, with two tasks or more.
        output_dir: Folder of the generator; it appears complete or not at all.
        arguments: Decoder, steps, learning rate, seed and text encoder.
        tasks: The zoo's tasks, when the generator is to be conditioned on examples as well as on texts: on their
            hidden states, or on the images of an `ImageTask`.
        images: Images by the name of the task, when the generator is to be conditioned on images as well as on texts.
        base_model: Base model for these hidden states (Eq. 1) and for stage 2; default: the one that the zoo names.
        bias_adapter: The multi-task LoRA that ``arguments.multitask_steps`` asks for, shape ``(D,)``, where it is at
            hand already; trained here by default.
        overwrite: Whether a generator that is there already is replaced. Nothing else ever is.

    Returns:
        The trained generator, on the CPU, in evaluation mode.

    Raises:
        LoraFactoryError: When the zoo has fewer than two tasks, the loss is not finite, or the folder is not to be
            replaced; see `lora_factory.utils.folders.check_folder`.
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
    through_base = {name: getattr(arguments, name) for name in ("base_steps", "specialist_steps")}
    asked = ", ".join(f"{name}={steps}" for name, steps in through_base.items() if steps)
    if asked and images is not None:
        raise LoraFactoryError(f"{asked}: stage 2 does not read images; pass 0, or leave images out")
    if asked and tasks is None:
        raise LoraFactoryError(f"{asked} needs the tasks' examples; pass tasks=, the task file of the zoo")
    inputs = [zoo.folder, base_model, zoo.layout.base_model, arguments.text_encoder, arguments.image_encoder]
    inputs += [image for row in (images or {}).values() for image in row if isinstance(image, str | Path)]
    output = check_folder(output_dir, GENERATOR, overwrite=overwrite, inputs=inputs)
    handwritten(output)
    working = output.with_name(f"{output.name}.training")
    if asked:
        check_folder(working, WORKING, overwrite=True, inputs=inputs)
    accelerator = Accelerator()
    encoder = TextEncoder(arguments.text_encoder)
    layout = zoo.layout
    if asked and arguments.base_rank:
        layout = layout.with_rank(arguments.base_rank)
    weights = open_checkpoints(zoo, layout)
    features = {"text": {task: encoder.encode(list(zoo.descriptions(task))) for task in zoo.tasks}}
    trainer = None
    if tasks is not None:
        tasks = _known(zoo, language_tasks(tasks))
        check_tasks(tasks)
        checkpointing = arguments.gradient_checkpointing
        trainer = zoo_factory(zoo, base_model, accelerator, layout, tasks, gradient_checkpointing=checkpointing)
        features["hidden"] = example_features(trainer, tasks)
    if images is not None:
        arguments = replace(arguments, image_encoder=arguments.image_encoder or str(base_model or layout.base_model))
        known = {task: images.get(task, ()) for task in zoo.tasks}
        features["image"] = image_vectors(ImageEncoder(arguments.image_encoder, device=accelerator.device), known)
    widths = {name: next(iter(rows.values())).shape[1] for name, rows in features.items()}
    generator = build_generator(zoo, arguments, widths, layout)
    statistics = generator.fit_statistics(weights, features)
    if asked and trainer is not None and tasks is not None:
        facts = [asdict(arguments), zoo.fingerprint(), [task.fingerprint() for task in tasks], layout.fingerprint()]
        start = None if bias_adapter is None else hashlib.sha256(bias_adapter.cpu().numpy().tobytes()).hexdigest()
        key = sha256_text(json.dumps([*facts, start]))
        history = _stage_2(generator, trainer, tasks, features, arguments, bias_adapter, working, key)
    else:
        history = fit(generator, weights, features, arguments, accelerator)
    generator = generator.cpu().eval()
    calibrate_spread(generator, statistics.within, features)
    if accelerator.is_main_process:
        training = {"arguments": asdict(arguments), "history": history}
        save_generator(generator, output_dir, training, overwrite=overwrite, inputs=inputs)
        if asked and working.exists():
            remove_folder(working, WORKING)
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
        text_encoder=recorded_name(arguments.text_encoder),
        image_encoder=recorded_name(arguments.image_encoder or "") if "image" in modalities else None,
        tasks=tasks,
        zoo_fingerprint=zoo.fingerprint(),
        chat_template=settings_of(zoo).chat_template,
        decoder=arguments.decoder,
        **sizes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(arguments.seed)
        return CVAELoRAGenerator(config)


def save_generator(
    generator: CVAELoRAGenerator,
    output_dir: str | Path,
    training: Mapping[str, object],
    *,
    overwrite: bool = False,
    inputs: Sequence[str | Path | None] = (),
) -> None:
    """Write the generator's folder in one rename: config, weights, ``training.json`` and card.

    Sections that somebody has added to the card of a generator that is replaced stay in the new card.
    """
    output = check_folder(output_dir, GENERATOR, overwrite=overwrite, inputs=inputs)
    with atomic_folder(output, GENERATOR, overwrite=overwrite, inputs=inputs) as folder:
        generator.save_pretrained(folder)
        write_json(folder / "training.json", training)
        write_text(folder / "README.md", with_handwritten(generator_card(generator, output.name), output))
    generator.config.name_or_path, generator.training_record = str(output), dict(training)


def training_history(folder: str | Path) -> list[dict[str, float]]:
    """The training losses that a generator's folder has in ``training.json``; none where there is no such file.

    Raises:
        LoraFactoryError: When the file is damaged.
    """
    path = local_path(folder) / "training.json"
    if not path.is_file():
        return []
    with reading(path, "delete it to go on without the training's curve"):
        return [dict(row) for row in read_json_object(path)["history"]]


def zoo_factory(
    zoo: AdapterZoo,
    base_model: str | Path | None,
    accelerator: Accelerator,
    layout: AdapterLayout,
    tasks: Sequence[Task] = (),
    *,
    gradient_checkpointing: bool = False,
) -> LoRATrainer:
    """The base model with one slot of ``layout``, and the settings that the zoo's runs were made with."""
    config = layout.lora_config
    settings = replace(
        settings_of(zoo),
        rank=config["r"],
        lora_alpha=config["lora_alpha"],
        gradient_checkpointing=gradient_checkpointing,
    )
    source, revision = base_source(zoo.layout, base_model)
    name = zoo.layout.base_model
    return open_trainer(source, settings, accelerator, tasks, base_model_name=name, revision=revision, layout=layout)


def _first_bias(trainer: LoRATrainer, tasks: Sequence[Task], arguments: TrainArguments) -> torch.Tensor:
    """The bias adapter at the start of stage 2, ``(D,)``: the LoRA initialisation or a multi-task LoRA."""
    if not arguments.multitask_steps:
        return trainer.initial
    steps, rate = arguments.multitask_steps, arguments.multitask_learning_rate
    return train_multitask(trainer, tasks, seed=arguments.seed, steps=steps, learning_rate=rate)


def _stage_2(
    generator: CVAELoRAGenerator,
    trainer: LoRATrainer,
    tasks: Sequence[Task],
    features: Mapping[str, Mapping[str, torch.Tensor]],
    arguments: TrainArguments,
    bias_adapter: torch.Tensor | None,
    working: Path,
    key: str,
) -> list[dict[str, float]]:
    """Train through the base, then the specialists; the records count the tokens of all that was trained before them.

    What is done is kept in the folder ``working``, for a training that was cut off and has the same ``key``.
    """
    data = {
        task.name: TaskData.read(task, trainer, features["text"][task.name], features["hidden"][task.name])
        for task in tasks
    }
    start_from(generator, _first_bias(trainer, tasks, arguments) if bias_adapter is None else bias_adapter)
    checkpoint = TrainingCheckpoint(working / "through-base", key)
    history = train_through_base(generator, trainer, data, arguments, checkpoint=checkpoint)
    if arguments.specialist_steps:
        cache = TensorCache(working / f"specialists-{key[:16]}")
        last = specialise(generator, trainer, tasks, data, features, arguments, cache)
        read = max((int(row["tokens"]) for row in history), default=0)
        history.append(last | {"tokens": last["tokens"] + read})
    earlier = arguments.multitask_steps * trainer.tokens_a_step
    return [row | {"tokens": row["tokens"] + earlier} for row in history]


def _known(zoo: AdapterZoo, tasks: Sequence[Task]) -> list[Task]:
    """The zoo's tasks, in its order."""
    known = {task.name: task for task in tasks}
    if missing := [name for name in zoo.tasks if name not in known]:
        raise LoraFactoryError(f"no examples of the zoo's tasks {missing}; pass the task file that it was made of")
    return [known[name] for name in zoo.tasks]
