"""One base model with one LoRA slot that is trained on one task after another from the same initialisation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from lora_factory import __version__
from lora_factory.adapters import AdapterSlot, wrap_base
from lora_factory.arguments import CollectArguments
from lora_factory.data_source import Split
from lora_factory.errors import LoraFactoryError
from lora_factory.layout import AdapterLayout
from lora_factory.run_record import RunRecord
from lora_factory.sequences import IGNORED, CausalInputs, TokenSequence, shuffled_batches

LIBRARIES = ("torch", "transformers", "peft")


class TrainingTask(Protocol):
    """What is learned: a `Task` or an `ImageTask`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def descriptions(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def license(self) -> str | None: ...  # noqa: D102

    def examples(self, split: Split) -> Sequence[Any]: ...  # noqa: D102
    def fingerprint(self) -> str: ...  # noqa: D102


class ModelInputs(Protocol):
    """Turns a task's examples into rows, and rows into the inputs of a model that returns a ``loss``."""

    def encode(self, examples: Sequence[Any], arguments: CollectArguments) -> Sequence[TokenSequence]:
        """The rows that are learned from."""

    def collate(self, rows: Sequence[Any], device: torch.device) -> dict[str, torch.Tensor]:
        """One batch of the model's inputs with labels."""


@dataclass
class AdapterFactory:
    """One base model with one LoRA slot, trained on one task after another.

    Attributes:
        model: The base model with the LoRA attached.
        tokenizer: A language model's tokenizer; None for an image classifier.
        slot: Writes weights into the LoRA slot in place.
        initial: The LoRA initialisation shared by all runs, shape ``(D,)``.
        inputs: Turns a task's examples into what the model reads.
    """

    model: PeftModel
    tokenizer: Any
    arguments: CollectArguments
    layout: AdapterLayout
    slot: AdapterSlot
    initial: torch.Tensor
    accelerator: Accelerator
    inputs: ModelInputs

    @classmethod
    def attach(
        cls,
        model: PreTrainedModel,
        tokenizer: Any,  # noqa: ANN401
        arguments: CollectArguments,
        base_model_name: str,
        accelerator: Accelerator,
        inputs: ModelInputs | None = None,
    ) -> AdapterFactory:
        """Attach a LoRA in fp32, initialised the same way in every process, to the frozen base.

        By default the base is a causal language model; another model comes with ``inputs`` of its own.
        """
        targets = arguments.target_modules
        lora_config = LoraConfig(
            r=arguments.rank,
            lora_alpha=arguments.lora_alpha,  # type: ignore[arg-type]  # PEFT takes any number
            target_modules=targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
            task_type="CAUSAL_LM" if inputs is None else None,
        )
        revision = getattr(model.config, "_commit_hash", None)  # absent on a local folder
        with torch.random.fork_rng():
            torch.manual_seed(0)
            peft_model = wrap_base(model, lora_config)
        state_dict = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
        layout = AdapterLayout.from_state_dict(
            state_dict, lora_config, base_model=base_model_name, base_revision=revision
        )
        initial = layout.flatten({key: value.detach().float().cpu().clone() for key, value in state_dict.items()})
        slot, inputs = AdapterSlot(peft_model, layout), inputs or CausalInputs(tokenizer)
        return cls(peft_model, tokenizer, arguments, layout, slot, initial, accelerator, inputs)

    def train(self, task: TrainingTask, seed: int, label: str) -> tuple[RunRecord, torch.Tensor]:
        """Fine-tune the slot on one task.

        Args:
            task: What to learn.
            seed: Order of the data.
            label: What the progress bar says.

        Returns:
            The run's record and its snapshots, shape ``(K, D)``, float32, oldest first.
        """
        train = self.inputs.encode(task.examples("train"), self.arguments)
        total, every = self.schedule(len(train))
        kept = list(range(total, 0, -every))[: self.arguments.snapshots][::-1]
        batches = shuffled_batches(train, self.arguments.batch_size, seed)
        snapshots, losses, tokens = self.fit(batches, [self.validation(task)], kept, label)
        return self._record(task, seed, tuple(kept), losses, tokens), snapshots

    def fit(
        self,
        batches: Iterator[list[TokenSequence]],
        validation: Sequence[list[TokenSequence]],
        kept: Sequence[int],
        label: str,
    ) -> tuple[torch.Tensor, tuple[float, ...], int]:
        """Train the slot from the shared initialisation.

        Args:
            batches: Training batches, as many as asked for.
            validation: Sets of sequences; a snapshot's loss is the mean over the sets.
            kept: Rising steps after which a snapshot is taken; the last one ends the training.
            label: What the progress bar and errors say.

        Returns:
            Snapshots ``(len(kept), D)``, float32, their validation losses in nats a token, and the tokens read.

        Raises:
            LoraFactoryError: When a training loss is not finite.
        """
        arguments, total = self.arguments, kept[-1]
        self.slot.load(self.initial)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
        schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(total * arguments.warmup_ratio), total)
        snapshots, losses, tokens = [], [], 0
        bar = tqdm(total=total, desc=label, unit="step", disable=not self.accelerator.is_local_main_process)
        for step in range(1, total + 1):
            tokens += self._step(batches, optimizer, parameters, label, step)
            schedule.step()
            bar.update()
            if step in kept:
                snapshots.append(self._weights())
                losses.append(sum(self.loss(sequences) for sequences in validation) / len(validation))
                bar.set_postfix(validation=f"{losses[-1]:.3f}")
        bar.close()
        return torch.stack(snapshots), tuple(losses), tokens

    @property
    def tokens_a_step(self) -> int:
        """Tokens that one optimizer step reads at most; exactly these where sequences are packed."""
        arguments = self.arguments
        return arguments.batch_size * arguments.gradient_accumulation * arguments.sequence_length

    def validation(self, task: TrainingTask) -> list[TokenSequence]:
        """The sequences of a task's validation split that snapshots are scored on."""
        sequences = self.inputs.encode(task.examples("validation"), self.arguments)
        return list(sequences)[: self.arguments.validation_sequences]

    def schedule(self, sequences: int) -> tuple[int, int]:
        """Optimizer steps in all, and steps between snapshots."""
        arguments = self.arguments
        if not arguments.epochs:
            return arguments.steps, arguments.snapshot_every
        per_epoch = math.ceil(sequences / (arguments.batch_size * arguments.gradient_accumulation))
        return per_epoch * arguments.epochs, per_epoch * arguments.snapshot_every

    def _step(
        self,
        batches: Iterator[list[TokenSequence]],
        optimizer: torch.optim.Optimizer,
        parameters: list[torch.nn.Parameter],
        label: str,
        step: int,
    ) -> int:
        """One optimizer step; returns the number of tokens that it read."""
        self.model.train()
        tokens = 0
        for _ in range(self.arguments.gradient_accumulation):
            batch = next(batches)
            loss = self._forward(batch)
            if not torch.isfinite(loss):
                raise LoraFactoryError(
                    f"{label}: the loss is {loss.item()} at step {step}; lower learning_rate "
                    f"(now {self.arguments.learning_rate}) or look for damaged text"
                )
            self.accelerator.backward(loss)  # divides by the accumulation steps itself
            tokens += sum(len(sequence.tokens) for sequence in batch)
        self.accelerator.clip_grad_norm_(parameters, self.arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return tokens

    def _forward(self, batch: list[TokenSequence]) -> torch.Tensor:
        return self.model(**self.inputs.collate(batch, self.accelerator.device)).loss

    def _weights(self) -> torch.Tensor:
        state_dict = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return self.layout.flatten({key: value.detach().float().cpu() for key, value in state_dict.items()})

    @torch.no_grad()
    def loss(self, sequences: list[TokenSequence]) -> float:
        """Mean loss in nats a scored token or image."""
        self.model.eval()
        total, scored = 0.0, 0
        for start in range(0, len(sequences), self.arguments.batch_size):
            batch = sequences[start : start + self.arguments.batch_size]
            count = sum(label != IGNORED for sequence in batch for label in sequence.labels[1:])
            total += self._forward(batch).item() * count
            scored += count
        return total / scored

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
            versions={"lora-factory": __version__, **{name: version(name) for name in LIBRARIES}},
            arguments=comparable_settings(self.arguments),
            license=task.license,
        )


def comparable_settings(arguments: CollectArguments) -> dict[str, object]:
    """The settings that a run depends on; the list of seeds is not one of them."""
    return {name: value for name, value in asdict(arguments).items() if name != "seeds"}
