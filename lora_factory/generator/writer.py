"""From a text, images or examples to weights and a PEFT folder, without a base model, PEFT or transformers' models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from lora_factory.adapters.folder import Generation
from lora_factory.generator.files import GeneratorSource, loading_errors, read_generator
from lora_factory.generator.generation import Order, fulfil, fulfil_texts, record, write_adapter
from lora_factory.generator.generation import explain as explain_order
from lora_factory.generator.hub import origins_of
from lora_factory.generator.task_vectors import open_reader
from lora_factory.generator.vae import ConditionalVAE
from lora_factory.hub.cards import CARD_FILE, AdapterCard, Origins, handwritten, with_handwritten
from lora_factory.tasks.examples import Example, ImageExample
from lora_factory.tasks.given import as_named_texts, as_texts
from lora_factory.tasks.image_files import ImageLike
from lora_factory.utils.files import atomic_folder, write_text
from lora_factory.utils.folders import ADAPTER, check_folder
from lora_factory.utils.paths import local_path, safe_name
from lora_factory.utils.progress import progress_bar

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


class AdapterWriter(ConditionalVAE):
    """Writes LoRA adapters to disk: all of a generator that needs neither PEFT nor transformers' models.

    The commands ``generate`` and ``explain`` use it as it is, since importing these libraries takes longer than their
    work. In Python, use `lora_factory.CVAELoRAGenerator`, which is one of these and more.
    """

    @classmethod
    def open(cls, name: str | Path, revision: str | None = None) -> Self:
        """Read a generator from a folder or the Hub, as strictly as ``CVAELoRAGenerator.from_pretrained``.

        Args:
            name: Folder or Hub id.
            revision: Branch, tag or commit on the Hub.

        Raises:
            LoraFactoryError: When the files are damaged, incomplete, or not a generator's, or the Hub refuses.
        """
        source, _ = GeneratorSource.from_options(str(name), {"revision": revision})
        with loading_errors(source):
            config, weights = read_generator(source, cls)
            with torch.device("meta"):
                generator = cls(config)
            generator.load_state_dict(weights, assign=True)
        config.name_or_path, config._commit_hash = source.name, source.commit
        return generator.requires_grad_(False).eval()

    @torch.no_grad()
    def generate_state_dict(
        self,
        text: str | Mapping[str, float] | None = None,
        *,
        conditions: Mapping[str, torch.Tensor] | None = None,
        seed: int = 0,
        temperature: float = 0.0,
        rank: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Write one adapter as a PEFT state dict; the base model is not needed.

        Args:
            text: What the adapter is for.
            conditions: Task vectors of shape ``(width,)`` by modality, instead of or beside ``text``.
            seed: Seed of the sample; of no effect at temperature 0.
            temperature: 0 (default) writes the most likely adapter; 1 samples with the spread of real checkpoints.
            rank: A lower rank than the generator's; see `generate_adapter`.

        Returns:
            Float32 tensors on the CPU under PEFT's names.

        Raises:
            LoraFactoryError: When the text is empty, or neither text nor task vectors are given.
        """
        order = Order(text, conditions=conditions, seed=seed, temperature=temperature, rank=rank)
        return fulfil(self, order).state_dict

    def explain(
        self,
        text: str | Mapping[str, float] | None = None,
        *,
        conditions: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """How far a text is from the tasks that the generator knows, and how much it makes of it.

        Args:
            text: What an adapter would be for; or several texts with a weight each.
            conditions: Task vectors by modality, instead of or beside ``text``.

        Returns:
            ``verdict``, ``sentence``, ``nearest``, ``distance``, ``farther_than`` and ``use``; see
            `lora_factory.generator.generation.explain`.

        Raises:
            LoraFactoryError: When the text is empty, or neither text nor task vectors are given.
        """
        return explain_order(self, Order(text, conditions=conditions))

    @torch.no_grad()
    def generate_adapters(
        self, texts: Iterable[str], *, seed: int = 0, temperature: float = 0.0, rank: int | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Write an adapter for each of many texts, as PEFT state dicts; the base model is not needed.

        The encoder reads all texts at once and the network writes many adapters at once, so that one costs a fraction
        of a call of `generate_state_dict`. Adapters come as they are asked for: memory does not grow with the
        number of texts. To write them to disk, see `save_adapters`.

        Args:
            texts: What each adapter is for.
            seed: As in `generate_state_dict`, the same for all.
            temperature: As there.
            rank: As there.

        Yields:
            For every text what `generate_state_dict` returns for it, up to rounding.

        Raises:
            LoraFactoryError: When a text is empty, or this generator was trained without texts.
        """
        orders = [Order(text, seed=seed, temperature=temperature, rank=rank) for text in as_texts(texts)]
        for made in fulfil_texts(self, orders):
            yield made.state_dict

    def save_adapters(
        self,
        texts: Mapping[str, str],
        save_directory: str | Path,
        *,
        seed: int = 0,
        temperature: float = 0.0,
        overwrite: bool = False,
        rank: int | None = None,
    ) -> list[Path]:
        """Write an adapter for each of many texts, a plain PEFT folder each, as `generate_adapters` makes them.

        Args:
            texts: What each adapter is for, by the name of its folder.
            save_directory: The folder of the folders; it may be there and hold other things.
            seed: As in `generate_adapter`, the same for all.
            temperature: As there.
            overwrite: As in `save_adapter`, for each of the folders.
            rank: As there.

        Returns:
            The folders.

        Raises:
            LoraFactoryError: When a name is no file name, a text is empty, or a folder is not to be replaced; nothing
                is written then.
            StorageError: When one cannot be written; those before it stay.
        """
        how: dict[str, Any] = {"seed": seed, "temperature": temperature, "rank": rank}
        orders = {safe_name(name): Order(text, **how) for name, text in as_named_texts(texts).items()}
        folders, kept = [local_path(save_directory) / name for name in orders], {"overwrite": overwrite}
        outputs = [check_folder(folder, ADAPTER, inputs=self._inputs(), **kept) for folder in folders]
        for output in outputs:
            handwritten(output)
        origins = origins_of(self)
        made_ones = progress_bar(
            fulfil_texts(self, [*orders.values()]), total=len(orders), desc="write adapters", unit="adapters"
        )
        for output, order, made in zip(outputs, orders.values(), made_ones, strict=True):
            with atomic_folder(output, ADAPTER, inputs=self._inputs(), **kept) as folder:
                _write_card(folder, output, record(self, folder, order, made), origins)
        return folders

    def _inputs(self) -> list[str]:
        """The folders that the generator may be read from, which no adapter replaces."""
        return [self.config.name_or_path, self.layout.base_model]

    def save_adapter(
        self,
        text: str | Mapping[str, float] | None,
        save_directory: str | Path,
        *,
        examples: Sequence[Example | ImageExample | str] | None = None,
        images: Sequence[ImageLike] | None = None,
        conditions: Mapping[str, torch.Tensor] | None = None,
        base_model: str | Path | PreTrainedModel | PeftModel | None = None,
        seed: int = 0,
        temperature: float = 0.0,
        overwrite: bool = False,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        refine_steps: int = 0,
        rank: int | None = None,
    ) -> Path:
        """Write an adapter as a plain PEFT folder; the base model is loaded only to read examples.

        The folder appears by one rename and holds ``adapter_config.json``, ``adapter_model.safetensors``,
        ``generation.json`` (condition, seed, generator, version) and a model card; examples and images are not kept.

        Args:
            text: What the adapter is for.
            save_directory: The folder to make.
            examples: As in `generate_adapter`, like all that is not listed here.
            images: As there.
            conditions: As there.
            base_model: As there.
            seed: As there.
            temperature: As there.
            overwrite: Whether a generated adapter that is there already is replaced. Nothing else ever is, be it an
                adapter that was trained; the sections that people have added to its card stay.
            tokenizer: As there.
            refine_steps: As there.
            rank: As there.

        Returns:
            The folder.

        Raises:
            LoraFactoryError: As `generate_adapter`, and when the folder is not to be replaced.
            StorageError: When it cannot be written; it is a LoraFactoryError.
        """
        order = Order(text, examples, images, conditions, seed, temperature, refine_steps, rank=rank)
        inputs = [one for one in (*self._inputs(), base_model, *(order.images or ())) if isinstance(one, str | Path)]
        output = check_folder(save_directory, ADAPTER, overwrite=overwrite, inputs=inputs)
        handwritten(output)
        base = None if order.examples is None else open_reader(self.layout, order.examples, base_model, tokenizer)
        with atomic_folder(output, ADAPTER, overwrite=overwrite, inputs=inputs) as folder:
            generation = write_adapter(self, folder, order, base)
            _write_card(folder, output, generation, origins_of(self))
        named = local_path(save_directory)
        return named if named.is_dir() else output  # "missing/../adapter" is written, and leads nowhere


def _write_card(folder: Path, output: Path, generation: Generation, origins: Origins) -> None:
    """Write the card of an adapter, with what people have added to the one in the folder that is to be replaced."""
    card = AdapterCard(title=output.name, origins=origins, generations={"": generation})
    write_text(folder / CARD_FILE, with_handwritten(card.text, output), durable=False)
