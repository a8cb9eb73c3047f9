"""The generator: a Transformers model that writes LoRA adapters from a task vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from lora_factory.adapters.attach import attach_adapter
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.arguments import REFINE_STEPS
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.configuration import CVAELoRAConfig
from lora_factory.generator.familiarity import familiarity
from lora_factory.generator.files import GeneratorSource, read_generator, read_training_record
from lora_factory.generator.generation import Order, fulfil, write_adapter
from lora_factory.generator.hub import HubMixin, origins_of
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
from lora_factory.generator.task_vectors import ConditionMixin, open_base, open_reader
from lora_factory.hub.cards import AdapterCard, handwritten, with_handwritten
from lora_factory.hub.errors import explain
from lora_factory.tasks.examples import Example, ImageExample
from lora_factory.tasks.image_files import ImageLike
from lora_factory.utils.files import atomic_folder, write_text
from lora_factory.utils.folders import ADAPTER, check_folder
from lora_factory.utils.paths import local_path
from lora_factory.utils.quiet import quiet_transformers
from lora_factory.zoo.snapshots import SnapshotRows, ZooStatistics, zoo_statistics


class CVAELoRAGenerator(HubMixin, ConditionMixin, PreTrainedModel):  # type: ignore[misc]  # our own push_to_hub
    """Conditional VAE over LoRA weights: from a sentence to a ``peft.PeftModel``.

    The network models the residual of an adapter around ``bias`` (the zoo's mean after stage 1), in units of one
    floored standard deviation a token. The known tasks' own adapters are remembered, for conditions that mean one of
    them. Train one with :func:`lora_factory.train_generator`; load a published one with
    ``CVAELoRAGenerator.from_pretrained("user/generator")``.
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

    @classmethod
    def from_pretrained(  # type: ignore[override]  # transformers lists every option; they pass through here
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Load a generator from a folder or the Hub, strictly: every weight must be there, with its shape, and finite.

        ``config.json``, ``model.safetensors`` and, if it is there, ``training.json`` are read; all are bounded and
        checked first.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            *args: As in transformers.
            **kwargs: As in transformers: ``revision``, ``token``, ``cache_dir``, ``local_files_only``,
                ``force_download``, ``dtype``, ``device_map``, ... A ``config`` is not taken; the folder's is.

        Raises:
            LoraFactoryError: When the files are damaged, incomplete, or not a generator's, or the Hub refuses.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        source, ours = GeneratorSource.from_options(str(pretrained_model_name_or_path), kwargs)
        try:
            config, state_dict = read_generator(source, cls)
            with quiet_transformers():
                loaded: Any = super().from_pretrained(
                    None, *args, config=config, state_dict=state_dict, output_loading_info=True, **ours
                )
        except Exception as error:  # these are somebody else's files: whatever a parser raises, they cannot be loaded
            remedy = "" if isinstance(error, OSError) else "; download it, or train it with train_generator, again"
            missing = "" if source.is_folder else "there is no folder of that name here, and "
            raise LoraFactoryError(
                f"cannot load a generator from {source.name!r}: {missing}{explain(error, source.name)}{remedy}"
            ) from error
        model, info = loaded
        model.config.name_or_path, model.config._commit_hash = source.name, source.commit
        model.training_record = read_training_record(source)
        return (model, info) if wants_info else model

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
        """What :meth:`generate_vector` adds to the bias adapter, in units of ``weight_scale``, ``(batch, D)``.

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
    def generate_state_dict(
        self,
        text: str | None = None,
        *,
        conditions: Mapping[str, torch.Tensor] | None = None,
        seed: int = 0,
        temperature: float = 0.0,
    ) -> dict[str, torch.Tensor]:
        """Write one adapter as a PEFT state dict; the base model is not needed.

        Args:
            text: What the adapter is for.
            conditions: Task vectors of shape ``(width,)`` by modality, instead of or beside ``text``.
            seed: Seed of the sample; of no effect at temperature 0.
            temperature: 0 (default) writes the most likely adapter; 1 samples with the spread of real checkpoints.

        Returns:
            Float32 tensors on the CPU under PEFT's names.

        Raises:
            LoraFactoryError: When the text is empty, or neither text nor task vectors are given.
        """
        order = Order(text, conditions=conditions, seed=seed, temperature=temperature)
        return fulfil(self, order)[0]

    def generate_adapter(
        self,
        text: str | None = None,
        base_model: str | Path | PreTrainedModel | PeftModel | None = None,
        *,
        examples: Sequence[Example | ImageExample | str] | None = None,
        images: Sequence[ImageLike] | None = None,
        conditions: Mapping[str, torch.Tensor] | None = None,
        seed: int = 0,
        temperature: float = 0.0,
        adapter_name: str = "default",
        is_trainable: bool = False,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        refine_steps: int = REFINE_STEPS,
    ) -> PeftModel:
        """Write an adapter and attach it to the base model.

        Args:
            text: What the adapter is for.
            base_model: Model, folder or Hub id to attach it to; by default the one that the generator's layout names.
                A ``PeftModel`` gets one more adapter (or has the one of this name overwritten). A live base model is
                changed, as ``peft.get_peft_model`` changes it; given again, it is copied without its adapters, so that
                the model which was returned first stays as it is.
            examples: A few examples of the task, beside ``text`` or instead of it: a condition as
                :meth:`encode_examples` makes it, and what the written adapter is refined on.
            images: A few images of the task, likewise; see :meth:`encode_images`.
            conditions: Task vectors by modality, instead of or beside ``text``.
            seed: Seed of the sample; of no effect at temperature 0.
            temperature: 0 writes the most likely adapter; 1 samples with the spread of real checkpoints.
            adapter_name: The adapter's name in the returned model.
            is_trainable: Whether the adapter is left open to training, as a start for fine-tuning.
            tokenizer: With ``examples`` and a live model: its tokenizer.
            refine_steps: With ``examples``: steps that the written adapter is trained on them at most, as far as that
                helps on those left out (`lora_factory.generator.refine.refine`); 0 leaves it as it is.

        Returns:
            A ``peft.PeftModel`` with the adapter active, in evaluation mode unless it is trainable.

        Raises:
            LoraFactoryError: When the text is empty, an image cannot be read, or the base model has not the modules or
                sizes of the layout.
        """
        order = Order(text, examples, images, conditions, seed, temperature, refine_steps, adapter_name)
        base = None if order.examples is None else open_reader(self.layout, order.examples, base_model, tokenizer)
        state_dict = fulfil(self, order, base)[0]
        model = open_base(self.layout, base_model) if base is None else base.model
        attached = attach_adapter(model, self.layout, state_dict, adapter_name)
        attached.set_requires_grad(adapter_name, requires_grad=is_trainable)
        return attached.train(is_trainable)

    def save_adapter(
        self,
        text: str | None,
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
        refine_steps: int = REFINE_STEPS,
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

        Returns:
            The folder.

        Raises:
            LoraFactoryError: As :meth:`generate_adapter`, and when the folder is not to be replaced.
            StorageError: When it cannot be written; it is a LoraFactoryError.
        """
        order = Order(text, examples, images, conditions, seed, temperature, refine_steps)
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

    @torch.no_grad()
    def fit_statistics(
        self, weights: Mapping[str, SnapshotRows], features: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> ZooStatistics:
        """Set bias adapter, token scales, task vectors and their standardisation from a zoo, whose statistics return.

        Args:
            weights: Snapshots ``(n, D)`` of every task.
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


AutoConfig.register("cvae_lora", CVAELoRAConfig)
AutoModel.register(CVAELoRAConfig, CVAELoRAGenerator)
