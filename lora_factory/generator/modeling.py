"""The generator: from a text, images or examples to a ``peft.PeftModel``, a PEFT folder, or the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from lora_factory.errors import LoraFactoryError
from lora_factory.generator.configuration import CVAELoRAConfig
from lora_factory.generator.files import (
    CONFIG_FILE,
    TRAINING_FILE,
    GeneratorSource,
    loading_errors,
    read_generator,
    read_training_record,
)
from lora_factory.generator.generation import Order, fulfil
from lora_factory.generator.hub import adapter_writer, adapters_writer, generator_writer
from lora_factory.generator.task_vectors import open_base, open_reader
from lora_factory.generator.writer import AdapterWriter
from lora_factory.hub.cards import heard
from lora_factory.hub.client import PushOptions, collect_repositories, push
from lora_factory.tasks.examples import Example, ImageExample
from lora_factory.tasks.image_files import ImageLike
from lora_factory.utils.files import atomic_files, write_json
from lora_factory.utils.folders import check_saving, storage_errors
from lora_factory.utils.paths import safe_name
from lora_factory.utils.printable import facts_html, facts_line, few
from lora_factory.utils.quiet import quiet_transformers

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

_WEIGHTS_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


class CVAELoRAGenerator(AdapterWriter, PreTrainedModel):
    """Writes LoRA adapters: from a sentence to a ``peft.PeftModel``.

    Train one with `lora_factory.train_generator`; load a published one with
    ``CVAELoRAGenerator.from_pretrained("user/generator")``.

    Every push writes a folder first and uploads it in one commit, so that it arrives whole or not at all; what people
    added to the card that is there stays in it. When a push fails, the folder is kept and the error names it.
    """

    config_class = CVAELoRAConfig
    base_model_prefix = "generator"
    main_input_name = "adapters"

    def __init__(self, config: CVAELoRAConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self._build(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation stands: ``from_pretrained`` refuses files that leave a weight out."""

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
        with loading_errors(source):
            config, state_dict = read_generator(source, cls)
            with quiet_transformers():
                loaded: Any = super().from_pretrained(
                    None, *args, config=config, state_dict=state_dict, output_loading_info=True, **ours
                )
        model, info = loaded
        model.config.name_or_path, model.config._commit_hash = source.name, source.commit
        model.training_record = read_training_record(source)
        return (model, info) if wants_info else model

    def __repr__(self) -> str:
        """Say on one line what the generator writes, and from what."""
        return facts_line("CVAELoRAGenerator", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("CVAELoRAGenerator", self._facts())

    def _facts(self) -> dict[str, object]:
        tasks = [task["name"] for task in self.config.tasks or ()]
        return {
            **self.layout.facts(),
            "listens to": heard(self.config.modalities),
            "known tasks": f"{len(tasks)} ({few(tasks)})",
            "weights of the generator": f"{self.num_parameters():,}",
        }

    def generate_adapter(
        self,
        text: str | Mapping[str, float] | None = None,
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
        refine_steps: int = 0,
        rank: int | None = None,
    ) -> PeftModel:
        """Write an adapter and attach it to the base model.

        Args:
            text: What the adapter is for; or several texts with a weight each, see `combine`.
            base_model: Model, folder or Hub id to attach it to; by default the one that the generator's layout names.
                A ``PeftModel`` gets one more adapter (or has the one of this name overwritten). A live base model is
                changed, as ``peft.get_peft_model`` changes it; given again, it is copied without its adapters, so that
                the model which was returned first stays as it is.
            examples: A few examples of the task, beside ``text`` or instead of it: a condition as
                `encode_examples` makes it, which counts three times as much as the text, and what ``refine_steps``
                refine the written adapter on.
            images: A few images of the task, likewise; see `encode_images`.
            conditions: Task vectors by modality, instead of or beside ``text``.
            seed: Seed of the sample; of no effect at temperature 0.
            temperature: 0 writes the most likely adapter; 1 samples with the spread of real checkpoints.
            adapter_name: The adapter's name in the returned model.
            is_trainable: Whether the adapter is left open to training, as a start for fine-tuning.
            tokenizer: With ``examples`` and a live model: its tokenizer.
            refine_steps: With ``examples``: steps that the written adapter is trained on them at most, as far as that
                helps on those left out (`lora_factory.generator.refine.refine`); 0 (default) leaves it as it is. On
                two CPU cores and 16 examples of an unseen task, 15 steps took four minutes on a 135M base model, and
                the loss on test text fell from 2.286 to 2.238 nats per token.
            rank: A lower rank than the generator's, to which every module's ΔW is brought by a singular value
                decomposition; `save_adapter` records what share of its squared norm is lost.

        Returns:
            A ``peft.PeftModel`` with the adapter active, in evaluation mode unless it is trainable.

        Raises:
            LoraFactoryError: When the text is empty, an image cannot be read, or the base model has not the modules or
                sizes of the layout.
        """
        from lora_factory.adapters.attach import attach_adapter

        order = Order(text, examples, images, conditions, seed, temperature, refine_steps, adapter_name, rank)
        base = None if order.examples is None else open_reader(self.layout, order.examples, base_model, tokenizer)
        made = fulfil(self, order, base)
        model = open_base(self.layout, base_model) if base is None else base.model
        attached = attach_adapter(model, made.layout, made.state_dict, adapter_name)
        attached.set_requires_grad(adapter_name, requires_grad=is_trainable)
        return attached.train(is_trainable)

    def apply(  # type: ignore[override]  # takes what nn.Module.apply takes, and more
        self,
        model: PeftModel | Callable[[nn.Module], None],
        text: str | Mapping[str, float] | None = None,
        *,
        examples: Sequence[Example | ImageExample | str] | None = None,
        images: Sequence[ImageLike] | None = None,
        conditions: Mapping[str, torch.Tensor] | None = None,
        seed: int = 0,
        temperature: float = 0.0,
        adapter_name: str = "default",
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        refine_steps: int = 0,
        rank: int | None = None,
    ) -> Self | None:
        """Write an adapter over one that a model has already, in place (hot swap).

        The model neither grows nor slows down, however often this is called; its other adapters, its mode and which
        adapters are active stay as they are. A compiled model is not compiled again: prepare it with
        ``peft.utils.hotswap.prepare_model_for_compiled_hotswap(model, target_rank=…)`` before ``torch.compile``.

        Args:
            model: What `generate_adapter` returned, or another ``PeftModel`` with such a slot; it may be
                compiled. A function is applied to the generator's own modules instead, as in ``nn.Module``.
            text: What the adapter is for; or several texts with a weight each, see `combine`.
            examples: As in `generate_adapter`, like all that is not listed here.
            images: As there.
            conditions: As there.
            seed: As there.
            temperature: As there.
            adapter_name: The adapter to overwrite.
            tokenizer: With ``examples``: the model's tokenizer.
            refine_steps: As there.
            rank: As there. The slot may have any rank from this one on; the rest of it becomes zero.

        Raises:
            LoraFactoryError: As `generate_adapter`, and when the model has no adapter of this name, or one with
                other modules or scaling, or of a lower rank. The model is left as it was.
        """
        from lora_factory.adapters.attach import overwrite_adapter

        if not isinstance(model, nn.Module) and callable(model):
            return super().apply(model)
        order = Order(text, examples, images, conditions, seed, temperature, refine_steps, adapter_name, rank)
        live: Any = model
        base = None if order.examples is None else open_reader(self.layout, order.examples, live, tokenizer)
        made = fulfil(self, order, base)
        overwrite_adapter(live, made.layout, made.state_dict, adapter_name)
        return None

    def combine(
        self,
        texts: Mapping[str, float],
        base_model: str | Path | PreTrainedModel | PeftModel | None = None,
        **options: Any,  # noqa: ANN401
    ) -> PeftModel:
        """Write one adapter from several texts: what each would change, times its weight, is added up.

        ``ΔW = s · B (K + Σ w_i Z(c_i)) A``; weights may be negative, and need not add up to 1. The same mapping can be
        given to `save_adapter` and `generate_state_dict` in place of a text.

        Args:
            texts: A weight for every text: ``{"legal notices": 0.7, "poems": 0.3}``.
            base_model: As in `generate_adapter`.
            **options: Its other arguments.

        Returns:
            A ``peft.PeftModel``, as `generate_adapter` returns it.

        Raises:
            LoraFactoryError: As `generate_adapter`, and when there is no text or a weight is not finite.
        """
        return self.generate_adapter(texts, base_model, **options)

    def push_to_hub(  # type: ignore[override]  # our options
        self,
        repo_id: str,
        *,
        comparison: Mapping[str, Any] | str | Path | None = None,
        tags: Sequence[str] = (),
        **options: Unpack[PushOptions],
    ) -> CommitInfo:
        """Push the generator: config, weights and card, with the comparison's results if there is one.

        Args:
            repo_id: Hub id, ``user/name``.
            comparison: What ``comparison.compare`` returned for this generator, or its ``comparison.json``.
            tags: More tags for the card.
            **options: ``private``, ``revision``, ``commit_message``, ``create_pr``, ``token``; see `PushOptions`.

        Returns:
            The commit, with ``commit_url`` and ``pr_url``.

        Raises:
            LoraFactoryError: When the generator names a base model or an encoder that others cannot load, or the Hub
                refuses or cannot be reached.
        """
        write = generator_writer(self, comparison=comparison, tags=tags, token=options.get("token"))
        commit = push(write, repo_id, default_message="Push generator", **options)
        if not options.get("create_pr"):
            self.config.name_or_path, self.config._commit_hash = commit.repo_url.repo_id, commit.oid
        return commit

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *args: Any,  # noqa: ANN401
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Save the generator, as in transformers, and its ``training.json``; with ``push_to_hub`` push it then.

        A generator that is there is replaced when all new files are written, and stays when one cannot be. Other files
        in the folder stay.

        Args:
            save_directory: The folder.
            *args: As in transformers.
            push_to_hub: Push as well, with a card, as `push_to_hub` does it.
            repo_id: Where to; default: the folder's name in the user's own namespace.
            **kwargs: As in transformers, and with ``push_to_hub`` its options.

        Raises:
            LoraFactoryError: When the folder holds another model, or the files cannot be written.
        """
        options = {name: kwargs.pop(name) for name in PushOptions.__annotations__ if name in kwargs}
        save_directory = check_saving(save_directory)
        with atomic_files(save_directory, last=CONFIG_FILE) as folder:
            with quiet_transformers():
                super().save_pretrained(folder, *args, **kwargs)
            if self.training_record is not None:
                write_json(folder / TRAINING_FILE, self.training_record, durable=False)
            written = {path.name for path in folder.iterdir()}
        if any(map(_WEIGHTS_FILES.fullmatch, written)):  # not where transformers has written a variant beside them
            with storage_errors(save_directory):
                for path in save_directory.iterdir():
                    if _WEIGHTS_FILES.fullmatch(path.name) and path.name not in written:
                        path.unlink()
        if push_to_hub:
            self.push_to_hub(repo_id or save_directory.name, **options)

    def push_adapter(
        self,
        text: str | None,
        repo_id: str,
        *,
        conditions: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        temperature: float = 0.0,
        tags: Sequence[str] = (),
        **options: Unpack[PushOptions],
    ) -> CommitInfo:
        """Generate an adapter and push it as a PEFT repository, which loads without this package.

        Args:
            text: What the adapter is for.
            repo_id: Hub id, ``user/name``.
            conditions: Task vectors by modality, instead of or beside ``text``.
            seed: Seed of the sample; of no effect at temperature 0.
            temperature: 0 writes the most likely adapter; 1 samples with the spread of real checkpoints.
            tags: More tags for the card.
            **options: ``private``, ``revision``, ``commit_message``, ``create_pr``, ``token``; see `PushOptions`.

        Returns:
            The commit, with ``commit_url`` and ``pr_url``.

        Raises:
            LoraFactoryError: As for ``save_adapter``, and when the Hub refuses or cannot be reached.
        """
        write = adapter_writer(
            self, text, conditions, seed=seed, temperature=temperature, tags=tags, token=options.get("token")
        )
        return push(write, repo_id, default_message="Push generated adapter", **options)

    def push_adapters(
        self,
        texts: Mapping[str, str],
        repo_id: str,
        *,
        collection: str | None = None,
        seed: int = 0,
        temperature: float = 0.0,
        tags: Sequence[str] = (),
        **options: Unpack[PushOptions],
    ) -> list[CommitInfo]:
        """Generate several adapters and push them: into one repository, or into one each and a collection of these.

        Args:
            texts: What each adapter is for, by its name.
            repo_id: Hub id. One repository gets a folder per adapter, in one commit; with ``collection`` each adapter
                goes to the repository ``<repo_id>-<name>``.
            collection: Title of the collection, made in the namespace of ``repo_id`` if it is not there.
            seed: Seed of the samples; of no effect at temperature 0.
            temperature: As in `push_adapter`.
            tags: More tags for the cards.
            **options: As in `push_adapter`.

        Returns:
            The commits.

        Raises:
            LoraFactoryError: As for `push_adapter`; adapters pushed before the failing one stay.
        """
        names = [safe_name(name) for name in texts]
        if not names:
            raise LoraFactoryError('texts is empty; name at least one adapter: {"legal": "Legal notices"}')
        if collection is not None:
            how: dict[str, Any] = {"seed": seed, "temperature": temperature, "tags": tags, **options}
            commits = [self.push_adapter(text, f"{repo_id}-{name}", **how) for name, text in texts.items()]
            collect_repositories(collection, [commit.repo_url.repo_id for commit in commits], **options)
            return commits
        write = adapters_writer(self, texts, seed=seed, temperature=temperature, tags=tags, token=options.get("token"))
        return [push(write, repo_id, default_message=f"Push {len(names)} generated adapters", **options)]


AutoConfig.register("cvae_lora", CVAELoRAConfig)
AutoModel.register(CVAELoRAConfig, CVAELoRAGenerator)
