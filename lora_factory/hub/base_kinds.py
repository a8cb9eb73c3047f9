"""The kind of a base model for cards: its pipeline tag and the class that loads it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_factory.errors import LoraFactoryError
from lora_factory.utils.safe_files import MAX_CONFIG_BYTES, checked_file, folder_here, read_json_object

if TYPE_CHECKING:
    from lora_factory.adapters.layout import AdapterLayout


@dataclass(frozen=True)
class BaseKind:
    """A kind of base models.

    Attributes:
        pipeline_tag: What the Hub calls their task; None when that is not known.
        auto_class: The class of transformers that loads them.
        peft_class: The class of PEFT that loads such a base model together with an adapter, if there is one.
    """

    pipeline_tag: str | None
    auto_class: str
    peft_class: str | None = None


CAUSAL = BaseKind("text-generation", "AutoModelForCausalLM", "AutoPeftModelForCausalLM")
_SEQ2SEQ = BaseKind("text2text-generation", "AutoModelForSeq2SeqLM", "AutoPeftModelForSeq2SeqLM")
_READS_IMAGES = BaseKind("image-text-to-text", "AutoModelForImageTextToText")
_CLASSIFIER = BaseKind("image-classification", "AutoModelForImageClassification")
_BY_TASK_TYPE = {
    "CAUSAL_LM": CAUSAL,
    "SEQ_2_SEQ_LM": _SEQ2SEQ,
    "SEQ_CLS": BaseKind("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": BaseKind("token-classification", "AutoModelForTokenClassification"),
    "FEATURE_EXTRACTION": BaseKind("feature-extraction", "AutoModel"),
}


def base_kind(layout: AdapterLayout, config: Mapping[str, Any] | None = None) -> BaseKind:
    """The kind of the base model that adapters of a layout are for.

    Args:
        layout: Says for which task PEFT writes the adapters, unless the base reads images.
        config: The base model's configuration; default: as a folder or the Hub's cache has it, else what the layout
            says must do.
    """
    task = layout.lora_config.get("task_type")
    by_task = _BY_TASK_TYPE.get(str(task), BaseKind(None, "AutoModel"))
    config = config or _config_here(layout)
    if config is None or task not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return by_task
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    model_type, architectures = config.get("model_type"), config.get("architectures") or [None]
    classifiers = _flat(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values())
    if architectures[0] in classifiers or (model_type is None and "architecture" in config):  # the latter: timm's own
        return _CLASSIFIER
    ways = [  # as `base_models` chooses
        (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, CAUSAL),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, _READS_IMAGES),
        (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, _SEQ2SEQ),
    ]
    if config.get("is_encoder_decoder") or task == "SEQ_2_SEQ_LM":
        ways = ways[1:]
    found = next((kind for names, kind in ways if model_type in names), by_task)
    reads_images = task is None and model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    tag = (_READS_IMAGES if reads_images else found).pipeline_tag
    return found if found == by_task else BaseKind(tag, found.auto_class)  # PEFT's classes take one task type alone


def _config_here(layout: AdapterLayout) -> dict[str, Any] | None:
    """The base model's configuration, if it is on this machine."""
    if (folder := folder_here(layout.base_model, layout.base_revision)) is None:
        return None
    try:
        return read_json_object(checked_file(folder, "config.json", MAX_CONFIG_BYTES))
    except LoraFactoryError:
        return None


def _flat(names: Collection[Any]) -> set[str]:
    return {one for name in names for one in ([name] if isinstance(name, str) else name)}
