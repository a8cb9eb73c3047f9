"""Examples as inputs of causal, sequence-to-sequence and image-text-to-text models, and adapters trained on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.image_bases import WORDS, blip, git, llava, paligemma, qwen2_vl, save
from PIL import Image
from tiny_models import tiny_florence, tiny_t5
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerBase

from lora_factory.arguments import CollectArguments
from lora_factory.collection.check import check_collection
from lora_factory.collection.collect import collect_adapters
from lora_factory.collection.trainer import LoRATrainer
from lora_factory.errors import LoraFactoryError
from lora_factory.models.inputs import IGNORED, ImageInputs, model_inputs
from lora_factory.models.loading import load_base_model, load_processor
from lora_factory.tasks.examples import Example, ImageExample
from lora_factory.tasks.task import Task

CPU = torch.device("cpu")
SMALL = CollectArguments(
    target_modules="all-linear",
    steps=12,
    snapshots=2,
    snapshot_every=6,
    batch_size=2,
    sequence_length=32,
    packing=False,
    learning_rate=3e-2,
    dtype="float32",
)


@pytest.fixture(scope="module")
def florence_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_florence(tmp_path_factory.mktemp("models") / "pico-florence", WORDS)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_t5(tmp_path_factory.mktemp("models") / "pico-t5", WORDS)


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llava(), tmp_path_factory.mktemp("models") / "pico-llava")


def detection_rows(label: str = "dog", count: int = 8) -> list[ImageExample]:
    """Each image is bright where its box is."""
    rows = []
    for number in range(count):
        image = Image.new("RGB", (40, 30), "black")
        box = (number, 2, number + 20, 22)
        image.paste((255, 255, 0), box)
        rows.append(ImageExample.of_boxes(image, label, [box]))
    return rows


def detection_task(label: str) -> Task:
    rows = detection_rows(label)
    return Task.from_examples(label, [f"Detect the {label}."], rows[2:], rows[:1], rows[1:2])


def answers(tokenizer: PreTrainedTokenizerBase, labels: torch.Tensor) -> list[str]:
    return [tokenizer.decode([label for label in row if label != IGNORED]) for row in labels.tolist()]


def test_florence_reads_image_and_question_and_is_to_write_the_boxes(florence_folder: Path) -> None:
    model, tokenizer = load_base_model(florence_folder)
    inputs = model_inputs(model, load_processor(florence_folder))
    rows = inputs.encode(detection_rows()[:2], SMALL)
    batch = inputs.collate(rows, CPU)
    expected = "dog<loc_0><loc_66><loc_500><loc_733>"
    assert answers(tokenizer, batch["labels"])[0] == f"<s>{expected}</s>"
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    question = tokenizer.decode(batch["input_ids"][0])
    assert question.count("<image>") == 17
    assert question.endswith("<s>Locate the objects with category name in the image.</s>")
    assert len(rows[0].tokens) == len(rows[0].labels)


def test_labels_of_a_longer_batch_are_padded_without_effect(florence_folder: Path) -> None:
    model, _ = load_base_model(florence_folder)
    inputs = model_inputs(model, load_processor(florence_folder))
    examples = detection_rows()[:1]
    examples += [ImageExample.of_boxes(Image.new("RGB", (40, 30)), "cat", [(0, 0, 9, 9), (3, 3, 30, 30)])]
    rows = inputs.encode(examples, SMALL)
    alone = [model(**inputs.collate([row], CPU)).loss.item() for row in rows]
    counts = [sum(label != IGNORED for label in row.labels[1:]) for row in rows]
    mean = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    assert model(**inputs.collate(rows, CPU)).loss.item() == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,k_proj,v_proj,fc2,lm_head,conv"])
def test_adapters_of_florence_learn_and_are_stored(florence_folder: Path, tmp_path: Path, targets: str) -> None:
    arguments = replace(SMALL, target_modules=targets, steps=16, snapshot_every=8)
    tasks = [detection_task(name) for name in ("dog", "cat")]
    zoo = collect_adapters(tasks, florence_folder, tmp_path / "zoo", arguments)
    assert zoo.verify() == []
    model, tokenizer = load_base_model(florence_folder)
    inputs = model_inputs(model, load_processor(florence_folder))
    trainer = LoRATrainer.attach(model, tokenizer, arguments, str(florence_folder), Accelerator(), inputs)
    validation = trainer.validation(tasks[0])
    losses = {}
    for name, weights in {"base": trainer.initial, "dog": zoo.final("dog", "seed-0")}.items():
        trainer.slot.load(weights)
        losses[name] = trainer.loss(validation)
    assert losses["dog"] < losses["base"] - 0.5
    assert losses["dog"] == pytest.approx(zoo.record("dog", "seed-0").validation_losses[-1], rel=1e-4)
    shapes = {module.path: (module.shape_a, module.shape_b) for module in zoo.layout.modules}
    if "conv" in targets:
        assert shapes["model.vision_tower.convs.1.conv"] == ((2, 16, 3, 3), (32, 2, 1, 1))
        assert shapes["lm_head"][0] == (2, 32)
    vector = zoo.final("cat", "seed-0")
    assert torch.equal(zoo.layout.flatten(zoo.layout.unflatten(vector)), vector)


def test_a_decoder_alone_answers_after_image_and_question(llava_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base_model(llava_folder)
    assert isinstance(model, type(AutoModelForImageTextToText.from_pretrained(llava_folder)))
    inputs = model_inputs(model, load_processor(llava_folder))
    assert isinstance(inputs, ImageInputs)
    examples = [
        ImageExample(Image.new("RGB", (40, 30)), "Say it", "one"),
        ImageExample(Image.new("RGB", (30, 40)), "Say it again:", "one two three"),
    ]
    rows = inputs.encode(examples, SMALL)
    batch = inputs.collate(rows, CPU)
    assert answers(tokenizer, batch["labels"]) == ["one</s>", "one two three</s>"]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert "<image><image><image><image>Say it again: " in tokenizer.decode(batch["input_ids"][1])
    alone = [model(**inputs.collate([row], CPU)).loss.item() for row in rows]
    counts = [len(inputs.tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in ("one", "one two three")]
    mean = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    assert model(**batch).loss.item() == pytest.approx(mean, rel=1e-3)
    task = Task.from_examples("say", ["Say it."], [*examples, *examples[:1]], examples[1:], examples[1:])
    zoo = collect_adapters([task], llava_folder, tmp_path / "zoo", replace(SMALL, target_modules="q_proj,v_proj"))
    first, last = zoo.record("say", "seed-0").validation_losses
    assert last < first


@torch.no_grad()
@pytest.mark.parametrize("make", [None, llava, qwen2_vl, paligemma, git])
def test_an_answers_token_is_predicted_without_those_behind_it(make, florence_folder: Path) -> None:
    model, reader = make() if make else (load_base_model(florence_folder)[0], load_processor(florence_folder))
    inputs, image = model_inputs(model, reader), Image.new("RGB", (56, 28), "red")
    rows = inputs.encode([ImageExample(image, "Say it:", answer) for answer in ("one two", "one three")], SMALL)
    batch = inputs.collate(rows, CPU)
    labels = batch["labels"]
    logits = model(**batch).logits[:, -labels.shape[1] :]  # GIT's begin with the image's
    first = int((labels[0] != labels[1]).nonzero()[0])  # its logits are one to the left in a decoder alone
    last = first if inputs.is_encoder_decoder else first - 1
    torch.testing.assert_close(logits[0, : last + 1], logits[1, : last + 1])
    assert not torch.allclose(logits[0, last + 1], logits[1, last + 1], atol=1e-3)


def test_sequence_to_sequence_models_learn_the_answer(t5_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base_model(t5_folder)
    inputs = model_inputs(model, tokenizer)
    rows = inputs.encode([Example("Say it again: one", "one"), Example("", "two three")], SMALL)
    batch = inputs.collate(rows, CPU)
    assert answers(tokenizer, batch["labels"])[1].endswith("two three</s>")
    assert "Say it again" in tokenizer.decode(batch["input_ids"][0])
    assert "one</s>" not in tokenizer.decode(batch["input_ids"][0])
    task = Task.from_examples("echo", ["Say it again."], [Example(f"Say it again: {n}", f"{n} {n}") for n in range(9)])
    zoo = collect_adapters([task], t5_folder, tmp_path / "zoo", SMALL)
    first, last = zoo.record("echo", "seed-0").validation_losses
    assert last < first
    assert zoo.layout.lora_config["task_type"] == "SEQ_2_SEQ_LM"


def test_a_model_whose_examples_have_no_features_is_refused(tmp_path: Path) -> None:
    folder = save(blip(), tmp_path / "blip")
    for call in (check_collection, lambda *given: collect_adapters(*given[:2], tmp_path / "zoo", given[2])):
        with pytest.raises(LoraFactoryError, match="a BlipForConditionalGeneration has no output embeddings"):
            call([detection_task("dog")], folder, SMALL)


def test_tasks_must_fit_the_model(florence_folder: Path, pico_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraFactoryError, match="reads texts alone"):
        collect_adapters([detection_task("dog")], pico_model_folder, tmp_path / "zoo", SMALL)
    texts = Task.from_examples("echo", ["Say it."], ["one", "two", "three"])
    with pytest.raises(LoraFactoryError, match=r"Example among the examples.*tasks of its kind"):
        collect_adapters([texts, detection_task("dog")], florence_folder, tmp_path / "zoo", SMALL)
