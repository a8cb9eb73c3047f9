"""Fine-tune one LoRA per task and seed on a frozen base model, and keep the last checkpoints in a zoo.

Launch it as it is, or on many processes with ``accelerate launch -m lora_factory.cli collect …``, once or several
times on one zoo: processes share the work out among themselves by files in the zoo's hidden folder ``.collection``, so
that all of them must see the same file system. A finished run is a folder that appeared by one
rename, and an unfinished one continues from its last saved state, so the same command continues after any
interruption.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_factory.arguments import CollectArguments
from lora_factory.collection.progress import make_accelerator
from lora_factory.collection.scheduler import Collection, PlannedRun
from lora_factory.collection.trainer import open_trainer
from lora_factory.tasks.images import ImageTask
from lora_factory.tasks.task import Task
from lora_factory.tasks.task_file import as_tasks, check_tasks
from lora_factory.utils.checkpoint import writing_into
from lora_factory.utils.paths import local_path
from lora_factory.zoo.store import HIDDEN_FOLDER, AdapterZoo


def collect_adapters(
    tasks: str | Path | Sequence[Task | ImageTask],
    base_model: str | Path,
    output_dir: str | Path,
    arguments: CollectArguments | None = None,
    *,
    base_model_name: str | None = None,
) -> AdapterZoo:
    """Fine-tune a LoRA for every task and seed and store the last K checkpoints of each in a zoo.

    All runs start from the same LoRA initialisation, which keeps their weights aligned across tasks. Runs that the zoo
    already holds are not repeated. A run depends on its task and seed alone, not on the process that makes it.

    Args:
        tasks: A task file, a folder of them, or tasks; all of texts, or all of images.
        base_model: Hub id or folder of the frozen base model: a causal language model, or an image classifier.
        output_dir: The zoo's folder; made when missing, continued when it is there.
        arguments: LoRA, optimiser and checkpoint settings.
        base_model_name: The public Hub id that adapters name as their base, when ``base_model`` is a local copy of it.

    Returns:
        The zoo, with ``len(tasks) * len(arguments.seeds)`` more runs at most.

    Raises:
        CollectionError: At the end, when runs failed: a loss that is not finite, a run that ended worse than the base
            model, or memory that ran out more often than ``arguments.retries`` allows. It is a LoraFactoryError, and
            the other runs are stored.
        StorageError: When the folder cannot be written; it is a LoraFactoryError as well.
        LoraFactoryError: When the data of a task cannot be read, or not be put before the base model (nothing is
            trained then, and all such tasks are named), the base model cannot be loaded, or the zoo holds runs of
            other settings.
    """
    arguments = arguments or CollectArguments()
    tasks = as_tasks(tasks)
    output_dir = local_path(output_dir)
    accelerator = make_accelerator(arguments, output_dir / HIDDEN_FOLDER / "logs")
    trainer = open_trainer(base_model, arguments, accelerator, tasks, base_model_name=base_model_name)
    check_tasks(tasks)
    if arguments.parallel == "data":
        trainer.share_runs()
    with writing_into(output_dir):
        zoo = AdapterZoo.create(output_dir, trainer.layout)
        (zoo.folder / HIDDEN_FOLDER).mkdir(exist_ok=True)
    collection = Collection(zoo, trainer, [PlannedRun(task, seed) for seed in arguments.seeds for task in tasks])
    collection.check()
    collection.collect()
    return AdapterZoo(output_dir)
