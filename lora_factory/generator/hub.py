"""Write the repositories of a generator and of the adapters that it generates: files and cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_factory.adapters.folder import Generation
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.files import is_public_name
from lora_factory.generator.generation import Order, fulfil_texts, record, write_adapter
from lora_factory.generator.vae import ConditionalVAE
from lora_factory.hub.base_kinds import base_kind
from lora_factory.hub.cards import CARD_FILE, AdapterCard, GeneratorCard, Origins, heard
from lora_factory.hub.client import Writer, about_model, check_base_model
from lora_factory.utils.files import write_json, write_text
from lora_factory.utils.paths import local_path
from lora_factory.utils.safe_files import MAX_CONFIG_BYTES, checked_file, read_json_object
from lora_factory.utils.versions import versions


def generator_card(
    generator: ConditionalVAE,
    title: str,
    *,
    origins: Origins | None = None,
    comparison: Mapping[str, Any] | None = None,
    plot: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The card of a generator.

    Args:
        generator: A trained generator.
        title: Its name: folder or Hub id.
        origins: What is known of its base model and tasks; default: what this machine knows.
        comparison: What ``comparison.compare`` returned for it.
        plot: File name of the headroom plot beside the card.
        tags: More tags.

    Returns:
        Markdown with a YAML head.
    """
    config = generator.config
    facts = {
        "weights of an adapter": f"{generator.layout.size:,}",
        "weights of the generator": f"{sum(values.numel() for values in generator.parameters()):,}",
        "decoder": config.decoder if config.decoder == "conv1d" else f"{config.decoder}, {config.core}",
        "rank of its adapters": str(generator.layout.rank),
        "listens to": heard(config.modalities),
        "text encoder": config.text_encoder or "none",
        **({"image encoder": config.image_encoder} if config.image_encoder else {}),
        "fingerprint of the zoo": config.zoo_fingerprint or "none",
    }
    return GeneratorCard(
        title=title,
        origins=origins or origins_of(generator),
        facts=facts,
        versions=versions(),
        comparison=comparison,
        plot=plot,
        from_zoo=config.zoo_fingerprint is not None,
        tags=tags,
    ).text


def origins_of(
    generator: ConditionalVAE, base_license: str | None = None, base_config: Mapping[str, Any] | None = None
) -> Origins:
    """Base model and training tasks of a generator.

    Args:
        generator: The generator.
        base_license: Licence of the base model, if known.
        base_config: Its configuration, if known; see `base_kind`.
    """
    layout = generator.layout
    return Origins(
        base_model=layout.base_model,
        base_revision=layout.base_revision,
        base_license=base_license,
        tasks=generator.config.tasks or [],
        kind=base_kind(layout, base_config),
    )


COMPARISON_FILE = "comparison.json"
PLOT_FILE = "headroom.svg"


def generator_writer(
    generator: Any,  # noqa: ANN401  # a CVAELoRAGenerator, whose file imports this one
    *,
    comparison: Mapping[str, Any] | str | Path | None = None,
    tags: Sequence[str] = (),
    token: str | bool | None = None,
) -> Writer:
    """Return a function that writes a generator's repository, the card last; see `CVAELoRAGenerator.push_to_hub`.

    Raises:
        LoraFactoryError: When the comparison cannot be read, or is one of another base model.
    """
    check_base_model(generator.layout)
    for field in ("text_encoder", "image_encoder"):
        encoder = getattr(generator.config, field)
        if encoder is not None and not is_public_name(encoder):
            raise LoraFactoryError(
                f"the generator's {field.replace('_', ' ')} {encoder!r} is no model of the Hub, so others cannot load "
                f"it; push the encoder and set generator.config.{field} to its Hub id"
            )
    results: Any = comparison
    if isinstance(comparison, str | Path):
        path = local_path(comparison).absolute()
        results = read_json_object(checked_file(path.parent, path.name, MAX_CONFIG_BYTES))
    if results is not None:
        known = isinstance(results, Mapping) and {"cells", "methods"} <= results.keys()
        if not known or results.get("base_model") != generator.layout.base_model:
            raise LoraFactoryError(
                f"the comparison is not one of adapters for {generator.layout.base_model}; "
                "pass the comparison.json that lora-factory evaluate --generator wrote"
            )
    origins = origins_of(generator, *about_model(generator.layout.base_model, token))

    def write(folder: Path, title: str) -> None:
        generator.save_pretrained(folder)
        plot = None
        if results is not None:
            write_json(folder / COMPARISON_FILE, results)
            plot = _write_plot(results, folder / PLOT_FILE)
        card = generator_card(generator, title, origins=origins, comparison=results, plot=plot, tags=tags)
        write_text(folder / CARD_FILE, card)

    return write


def adapter_writer(
    generator: ConditionalVAE,
    text: str | None,
    conditions: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
    temperature: float = 0.0,
    tags: Sequence[str] = (),
    token: str | bool | None = None,
) -> Writer:
    """Return a function that writes a generated adapter's repository; see `CVAELoRAGenerator.push_adapter`."""
    check_base_model(generator.layout)
    origins = origins_of(generator, *about_model(generator.layout.base_model, token))

    order = Order(text, conditions=conditions, seed=seed, temperature=temperature)

    def write(folder: Path, title: str) -> None:
        made = write_adapter(generator, folder, order)
        card = AdapterCard(title=title, origins=origins, generations={"": made}, tags=tags)
        write_text(folder / CARD_FILE, card.text)

    return write


def adapters_writer(
    generator: ConditionalVAE,
    texts: Mapping[str, str],
    *,
    seed: int = 0,
    temperature: float = 0.0,
    tags: Sequence[str] = (),
    token: str | bool | None = None,
) -> Writer:
    """Return a function that writes a repository with a folder per adapter; see `CVAELoRAGenerator.push_adapters`."""
    check_base_model(generator.layout)
    origins = origins_of(generator, *about_model(generator.layout.base_model, token))

    orders = {name: Order(text, seed=seed, temperature=temperature) for name, text in texts.items()}

    def write(folder: Path, title: str) -> None:
        made: dict[str, Generation] = {}
        for (name, order), adapter in zip(orders.items(), fulfil_texts(generator, [*orders.values()]), strict=True):
            (folder / name).mkdir()
            made[name] = record(generator, folder / name, order, adapter)
            one = AdapterCard(title=title, subfolder=name, origins=origins, generations={"": made[name]}, tags=tags)
            write_text(folder / name / CARD_FILE, one.text)
        card = AdapterCard(title=title, origins=origins, generations=made, tags=tags)
        write_text(folder / CARD_FILE, card.text)

    return write


def _write_plot(comparison: Mapping[str, Any], path: Path) -> str | None:
    """Draw the headroom of a comparison's methods; None where nothing was measured."""
    from lora_factory.reporting.report import headroom_picture

    picture = headroom_picture(comparison)
    if picture is not None:
        write_text(path, picture)
    return picture and path.name
