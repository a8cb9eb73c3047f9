"""The network of a generator: a Transformers model that maps task vectors to adapter weights, and its encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.configuration import CVAELoRAConfig
from lora_factory.generator.familiarity import familiarity
from lora_factory.generator.networks import (
    ConditionStandardiser,
    ConvCVAE,
    Gaussian,
    GeneratorOutput,
    TokenCVAE,
    group_means,
    spread_over_weights,
    token_scales,
)
from lora_factory.generator.recall import certainty, hedged, task_posterior
from lora_factory.generator.task_vectors import check_conditions, nearest_tasks, open_reader
from lora_factory.models.hidden_states import example_states, task_vector
from lora_factory.models.image_encoders import ImageEncoder
from lora_factory.models.text_encoders import TextEncoder
from lora_factory.tasks.examples import Example, ImageExample
from lora_factory.tasks.given import as_examples, as_images, as_vectors
from lora_factory.tasks.image_files import ImageLike
from lora_factory.zoo.checkpoints import SnapshotRows, ZooStatistics, zoo_statistics


class ConditionalVAE(PreTrainedModel):
    """Conditional VAE over LoRA weights: task vectors in, adapter weights out.

    The network models the residual of an adapter around ``bias`` (the zoo's mean after stage 1), in units of one
    floored standard deviation per token. The known tasks' own adapters are stored, for conditions that mean one of
    them.
    """

    config_class = CVAELoRAConfig
    base_model_prefix = "generator"
    main_input_name = "adapters"
    token_scale: torch.Tensor
    training_record: dict[str, Any] | None = None  # what training.json holds, if the generator has one

    def __init__(self, config: CVAELoRAConfig) -> None:
        super().__init__(config)
        if config.layout is None or not config.modalities:
            raise LoraFactoryError(
                "a generator's config needs layout and modalities; train_generator(zoo, output_dir) writes both"
            )
        self.layout = AdapterLayout.from_dict(config.layout)
        widths = dict(sorted(config.modalities.items()))  # the order that config.json keeps
        tasks = max(1, len(config.tasks or []))
        self.standardiser = ConditionStandardiser(widths, {"text": tasks})
        coordinates = self.standardiser.widths
        self.network: TokenCVAE | ConvCVAE
        if config.decoder == "conv1d":
            self.network = ConvCVAE(
                self.layout, coordinates, channels=tuple(config.channels), latent_size=config.latent_size
            )
        else:
            self.network = TokenCVAE(
                self.layout, coordinates, width=config.width, depth=config.depth, latent_size=config.latent_size
            )
        self.bias = nn.Parameter(torch.zeros(self.layout.size), requires_grad=False)
        self.register_buffer("token_scale", torch.ones(self.layout.num_tokens))
        for name, width in widths.items():
            self.register_buffer(f"{name}_task_vectors", torch.zeros(tasks, width))
        if config.recall is not None:
            self.register_buffer("known_adapters", torch.zeros(tasks, self.layout.size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation stands: ``from_pretrained`` below refuses files that leave a weight out."""

    def forward(
        self,
        adapters: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
        *,
        kl_factor: float = 1.0,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
    ) -> GeneratorOutput:
        """The training objective (Eq. 8) on a batch of adapters.

        Args:
            adapters: Weights of shape ``(batch, D)``.
            conditions: Task vectors ``(batch, width)`` for any subset of the config's modalities.
            kl_factor: Warm-up factor of the KL term.
            generator: Source of the latent noise; PyTorch's global one by default.
            return_loss: Transformers' ``Trainer`` asks for it; the loss is always there.
        """
        weights, condition = self.encode_inputs(adapters, conditions)
        posterior, prior = self.network.posterior(weights, condition), self.network.prior(condition)
        kl = posterior.kl(prior)
        if isinstance(self.network, ConvCVAE):
            mean, _ = self.network.decode(posterior.sample(generator=generator), condition)
            reconstruction = (mean - weights).square().mean()
            loss = reconstruction + self.config.kl_weight * kl_factor * kl.sum(-1).mean()
        else:
            loss, reconstruction = self._token_loss(weights, condition, posterior, prior, kl, kl_factor, generator)
        active = (kl.mean(0) > 0.01).sum()
        return GeneratorOutput(loss=loss, reconstruction=reconstruction, kl=kl.sum(-1).mean(), active_latents=active)

    def encode_inputs(
        self, adapters: torch.Tensor, conditions: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardised weights ``(batch, D)`` and the embedded condition ``(batch, width)`` of a training batch."""
        weights = (adapters - self.bias) / self.weight_scale
        return weights, self.network.embed_condition(self.standardiser.all(conditions), len(adapters))

    def recall(self, mean: torch.Tensor, coordinates: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The known tasks' adapters instead of ``mean``, as far as a condition is recognised as one of these tasks.

        Args:
            mean: What the network writes, shape ``(batch, D)``.
            coordinates: Of the conditions, shape ``(batch, directions)``, by modalities that tell the tasks apart.
        """
        known = {name: self.known_coordinates(name) for name in coordinates}
        posterior = task_posterior(self.config.recall, known, coordinates)
        nearness = familiarity(self.config.recall, known, coordinates, len(mean))
        relied = certainty(posterior) * (hedged(nearness) if self.config.reach is None else nearness)
        return mean + relied.to(mean) * (posterior.to(mean) @ self.get_buffer("known_adapters") - mean)

    def known_coordinates(self, name: str) -> torch.Tensor:
        """The zoo's task vectors of one modality, as the network reads them: ``(tasks, directions)``."""
        return self.standardiser(name, self.get_buffer(f"{name}_task_vectors"))

    def _token_loss(
        self,
        weights: torch.Tensor,
        condition: torch.Tensor,
        posterior: Gaussian,
        prior: Gaussian,
        kl: torch.Tensor,
        kl_factor: float,
        generator: torch.Generator | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Half squared error and KL an element; every other row is decoded from the prior's mean.

        That is the latent which generation at temperature 0 uses, so the decoder learns to do well on it.
        """
        even = torch.arange(len(weights), device=weights.device)[:, None] % 2 == 0
        latent = torch.where(even, prior.mean, posterior.sample(generator=generator))
        mean, _ = self.network.decode(latent, condition)
        errors = (mean - weights).square().mean(-1)
        charged = kl.mean(0).clamp_min(self.config.free_bits).sum()
        penalty = self.config.kl_weight * kl_factor * charged / self.layout.size
        return 0.5 * errors.mean() + penalty, errors[::2].mean()

    def generate_vector(
        self, conditions: Mapping[str, torch.Tensor], *, seed: int = 0, temperature: float = 0.0
    ) -> torch.Tensor:
        """Adapter weights of shape ``(batch, D)`` for task vectors of shape ``(batch, width)``.

        At temperature 0 the prior's mean is decoded, whatever the seed; above, z and the predicted spread are sampled
        with their standard deviations times ``temperature`` (Eq. 9). The convolutional decoder, whose prior knows
        nothing of the condition, decodes its mean or a sample in the same way. Differentiable.
        """
        standard = self.standard_vector(conditions, len(next(iter(conditions.values()))), seed, temperature)
        return self.bias + standard * self.weight_scale

    def standard_vector(
        self, conditions: Mapping[str, torch.Tensor], batch: int, seed: int = 0, temperature: float = 0.0
    ) -> torch.Tensor:
        """The difference of generated weights from the bias adapter, in units of ``weight_scale``, ``(batch, D)``.

        No condition at all is a valid one: every modality is then replaced by its learned absence. A known task's
        adapter, where one is recalled, has nothing of z, and varies by the predicted spread alone. After stage 2 with
        specialists it shrinks with the distance from all known tasks, see `familiarity.py`.
        """
        generator = torch.Generator().manual_seed(seed)
        coordinates = self.standardiser.all(conditions)
        condition = self.network.embed_condition(coordinates, batch)
        latent = self.network.prior(condition).sample(temperature, generator)
        mean, log_std = self.network.decode(latent, condition)
        if telling := {name: rows for name, rows in coordinates.items() if name in (self.config.recall or {})}:
            mean = self.recall(mean, telling)
        if self.config.reach is not None:
            known = {name: self.known_coordinates(name) for name in conditions}
            mean = mean * familiarity(self.config.reach, known, coordinates, batch).to(mean)
        if temperature > 0:
            noise = torch.randn(mean.shape, generator=generator).to(mean)
            mean = mean + temperature * torch.exp(log_std) * noise
        return mean

    @property
    def weight_scale(self) -> torch.Tensor:
        """The floored standard deviation of every weight's token, shape ``(D,)``."""
        return spread_over_weights(self.layout, self.token_scale)

    @torch.no_grad()
    def fit_statistics(
        self, weights: Mapping[str, SnapshotRows], features: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> ZooStatistics:
        """Set bias adapter, token scales, task vectors and their standardisation from a zoo, whose statistics return.

        Args:
            weights: Checkpoints ``(n, D)`` of every task.
            features: For every modality the rows ``(n, width)`` of every task (descriptions, examples).
        """
        self.bias.copy_((statistics := zoo_statistics(weights)).mean)
        self.token_scale.copy_(token_scales(self.layout, statistics.deviation))
        vectors = {name: torch.stack([rows.mean(0) for rows in tasks.values()]) for name, tasks in features.items()}
        differing, within = dict(vectors), {}
        if "image" in features:
            differing["image"] = torch.cat([group_means(rows) for rows in features["image"].values()])
        if "hidden" in features:
            within["hidden"] = torch.cat([rows - rows.mean(0) for rows in features["hidden"].values()])
        self.standardiser.fit(differing, within)
        for name, rows in vectors.items():
            self.get_buffer(f"{name}_task_vectors").copy_(rows)
        return statistics

    _text_encoder: TextEncoder | None = None
    _image_encoder: ImageEncoder | None = None

    def conditions(self, text: str | None = None, conditions: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Task vectors of shape ``(width,)`` by modality, checked against the config."""
        vectors = as_vectors(conditions)
        if text is not None:
            vectors["text"] = self.text_encoder.encode([text])[0]
        check_conditions(vectors, self.config.modalities or {})
        return vectors

    def encode_examples(
        self,
        examples: Sequence[Example | ImageExample | str],
        base_model: str | Path | PreTrainedModel | PeftModel | None = None,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    ) -> dict[str, Tensor]:
        """A few examples of a task as a condition: their mean hidden states on the frozen base model (Eq. 1).

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
        self._refuse_unheard("hidden", "examples", "tasks= (--tasks) of the zoo")
        examples = as_examples(examples)
        base = open_reader(self.layout, examples, base_model, tokenizer)
        return {"hidden": task_vector(example_states(base, examples))}

    def encode_images(self, images: Sequence[ImageLike]) -> dict[str, Tensor]:
        """A few images of a task as a condition: the mean of their vectors.

        Args:
            images: Files or images in memory, of any size and mode, at least one.

        Returns:
            ``{"image": vector}``, to be passed as ``conditions``.

        Raises:
            LoraFactoryError: When this generator was trained without images, none is given, or one cannot be read.
        """
        self._refuse_unheard("image", "images", "images= (--images) of every task")
        images = as_images(images)
        return {"image": task_vector(self.image_encoder.encode(images))}

    def nearest_tasks(self, vectors: Mapping[str, Tensor], count: int = 3) -> list[dict[str, Any]]:
        """The zoo's tasks whose vectors are nearest by cosine similarity, best first: ``{"task", "similarity"}``."""
        known = {name: self.get_buffer(f"{name}_task_vectors") for name in vectors}
        return nearest_tasks([task["name"] for task in self.config.tasks or []], known, vectors, count)

    @property
    def text_encoder(self) -> TextEncoder:
        """The sentence encoder that the config names, loaded on first use."""
        if self._text_encoder is None:
            if self.config.text_encoder is None:
                raise LoraFactoryError("this generator was trained without texts; pass conditions= instead of text")
            self._text_encoder = TextEncoder(self.config.text_encoder)
        return self._text_encoder

    @property
    def image_encoder(self) -> ImageEncoder:
        """The image encoder that the config names, loaded on first use."""
        if self._image_encoder is None:
            if self.config.image_encoder is None:
                raise LoraFactoryError("this generator's config names no image encoder; pass conditions= instead")
            self._image_encoder = ImageEncoder(self.config.image_encoder)
        return self._image_encoder

    def _refuse_unheard(self, modality: str, noun: str, remedy: str) -> None:
        modalities = self.config.modalities or {}
        if modality not in modalities:
            raise LoraFactoryError(
                f"this generator listens to {', '.join(modalities)} and not to {noun}; pass a text, or train "
                f"a generator with {remedy}"
            )
