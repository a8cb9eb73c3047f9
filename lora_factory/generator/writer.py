"""From a text, images or examples to weights and a PEFT folder, without a base model, PEFT or transformers' models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from lora_factory.generator.files import GeneratorSource, loading_errors, read_generator
from lora_factory.generator.generation import Order, fulfil, write_adapter
from lora_factory.generator.generation import explain as explain_order
from lora_factory.generator.hub import origins_of
from lora_factory.generator.task_vectors import open_reader
from lora_factory.generator.vae import ConditionalVAE
from lora_factory.hub.cards import AdapterCard, handwritten, with_handwritten
from lora_factory.tasks.examples import Example, ImageExample
from lora_factory.tasks.image_files import ImageLike
from lora_factory.utils.files import atomic_folder, write_text
from lora_factory.utils.folders import ADAPTER, check_folder
from lora_factory.utils.paths import local_path

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


class AdapterWriter(ConditionalVAE):
    """Writes LoRA adapters to disk: all of a generator that needs neither PEFT nor transformers' models.

    The commands ``generate`` and ``explain`` use it as it is, since importing these libraries takes longer than their
    work. In Python, use :class:`~lora_factory.CVAELoRAGenerator`, which is one of these and more.
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
            rank: A lower rank than the generator's; see :meth:`generate_adapter`.

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
            ``nearest``, ``distance``, ``farther_than`` and ``use``; see `lora_factory.generator.generation.explain`.

        Raises:
            LoraFactoryError: When the text is empty, or neither text nor task vectors are given.
        """
        return explain_order(self, Order(text, conditions=conditions))

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
            examples: As in :meth:`generate_adapter`, like all that is not listed here.
            images: As there.
            conditions: As there.
            base_model: As there.
            seed: As there.
            temperature: As there.
            overwrite: Whether a generated adapter that is there already is replaced. Nothing else ever is, be it an
                adapter that was trained; what people have added to its card stays.
            tokenizer: As there.
            refine_steps: As there.
            rank: As there.

        Returns:
            The folder.

        Raises:
            LoraFactoryError: As :meth:`generate_adapter`, and when the folder is not to be replaced.
            StorageError: When it cannot be written; it is a LoraFactoryError.
        """
        order = Order(text, examples, images, conditions, seed, temperature, refine_steps, rank=rank)
        read = (self.config.name_or_path, self.layout.base_model, base_model, *(order.images or ()))
        inputs = [one for one in read if isinstance(one, str | Path)]
        output = check_folder(save_directory, ADAPTER, overwrite=overwrite, inputs=inputs)
        handwritten(output)
        base = None if order.examples is None else open_reader(self.layout, order.examples, base_model, tokenizer)
        with atomic_folder(output, ADAPTER, overwrite=overwrite, inputs=inputs) as folder:
            generation = write_adapter(self, folder, order, base)
            card = AdapterCard(title=output.name, origins=origins_of(self), generations={"": generation})
            write_text(folder / "README.md", with_handwritten(card.text, output))
        return local_path(save_directory)
