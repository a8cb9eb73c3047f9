"""A bounded number of generated adapters in one base model; the one unused for longest makes room."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_factory.adapters.attach import AdapterSlot, attach_adapter
from lora_factory.adapters.folder import ADAPTER_FILE, GENERATION_FILE, load_adapter
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.generator.generation import Order, fulfil
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.serving.metrics import Metrics
from lora_factory.tasks.image_files import image_fingerprint
from lora_factory.utils.paths import sha256_text
from lora_factory.utils.safe_files import read_json


@dataclass(frozen=True)
class WrittenAdapter:
    """An adapter as a PEFT folder.

    Attributes:
        files: The folder's files by name.
        generation: What ``generation.json`` says.
    """

    files: dict[str, bytes]
    generation: dict[str, Any]

    @property
    def weights(self) -> bytes:
        """The safetensors file."""
        return self.files[ADAPTER_FILE]

    def archive(self) -> bytes:
        """A ZIP archive with the files in a folder named ``adapter``."""
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
            for name, content in self.files.items():
                file.writestr(zipfile.ZipInfo(f"adapter/{name}"), content)
        return archive.getvalue()


class KeptAdapters:
    """Adapters in slots of one ``PeftModel``, by the identifier of the order that they fulfil.

    A slot is added with the first adapter that needs it and overwritten in place from then on. Only one thread may use
    it at a time.

    Args:
        generator: Writes the adapters.
        model: The base model; the adapters are put into it.
        tokenizer: The base model's.
        capacity: Adapters kept.
        metrics: Where adapters are counted.
    """

    def __init__(
        self,
        generator: CVAELoRAGenerator,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        capacity: int,
        metrics: Metrics,
    ) -> None:
        """Start without an adapter."""
        self.generator, self.tokenizer, self.capacity, self._metrics = generator, tokenizer, capacity, metrics
        self.model: PreTrainedModel | PeftModel = model
        self._layout = generator.layout.with_rank(generator.layout.rank)
        self._names: OrderedDict[str, str] = OrderedDict()  # by identifier, the one unused for longest first
        self._slots: dict[str, AdapterSlot] = {}  # by name

    def __len__(self) -> int:
        """The number of adapters in the model."""
        return len(self._names)

    def slot(self, identifier: str, order: Order | None) -> str | None:
        """The name of an adapter in the model; it is generated unless it is there.

        Args:
            identifier: The order's, see `identifier_of`.
            order: What to generate; None: nothing.

        Returns:
            PEFT's name of the adapter; None when it is not there and there is no order.

        Raises:
            LoraFactoryError: When the generator refuses the order.
        """
        if identifier not in self._names:
            if order is None:
                return None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the text is far from every task: POST /adapters says so
                made = fulfil(self.generator, order)
            self._put(identifier, made.layout, made.state_dict)
        self._names.move_to_end(identifier)
        return self._names[identifier]

    def write(self, identifier: str, order: Order) -> WrittenAdapter:
        """Generate an adapter as a PEFT folder, and put it into the model.

        Raises:
            LoraFactoryError: When the generator refuses the order.
        """
        with tempfile.TemporaryDirectory() as parent, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folder = self.generator.save_adapter(
                order.text,
                Path(parent, "adapter"),
                examples=order.examples,
                images=order.images,
                base_model=self.model if order.examples else None,
                tokenizer=self.tokenizer,
                seed=order.seed,
                temperature=order.temperature,
                rank=order.rank,
            )
            self._put(identifier, *load_adapter(folder))
            files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
            return WrittenAdapter(files, read_json(folder / GENERATION_FILE))

    def _put(self, identifier: str, layout: AdapterLayout, state_dict: Mapping[str, Tensor]) -> None:
        """Put an adapter into its slot, a free one, or that of the adapter unused for longest."""
        self._metrics.count("adapters_generated_total")
        wide = self._layout
        vector = layout.widen(layout.flatten(state_dict), wide)  # zeros fill up a lower rank
        full = identifier not in self._names and len(self._names) == self.capacity
        eldest = next(iter(self._names)) if full else None
        name = self._names.get(eldest or identifier) or f"slot{len(self._names)}"
        if name in self._slots:
            self._slots[name].load(vector)
        else:
            self.model = attach_adapter(self.model, wide, wide.unflatten(vector), name)
            self._slots[name] = AdapterSlot(self.model, wide, name)
        if eldest is not None:  # not before its slot has been overwritten: a load that fails leaves all as it was
            del self._names[eldest]
            self._metrics.count("adapters_evicted_total")
        self._names[identifier] = name
        self._names.move_to_end(identifier)


def identifier_of(order: Order) -> str:
    """A name for an order's adapter, the same for equal orders: a hash of all that the adapter depends on."""
    images = [image_fingerprint(image) for image in order.images or ()]
    facts = [order.text, order.examples, images, order.rank, order.seed, order.temperature]
    return "adapter-" + sha256_text(json.dumps(facts))[:32]
