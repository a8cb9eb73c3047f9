"""The command line: every command reads flags into the options classes and calls one public function.

In: words. Out: an exit code; errors are printed in the command line's own terms.
"""

from lora_factory._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "commands": "main",
    },
)
