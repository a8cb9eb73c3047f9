"""Train a generator from folder to folder: on a zoo's weights, on the tasks' examples, or on both."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.arguments import (
    DECIDED_BY_ZOO,
    DEFAULT_BASE_STEPS,
    DEFAULT_RANK,
    CollectArguments,
    LoRAOptions,
    TrainArguments,
)
from lora_factory.collection.trainer import LoRATrainer, open_trainer, settings_of
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.configuration import FORMAT_VERSION, CVAELoRAConfig, paper_channels
from lora_factory.generator.files import TRAINING_FILE
from lora_factory.generator.hub import generator_card
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.hub.cards import CARD_FILE, handwritten, with_handwritten
from lora_factory.models.hidden_states import base_fingerprint, example_features
from lora_factory.models.image_encoders import ImageEncoder, image_vectors
from lora_factory.models.loading import base_source
from lora_factory.models.text_encoders import TextEncoder
from lora_factory.tasks.given import as_images
from lora_factory.tasks.image_files import ImageLike
from lora_factory.tasks.images import ImageTask, language_tasks
from lora_factory.tasks.task import Task
from lora_factory.tasks.task_file import check_tasks
from lora_factory.training.conditions import text_features
from lora_factory.training.from_data import calibrate_spread, train_through_base
from lora_factory.training.from_zoo import basis_rank, fit
from lora_factory.utils.checkpoint import TrainingCheckpoint
from lora_factory.utils.files import atomic_folder, remove_folder, write_json, write_text
from lora_factory.utils.folders import GENERATOR, WORKING, check_folder
from lora_factory.utils.paths import local_path, recorded_name, sha256_text
from lora_factory.utils.safe_files import read_json_object, reading
from lora_factory.zoo.store import AdapterZoo

_LOGGER = logging.getLogger(__name__)


def train_generator(
    zoo: AdapterZoo | str | Path | None = None,
    output_dir: str | Path | None = None,
    arguments: TrainArguments | None = None,
    *,
    tasks: Sequence[Task | ImageTask] | None = None,
    held_out: Sequence[Task | ImageTask] = (),
    images: Mapping[str, Sequence[ImageLike]] | None = None,
    base_model: str | Path | None = None,
    base_model_name: str | None = None,
    overwrite: bool = False,
) -> CVAELoRAGenerator:
    """Train a generator and save it: on a zoo's weights, on the tasks' examples, or on the one and then the other.

    With a zoo, basis and cores are fitted to its adapters; with tasks and ``base_steps`` too, they are trained on from
    there. Without a zoo, a LoRA for all tasks is trained first, then basis and cores.

    Args:
        zoo: A zoo or its folder, with two tasks or more.
        output_dir: Folder of the generator; it appears complete or not at all.
        arguments: Decoder, steps, learning rates, seed and text encoder.
        tasks: The zoo's tasks, or without a zoo the tasks to train on. The generator is conditioned on examples as
            well as on texts: on their hidden states, or on the images of an `ImageTask`, which is not to be mixed with
            other tasks.
        held_out: More tasks, to choose the step of ``base_steps`` by; see `train_through_base`.
        images: Images by the name of the task, when the generator is to be conditioned on images as well as on texts.
        base_model: Base model of the tasks; default: the one that the zoo names.
        base_model_name: What adapters name as their base, without a zoo; default: ``base_model``.
        overwrite: Whether a generator that is there already is replaced. Nothing else ever is.

    Returns:
        The trained generator, on the CPU, in evaluation mode.

    Raises:
        LoraFactoryError: When there are fewer than two tasks, a loss is not finite, another process changes the zoo's
            runs meanwhile, or the folder is not to be replaced; see `lora_factory.utils.folders.check_folder`.
    """
    arguments = arguments or TrainArguments()
    if output_dir is None:
        raise LoraFactoryError("output_dir is not given; name the folder that the generator is to be written to")
    zoo = AdapterZoo(zoo) if isinstance(zoo, str | Path) else zoo
    zoo = None if zoo is None else zoo.select(zoo.tasks)  # runs that another process adds are not among them
    state = None if zoo is None else zoo.fingerprint()
    arguments = _checked(zoo, arguments, tasks, held_out, base_model, base_model_name)
    classifies = any(isinstance(task, ImageTask) for task in tasks or ())
    if images is not None:
        images = {name: as_images(rows, f"images[{name!r}]") for name, rows in images.items()}
    elif classifies:
        given = [task for task in (*(tasks or ()), *held_out) if isinstance(task, ImageTask)]
        images = {task.name: task.images() for task in given}
    inputs: list[str | Path | None] = [base_model, arguments.text_encoder, arguments.image_encoder]
    inputs += [zoo.folder, zoo.layout.base_model] if zoo is not None else []
    inputs += [image for row in (images or {}).values() for image in row if isinstance(image, str | Path)]
    output = check_folder(output_dir, GENERATOR, overwrite=overwrite, inputs=inputs)
    handwritten(output)
    working = output.with_name(f"{output.name}.training")
    if arguments.base_steps:
        check_folder(working, WORKING, overwrite=True, inputs=inputs)
    accelerator, trainer = Accelerator(), None
    if tasks is not None:
        tasks = [*tasks] if zoo is None else _known(zoo, tasks)
        check_tasks([*tasks, *held_out])
        if arguments.base_steps or not classifies:
            everything = [*tasks, *held_out]
            trainer = _open_trainer(zoo, arguments, base_model, base_model_name, accelerator, everything)
    if images is not None and not arguments.image_encoder:
        base = base_model or (zoo.layout.base_model if zoo is not None else "")
        arguments = replace(arguments, image_encoder=str(base))
    about = _about(zoo, tasks or ())
    described = {task["name"]: task["descriptions"] for task in about}
    _warn_of_twins(described)
    features = _features(arguments, described, held_out, images, accelerator)
    if tasks is not None and trainer is not None and not classifies:
        features["hidden"] = example_features(trainer, language_tasks([*tasks, *held_out]))
    widths = {name: next(iter(rows.values())).shape[1] for name, rows in features.items()}
    layout = trainer.layout if trainer is not None and zoo is None else _layout(zoo, arguments)
    generator = build_generator(zoo, arguments, widths, layout, about)
    seen = {name: {task: rows[task] for task in described} for name, rows in features.items()}
    plain = {task: seen["text"][task][: len(texts)] for task, texts in described.items()}
    generator.fit_conditions(seen | {"text": plain})
    record: dict[str, Any] = {"arguments": asdict(arguments)}
    if zoo is not None:
        record["history"], record["errors"] = fit(generator, zoo, seen, arguments, accelerator)
        if zoo.fingerprint() != state:
            raise LoraFactoryError(
                f"the zoo {zoo.folder} was changed while it was read: runs were removed or written anew; train again "
                "when nothing else changes it"
            )
    elif generator.basis is not None and trainer is not None:
        with torch.no_grad():
            generator.center.copy_(generator.basis.identity())
            generator.basis.factors.copy_(trainer.initial)
    if arguments.base_steps and trainer is not None and tasks is not None:
        key = _training_key(zoo, arguments, tasks, held_out, generator, trainer)
        checkpoint = TrainingCheckpoint(working / "through-base", key)
        record["history"] = train_through_base(
            generator, trainer, tasks, features, arguments, held_out=held_out, checkpoint=checkpoint
        )
        if zoo is None:
            calibrate_spread(generator.cpu(), seen)
    generator = generator.cpu().eval()
    _check_weights(generator)
    if accelerator.is_main_process:
        save_generator(generator, output_dir, record, overwrite=overwrite, inputs=inputs)
        if arguments.base_steps and working.exists():
            remove_folder(working, WORKING)
    accelerator.wait_for_everyone()
    return generator


def build_generator(
    zoo: AdapterZoo | None,
    arguments: TrainArguments,
    modalities: Mapping[str, int],
    layout: AdapterLayout,
    tasks: Sequence[Mapping[str, Any]],
) -> CVAELoRAGenerator:
    """A generator with weights initialised from ``arguments.seed``.

    Args:
        zoo: What it is to be trained on; None for examples alone.
        arguments: Decoder and sizes.
        modalities: Width of the task vectors of every modality.
        layout: The adapters that it is to write.
        tasks: ``CVAELoRAConfig.tasks``.
    """
    sizes: dict[str, Any] = {"core": arguments.core, "width": arguments.width, "depth": arguments.depth}
    sizes["latent_size"] = arguments.latent_size
    if arguments.decoder == "conv1d":
        sizes = {"kl_weight": 0.005, "latent_size": 256, "channels": paper_channels(arguments.conv_depth)}
    elif zoo is not None and not arguments.base_steps:  # the tasks' mean cores span no more directions
        sizes["latent_size"] = min(arguments.latent_size, len(tasks) - 1)
    directions = {name: width for name, width in modalities.items() if name != "text"}
    if "hidden" in directions:  # means of tasks differ in no more directions; of images, groups are told apart as well
        directions["hidden"] = min(directions["hidden"], max(1, len(tasks) - 1))
    config = CVAELoRAConfig(
        layout=layout.to_dict(),
        modalities=dict(modalities),
        directions=directions,
        text_encoder=recorded_name(arguments.text_encoder),
        image_encoder=recorded_name(arguments.image_encoder or "") if "image" in modalities else None,
        tasks=[dict(task) for task in tasks],
        zoo_fingerprint=None if zoo is None else zoo.fingerprint(),
        chat_template=arguments.chat_template if zoo is None else settings_of(zoo).chat_template,
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
        write_json(folder / TRAINING_FILE, training)
        write_text(folder / CARD_FILE, with_handwritten(generator_card(generator, output.name), output))
    generator.config.name_or_path, generator.training_record = str(output), dict(training)


def training_history(folder: str | Path) -> list[dict[str, float]]:
    """The training losses that a generator's folder has in ``training.json``; none where there is no such file.

    Raises:
        LoraFactoryError: When the file is damaged.
    """
    path = local_path(folder) / TRAINING_FILE
    if not path.is_file():
        return []
    with reading(path, "delete it to go on without the training's curve"):
        return [dict(row) for row in read_json_object(path)["history"]]


def zoo_factory(
    zoo: AdapterZoo,
    base_model: str | Path | None,
    accelerator: Accelerator,
    layout: AdapterLayout,
    tasks: Sequence[Task | ImageTask] = (),
    *,
    gradient_checkpointing: bool = False,
) -> LoRATrainer:
    """The base model with one slot of ``layout``, and the settings that the zoo's runs were made with."""
    zoo.check_base(base_model)
    settings = replace(settings_of(zoo), gradient_checkpointing=gradient_checkpointing)
    source, revision = base_source(zoo.layout, base_model)
    name = zoo.layout.base_model
    return open_trainer(source, settings, accelerator, tasks, base_model_name=name, revision=revision, layout=layout)


