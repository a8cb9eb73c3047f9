"""The generator: a Transformers model that maps task vectors to LoRA weights.

In: a text, images, examples or task vectors. Out: a ``PeftModel``, a PEFT folder, or a push to the Hub.
"""

from lora_factory._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "configuration": "CVAELoRAConfig",
        "modeling": "CVAELoRAGenerator",
    },
)
