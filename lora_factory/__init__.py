"""Generate LoRA adapters from a description: a conditional VAE over the adapters of many tasks.

Importing the package is cheap: every public name is loaded from its module when it is first used (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_factory.arguments import CollectArguments, TrainArguments
    from lora_factory.collect import collect_adapters
    from lora_factory.configuration import CVAELoRAConfig
    from lora_factory.errors import LoraFactoryError
    from lora_factory.layout import AdapterLayout
    from lora_factory.modeling import CVAELoRAGenerator
    from lora_factory.tasks import Task, load_tasks
    from lora_factory.training import train_generator
    from lora_factory.zoo import AdapterZoo

__version__ = "0.1.0"

__all__ = [
    "AdapterLayout",
    "AdapterZoo",
    "CVAELoRAConfig",
    "CVAELoRAGenerator",
    "CollectArguments",
    "LoraFactoryError",
    "Task",
    "TrainArguments",
    "collect_adapters",
    "load_tasks",
    "train_generator",
]

_MODULES = {
    "AdapterLayout": "layout",
    "AdapterZoo": "zoo",
    "CVAELoRAConfig": "configuration",
    "CVAELoRAGenerator": "modeling",
    "CollectArguments": "arguments",
    "LoraFactoryError": "errors",
    "Task": "tasks",
    "TrainArguments": "arguments",
    "collect_adapters": "collect",
    "load_tasks": "tasks",
    "train_generator": "training",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use and keep it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names as well, loaded or not."""
    return sorted({*globals(), *__all__})
