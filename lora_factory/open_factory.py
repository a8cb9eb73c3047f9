"""The base model that tasks need, loaded and with one LoRA slot: for texts, for images with texts, or a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from lora_factory.arguments import CollectArguments
from lora_factory.base_models import load_base_model, load_processor
from lora_factory.errors import LoraFactoryError
from lora_factory.factory import AdapterFactory
from lora_factory.files import recorded_name
from lora_factory.image_classification import classifier_factory
from lora_factory.image_tasks import ImageTask
from lora_factory.layout import AdapterLayout
from lora_factory.model_inputs import model_inputs
from lora_factory.tasks import Task


def open_factory(
    base_model: str | Path,
    arguments: CollectArguments,
    accelerator: Accelerator,
    tasks: Sequence[Task | ImageTask] = (),
    *,
    base_model_name: str | None = None,
    revision: str | None = None,
    layout: AdapterLayout | None = None,
) -> AdapterFactory:
    """Load a base model onto the accelerator's device and attach a LoRA slot.

    Args:
        base_model: Hub id or folder.
        arguments: LoRA and optimiser settings, precision and quantisation.
        accelerator: The device.
        tasks: What is to be learned or read; by default texts.
        base_model_name: What adapters name as their base; default: ``base_model``.
        revision: Branch, tag or commit on the Hub.
        layout: The slot's modules, ranks and scalings; default: those of the arguments.

    Raises:
        LoraFactoryError: When the model cannot be loaded, or reads no images though the tasks have some; or when some
            tasks are for classifiers and some are not.
    """
    name = base_model_name or recorded_name(base_model)
    if any(isinstance(task, ImageTask) for task in tasks):
        if others := [task.name for task in tasks if not isinstance(task, ImageTask)]:
            raise LoraFactoryError(f"task {others[0]!r} is not for image classifiers as others are; give them apart")
        return classifier_factory(base_model, arguments, name, accelerator, revision, layout)
    model, tokenizer = load_base_model(
        base_model,
        revision=revision,
        dtype=arguments.dtype,
        device=accelerator.device,
        quantization=arguments.quantization,
    )
    reads_images = any(task.has_images for task in tasks if isinstance(task, Task))
    inputs = model_inputs(model, load_processor(base_model, revision=revision)) if reads_images else None
    return AdapterFactory.attach(model, tokenizer, arguments, name, accelerator, inputs, layout)
