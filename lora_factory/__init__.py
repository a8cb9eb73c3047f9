"""Generate LoRA adapters from a description: a conditional VAE over the adapters of many tasks.

Importing the package is cheap: every public name is loaded from its module when it is first used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lora_factory._lazy import lazy
from lora_factory._moved import install
from lora_factory._version import __version__ as __version__

if TYPE_CHECKING:
    from lora_factory.adapters.layout import AdapterLayout as AdapterLayout
    from lora_factory.arguments import CollectArguments as CollectArguments
    from lora_factory.arguments import CompareArguments as CompareArguments
    from lora_factory.arguments import TrainArguments as TrainArguments
    from lora_factory.collection.check import check_collection as check_collection
    from lora_factory.collection.collect import collect_adapters as collect_adapters
    from lora_factory.errors import LoraFactoryError as LoraFactoryError
    from lora_factory.evaluation.comparison import compare as compare
    from lora_factory.evaluation.fold import Fold as Fold
    from lora_factory.evaluation.perplexity import evaluate_adapters as evaluate_adapters
    from lora_factory.evaluation.perplexity import evaluate_texts as evaluate_texts
    from lora_factory.generator.configuration import CVAELoRAConfig as CVAELoRAConfig
    from lora_factory.generator.modeling import CVAELoRAGenerator as CVAELoRAGenerator
    from lora_factory.tasks.task import Task as Task
    from lora_factory.tasks.task_file import load_tasks as load_tasks
    from lora_factory.training.train import train_generator as train_generator
    from lora_factory.zoo.store import AdapterZoo as AdapterZoo

# How often a waiting thread of libgomp looks before it sleeps; read when torch loads it. By default waiting threads
# keep the cores that other programs need. On two cores beside five busy processes, a step of the demo's collection
# takes 1.7 times what a fair share of the cores would make of it with 1,000, 1.9 times with 2,000 and 3.3 times with
# 10,000; alone it takes 0.64, 0.61 and 0.66 s (benchmarks/busy.py). A user's own setting wins.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "2000"

install()
__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "adapters.layout": "AdapterLayout",
        "arguments": "CollectArguments CompareArguments TrainArguments",
        "collection.collect": "collect_adapters",
        "collection.check": "check_collection",
        "errors": "LoraFactoryError",
        "evaluation.comparison": "compare",
        "evaluation.fold": "Fold",
        "evaluation.perplexity": "evaluate_adapters evaluate_texts",
        "generator.configuration": "CVAELoRAConfig",
        "generator.modeling": "CVAELoRAGenerator",
        "tasks.task": "Task",
        "tasks.task_file": "load_tasks",
        "training.train": "train_generator",
        "zoo.store": "AdapterZoo",
    },
)
