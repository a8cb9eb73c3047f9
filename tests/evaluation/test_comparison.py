"""The comparison with every baseline and control on pico models."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import TRAINING_TEXT, with_template
from helpers.training import save_word_encoder
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lora_factory.arguments import CollectArguments, CompareArguments, TrainArguments
from lora_factory.collection.collect import collect_adapters
from lora_factory.errors import LoraFactoryError
from lora_factory.evaluation import comparison, diagnostics, methods
from lora_factory.evaluation.comparison import compare
from lora_factory.evaluation.fold import Fold
from lora_factory.evaluation.methods import ComparedMethods
from lora_factory.evaluation.perplexity import score_examples
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.models.hidden_states import base_fingerprint
from lora_factory.models.loading import load_base_model
from lora_factory.tasks.examples import Example
from lora_factory.tasks.task import Task
from lora_factory.tasks.text import SPLITS, DataSource
from lora_factory.training.train import train_generator
from lora_factory.zoo import checkpoints as snapshots
from lora_factory.zoo.store import AdapterZoo

pytest.importorskip("diffusers")

SETTINGS = CollectArguments(
    steps=10, snapshots=3, batch_size=2, sequence_length=32, learning_rate=3e-2, target_modules="q_proj,v_proj"
)
ARGUMENTS = CompareArguments(max_tokens=30, window=32, refine_steps=4)
SEEN = ("prose", "code", "law")


def make_task(name: str, text: str) -> Task:
    texts = [f"{number} {text}" for number in range(6)]
    descriptions = [f"Write {name}.", f"More {name}'s text."]
    if name != "law":
        return Task.from_examples(name, descriptions, texts[:4], texts[4:5], texts[5:])
    asked = [Example(f"{text} Is it law?", " yes" if number % 2 else " no") for number, text in enumerate(texts)]
    return Task.from_examples(name, descriptions, asked[:4], asked[4:5], asked[5:], metric="multiple_choice")


@pytest.fixture(scope="module")
def fold(tmp_path_factory: pytest.TempPathFactory, pico_model_folder: Path, pico_encoder_folder: Path) -> Fold:
    folder = tmp_path_factory.mktemp("fold")
    seen = [make_task(name, text) for name, text in zip(SEEN, TRAINING_TEXT, strict=True)]
    unseen = [make_task("verse", "\n".join(reversed(TRAINING_TEXT[0].split())))]
    zoo = collect_adapters(seen, pico_model_folder, folder / "zoo", SETTINGS)
    originals = collect_adapters(unseen, pico_model_folder, folder / "originals", SETTINGS)
    training = TrainArguments(steps=6, text_encoder=str(pico_encoder_folder))
    generator = train_generator(zoo, folder / "generator", training, tasks=seen)
    return Fold(tuple(seen), tuple(unseen), zoo, originals, generator)


@pytest.fixture(autouse=True)
def short_diffusion(monkeypatch: pytest.MonkeyPatch) -> None:
    short = partial(methods.train_cond_p_diff, autoencoder_steps=10, diffusion_steps=10)
    monkeypatch.setattr(methods, "train_cond_p_diff", short)
    monkeypatch.setattr(methods.CondPDiff, "generate", partialmethod(methods.CondPDiff.generate, steps=10))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


def test_every_method_is_scored_on_every_task(fold: Fold, pico_model_folder: Path, output: Path) -> None:
    result = compare(fold, pico_model_folder, output, ARGUMENTS)
    assert json.loads((output / "comparison.json").read_text()) == json.loads(json.dumps(result))
    places = {(cell["task"], cell["method"]) for cell in result["cells"]}
    assert places == {(task, method) for task in (*SEEN, "verse") for method in result["methods"]}
    assert {cell["task"] for cell in result["cells"] if not cell["seen"]} == {"verse"}
    losses = {(cell["task"], cell["method"]): cell["loss"] for cell in result["cells"]}
    for cell in result["cells"]:
        assert (cell["accuracy"] in (0.0, 1.0)) if cell["task"] == "law" else cell["accuracy"] is None
    for task in SEEN:
        assert losses[task, "original LoRA"] < losses[task, "original model"]
        assert losses[task, "retrieval"] < losses[task, "original model"]
    assert result["diagnostics"][0]["novelty"].keys() == set(SEEN)
    assert {row["what"] for row in result["storage"]} >= {"data set", "COND P-DIFF", "generator"}
    assert result["points"]["weights"]["kinds"].count("generated") == 4
    assert set(result["points"]) == {"task vectors", "hidden states", "latents", "weights"}
    assert {"retrieval from examples", "generated from examples, another task"} < set(result["methods"])


def test_finished_cells_are_not_repeated(
    fold: Fold, pico_model_folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compare(fold, pico_model_folder, output, ARGUMENTS)

    def repeated(*_: object, **__: object) -> None:
        raise AssertionError("a finished cell was scored again")

    monkeypatch.setattr(comparison, "score_task", repeated)
    monkeypatch.setattr(methods, "train_multitask", repeated)
    assert compare(fold, pico_model_folder, output, ARGUMENTS)["cells"] == first["cells"]


def test_cells_of_another_encoders_vectors_are_not_taken_up(
    fold: Fold, pico_model_folder: Path, output: Path, tmp_path: Path
) -> None:
    compare(fold, pico_model_folder, output, ARGUMENTS)
    shutil.copytree(output, tmp_path / "kept")
    encoder = save_word_encoder(tmp_path / "words")
    training = TrainArguments(steps=1, text_encoder=str(encoder))
    generator = train_generator(fold.zoo, tmp_path / "generator", training)
    other = dataclasses.replace(fold, generator=generator)
    names = ["retrieval", "PCA + ridge", "COND P-DIFF"]
    for folder in ("kept", "fresh"):
        compare(other, pico_model_folder, tmp_path / folder, ARGUMENTS, methods=names)
    found = [json.loads((tmp_path / folder / "comparison.json").read_text())["cells"] for folder in ("kept", "fresh")]
    assert found[0] == found[1]


def another_base(fold: Fold, base: Path, folder: Path) -> tuple[Fold, Path]:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(base))
    shutil.copytree(base, folder / "base")
    model.save_pretrained(folder / "base")
    return fold, folder / "base"


def another_tokenizer(fold: Fold, base: Path, folder: Path) -> tuple[Fold, Path]:
    shutil.copytree(base, folder / "base")
    file = folder / "base" / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": {"type": "Lowercase"}}))
    return fold, folder / "base"


def other_originals(fold: Fold, base: Path, folder: Path) -> tuple[Fold, Path]:
    longer = dataclasses.replace(SETTINGS, steps=20)
    originals = collect_adapters(list(fold.unseen), base, folder / "originals", longer)
    return dataclasses.replace(fold, originals=originals), base


def described(task: Task, *descriptions: str) -> Task:
    return Task.from_examples(task.name, descriptions, *(task.examples(split) for split in SPLITS))


def another_description(fold: Fold, base: Path, folder: Path) -> tuple[Fold, Path]:
    (verse,) = fold.unseen
    return dataclasses.replace(fold, unseen=(described(verse, "Write laws and code."),)), base


def another_description_of_the_zoos(fold: Fold, base: Path, folder: Path) -> tuple[Fold, Path]:
    prose, *others = fold.seen
    seen = described(prose, "Write of the fox.", "More of the dog."), *others
    return dataclasses.replace(fold, seen=seen), base


def other_training_data(fold: Fold, base: Path, folder: Path) -> tuple[Fold, Path]:
    prose, *others = fold.seen
    rest = [prose.examples(split) for split in SPLITS[1:]]
    edited = Task.from_examples(prose.name, prose.descriptions, [TRAINING_TEXT[2]] * 4, *rest)
    return dataclasses.replace(fold, seen=(edited, *others)), base


@pytest.mark.parametrize(
    "change",
    [
        another_base,
        another_tokenizer,
        other_originals,
        another_description,
        another_description_of_the_zoos,
        other_training_data,
    ],
)
def test_cells_and_weights_of_another_fold_are_not_taken_up(
    fold: Fold,
    pico_model_folder: Path,
    output: Path,
    tmp_path: Path,
    change: Callable[[Fold, Path, Path], tuple[Fold, Path]],
) -> None:
    names = ["original LoRA", "greedy soup", "multi-task LoRA", "similarity mixture", "COND P-DIFF", "generated"]
    before = compare(fold, pico_model_folder, output, ARGUMENTS, methods=names)["cells"]
    shutil.copytree(output, tmp_path / "kept")
    other, base = change(fold, pico_model_folder, tmp_path)
    fresh, resumed = (
        compare(other, base, tmp_path / name, ARGUMENTS, methods=names)["cells"] for name in ("fresh", "kept")
    )
    assert resumed == fresh
    assert [cell["loss"] for cell in fresh] != [cell["loss"] for cell in before]


def test_cells_of_an_encoder_whose_weights_changed_are_not_taken_up(
    fold: Fold, pico_model_folder: Path, pico_encoder_folder: Path, tmp_path: Path
) -> None:
    encoder, names = tmp_path / "encoder", ["retrieval", "similarity mixture", "COND P-DIFF", "generated"]
    shutil.copytree(pico_encoder_folder, encoder)
    trained = train_generator(fold.zoo, tmp_path / "generator", TrainArguments(steps=6, text_encoder=str(encoder)))
    before = dataclasses.replace(fold, generator=trained)
    compare(before, pico_model_folder, tmp_path / "kept", ARGUMENTS, methods=names)
    torch.manual_seed(1)
    BertModel(BertConfig.from_pretrained(encoder)).save_pretrained(encoder)
    after = dataclasses.replace(fold, generator=CVAELoRAGenerator.from_pretrained(tmp_path / "generator"))
    fresh, resumed = (
        compare(after, pico_model_folder, tmp_path / name, ARGUMENTS, methods=names)["cells"]
        for name in ("fresh", "kept")
    )
    assert resumed == fresh


def test_more_seeds_and_methods_leave_the_finished_cells(
    fold: Fold, pico_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_task, scored, hashed = comparison.score_task, [], []
    first = compare(fold, pico_model_folder, tmp_path, ARGUMENTS, methods=["retrieval", "original LoRA"])

    def counted(*words: Any, **options: Any) -> Any:
        scored.append(words[2].name)
        return score_task(*words, **options)

    def hashed_once(base: Any) -> str:
        hashed.append(base)
        return base_fingerprint(base)

    monkeypatch.setattr(comparison, "score_task", counted)
    monkeypatch.setattr(methods, "base_fingerprint", hashed_once)
    more, names = dataclasses.replace(ARGUMENTS, seeds=(0, 1)), ["original model", "retrieval", "original LoRA"]
    result = compare(fold, pico_model_folder, tmp_path, more, methods=names)
    assert all(cell in result["cells"] for cell in first["cells"])
    assert len(scored) == len(result["cells"]) - len(first["cells"]) == 16
    assert len(hashed) == 1


def test_a_metric_that_does_not_fit_its_task_is_refused_before_anything_is_scored(
    fold: Fold, pico_model_folder: Path, tmp_path: Path
) -> None:
    (verse,) = fold.unseen
    plain = Task.from_examples(verse.name, verse.descriptions, TRAINING_TEXT, metric="exact_match")
    with pytest.raises(LoraFactoryError, match="has no prompt, and only an answer"):
        compare(dataclasses.replace(fold, unseen=(plain,)), pico_model_folder, tmp_path, ARGUMENTS)
    assert not (tmp_path / "cells.jsonl").exists()


def test_the_same_seeds_give_the_same_table(fold: Fold, pico_model_folder: Path, output: Path, tmp_path: Path) -> None:
    first = compare(fold, pico_model_folder, output, ARGUMENTS)
    assert compare(fold, pico_model_folder, tmp_path, ARGUMENTS)["cells"] == first["cells"]


def test_a_zoo_larger_than_memory_is_compared_alike(
    fold: Fold, pico_model_folder: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = compare(fold, pico_model_folder, output, ARGUMENTS)
    monkeypatch.setattr(snapshots, "HELD_BYTES", 0)
    monkeypatch.setattr(snapshots, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(AdapterZoo, "snapshots", only_rows(AdapterZoo.snapshots))
    stored = compare(fold, pico_model_folder, tmp_path / "stored", ARGUMENTS)
    for one, other in zip(held["cells"], stored["cells"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3), one["method"]
    assert stored["points"]["weights"]["labels"] == held["points"]["weights"]["labels"]
    monkeypatch.setattr(diagnostics, "SHOWN_BYTES", 0)
    shown = compare(fold, pico_model_folder, output, ARGUMENTS)["points"]
    assert shown["weights"]["kinds"].count("real") == shown["latents"]["kinds"].count("posterior") == len(SEEN)


def only_rows(read: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """As ``read``, but all snapshots of a task at once are refused."""

    def snapshots_of(zoo: AdapterZoo, task: str, run: str | None = None, **options: Any) -> torch.Tensor:
        assert run is not None, f"all snapshots of {task} were read"
        return read(zoo, task, run, **options)

    return snapshots_of


def test_a_nan_metric_fails_its_cell_and_not_the_run(
    fold: Fold, pico_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_task, calls = comparison.score_task, []

    def sometimes_nan(*words: Any, **options: Any) -> Any:
        score = score_task(*words, **options)
        calls.append(score)
        return dataclasses.replace(score, loss=float("nan")) if len(calls) == 3 else score

    monkeypatch.setattr(comparison, "score_task", sometimes_nan)
    with pytest.warns(UserWarning, match="the loss is nan"):
        result = compare(fold, pico_model_folder, tmp_path, ARGUMENTS)
    failed = [cell for cell in result["cells"] if cell["loss"] is None]
    assert len(failed) == 1 and "nan" in failed[0]["error"]
    again = compare(fold, pico_model_folder, tmp_path, ARGUMENTS)
    assert all(cell["loss"] is not None for cell in again["cells"])


def test_a_zoo_in_the_chat_template_is_compared_in_it(
    fold: Fold,
    pico_model_folder: Path,
    pico_tokenizer: PreTrainedTokenizerBase,
    pico_encoder_folder: Path,
    tmp_path: Path,
) -> None:
    base, settings = tmp_path / "base", dataclasses.replace(SETTINGS, chat_template=True)
    shutil.copytree(pico_model_folder, base)
    with_template(pico_tokenizer).save_pretrained(base)
    asked = [fold.seen[2].examples(split) for split in SPLITS]
    tasks = [Task.from_examples(name, [f"Ask {name}."], *asked, metric="multiple_choice") for name in ("law", "more")]
    zoo = collect_adapters(tasks, base, tmp_path / "zoo", settings)
    training = TrainArguments(steps=2, text_encoder=str(pico_encoder_folder))
    generator = train_generator(zoo, tmp_path / "generator", training)
    result = compare(Fold(tuple(tasks), (), zoo, None, generator), base, tmp_path / "output", ARGUMENTS)
    model, tokenizer = load_base_model(base)
    options = {"window": 32, "stride": 24, "max_tokens": 30}
    score = score_examples(model, tokenizer, tasks[0].examples("test"), chat_template=True, **options)
    cell = next(cell for cell in result["cells"] if (cell["task"], cell["method"]) == ("law", "original model"))
    assert cell["loss"] == pytest.approx(score.loss, rel=1e-5) and cell["tokens"] == score.tokens
    assert cell["settings"]["chat_template"] and cell["accuracy"] in (0.0, 1.0)


def test_no_method_depends_on_an_unseen_task(fold: Fold, pico_model_folder: Path, tmp_path: Path) -> None:
    poison = Task.from_examples("verse", ["zzz"], ["poison " * 40] * 4, ["poison"], ["poison"])
    poisoned = dataclasses.replace(fold, unseen=(poison,))
    clean = ComparedMethods(fold, pico_model_folder, tmp_path / "clean", ARGUMENTS)
    dirty = ComparedMethods(poisoned, pico_model_folder, tmp_path / "dirty", ARGUMENTS)
    for task in fold.seen:
        for name in clean.methods:
            assert torch.equal(clean.methods[name](task, 0), dirty.methods[name](task, 0)), (task.name, name)
    for way, rows in clean.features.items():
        dirty.features[way]["verse"] = rows["verse"]  # the same question, asked of what was fitted
    for name in clean.methods:
        own = name.startswith("original LoRA")  # its own LoRA
        own = own or name in ("generated from examples", "multi-task LoRA, refined")
        if not own:
            assert torch.equal(clean.methods[name](fold.unseen[0], 0), dirty.methods[name](poison, 0)), name


def test_data_is_read_before_anything_is_scored(fold: Fold, pico_model_folder: Path, tmp_path: Path) -> None:
    broken = dataclasses.replace(fold, unseen=(Task("broken", ("Nothing.",), DataSource(str(tmp_path / "no.jsonl"))),))
    with pytest.raises(LoraFactoryError, match=r"task 'broken' cannot be used: .*no\.jsonl"):
        compare([fold, broken], pico_model_folder, tmp_path / "out")
    assert not (tmp_path / "out" / "cells.jsonl").exists()


def test_a_fold_that_leaks_is_refused(fold: Fold) -> None:
    with pytest.raises(LoraFactoryError, match="are not the zoo"):
        dataclasses.replace(fold, seen=fold.seen[1:])
    with pytest.raises(LoraFactoryError, match=r"'prose'.*are in the zoo"):
        dataclasses.replace(fold, unseen=(fold.seen[0],))
    with pytest.raises(LoraFactoryError, match="need their own LoRAs"):
        dataclasses.replace(fold, originals=None)


def test_chosen_methods_alone_are_scored(fold: Fold, pico_model_folder: Path, tmp_path: Path) -> None:
    result = compare(fold, pico_model_folder, tmp_path, ARGUMENTS, methods=["generated", "original model"])
    assert result["methods"] == ["original model", "generated"] == list(result["budgets"])
    assert {cell["method"] for cell in result["cells"]} == {"original model", "generated"}
    assert not (result["diagnostics"] or result["storage"] or result["points"])
    with pytest.raises(LoraFactoryError, match=r"methods names \['soup'\]; choose among original model, "):
        compare(fold, pico_model_folder, tmp_path, ARGUMENTS, methods=["soup"])


def test_folds_and_seeds_of_their_own_are_joined(fold: Fold, pico_model_folder: Path, tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 2.0, "tokens": 500}]
    folds = [fold, dataclasses.replace(fold, number=1, seeds=(7,), history=history)]
    result = compare(folds, pico_model_folder, tmp_path, ARGUMENTS)
    assert {(cell["fold"], cell["seed"]) for cell in result["cells"]} == {(0, 0), (1, 7)}
    assert [(row["fold"], row["seed"]) for row in result["diagnostics"]] == [(0, 0), (1, 7)]
    assert result["seeds"] == [0, 7] and result["folds"] == [["verse"]]
    assert result["curves"] == {"generator, fold 1, seed 7": [{"step": 1, "loss": 2.0}]}
    assert result["budgets"]["generated"] - result["budgets"]["multi-task LoRA"] == 250  # 500 in one of two folds


def test_the_multitask_lora_may_have_a_rank_of_its_own(fold: Fold, pico_model_folder: Path, tmp_path: Path) -> None:
    wider = dataclasses.replace(ARGUMENTS, multitask_rank=4, multitask_learning_rate=1e-2)
    rivals = ComparedMethods(fold, pico_model_folder, tmp_path, wider)
    weights = rivals.methods["multi-task LoRA"](fold.seen[0], 0)
    assert len(weights) == 2 * fold.zoo.layout.size
    trainer = rivals.trainer_of("multi-task LoRA")
    assert (trainer.arguments.rank, trainer.arguments.learning_rate) == (4, 1e-2)
    assert trainer.layout.modules[0].scaling == fold.zoo.layout.modules[0].scaling
    assert rivals.trainer_of("retrieval").layout == fold.zoo.layout
    assert rivals.trainer_of("generated").layout.modules == fold.generator.layout.modules


def test_a_condition_from_examples_is_of_as_many_as_asked(fold: Fold, pico_model_folder: Path, tmp_path: Path) -> None:
    one = ComparedMethods(fold, pico_model_folder, tmp_path, dataclasses.replace(ARGUMENTS, examples=1))
    rows = [fold.generator.task_vector("hidden", row[None]) for row in one.features["hidden"]["verse"]]
    assert any(torch.equal(one.condition("hidden", "verse", 0), row) for row in rows)
    assert len({one.condition("hidden", "verse", seed).sum().item() for seed in range(8)}) > 1


def test_a_generator_that_saw_no_weights_is_not_measured_by_them(
    fold: Fold, pico_model_folder: Path, tmp_path: Path
) -> None:
    generator = CVAELoRAGenerator(copy.deepcopy(fold.generator.config))
    generator.load_state_dict(fold.generator.state_dict())
    generator.config.zoo_fingerprint = None
    result = compare(dataclasses.replace(fold, generator=generator), pico_model_folder, tmp_path, ARGUMENTS)
    assert result["cells"] and not result["diagnostics"]
    assert set(result["points"]) == {"task vectors", "hidden states", "weights"}
