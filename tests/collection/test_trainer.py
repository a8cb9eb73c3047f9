"""Collection of fine-tuned LoRAs: what is learnt, which snapshots are kept, and that nothing is done twice."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.models import TRAINING_TEXT, VOCABULARY, save_model
from helpers.runs import SMALL, contents, modification_times, tasks, text_task
from transformers import (
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerBase,
)

from lora_factory.arguments import CollectArguments, TrainArguments
from lora_factory.cli import commands as cli
from lora_factory.collection.collect import collect_adapters
from lora_factory.collection.trainer import LoRATrainer, open_trainer, settings_of
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.refine import refine
from lora_factory.models import losses
from lora_factory.models.inputs import IGNORED, TokenSequence, collate, encode_sequences
from lora_factory.tasks.examples import Example
from lora_factory.tasks.task import Task
from lora_factory.tasks.task_file import save_tasks
from lora_factory.training import from_data
from lora_factory.training.train import train_generator
from lora_factory.zoo.store import AdapterZoo


def labelled(tokenizer: PreTrainedTokenizerBase, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != IGNORED])


def test_validation_loss_falls(pico_model_folder: Path, tmp_path: Path) -> None:
    arguments = replace(SMALL, target_modules="all-linear", steps=25, snapshots=25, learning_rate=3e-2, batch_size=4)
    zoo = collect_adapters(tasks("prose"), pico_model_folder, tmp_path / "zoo", arguments)
    losses = zoo.record("prose", "seed-0").validation_losses
    assert len(losses) == 25
    assert losses[-1] < losses[0] - 1


def test_record_says_how_the_run_was_made(pico_model_folder: Path, tmp_path: Path) -> None:
    task = text_task("prose")
    zoo = collect_adapters(
        [task], pico_model_folder, tmp_path / "zoo", replace(SMALL, seeds=(4,)), base_model_name="pico/llama"
    )
    record = zoo.record("prose", "seed-4")
    assert (record.seed, record.steps, record.descriptions) == (4, 3, task.descriptions)
    assert record.base_model == zoo.layout.base_model == "pico/llama"
    assert record.train_tokens == 3 * 2 * 16
    assert record.data_fingerprint == task.fingerprint()
    assert record.arguments["learning_rate"] == 1e-2
    assert zoo.verify() == []


def test_every_run_starts_from_the_same_initialisation(pico_model_folder: Path, tmp_path: Path) -> None:
    untrained = replace(SMALL, steps=1, snapshots=1, seeds=(0, 1))  # the warm-up starts from rate 0
    zoo = collect_adapters(tasks("prose", "code"), pico_model_folder, tmp_path / "zoo", untrained)
    other = collect_adapters(tasks("prose"), pico_model_folder, tmp_path / "other", untrained)
    start = other.final("prose", "seed-0")
    for task in ("prose", "code"):
        assert zoo.runs(task) == ["seed-0", "seed-1"]
        assert torch.equal(zoo.snapshots(task), start.expand(2, -1))
    factors = zoo.layout.unflatten(start)
    assert all(factor.abs().max() > 0 for key, factor in factors.items() if "lora_A" in key)
    assert all(factor.abs().max() == 0 for key, factor in factors.items() if "lora_B" in key)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"steps": 7, "snapshots": 3, "snapshot_every": 2}, (3, 5, 7)),
        ({"epochs": 4, "snapshots": 2}, (9, 12)),
        ({"epochs": 4, "snapshots": 2, "snapshot_every": 2}, (6, 12)),
    ],
    ids=["steps", "epochs", "every other epoch"],
)
def test_the_last_snapshots_are_kept(
    pico_model_folder: Path, tmp_path: Path, options: dict[str, int], kept: tuple[int, ...]
) -> None:
    # Five sequences in batches of two: an epoch has three steps.
    arguments = replace(SMALL, packing=False, sequence_length=200, **options)
    zoo = collect_adapters([text_task("prose")], pico_model_folder, tmp_path / "zoo", arguments)
    record, snapshots = zoo.record("prose", "seed-0"), zoo.snapshots("prose")
    assert record.snapshot_steps == kept
    assert record.steps == kept[-1]
    assert len(record.validation_losses) == len(snapshots) == len(kept)
    assert len({tuple(row.tolist()) for row in snapshots}) == len(kept)
    assert torch.equal(snapshots[-1], zoo.final("prose", "seed-0"))


def test_a_run_depends_on_its_seed_alone(pico_model_folder: Path, tmp_path: Path) -> None:
    arguments = replace(SMALL, seeds=(0, 1))
    together = collect_adapters(tasks("prose", "code"), pico_model_folder, tmp_path / "together", arguments)
    torch.rand(3)  # what others draw from the global generator is of no effect
    state = torch.random.get_rng_state()
    alone = collect_adapters(tasks("prose", "code")[1:], pico_model_folder, tmp_path / "alone", arguments)
    assert torch.equal(together.snapshots("code"), alone.snapshots("code"))
    assert not torch.equal(alone.final("code", "seed-0"), alone.final("code", "seed-1"))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", "eager"), ("float32", "sdpa")])
def test_attention_is_written_out_in_half_precision_and_no_longer_than_a_run(
    pico_model_folder: Path, dtype: str, expected: str
) -> None:
    trainer = open_trainer(pico_model_folder, replace(SMALL, dtype=dtype), Accelerator(cpu=True))
    config, seen = trainer.model.get_base_model().config, set()
    trainer.train(text_task("prose"), 0, "prose", on_step=lambda *_: seen.add(config._attn_implementation))
    assert (seen, config._attn_implementation) == ({expected}, "sdpa")


def test_attention_is_written_out_for_a_refinement_and_a_training_from_data_too(
    pico_model_folder: Path, pico_encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = open_trainer(pico_model_folder, replace(SMALL, dtype="bfloat16"), Accelerator(cpu=True))
    used, read = [], losses.query_losses

    def noted(base: LoRATrainer, *words: Any) -> Any:
        used.append(base.model.get_base_model().config._attn_implementation)
        return read(base, *words)

    monkeypatch.setattr(losses, "query_losses", noted)
    monkeypatch.setattr(from_data, "query_losses", noted)
    refine(trainer, trainer.initial, trainer.encode(text_task("prose").examples("train")), steps=1)
    refined = len(used)
    settings = TrainArguments(
        base_steps=2, rank=2, sequence_length=16, dtype="bfloat16", text_encoder=str(pico_encoder_folder)
    )
    train_generator(None, tmp_path / "g", settings, tasks=tasks("prose", "code"), base_model=pico_model_folder)
    assert set(used) == {"eager"} and 0 < refined < len(used)
    assert trainer.model.get_base_model().config._attn_implementation == "sdpa"


def test_base_in_half_precision_trains_the_lora_in_full(pico_model_folder: Path, tmp_path: Path) -> None:
    zoo = collect_adapters(tasks("prose"), pico_model_folder, tmp_path / "zoo", replace(SMALL, dtype="bfloat16"))
    weights = zoo.final("prose", "seed-0")
    assert not torch.equal(weights.bfloat16().float(), weights)


@pytest.mark.parametrize("told", ["1", "2"])
def test_accumulated_batches_count_as_one_large_one(
    told: str, pico_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", told)  # as `accelerate launch` does
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)  # Adam would hide a factor on the gradient
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *_: torch.zeros(()))  # so would clipping
    options = {"steps": 2, "snapshots": 1, "learning_rate": 0.1}  # the first step is the warm-up, at rate 0
    finals = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        arguments = replace(SMALL, batch_size=batch_size, gradient_accumulation=accumulation, **options)
        zoo = collect_adapters(tasks("prose"), pico_model_folder, tmp_path / str(accumulation), arguments)
        finals.append(zoo.final("prose", "seed-0"))
        assert zoo.record("prose", "seed-0").train_tokens == 2 * 4 * 16
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-4, atol=1e-7)


def test_second_invocation_does_the_missing_runs_alone(
    pico_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    train = LoRATrainer.train

    def counted(trainer: LoRATrainer, task: Task, seed: int, label: str, **options: object) -> object:
        trained.append((task.name, seed))
        return train(trainer, task, seed, label, **options)

    monkeypatch.setattr(LoRATrainer, "train", counted)
    folder = tmp_path / "zoo"
    collect_adapters(tasks("prose"), pico_model_folder, folder, SMALL)
    before = modification_times(folder)
    trained.clear()
    zoo = collect_adapters(tasks("prose", "code"), pico_model_folder, folder, replace(SMALL, seeds=(0, 7)))
    assert sorted(trained) == [("code", 0), ("code", 7), ("prose", 7)]
    assert zoo.runs("prose") == ["seed-0", "seed-7"]
    assert modification_times(folder).items() >= before.items()
    assert zoo.verify() == []


@pytest.mark.parametrize(
    ("options", "rows", "named"),
    [
        ({"learning_rate": 3e-3}, 5, "learning_rate: 0.01 there, 0.003 now"),
        ({"rank": 3}, 5, "same LoRA"),
        ({}, 6, "data_fingerprint"),
    ],
    ids=["learning rate", "rank", "text"],
)
def test_an_existing_zoo_refuses_other_settings(
    pico_model_folder: Path, tmp_path: Path, options: dict[str, float], rows: int, named: str
) -> None:
    collect_adapters([text_task("prose")], pico_model_folder, tmp_path / "zoo", SMALL)
    before = modification_times(tmp_path)
    with pytest.raises(LoraFactoryError, match=named):
        collect_adapters(
            [text_task("prose", rows=rows)], pico_model_folder, tmp_path / "zoo", replace(SMALL, **options)
        )
    assert modification_times(tmp_path) == before


def test_a_zoo_of_an_earlier_version_is_continued(pico_model_folder: Path, tmp_path: Path) -> None:
    zoo = collect_adapters(tasks("prose"), pico_model_folder, tmp_path / "zoo", SMALL)
    file = zoo.folder / "prose" / "seed-0" / "run.json"
    record = json.loads(file.read_text())
    assert {record["arguments"][name] for name in ("warmup_ratio", "weight_decay", "max_grad_norm")} == {0.1, 0.0, 1.0}
    file.write_text(json.dumps(record | {"arguments": {**record["arguments"], "compile": False}}))
    zoo = collect_adapters(tasks("prose", "code"), pico_model_folder, tmp_path / "zoo", SMALL)
    assert settings_of(zoo) == CollectArguments(**{**asdict(SMALL), "seeds": (0,)}) and zoo.tasks == ["code", "prose"]
    record["arguments"]["warmup_ratio"] = 0.0
    file.write_text(json.dumps(record))
    with pytest.raises(LoraFactoryError, match=r"warmup_ratio: 0\.0 there, 0\.1 now"):
        collect_adapters(tasks("prose"), pico_model_folder, tmp_path / "zoo", SMALL)


def test_a_loss_that_is_not_finite_leaves_no_run(
    pico_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = LoRATrainer._forward, []

    def broken(trainer: LoRATrainer, batch: list[object]) -> torch.Tensor:
        calls.append(1)
        loss = forward(trainer, batch)
        return loss * math.nan if len(calls) == 2 else loss

    monkeypatch.setattr(LoRATrainer, "_forward", broken)
    with pytest.raises(LoraFactoryError, match=r"prose.*loss is nan at step 2.*lower learning_rate"):
        collect_adapters(tasks("prose"), pico_model_folder, tmp_path / "zoo", replace(SMALL, steps=10, retries=3))
    assert len(calls) == 2, "the same seed would give the same loss, so that nothing is tried again"
    assert [path.name for path in (tmp_path / "zoo").iterdir() if path.name[0] != "."] == ["zoo.json"]


@pytest.mark.parametrize(
    ("rate", "reason"),
    [
        (1e30, "which half precision cannot hold; lower learning_rate"),
        (30.0, "worse than the base model.*lower"),
    ],
)
def test_a_run_that_diverged_leaves_no_run(pico_model_folder: Path, tmp_path: Path, rate: float, reason: str) -> None:
    # Whatever a processor makes of such weights, no finite loss is taken for a good one.
    arguments = replace(SMALL, steps=10, learning_rate=rate)
    with pytest.raises(LoraFactoryError, match=rf"prose.*({reason}|loss is|gradients are not finite)"):
        collect_adapters(tasks("prose"), pico_model_folder, tmp_path / "zoo", arguments)
    assert [path.name for path in (tmp_path / "zoo").iterdir() if path.name[0] != "."] == ["zoo.json"]


def test_a_run_that_overfits_or_barely_moves_is_kept(pico_model_folder: Path, tmp_path: Path) -> None:
    train, other = [Example("who? ", "the fox")] * 4, [Example("who? ", "8 9 7 2 8 9 7 2")]
    task = Task.from_examples("prose", ["Write."], train, other, other)
    arguments = replace(SMALL, steps=40, snapshots=40, learning_rate=3e-2, packing=False)
    losses = collect_adapters([task], pico_model_folder, tmp_path / "zoo", arguments).record("prose", "seed-0")
    assert losses.validation_losses[-1] > losses.validation_losses[0], "worse on other text, better on its own"
    collect_adapters(tasks("prose"), pico_model_folder, tmp_path / "still", replace(SMALL, steps=1, snapshots=1))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("q_proj,v_porj", r"'v_porj' does not fit this LlamaForCausalLM.*nearest: v_proj.*q_proj.*or all-linear"),
        ("q_proj,act_fn", r"act_fn"),
        (" , ", "names no module"),
    ],
)
def test_a_target_module_beside_right_ones_is_checked(
    pico_model_folder: Path, tmp_path: Path, given: str, words: str
) -> None:
    with pytest.raises(LoraFactoryError, match=words):
        collect_adapters(tasks("prose"), pico_model_folder, tmp_path / "zoo", replace(SMALL, target_modules=given))
    assert not (tmp_path / "zoo").exists()


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "num_local_experts": 4}
OTHERS = {
    "experts": (MixtralForCausalLM, MixtralConfig(**SIZES, **HEADS), "gate", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    "mamba": (MambaForCausalLM, MambaConfig(**SIZES, state_size=4), "out_proj", {"in_proj", "x_proj", "dt_proj"}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_all_linear_and_its_advice_work_where_peft_adapts_some_modules(
    kind: str, tmp_path: Path, pico_tokenizer: PreTrainedTokenizerBase
) -> None:
    cls, config, refused, modules = OTHERS[kind]
    save_model(lambda: cls(config), pico_tokenizer, tmp_path / "base")
    arguments = replace(SMALL, steps=1, snapshots=1, target_modules="all-linear")
    with pytest.warns(UserWarning, match="stay as they are, since PEFT cannot adapt them"):
        zoo = collect_adapters(tasks("prose"), tmp_path / "base", tmp_path / "zoo", arguments)
    assert {module.path.rpartition(".")[2] for module in zoo.layout.modules} == modules
    with pytest.raises(LoraFactoryError, match=refused) as caught:
        collect_adapters(
            tasks("prose"), tmp_path / "base", tmp_path / "no", replace(arguments, target_modules=refused)
        )
    advised = str(caught.value).rpartition("name some of ")[2].partition(", or all-linear")[0]
    arguments = replace(arguments, target_modules=advised)
    followed = collect_adapters(tasks("prose"), tmp_path / "base", tmp_path / "zoo-2", arguments)
    assert followed.layout.modules == zoo.layout.modules


def test_wrong_inputs_are_one_clear_error_and_leave_nothing(pico_model_folder: Path, tmp_path: Path) -> None:
    task_file, zoo = tmp_path / "tasks.yaml", tmp_path / "zoo"
    task_file.write_text("", encoding="utf-8")
    with pytest.raises(LoraFactoryError, match="is empty; write at least one task"):
        collect_adapters(task_file, pico_model_folder, zoo, SMALL)
    with pytest.raises(LoraFactoryError, match="no base model folder"):
        collect_adapters(tasks("prose"), tmp_path / "no-model", zoo, SMALL)
    with pytest.raises(LoraFactoryError, match=r"nonsense.*does not fit.*all-linear"):
        collect_adapters(tasks("prose"), pico_model_folder, zoo, replace(SMALL, target_modules="nonsense"))
    assert not zoo.exists()


@pytest.mark.parametrize("options", [{"rank": 0}, {"seeds": ()}, {"steps": 0}, {"learning_rate": 0.0}])
def test_arguments_are_checked_at_birth(options: dict[str, object]) -> None:
    with pytest.raises(LoraFactoryError, match=next(iter(options))):
        CollectArguments(**options)


def test_kill_in_the_middle_then_the_same_command_finishes(pico_model_folder: Path, tmp_path: Path) -> None:
    names, folder = [f"task-{number}" for number in range(4)], tmp_path / "zoo"
    save_tasks([text_task(name) for name in names], tmp_path / "tasks.json")
    words = ["collect", "--tasks", str(tmp_path / "tasks.json"), "--base-model", str(pico_model_folder)]
    words += ["--output-dir", str(folder), "--steps", "60", "--snapshots", "2", "--batch-size", "2"]
    words += ["--sequence-length", "16", "--target-modules", "q_proj"]
    process = subprocess.Popen([sys.executable, "-m", "lora_factory.cli", *words], stderr=subprocess.DEVNULL)
    try:
        patience = time.monotonic() + 120
        while not list(folder.glob("*/seed-0/run.json")) and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    finished = AdapterZoo(folder).tasks
    assert 0 < len(finished) < len(names)
    before = {name: modification_times(folder / name / "seed-0") for name in finished}
    assert cli.main(words) == 0
    zoo = AdapterZoo(folder)
    assert zoo.tasks == names
    assert zoo.verify() == []
    assert {name: modification_times(folder / name / "seed-0") for name in finished} == before


@pytest.mark.parametrize("earlier", [False, True])
def test_a_run_continues_in_batches_by_length_alone(
    earlier: bool,
    pico_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = replace(SMALL, packing=False, steps=4, state_every=1)
    work = [Task.from_examples("words", ["Words."], *[[f"a fox {'and a fox ' * n}" for n in range(20)]] * 3)]
    collect_adapters(work, pico_model_folder, tmp_path / "calm", settings)
    with monkeypatch.context() as patch:
        if earlier:  # a version that did not look at lengths
            patch.setattr(LoRATrainer, "pads", False)
        batches = LoRATrainer.batches

        def cut_off(*arguments: Any) -> Iterator[list[TokenSequence]]:
            yield from islice(batches(*arguments), 2)
            raise KeyboardInterrupt

        patch.setattr(LoRATrainer, "batches", cut_off)
        with pytest.raises(KeyboardInterrupt):
            collect_adapters(work, pico_model_folder, tmp_path / "zoo", settings)
    collect_adapters(work, pico_model_folder, tmp_path / "zoo", settings)
    assert ("continues at step 2" in caplog.text) is not earlier
    assert contents(tmp_path / "zoo") == contents(tmp_path / "calm")


def test_only_the_completion_is_learnt(pico_tokenizer: PreTrainedTokenizerBase) -> None:
    arguments = replace(SMALL, packing=False, sequence_length=200)
    examples = [Example("Question: who? ", "The fox."), Example("", "Plain text")]
    masked, plain = encode_sequences(pico_tokenizer, examples, arguments)
    assert pico_tokenizer.decode(masked.tokens) == "<s>Question: who? The fox.</s>"
    assert labelled(pico_tokenizer, masked.labels) == "The fox.</s>"
    assert labelled(pico_tokenizer, plain.labels) == "<s>Plain text</s>"
    (packed,) = encode_sequences(pico_tokenizer, examples, replace(arguments, packing=True))
    assert packed.tokens == masked.tokens + plain.tokens
    assert packed.labels == masked.labels + plain.labels


def test_an_overlong_prompt_loses_its_beginning(pico_tokenizer: PreTrainedTokenizerBase) -> None:
    arguments = replace(SMALL, packing=False, sequence_length=24)
    (sequence,) = encode_sequences(pico_tokenizer, [Example("never mind " * 30 + "who? ", "The fox.")], arguments)
    assert len(sequence.tokens) == 24
    assert pico_tokenizer.decode(sequence.tokens).endswith("who? The fox.</s>")
    assert labelled(pico_tokenizer, sequence.labels) == "The fox.</s>"


@pytest.mark.parametrize("length", [16, 23])
def test_packing_fills_every_sequence_in_order(pico_tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    examples = [Example("", text) for text in TRAINING_TEXT]
    sequences = encode_sequences(pico_tokenizer, examples, replace(SMALL, sequence_length=length))
    assert {len(sequence.tokens) for sequence in sequences} == {length}
    text = pico_tokenizer.decode([token for sequence in sequences for token in sequence.tokens])
    whole = "".join(f"<s>{part}</s>" for part in TRAINING_TEXT)
    assert whole.startswith(text)
    assert len(pico_tokenizer(whole, add_special_tokens=False).input_ids) - length * len(sequences) < length


def test_without_packing_examples_stay_apart(pico_tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [Example("", text) for text in TRAINING_TEXT]
    sequences = encode_sequences(pico_tokenizer, examples, replace(SMALL, packing=False, sequence_length=400))
    assert [pico_tokenizer.decode(sequence.tokens) for sequence in sequences] == [f"<s>{t}</s>" for t in TRAINING_TEXT]


def test_nothing_to_learn_from(pico_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(LoraFactoryError, match="1 examples hold no token to learn from"):
        encode_sequences(pico_tokenizer, [Example("only a prompt", "")], replace(SMALL, sequence_length=1))


def test_padding_changes_no_loss(pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [Example("", TRAINING_TEXT[0]), Example("Who? ", "The fox.")]
    sequences = encode_sequences(pico_tokenizer, examples, replace(SMALL, packing=False, sequence_length=400))
    batch = collate(sequences, pico_tokenizer.pad_token_id, torch.device("cpu"))
    lengths = [len(sequence.tokens) for sequence in sequences]
    assert batch["input_ids"].shape == batch["labels"].shape == (2, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    counts = [sum(label != IGNORED for label in sequence.labels[1:]) for sequence in sequences]
    alone = [pico_model(**collate([sequence], 0, torch.device("cpu"))).loss.item() for sequence in sequences]
    expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    assert math.isclose(pico_model(**batch).loss.item(), expected, rel_tol=1e-5)
