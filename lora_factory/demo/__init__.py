"""The demo: the whole pipeline on an embedded real model and on text of installed Python packages.

In: installed packages. Out: a zoo, a generator, adapters and a report in one folder.
"""

from lora_factory._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "corpus": "build_corpus",
        "run": "run_demo",
    },
)
