"""Train a generator: on the weights of a zoo, then on the tasks' own loss through the frozen base model.

In: an `AdapterZoo`, tasks. Out: a generator's folder.
"""

from lora_factory._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "train": "train_generator zoo_factory",
    },
)
