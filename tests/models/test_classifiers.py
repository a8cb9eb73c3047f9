"""LoRA on an image classifier, from the tasks to an adapter that images ask for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.hub import ask
from helpers.images import bright_or_dark, brightness_task, picture, save_classifier
from hub_server.local import LocalHub
from peft import PeftModel
from transformers import AutoModelForImageClassification, DeiTForImageClassificationWithTeacher

from lora_factory import AdapterZoo, CVAELoRAGenerator, train_generator
from lora_factory.arguments import CollectArguments, TrainArguments
from lora_factory.cli.commands import main
from lora_factory.collection.collect import collect_adapters
from lora_factory.collection.multitask import train_multitask
from lora_factory.collection.trainer import classifier_trainer
from lora_factory.errors import LoraFactoryError
from lora_factory.models.classifiers import image_accuracy, load_image_classifier
from lora_factory.tasks.images import ImageTask, LabelledImage

# Texts that the pico encoder, which has random weights, tells apart in any frame.
TEXTS = {"bright": "white snow in the noon light of a summer day", "dark": "def night(): return cellars + caves"}
TASKS = [replace(brightness_task(name, wanted=name == "bright"), descriptions=(text,)) for name, text in TEXTS.items()]
COLLECT = CollectArguments(
    rank=2, lora_alpha=8.0, steps=30, snapshots=2, batch_size=16, learning_rate=1e-2, validation_sequences=4
)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier") / "pico-vit")


@pytest.fixture(scope="module")
def zoo(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterZoo:
    return collect_adapters(TASKS, classifier, tmp_path_factory.mktemp("zoo"), COLLECT)


@pytest.fixture(scope="module")
def generator_folder(zoo: AdapterZoo, pico_encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generator") / "generator"
    arguments = TrainArguments(steps=300, width=32, text_encoder=str(pico_encoder_folder))
    train_generator(zoo, folder, arguments, images={task.name: task.images() for task in TASKS})
    return folder


def accuracy(model: PeftModel, classifier: Path, task: ImageTask) -> float:
    return image_accuracy(model, load_image_classifier(classifier)[1], task.examples("test"))


def test_collected_adapters_classify(zoo: AdapterZoo, classifier: Path) -> None:
    model, inputs = load_image_classifier(classifier)
    # The tasks want opposite answers to the same images, so the base model is right about one or none of them.
    assert sum(image_accuracy(model, inputs, task.examples("test")) for task in TASKS) == 1
    for task in TASKS:
        record = zoo.record(task.name, "seed-0")
        assert (record.train_tokens, record.snapshot_steps) == (30 * 16 - 30 // 3 * 8, (29, 30))
        assert record.validation_losses[-1] < 0.3
        adapted = PeftModel.from_pretrained(model, zoo.folder / task.name / "seed-0")
        assert accuracy(adapted, classifier, task) == 1.0
        model = adapted.unload()


def test_collecting_again_repeats_nothing(zoo: AdapterZoo, classifier: Path) -> None:
    before = zoo.fingerprint()
    assert collect_adapters(TASKS, classifier, zoo.folder, COLLECT).fingerprint() == before
    changed = [TASKS[0], replace(TASKS[1], descriptions=("Is it night?",))]
    collect_adapters(changed, classifier, zoo.folder, COLLECT)
    assert zoo.descriptions("dark") == ("Is it night?",)
    collect_adapters(TASKS, classifier, zoo.folder, COLLECT)
    assert zoo.fingerprint() == before


def test_images_text_or_both(generator_folder: Path, classifier: Path) -> None:
    generator = CVAELoRAGenerator.from_pretrained(generator_folder)
    assert generator.config.modalities == {"image": 32, "text": 32}
    assert generator.config.image_encoder == str(classifier)
    for task, bright in ((TASKS[0], True), (TASKS[1], False)):
        images = [bright_or_dark(number, bright=bright) for number in range(100, 108)]  # not those of training
        ways = ({"images": images}, {"text": task.descriptions[0]}, {"text": task.descriptions[0], "images": images})
        for way in ways:
            assert accuracy(generator.generate_adapter(**way), classifier, task) == 1.0


def test_one_image_in_any_form(generator_folder: Path, classifier: Path, tmp_path: Path) -> None:
    generator, image = CVAELoRAGenerator.from_pretrained(generator_folder), bright_or_dark(7, bright=True)
    image.save(tmp_path / "a.png")
    expected = generator.encode_images([image])["image"]
    assert torch.equal(generator.encode_images([tmp_path / "a.png"])["image"], expected)
    torch.testing.assert_close(generator.encode_images([image.convert("RGBA")] * 3)["image"], expected)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    for wrong, message in (([], "images=\\[\\] is empty"), ([tmp_path / "broken.png"], "cannot read the image")):
        with pytest.raises(LoraFactoryError, match=message):
            generator.generate_adapter(images=wrong)


def test_command_line(generator_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / f"{number}.png") for number in range(2)]
    for number, file in enumerate(files):
        bright_or_dark(number, bright=True).save(file)
    command = ["generate", "--generator", str(generator_folder), "--output-dir", str(tmp_path / "adapter")]
    assert main([*command, "--images", *files]) == 0
    generation = json.loads((tmp_path / "adapter" / "generation.json").read_text())
    assert (generation["conditions"], generation["text"]) == (["image"], None)
    assert generation["nearest_tasks"][0]["task"] == "bright"
    command[-1] = str(tmp_path / "another")
    assert main([*command, "--images", str(tmp_path / "absent.png")]) == 2
    assert "cannot read the image" in " ".join(capsys.readouterr().err.split())


def test_training_on_folders_of_images(
    zoo: AdapterZoo, pico_encoder_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in TASKS:
        (tmp_path / "images" / task.name).mkdir(parents=True)
        for number, image in enumerate(task.images()[:4]):
            image.save(tmp_path / "images" / task.name / f"{number}.png")
    command = ["train", "--zoo", str(zoo.folder), "--output-dir", str(tmp_path / "generator"), "--steps", "1"]
    command += ["--width", "8", "--text-encoder", str(pico_encoder_folder), "--images", str(tmp_path / "images")]
    assert main(command) == 0
    assert set(CVAELoRAGenerator.from_pretrained(tmp_path / "generator").config.modalities) == {"image", "text"}
    for file in (tmp_path / "images" / "dark").iterdir():
        file.unlink()
    assert main(command) == 2
    assert "no image in" in capsys.readouterr().err


def test_a_generator_without_images(
    generator_folder: Path, zoo: AdapterZoo, pico_encoder_folder: Path, tmp_path: Path
) -> None:
    arguments = TrainArguments(steps=1, width=8, text_encoder=str(pico_encoder_folder))
    train_generator(zoo, tmp_path / "text", arguments)
    generator = CVAELoRAGenerator.from_pretrained(tmp_path / "text")
    assert generator.config.image_encoder is None
    with pytest.raises(LoraFactoryError, match="listens to text and not to images"):
        generator.generate_adapter(images=[picture(0)])


def test_a_task_without_images_is_refused(zoo: AdapterZoo, pico_encoder_folder: Path, tmp_path: Path) -> None:
    arguments = TrainArguments(steps=1, width=8, text_encoder=str(pico_encoder_folder))
    with pytest.raises(LoraFactoryError, match="task 'dark' has no image"):
        train_generator(zoo, tmp_path / "generator", arguments, images={"bright": TASKS[0].images()})


def test_training_through_a_classifier(classifier: Path, pico_encoder_folder: Path, tmp_path: Path) -> None:
    arguments = TrainArguments(rank=4, lora_alpha=8.0, width=32, base_steps=200, text_encoder=str(pico_encoder_folder))
    held_out = [replace(task, name=f"{task.name}-again") for task in TASKS]
    train_generator(None, tmp_path / "generator", arguments, tasks=TASKS, base_model=classifier, held_out=held_out)
    generator = CVAELoRAGenerator.from_pretrained(tmp_path / "generator")
    assert generator.config.modalities == {"image": 32, "text": 32}
    for task in TASKS:
        assert accuracy(generator.generate_adapter(task.descriptions[0]), classifier, task) == 1.0


def test_one_adapter_for_all_tasks(classifier: Path) -> None:
    trainer = classifier_trainer(classifier, COLLECT, "pico-vit", Accelerator())
    same = [TASKS[0], replace(TASKS[0], name="again")]
    vector = train_multitask(trainer, same, seed=0, steps=30)
    trainer.slot.load(vector)
    assert image_accuracy(trainer.model, trainer.inputs, TASKS[0].examples("test")) == 1.0


@pytest.mark.parametrize(
    "options",
    [{"kind": DeiTForImageClassificationWithTeacher}, {"problem_type": "multi_label_classification"}],
    ids=["none", "of several labels"],
)
def test_classes_are_learned_whatever_loss_the_model_has_itself(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = save_classifier(tmp_path / "base", **options)
    zoo = collect_adapters(TASKS[:1], folder, tmp_path / "zoo", COLLECT)
    assert zoo.record("bright", "seed-0").validation_losses[-1] < 0.3
    adapted = PeftModel.from_pretrained(load_image_classifier(folder)[0], zoo.folder / "bright" / "seed-0")
    assert accuracy(adapted, folder, TASKS[0]) == 1.0


def test_a_class_that_the_model_has_not(classifier: Path) -> None:
    rows = [LabelledImage(picture(number), ("no", "maybe")[number % 2]) for number in range(20)]
    task = ImageTask.from_examples("maybe", ["Maybe?"], rows)
    with pytest.raises(LoraFactoryError, match=r"no output for \['maybe'\], its classes are \['no', 'yes'\]"):
        classifier_trainer(classifier, COLLECT, "pico-vit", Accelerator()).train(task, 0, "run")


def test_a_classifier_of_the_hub(hub: LocalHub, classifier: Path) -> None:
    files = {path.name: path.read_bytes() for path in classifier.iterdir()}
    hub.add_repo("alice/vit", files)
    commit = hub.repos["model", "alice/vit"].find().oid
    hub.add_repo("bob/gated", files, gated="manual")
    result = ask(
        hub,
        """
from accelerate import Accelerator
from lora_factory.arguments import CollectArguments
from lora_factory.collection.trainer import classifier_trainer
from lora_factory.models.classifiers import load_image_classifier
trainer = classifier_trainer("alice/vit", CollectArguments(), "alice/vit", Accelerator())
result = [trainer.layout.base_revision, *(attempt(load_image_classifier, name) for name in ("bob/gated", "no/such"))]
""",
    )
    assert result[0] == commit
    assert "cannot load the image classifier 'bob/gated'" in result[1] and "ask for access on its page" in result[1]
    assert "there is no repository no/such" in result[2]


def test_no_classifier(pico_model_folder: Path, classifier: Path, tmp_path: Path) -> None:
    for name in (pico_model_folder, "/no/such/folder"):
        with pytest.raises(LoraFactoryError, match="cannot load the image classifier"):
            load_image_classifier(name)
    AutoModelForImageClassification.from_pretrained(classifier).vit.save_pretrained(tmp_path)
    processor = classifier / "preprocessor_config.json"
    (tmp_path / processor.name).write_bytes(processor.read_bytes())
    with pytest.raises(LoraFactoryError, match="lacks 2 weights, first classifier"):
        load_image_classifier(tmp_path)
