"""A zoo: the folder that holds the trained adapters of many tasks, with a record for every run.

In: adapters, trained here or imported. Out: checkpoints and their statistics.
Nothing here knows how adapters are trained.
"""

from lora_factory._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "importing": "AdapterSource import_adapters",
        "checkpoints": "zoo_statistics",
        "store": "AdapterZoo",
        "tools": "merge prune",
    },
)
