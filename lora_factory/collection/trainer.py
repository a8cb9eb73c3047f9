"""One base model with one LoRA slot that is trained on one task after another from the same initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, prepare_model_for_kbit_training
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from lora_factory.adapters.attach import AdapterSlot, whole, wrap_base
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.adapters.targets import find_targets
from lora_factory.arguments import CollectArguments, from_record
from lora_factory.collection.optimise import MAX_GRAD_NORM, take_steps
from lora_factory.errors import LoraFactoryError
from lora_factory.models.classifiers import load_image_classifier
from lora_factory.models.inputs import (
    CausalInputs,
    ModelInputs,
    TokenSequence,
    check_lengths,
    length_batches,
    model_inputs,
    scored_tokens,
    shuffled_batches,
)
from lora_factory.models.loading import load_base_model, load_processor
from lora_factory.models.losses import fast_attention, mean_loss
from lora_factory.tasks.images import ImageTask
from lora_factory.tasks.task import Task
from lora_factory.utils.checkpoint import RunCheckpoint, RunState
from lora_factory.utils.paths import recorded_name
from lora_factory.utils.versions import versions
from lora_factory.zoo.run_record import RunRecord
from lora_factory.zoo.store import BASE_WEIGHTS, AdapterZoo, weights_digest

TrainingTask = Task | ImageTask
WARMUP_RATIO = 0.1  # of the steps, in which the learning rate rises; then it falls in a cosine
WEIGHT_DECAY = 0.0
_OF_NO_EFFECT = ("seeds", "parallel", "state_every", "retries", "gradient_checkpointing", "report_to")


@dataclass
class LoRATrainer:
    """One base model with one LoRA slot, trained on one task after another.

    Attributes:
        model: The base model with the LoRA attached.
        tokenizer: A language model's tokenizer; None for an image classifier.
        slot: Writes weights into the LoRA slot in place.
        initial: The LoRA initialisation shared by all runs, shape ``(D,)``.
        inputs: Turns a task's examples into what the model reads.
        wrapped: What forward passes go through: the model, or what Accelerate made of it for ``shares_runs``.
        shares_runs: Whether all processes train every run together, each on its share of a batch.
    """

    model: PeftModel
    tokenizer: Any
    arguments: CollectArguments
    layout: AdapterLayout
    slot: AdapterSlot
    initial: torch.Tensor
    accelerator: Accelerator
    inputs: ModelInputs
    wrapped: torch.nn.Module
    shares_runs: bool = False

    @classmethod
    def attach(
        cls,
        model: PreTrainedModel,
        tokenizer: Any,  # noqa: ANN401
        arguments: CollectArguments,
        base_model_name: str,
        accelerator: Accelerator,
        inputs: ModelInputs | None = None,
        layout: AdapterLayout | None = None,
    ) -> LoRATrainer:
        """Attach a LoRA in fp32, initialised the same way in every process, to the frozen base.

        Args:
            model: The frozen base model.
            tokenizer: Its tokenizer.
            arguments: LoRA, optimiser and checkpoint settings.
            base_model_name: What adapters name as their base.
            accelerator: The device, and who says what.
            inputs: How the model reads examples; default: as texts.
            layout: The modules, ranks and scalings of the LoRA; default: those that ``arguments`` name.

        Raises:
            LoraFactoryError: When the model lacks a module that ``arguments`` or ``layout`` name, or has it in another
                size.
        """
        task_type = None
        if inputs is None:
            task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
        if layout is None:
            lora_config = LoraConfig(
                r=arguments.rank,
                lora_alpha=arguments.lora_alpha,  # type: ignore[arg-type]  # PEFT takes any number
                target_modules=find_targets(model, arguments.target_modules),
                task_type=task_type,
            )
        else:
            lora_config = layout.training_config()
            lora_config.task_type = task_type
        revision = getattr(model.config, "_commit_hash", None)  # absent on a local folder
        if arguments.quantization:
            prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if arguments.gradient_checkpointing:
            # its name from transformers 5.23 on, and the one before, which then warns
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            model.config.use_cache = False
        with torch.random.fork_rng():
            torch.manual_seed(0)
            peft_model = wrap_base(model, lora_config)
        state_dict = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
        layout = layout or AdapterLayout.from_state_dict(
            state_dict, lora_config, base_model=base_model_name, base_revision=revision
        )
        layout.check(state_dict)
        initial = layout.flatten({key: value.detach().float().cpu().clone() for key, value in state_dict.items()})
        slot, inputs = AdapterSlot(peft_model, layout), inputs or model_inputs(model, tokenizer)
        return cls(peft_model, tokenizer, arguments, layout, slot, initial, accelerator, inputs, peft_model)

    def share_runs(self) -> None:
        """Have all processes train every run together from now on, each on its share of a batch.

        Accelerate's configuration decides how: each process holds the whole model, or FSDP 2 shards it.

        Raises:
            LoraFactoryError: When it decides for what cannot set an adapter back between runs, or save its state.
        """
        accelerator, sharded = self.accelerator, self.accelerator.distributed_type == DistributedType.FSDP
        if accelerator.distributed_type == DistributedType.DEEPSPEED or (sharded and not accelerator.is_fsdp2):
            raise LoraFactoryError(
                f"parallel=data cannot use {accelerator.distributed_type}: it keeps its own copies of the weights; "
                "choose FSDP with fsdp_version: 2 in Accelerate's configuration, or plain data parallelism"
            )
        if accelerator.mixed_precision == "fp16":
            raise LoraFactoryError(
                "mixed_precision=fp16 scales losses; choose bf16 or no in Accelerate's configuration"
            )
        if sharded and self.arguments.state_every:
            raise LoraFactoryError("the state of a run that FSDP shards cannot be saved; pass state_every=0")
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # FSDP 2 takes a model together with an optimizer; every run makes its own afterwards.
        self.wrapped, _ = accelerator.prepare(self.model, torch.optim.SGD(trained))
        self.slot = AdapterSlot(self.model, self.layout)  # sharding puts new parameters in place of the old ones
        self.shares_runs = True

    def encode(self, examples: Sequence[Any]) -> list[TokenSequence]:
        """Examples as ``inputs`` encodes them.

        Raises:
            LoraFactoryError: When there is nothing to learn from, or a row has more tokens than the model positions.
        """
        rows = list(self.inputs.encode(examples, self.arguments.tokens))
        check_lengths(self.model, rows)
        return rows

    def train(
        self,
        task: TrainingTask,
        seed: int,
        label: str,
        *,
        checkpoint: RunCheckpoint | None = None,
        on_step: Callable[[int, int, float], None] | None = None,
    ) -> tuple[RunRecord, torch.Tensor]:
        """Fine-tune the slot on one task.

        Args:
            task: What to learn.
            seed: Order of the data, and of what the base model drops out.
            label: What the progress bar says.
            checkpoint: As in ``fit``.
            on_step: As in ``fit``.

        Returns:
            The run's record and its checkpoints, shape ``(K, D)``, float32, oldest first.

        Raises:
            LoraFactoryError: When the loss is not finite, or the run ends with no good adapter, see ``_check_run``.
        """
        train = self.encode(task.examples("train"))
        total, every = self.schedule(len(train))
        kept = list(range(total, 0, -every))[: self.arguments.snapshots][::-1]
        batches, validation = self.batches(train, seed), [self.validation(task)]
        snapshots, losses, tokens = self.fit(
            batches, validation, kept, label, seed=seed, checkpoint=checkpoint, on_step=on_step
        )
        self._check_run(label, snapshots[-1], losses[-1], validation[0], train)
        return self._record(task, seed, tuple(kept), losses, tokens), snapshots

    def fit(
        self,
        batches: Iterator[list[TokenSequence]],
        validation: Sequence[list[TokenSequence]],
        kept: Sequence[int],
        label: str,
        *,
        seed: int = 0,
        start: torch.Tensor | None = None,
        learning_rate: float | None = None,
        checkpoint: RunCheckpoint | None = None,
        on_step: Callable[[int, int, float], None] | None = None,
    ) -> tuple[torch.Tensor, tuple[float, ...], int]:
        """Train the slot from the shared initialisation, or from where a checkpoint was cut off.

        Args:
            batches: Training batches, as many as asked for, the same ones at every call.
            validation: Sets of sequences; a checkpoint's loss is the mean over the sets.
            kept: Rising steps after which a checkpoint is taken; the last one ends the training.
            label: What the progress bar and errors say.
            seed: Of what the base model drops out, if it does.
            start: Weights to start from instead of the initialisation, shape ``(D,)``.
            learning_rate: Its peak; default: that of ``arguments``.
            checkpoint: Where the state is kept; default: nowhere.
            on_step: Called after every step with its number, the number of all steps and the loss.

        Returns:
            Checkpoints ``(len(kept), D)``, float32, their validation losses in nats per token, and the tokens read.

        Raises:
            LoraFactoryError: When a training loss is not finite.
        """
        arguments, total, state = self.arguments, kept[-1], RunState()
        rate = learning_rate or arguments.learning_rate
        start = self.initial if start is None else start
        self.slot.load(start)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=WEIGHT_DECAY)
        schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(total * WARMUP_RATIO), total)
        with self._seeded(seed), fast_attention(self, arguments.batch_size, arguments.sequence_length):
            if checkpoint:
                state, weights = checkpoint.restore(optimizer, schedule, self.accelerator)
                self.slot.load(start if weights is None else weights)
            batches = islice(batches, state.step * arguments.gradient_accumulation, None)

            def gradients(step: int) -> float:
                loss, tokens = self._gradients(batches)
                state.tokens += tokens
                return loss

            steps = take_steps(
                gradients,
                optimizer,
                total,
                start=state.step,
                label=label,
                advice=f"lower learning_rate (now {rate}) or look for damaged text",
                schedule=schedule,
                clip=self.accelerator.clip_grad_norm_,
                leave=None,
                disable=not self.accelerator.is_main_process,
            )
            for step, loss, bar in steps:
                state.step = step
                if step in kept:
                    state.snapshots.append(self._weights())
                    state.losses.append(sum(map(self.loss, validation)) / len(validation))
                    bar.set_postfix(validation=f"{state.losses[-1]:.3f}")
                if on_step:
                    on_step(step, total, loss)
                if checkpoint and checkpoint.is_due(step) and step < total:
                    checkpoint.save(
                        state, self._weights(), optimizer, schedule, self.accelerator, shared=self.shares_runs
                    )
        return torch.stack(state.snapshots), tuple(state.losses), state.tokens

    def _check_run(
        self,
        label: str,
        final: torch.Tensor,
        loss: float,
        validation: list[TokenSequence],
        train: list[TokenSequence],
    ) -> None:
        """Refuse a run that diverged.

        Its weights must be finite in half precision, in which adapters are served. Where its validation loss is above
        the base model's, its loss on as many of its training sequences must not be: a run that has overfitted a small
        task, or has taken few steps, reads its own training text no worse than before; one that diverged reads both
        worse.
        """
        advice = f"lower learning_rate (now {self.arguments.learning_rate})"
        largest = float(final.abs().max())
        if not (math.isfinite(loss) and largest <= torch.finfo(torch.float16).max):
            raise LoraFactoryError(
                f"{label}: it ended with a validation loss of {loss:.4g} and weights up to {largest:.3g}, which half "
                f"precision cannot hold; {advice}"
            )
        self.slot.load(self.initial)
        base = self.loss(validation)
        if not loss > base:
            return
        some = train[: len(validation)]
        before = self.loss(some)
        self.slot.load(final)
        if (trained := self.loss(some)) > before:
            raise LoraFactoryError(
                f"{label}: it ended worse than the base model: validation loss {loss:.4f}, the base model's "
                f"{base:.4f}; training loss {trained:.4f}, the base model's {before:.4f}; {advice}"
            )

    @property
    def pads(self) -> bool:
        """Whether texts are read one a row, so that batches hold rows of similar lengths."""
        return isinstance(self.inputs, CausalInputs) and not self.arguments.packing

    def batches(self, sequences: Sequence[TokenSequence], seed: int) -> Iterator[list[TokenSequence]]:
        """A run's training batches, without end."""
        make = length_batches if self.pads else shuffled_batches
        return make(sequences, self.arguments.batch_size, seed)

    def validation(self, task: TrainingTask) -> list[TokenSequence]:
        """The sequences of a task's validation split that checkpoints are scored on."""
        return self.encode(task.examples("validation"))[: self.arguments.validation_sequences]

    def schedule(self, sequences: int) -> tuple[int, int]:
        """Optimizer steps in all, and steps between checkpoints."""
        arguments = self.arguments
        if not arguments.epochs:
            return arguments.steps, arguments.snapshot_every
        per_epoch = math.ceil(sequences / (arguments.batch_size * arguments.gradient_accumulation))
        return per_epoch * arguments.epochs, per_epoch * arguments.snapshot_every

    def train_mode(self) -> None:
        """Put the model into training mode, but for batch statistics, which are no part of an adapter."""
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()

    def _gradients(self, batches: Iterator[list[TokenSequence]]) -> tuple[float, int]:
        """Compute the gradients of one optimizer step; returns its loss and the number of tokens that it read."""
        self.train_mode()
        accumulation, tokens = self.arguments.gradient_accumulation, 0
        mean = torch.zeros((), device=self.accelerator.device)
        for number in range(1, accumulation + 1):
            batch = next(batches)
            waits = self.shares_runs and number < accumulation
            with self.accelerator.no_sync(self.wrapped) if waits else nullcontext():
                loss = self._share_of_loss(batch) / accumulation
                loss.backward()  # not Accelerate's, which divides if it was told so
            mean += loss.detach()
            tokens += sum(len(sequence.tokens) for sequence in batch)
        return self._mean_of_processes(mean), tokens

    def _share_of_loss(self, batch: list[TokenSequence]) -> torch.Tensor:
        """The mean loss per scored token of a batch; processes that share a run return shares with this mean."""
        if not self.shares_runs:
            return self._forward(batch)
        world = self.accelerator.num_processes
        share = batch[self.accelerator.process_index :: world]
        weight = world * scored_tokens(share) / scored_tokens(batch)
        return self._forward(share or batch[:1]) * weight  # all must take part, so one without a row counts nothing

    def _mean_of_processes(self, value: torch.Tensor) -> float:
        return float(self.accelerator.reduce(value, "mean") if self.shares_runs else value)

    def _forward(self, batch: list[TokenSequence]) -> torch.Tensor:
        inputs = self.inputs.collate(batch, self.accelerator.device)
        return mean_loss(self.wrapped, self.model.config, inputs)

    @contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        """Seed what the base model draws, differently in processes that share a run; put things back afterwards."""
        device = self.accelerator.device
        kind, devices = ("cuda", []) if device.type == "cpu" else (device.type, [device])
        with torch.random.fork_rng(devices=devices, device_type=kind):
            torch.manual_seed(seed + self.shares_runs * self.accelerator.process_index * 1_000_003)
            yield

    def _weights(self) -> torch.Tensor:
        state_dict = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return self.layout.flatten({key: whole(value).detach().float().cpu() for key, value in state_dict.items()})

    @torch.no_grad()
    def loss(self, sequences: list[TokenSequence]) -> float:
        """Mean loss in nats per scored token or image."""
        self.model.eval()
        total, scored = 0.0, 0
        for start in range(0, len(sequences), self.arguments.batch_size):
            batch = sequences[start : start + self.arguments.batch_size]
            count = scored_tokens(batch)
            total += self._mean_of_processes(self._share_of_loss(batch)) * count
            scored += count
        return total / scored

    @cached_property
    def base_weights(self) -> dict[str, object]:
        """The base's weights as runs record them: nothing for one of the Hub, which has a commit."""
        digest = weights_digest(self.layout.base_model)
        return {BASE_WEIGHTS: digest} if digest else {}

    def _record(
        self, task: TrainingTask, seed: int, steps: tuple[int, ...], losses: tuple[float, ...], tokens: int
    ) -> RunRecord:
        return RunRecord(
            task=task.name,
            run=f"seed-{seed}",
            descriptions=task.descriptions,
            seed=seed,
            base_model=self.layout.base_model,
            base_revision=self.layout.base_revision,
            steps=steps[-1],
            snapshot_steps=steps,
            validation_losses=losses,
            train_tokens=tokens,
            data_fingerprint=task.fingerprint(),
            versions=versions(),
            arguments=comparable_settings(self.arguments) | self.base_weights,
            license=task.license,
            dataset=task.dataset,
        )


