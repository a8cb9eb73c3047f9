"""Model cards: data from a generator and its adapters, rendered through the templates in ``model_card_templates``."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_factory.modeling import CVAELoRAGenerator


def generator_card(generator: CVAELoRAGenerator, title: str) -> str:
    """The card of a generator's folder.

    Args:
        generator: A trained generator.
        title: Its name: folder or Hub id.

    Returns:
        Markdown with a YAML head.
    """
    config, layout = generator.config, generator.layout
    data = ModelCardData(
        library_name="lora-factory",
        base_model=layout.base_model,
        tags=["lora", "lora-factory", "adapter-generation"],
    )
    tasks = [{**task, "descriptions": [_inline(text) for text in task["descriptions"]]} for task in config.tasks or []]
    return _render(
        "generator.md",
        data,
        title=title,
        base_model=layout.base_model,
        base_revision=layout.base_revision,
        example=tasks[0]["descriptions"][0] if tasks else "",
        adapter_size=f"{layout.size:,}",
        generator_size=f"{generator.num_parameters():,}",
        decoder=config.decoder,
        modalities=", ".join(config.modalities),
        zoo_fingerprint=config.zoo_fingerprint or "unknown",
        tasks=tasks,
    )


def adapter_card(generation: Mapping[str, Any], title: str) -> str:
    """The card of a generated adapter's folder.

    Args:
        generation: What ``generation.json`` says.
        title: The adapter's name: folder or Hub id.

    Returns:
        Markdown with a YAML head.
    """
    data = ModelCardData(
        library_name="peft",
        base_model=generation["base_model"],
        base_model_relation="adapter",
        pipeline_tag="text-generation",
        tags=["lora", "lora-factory"],
    )
    nearest = ", ".join(f"{entry['task']} ({entry['similarity']:.2f})" for entry in generation["nearest_tasks"])
    return _render(
        "adapter.md",
        data,
        title=title,
        base_model=generation["base_model"],
        text=_inline(generation["text"] or ""),
        generator=generation["generator"],
        generator_commit=generation["generator_commit"],
        seed=generation["seed"],
        temperature=generation["temperature"],
        nearest_tasks=nearest,
        version=generation["lora_factory"],
    )


def _render(template: str, card_data: ModelCardData, **values: Any) -> str:  # noqa: ANN401
    source = files("lora_factory.model_card_templates").joinpath(template).read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(source).render(card_data=card_data.to_yaml(), **values)


def _inline(text: str) -> str:
    """Text from outside on one line, with what Markdown, HTML and our own code block would act on made harmless."""
    flat = " ".join(text.split())
    return flat.replace("\\", "").replace('"', "'").replace("`", "'").replace("<", "&lt;").replace(">", "&gt;")
