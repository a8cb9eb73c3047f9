"""Talk to the Hub: one commit a push, bounded downloads, and model cards.

In: a function that writes a folder, or the name of a repository. Out: a commit, or checked files.
Cards are made from data, never from live models.
"""

from lora_factory._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "cards": "AdapterCard GeneratorCard ZooCard",
        "client": "PushOptions push preview search_generators download_files",
    },
)
