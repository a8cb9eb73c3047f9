"""Train one LoRA for every task and seed, and keep its checkpoints in a zoo.

In: tasks and a base model. Out: an `AdapterZoo`. Runs continue after a crash and can be shared between processes.
"""

from lora_factory._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "collect": "collect_adapters",
        "multitask": "train_multitask",
    },
)