def _checked(
    zoo: AdapterZoo | None,
    arguments: TrainArguments,
    tasks: Sequence[Task | ImageTask] | None,
    held_out: Sequence[Task | ImageTask],
    base_model: str | Path | None,
    base_model_name: str | None,
) -> TrainArguments:
    """The arguments with the steps that they leave open, where all that is given fits together.

    Raises:
        LoraFactoryError: When there is too little to train on, or an option has no meaning here.
    """
    names = [task.name for task in (*(tasks or ()), *held_out)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise LoraFactoryError(f"several tasks are named {twice[0]!r}; give each a name of its own")
    if zoo is None:
        if tasks is None or base_model is None:
            raise LoraFactoryError("without a zoo, a generator is trained on examples; pass tasks= and base_model=")
        if arguments.decoder != "core":
            raise LoraFactoryError(
                f"decoder={arguments.decoder!r} learns from a zoo's weights; collect a zoo first, with lora-factory "
                "collect or collect_adapters"
            )
        if len(tasks) < 2:
            raise LoraFactoryError(f"{len(tasks)} task(s): a generator needs at least two to tell apart; add tasks")
        steps = arguments.base_steps or DEFAULT_BASE_STEPS
        first = arguments.multitask_steps or steps // 3
        return replace(arguments, base_steps=steps, multitask_steps=first, rank=arguments.rank or DEFAULT_RANK)
    if len(zoo.tasks) < 2:
        raise LoraFactoryError(
            f"the zoo {zoo.folder} holds {len(zoo.tasks)} task(s), a generator needs at least two to tell apart; "
            "collect more, with lora-factory collect or collect_adapters"
        )
    if base_model_name is not None:
        raise LoraFactoryError(f"base_model_name={base_model_name!r} is decided by the zoo {zoo.folder}; leave it out")
    decided = [one for one in fields(arguments) if one.name in DECIDED_BY_ZOO]
    given = [one for one in decided if getattr(arguments, one.name) != one.default]
    if given:
        raise LoraFactoryError(
            f"{given[0].name}={getattr(arguments, given[0].name)!r} is decided by the zoo {zoo.folder}; leave it out"
        )
    if held_out and not arguments.base_steps:
        raise LoraFactoryError(
            "held_out= (--held-out-tasks) chooses a step of base_steps, which is 0; pass base_steps, or leave it out"
        )
    if arguments.multitask_steps and not arguments.base_steps:
        raise LoraFactoryError(
            f"multitask_steps={arguments.multitask_steps} are the first of base_steps=0; give as many of these or more"
        )
    if arguments.base_steps and tasks is None:
        raise LoraFactoryError(
            f"base_steps={arguments.base_steps} needs the tasks' examples; pass tasks=, the task file of the zoo"
        )
    if arguments.base_steps and arguments.decoder != "core":
        raise LoraFactoryError(
            f"base_steps={arguments.base_steps} trains a shared basis, which decoder={arguments.decoder!r} has not; "
            "pass 0, or decoder='core'"
        )
    return arguments


def _check_weights(generator: CVAELoRAGenerator) -> None:
    """Refuse weights that half precision, in which adapters are served, cannot hold."""
    largest = float(torch.stack([parameter.detach().abs().max() for parameter in generator.parameters()]).max())
    if not largest <= torch.finfo(torch.float16).max:
        raise LoraFactoryError(
            f"the training ended with weights up to {largest:.3g}, which half precision cannot hold; lower "
            "learning_rate, or with base_steps base_learning_rate and basis_learning_rate"
        )


def _warn_of_twins(described: Mapping[str, Sequence[str]]) -> None:
    """Warn of a description that several tasks have, which gets an adapter between theirs."""
    first: dict[str, str] = {}
    for task, texts in described.items():
        for text in dict.fromkeys(texts):
            if (other := first.setdefault(text, task)) != task:
                _LOGGER.warning(
                    "the tasks %s and %s have the same description %r, so that a text cannot tell them apart; say in "
                    "which way they differ",
                    *(other, task, text[:80]),
                )
                return


def _features(
    arguments: TrainArguments,
    described: Mapping[str, Sequence[str]],
    held_out: Sequence[Task | ImageTask],
    images: Mapping[str, Sequence[ImageLike]] | None,
    accelerator: Accelerator,
) -> dict[str, dict[str, torch.Tensor]]:
    """Vectors of texts and images by modality and task, ``(n, width)``; a held-out task has no damaged wordings.

    Raises:
        LoraFactoryError: When a text is empty, or a task has no image that can be read.
    """
    encoder = TextEncoder(arguments.text_encoder)
    plain = {task.name: encoder.encode(list(task.descriptions)) for task in held_out}
    features = {"text": text_features(encoder, described, arguments.seed) | plain}
    if images is not None:
        wanted = {name: images.get(name, ()) for name in features["text"]}
        features["image"] = image_vectors(ImageEncoder(arguments.image_encoder, device=accelerator.device), wanted)
    return features


def _layout(zoo: AdapterZoo | None, arguments: TrainArguments) -> AdapterLayout:
    """The adapters that a generator trained on this zoo writes."""
    assert zoo is not None  # without one, the trainer has made the layout
    return zoo.layout if arguments.decoder == "conv1d" else zoo.layout.with_rank(basis_rank(zoo, arguments))


def _open_trainer(
    zoo: AdapterZoo | None,
    arguments: TrainArguments,
    base_model: str | Path | None,
    base_model_name: str | None,
    accelerator: Accelerator,
    tasks: Sequence[Task | ImageTask],
) -> LoRATrainer:
    """The base model, with a slot of the zoo's modules, or of those that ``arguments`` name."""
    if zoo is not None:
        layout, checkpointing = _layout(zoo, arguments), arguments.gradient_checkpointing
        return zoo_factory(zoo, base_model, accelerator, layout, tasks, gradient_checkpointing=checkpointing)
    assert base_model is not None  # _checked has seen it
    shared = {one.name: getattr(arguments, one.name) for one in fields(LoRAOptions)}
    return open_trainer(base_model, CollectArguments(**shared), accelerator, tasks, base_model_name=base_model_name)


def _about(zoo: AdapterZoo | None, tasks: Sequence[Task | ImageTask]) -> list[dict[str, Any]]:
    """``CVAELoRAConfig.tasks``, from the zoo's records or from the tasks themselves."""
    sources: Any = tasks if zoo is None else [zoo.record(task, zoo.runs(task)[0]) for task in zoo.tasks]
    return [
        {
            "name": source.name if zoo is None else source.task,
            "descriptions": list(source.descriptions),
            "license": source.license,
            "dataset": source.dataset,
        }
        for source in sources
    ]


def _training_key(
    zoo: AdapterZoo | None,
    arguments: TrainArguments,
    tasks: Sequence[Task | ImageTask],
    held_out: Sequence[Task | ImageTask],
    generator: CVAELoRAGenerator,
    trainer: LoRATrainer,
) -> str:
    """A fingerprint of all that a training through the base depends on."""
    data = [[[task.name, task.descriptions, task.fingerprint()] for task in some] for some in (tasks, held_out)]
    facts = [FORMAT_VERSION, asdict(arguments), data, generator.layout.fingerprint(), generator.config.modalities]
    if "image" in generator.config.modalities:  # vectors of images come from the cache, bit for bit
        facts.append(generator.get_buffer("image_task_vectors").tolist())
    facts += [base_fingerprint(trainer), None if zoo is None else zoo.fingerprint()]
    return sha256_text(json.dumps(facts))


def _known(zoo: AdapterZoo, tasks: Sequence[Task | ImageTask]) -> list[Task | ImageTask]:
    """The zoo's tasks, in its order."""
    known = {task.name: task for task in tasks}
    if missing := [name for name in zoo.tasks if name not in known]:
        raise LoraFactoryError(f"no examples of the zoo's tasks {missing}; pass the task file that it was made of")
    return [known[name] for name in zoo.tasks]
