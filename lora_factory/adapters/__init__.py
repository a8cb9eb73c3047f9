"""The geometry of LoRA adapters, their attachment to live models, and the PEFT folder.

In: PEFT state dicts and configurations. Out: an `AdapterLayout`, vectors of shape ``(D,)``, a ``PeftModel``.
"""

from lora_factory._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "attach": "AdapterSlot attach_adapter adapters_in_batch wrap_base",
        "folder": "Generation load_adapter save_adapter_config",
        "layout": "AdapterLayout",
        "targets": "find_targets",
    },
)
