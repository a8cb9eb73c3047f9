"""The network of a generator, from task vectors to adapter weights, and its encoders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.basis import CoreBasis
from lora_factory.generator.configuration import CVAELoRAConfig
from lora_factory.generator.conv1d import ConvCVAE
from lora_factory.generator.networks import ConditionStandardiser, CoreCVAE, GeneratorOutput, group_means
from lora_factory.generator.task_vectors import check_conditions, open_reader
from lora_factory.hub.cards import heard
from lora_factory.tasks.examples import Example, ImageExample
from lora_factory.tasks.given import as_examples, as_images, as_vectors
from lora_factory.tasks.image_files import ImageLike
from lora_factory.utils.precision import own_precision

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from lora_factory.models.image_encoders import ImageEncoder
    from lora_factory.models.text_encoders import TextEncoder


class ConditionalVAE(nn.Module):
    """Conditional VAE over LoRA weights: task vectors in, adapter weights out.

    With ``decoder="core"`` an adapter is ``ΔW = s · B (K + Z(c)) A`` per module: ``A`` and ``B`` are the ``basis``
    that all adapters share, ``K`` is the ``center``, the core that all tasks share (it starts as the identity where
    the generator is trained on examples alone, as the zoo's mean core on a zoo, and is trained through the base), and
    the network makes ``Z`` of a condition. Without a condition ``Z = 0``: one adapter for all tasks. With
    ``decoder="conv1d"`` the network makes the weights themselves, as differences from their mean.

    The network works on *targets*: cores or weights, less their center, in units of one standard deviation per module.

    It is a plain module: transformers' models, which take seconds to import, are needed for none of this.
    """

    config: Any  # CVAELoRAConfig; transformers declares its own class for it
    scale: torch.Tensor
    spread: torch.Tensor
    training_record: dict[str, Any] | None = None  # what training.json holds, if the generator has one

    def __init__(self, config: CVAELoRAConfig) -> None:
        super().__init__()
        self.config = config
        self._build(config)

    def _build(self, config: CVAELoRAConfig) -> None:
        """Make the parameters and buffers."""
        if config.layout is None or not config.modalities:
            raise LoraFactoryError(
                "a generator's config needs layout and modalities; train_generator(zoo, output_dir) writes both"
            )
        self.layout = AdapterLayout.from_dict(config.layout)
        widths = dict(sorted(config.modalities.items()))  # the order that config.json keeps
        tasks = max(1, len(config.tasks or []))
        noisy = sorted({"text", "hidden"} & set(widths)) if config.format_version >= 4 else ()
        self.standardiser = ConditionStandardiser(widths, config.directions or {}, noisy)
        coordinates, latents = self.standardiser.coordinates, config.latent_size
        self.basis: CoreBasis | None = None
        self.network: CoreCVAE | ConvCVAE
        if config.decoder == "conv1d":
            self.sizes = [math.prod(shape) for m in self.layout.modules for shape in (m.shape_a, m.shape_b)]
            channels = tuple(config.channels)
            self.network = ConvCVAE(sum(self.sizes), coordinates, channels=channels, latent_size=latents)
        else:
            self.basis = CoreBasis(self.layout, diagonal=config.core == "diagonal")
            self.sizes = self.basis.sizes
            width, depth = config.width, config.depth
            self.network = CoreCVAE(sum(self.sizes), coordinates, latents=latents, width=width, depth=depth)
        self.center = nn.Parameter(torch.zeros(sum(self.sizes)), requires_grad=False)
        self.register_buffer("scale", torch.ones(len(self.sizes)))
        self.register_buffer("spread", torch.zeros(len(self.sizes)))
        for name, width in widths.items():
            self.register_buffer(f"{name}_task_vectors", torch.zeros(tasks, width))

    def forward(
        self,
        adapters: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
        *,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
    ) -> GeneratorOutput:
        """The training objective (Eq. 8) on a batch of adapters.

        Args:
            adapters: Weights of shape ``(batch, D)``.
            conditions: Task vectors ``(batch, width)`` for any subset of the config's modalities.
            generator: Source of the latent noise; PyTorch's global one by default.
            return_loss: Transformers' ``Trainer`` asks for it; the loss is always there.
        """
        coordinates = self.standardiser.all(conditions)
        return self.network.loss(self.targets(adapters), coordinates, self.config.kl_weight, generator)

    def targets(self, adapters: torch.Tensor, layout: AdapterLayout | None = None) -> torch.Tensor:
        """What the network would have to make for adapters ``(n, D)`` of this or another layout: ``(n, targets)``."""
        layout = layout or self.layout
        rows = layout.widen(adapters, self.layout) if self.basis is None else self.basis.projector(layout)(adapters)
        return (rows - self.center) / self.spread_over(self.scale)

    def spread_over(self, numbers: torch.Tensor) -> torch.Tensor:
        """One number per module (per factor for ``"conv1d"``) as one per target."""
        return numbers.repeat_interleave(torch.tensor(self.sizes, device=numbers.device))

    def restored(self, targets: torch.Tensor) -> torch.Tensor:
        """The cores (weights, for ``"conv1d"``) of targets, both ``(batch, targets)``."""
        return self.center + targets * self.spread_over(self.scale)

    def assemble(self, targets: torch.Tensor) -> torch.Tensor:
        """The adapters ``(batch, D)`` of targets ``(batch, targets)``; zeros are those without a condition."""
        rows = self.restored(targets)
        return rows if self.basis is None else self.basis.adapters(rows)

    def made(
        self, conditions: Mapping[str, torch.Tensor], batch: int, *, seed: int = 0, temperature: float = 0.0
    ) -> torch.Tensor:
        """Targets ``(batch, targets)`` of task vectors ``(batch, width)``, or of no condition at all."""
        source = torch.Generator().manual_seed(seed)
        coordinates = self.standardiser.all(conditions)
        latent = self.network.prior(coordinates, batch).sample(temperature, source)
        targets = self.network.decode(latent, coordinates)
        if temperature > 0:
            noise = torch.randn(targets.shape, generator=source).to(targets)
            targets = targets + temperature * self.spread_over(self.spread) * noise
        return targets

    def cores(
        self,
        conditions: Mapping[str, torch.Tensor],
        batch: int,
        *,
        present: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Cores ``(batch, C)`` of the prior's mean, for training through the base. Differentiable.

        Args:
            conditions: Task vectors ``(batch, width)`` by modality.
            batch: How many.
            present: Which rows have which modality, bool ``(batch, 1)`` by modality; default: all have all.
        """
        assert isinstance(self.network, CoreCVAE)
        codes = self.network.prior(self.standardiser.all(conditions), batch, present).mean
        return self.restored(self.network.decode(codes))

    @torch.no_grad()
    def fit_conditions(self, features: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Set the tasks' vectors and their standardisation.

        Args:
            features: For every modality the rows ``(n, width)`` of every task (descriptions, examples, images).

        Raises:
            LoraFactoryError: When a row is not finite.
        """
        for name, tasks in features.items():
            for task, rows in tasks.items():
                if not torch.isfinite(rows).all():
                    raise LoraFactoryError(
                        f"task {task!r}: its vectors of {heard([name])} hold NaN or infinite values; the model that "
                        "makes them is damaged, or its precision too low: try dtype='float32' (--dtype float32)"
                    )
        vectors = {name: torch.stack([rows.mean(0) for rows in tasks.values()]) for name, tasks in features.items()}
        differing, within = dict(vectors), {}
        if "image" in features:
            differing["image"] = torch.cat([group_means(rows) for rows in features["image"].values()])
        for name in {"text", "hidden"} & set(features):
            within[name] = torch.cat([rows - rows.mean(0) for rows in features[name].values()])
        self.standardiser.fit(differing, within)
        for name, rows in vectors.items():
            self.get_buffer(f"{name}_task_vectors").copy_(rows)

    _text_encoder: Any = None  # transformers evaluates the annotations of its models' attributes
    _image_encoder: Any = None

    def conditions(self, text: str | None = None, conditions: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Task vectors of shape ``(width,)`` by modality, checked against the config."""
        vectors = as_vectors(conditions)
        if text is not None:
            vectors["text"] = self.text_encoder.encode([text])[0]
        check_conditions(vectors, self.config.modalities or {})
        return vectors

    @own_precision()
    def encode_examples(
        self,
        examples: Sequence[Example | ImageExample | str],
        base_model: str | Path | PreTrainedModel | PeftModel | None = None,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    ) -> dict[str, Tensor]:
        """A few examples of a task as a condition: what their hidden states say of the task's mean ones (Eq. 1).

        Args:
            examples: Texts, prompts with their completions (as pairs or as ``{"prompt", "completion"}``), or images
                with both; from 4 to 32 is what training saw.
            base_model: Model, folder or Hub id; by default the one that the generator's layout names.
            tokenizer: Tokenizer or processor of a live model; a folder or Hub id has its own.

        Returns:
            ``{"hidden": vector}``, to be passed as ``conditions``.

        Raises:
            LoraFactoryError: When this generator was trained without examples, one is empty, or a live model comes
                without its tokenizer.
        """
        from lora_factory.models.hidden_states import example_states

        remedy = "train a generator with tasks= (--tasks) of the zoo, or pass a text and refine_steps=60 beside them"
        self._refuse_unheard("hidden", "examples", remedy)
        examples = as_examples(examples)
        base = open_reader(self.layout, examples, base_model, tokenizer)
        states = example_states(base, examples)[:, : (self.config.modalities or {})["hidden"]]  # format 2: no memory
        return {"hidden": self.task_vector("hidden", states)}

    def task_vector(self, modality: str, rows: Tensor) -> Tensor:
        """The task vector ``(width,)`` of a few examples' or images' vectors ``(n, width)``.

        It is their mean (Eq. 1), or of examples the mean that is to be expected of more of them.
        """
        from lora_factory.models.hidden_states import task_vector

        return self.standardiser.expected(modality, task_vector(rows)[None], [len(rows)])[0]

    @own_precision()
    def encode_images(self, images: Sequence[ImageLike]) -> dict[str, Tensor]:
        """A few images of a task as a condition: the mean of their vectors.

        Args:
            images: Files or images in memory, of any size and mode, at least one.

        Returns:
            ``{"image": vector}``, to be passed as ``conditions``.

        Raises:
            LoraFactoryError: When this generator was trained without images, none is given, or one cannot be read.
        """
        self._refuse_unheard("image", "images", "or train a generator with images= (--images) of every task")
        images = as_images(images)
        return {"image": self.task_vector("image", self.image_encoder.encode(images))}

    def nearest_tasks(self, vectors: Mapping[str, Tensor], count: int = 3) -> list[dict[str, Any]]:
        """The known tasks whose vectors ``(width,)`` are nearest, best first: ``{"task", "similarity"}``.

        The similarity is that of the cosine, the mean over modalities.
        """
        tasks, known = self.config.tasks or [], {name: self.get_buffer(f"{name}_task_vectors") for name in vectors}
        similarities = [
            functional.cosine_similarity(known[name], vector[None].to(known[name])) for name, vector in vectors.items()
        ]
        values, indices = torch.stack(similarities).mean(0).topk(min(count, len(tasks)))
        return [
            {"task": tasks[index]["name"], "similarity": round(value, 4)}
            for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        ]

    @property
    def text_encoder(self) -> TextEncoder:
        """The sentence encoder that the config names, loaded on first use."""
        if self._text_encoder is None:
            if self.config.text_encoder is None:
                raise LoraFactoryError("this generator was trained without texts; pass conditions= instead of text")
            from lora_factory.models.text_encoders import TextEncoder

            self._text_encoder = TextEncoder(self.config.text_encoder)
        return self._text_encoder

    @property
    def image_encoder(self) -> ImageEncoder:
        """The image encoder that the config names, loaded on first use."""
        if self._image_encoder is None:
            if self.config.image_encoder is None:
                raise LoraFactoryError("this generator's config names no image encoder; pass conditions= instead")
            from lora_factory.models.image_encoders import ImageEncoder

            self._image_encoder = ImageEncoder(self.config.image_encoder)
        return self._image_encoder

    def _refuse_unheard(self, modality: str, noun: str, remedy: str) -> None:
        modalities = self.config.modalities or {}
        if modality not in modalities:
            raise LoraFactoryError(
                f"this generator listens to {heard(modalities)} and not to {noun}; pass a text, {remedy}"
            )