def comparable_settings(arguments: CollectArguments) -> dict[str, object]:
    """The settings that a run depends on, with the constants that were options in earlier versions.

    The list of seeds is not among them, nor how and where the work is done.
    """
    fixed = {"warmup_ratio": WARMUP_RATIO, "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM}
    return {name: value for name, value in asdict(arguments).items() if name not in _OF_NO_EFFECT} | fixed


def settings_of(zoo: AdapterZoo) -> CollectArguments:
    """The settings that a zoo's runs were made with, by the record of the first."""
    task = zoo.tasks[0]
    return from_record(CollectArguments, zoo.record(task, zoo.runs(task)[0]).arguments)


def open_trainer(
    base_model: str | Path,
    arguments: CollectArguments,
    accelerator: Accelerator,
    tasks: Sequence[Task | ImageTask] = (),
    *,
    base_model_name: str | None = None,
    revision: str | None = None,
    layout: AdapterLayout | None = None,
) -> LoRATrainer:
    """Load a base model onto the accelerator's device and attach a LoRA slot.

    Args:
        base_model: Hub id or folder.
        arguments: LoRA and optimiser settings, precision and quantisation.
        accelerator: The device.
        tasks: What is to be learned or read; by default texts.
        base_model_name: What adapters name as their base; default: ``base_model``.
        revision: Branch, tag or commit on the Hub.
        layout: The slot's modules, ranks and scalings; default: those of the arguments.

    Raises:
        LoraFactoryError: When the model cannot be loaded, or reads no images though the tasks have some; or when some
            tasks are for classifiers and some are not.
    """
    name = base_model_name or recorded_name(base_model)
    if any(isinstance(task, ImageTask) for task in tasks):
        if others := [task.name for task in tasks if not isinstance(task, ImageTask)]:
            raise LoraFactoryError(f"task {others[0]!r} is not for image classifiers as others are; give them apart")
        return classifier_trainer(base_model, arguments, name, accelerator, revision, layout)
    model, tokenizer = load_base_model(
        base_model,
        revision=revision,
        dtype=arguments.dtype,
        device=accelerator.device,
        quantization=arguments.quantization,
    )
    reads_images = any(task.has_images for task in tasks if isinstance(task, Task))
    inputs = model_inputs(model, load_processor(base_model, revision=revision)) if reads_images else None
    return LoRATrainer.attach(model, tokenizer, arguments, name, accelerator, inputs, layout)


def classifier_trainer(
    base_model: str | Path,
    arguments: CollectArguments,
    base_model_name: str,
    accelerator: Accelerator,
    revision: str | None = None,
    layout: AdapterLayout | None = None,
) -> LoRATrainer:
    """An image classifier with one LoRA slot, to be trained on one `ImageTask` after another."""
    model, inputs = load_image_classifier(
        base_model, revision=revision, dtype=arguments.dtype, device=accelerator.device
    )
    return LoRATrainer.attach(model, None, arguments, base_model_name, accelerator, inputs, layout)
