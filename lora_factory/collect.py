"""Fine-tune one LoRA a task and seed on a frozen base model and keep the last snapshots: a generator's training data.

Launch it as it is, or on many processes with ``accelerate launch -m lora_factory.cli collect …``: pending runs are
dealt out to the processes. A finished run is a folder that appeared by one rename, so the same command continues
after any interruption.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from lora_factory.arguments import CollectArguments
from lora_factory.base_models import load_base_model
from lora_factory.errors import LoraFactoryError
from lora_factory.factory import AdapterFactory, comparable_settings
from lora_factory.image_classification import classifier_factory
from lora_factory.image_tasks import ImageTask
from lora_factory.tasks import Task, load_tasks
from lora_factory.zoo import AdapterZoo


def collect_adapters(
    tasks: str | Path | Sequence[Task | ImageTask],
    base_model: str | Path,
    output_dir: str | Path,
    arguments: CollectArguments | None = None,
    *,
    base_model_name: str | None = None,
) -> AdapterZoo:
    """Fine-tune a LoRA for every task and seed and store the last K snapshots of each in a zoo.

    All runs start from the same LoRA initialisation, which keeps their weights aligned across tasks. Runs that the zoo
    already holds are not repeated.

    Args:
        tasks: A task file, a folder of them, or tasks; all of texts, or all of images.
        base_model: Hub id or folder of the frozen base model: a causal language model, or an image classifier.
        output_dir: The zoo's folder; made when missing, continued when it is there.
        arguments: LoRA, optimiser and snapshot settings.
        base_model_name: The public Hub id that adapters name as their base, when ``base_model`` is a local copy of it.

    Returns:
        The zoo, with ``len(tasks) * len(arguments.seeds)`` more runs at most.

    Raises:
        LoraFactoryError: When a task has no text, a loss is not finite, or the zoo holds runs of other settings.
    """
    arguments = arguments or CollectArguments()
    tasks = load_tasks(tasks) if isinstance(tasks, str | Path) else list(tasks)
    accelerator = Accelerator(gradient_accumulation_steps=arguments.gradient_accumulation)
    factory = _factory(tasks, base_model, arguments, base_model_name or str(base_model), accelerator)
    with accelerator.main_process_first():
        zoo = AdapterZoo.create(output_dir, factory.layout)
    pending = [pair for pair in _pairs(tasks, arguments) if not _finished(zoo, *pair, factory)]
    mine = pending[accelerator.process_index :: accelerator.num_processes]
    for number, (task, seed) in enumerate(mine, start=1):
        label = f"collect {task.name} seed {seed} ({number}/{len(mine)})"
        record, snapshots = factory.train(task, seed, label)
        zoo.add_run(record, snapshots)
    accelerator.wait_for_everyone()
    return AdapterZoo(output_dir)


def _factory(
    tasks: Sequence[Task | ImageTask],
    base_model: str | Path,
    arguments: CollectArguments,
    name: str,
    accelerator: Accelerator,
) -> AdapterFactory:
    """A language model or, for tasks of images, an image classifier with one slot."""
    if tasks and all(isinstance(task, ImageTask) for task in tasks):
        return classifier_factory(base_model, arguments, name, accelerator)
    model, tokenizer = load_base_model(base_model, dtype=arguments.dtype, device=accelerator.device)
    return AdapterFactory.attach(model, tokenizer, arguments, name, accelerator)


def _pairs(tasks: Sequence[Task | ImageTask], arguments: CollectArguments) -> list[tuple[Task | ImageTask, int]]:
    return [(task, seed) for seed in arguments.seeds for task in tasks]


def _finished(zoo: AdapterZoo, task: Task | ImageTask, seed: int, factory: AdapterFactory) -> bool:
    """Whether the zoo holds this run, made with these settings on this text."""
    run = f"seed-{seed}"
    if not zoo.has_run(task.name, run):
        return False
    record = zoo.record(task.name, run)
    if record.descriptions != task.descriptions:
        zoo.describe(record, task.descriptions)
    wanted = {**comparable_settings(factory.arguments), "data_fingerprint": task.fingerprint()}
    found = {**record.arguments, "data_fingerprint": record.data_fingerprint}
    different = sorted(name for name in wanted if wanted[name] != found.get(name))
    if different:
        changes = ", ".join(f"{name}: {found.get(name)} there, {wanted[name]} now" for name in different)
        raise LoraFactoryError(
            f"{zoo.folder / task.name / run} was collected with other settings ({changes}); "
            "choose another output_dir, or delete that run folder to collect it again"
        )
    return True
