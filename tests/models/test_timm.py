"""LoRA on timm's image classifiers: attention and convolutions, saved by transformers and by timm itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.images import bright_or_dark, brightness_task
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperForImageClassification

from lora_factory import CVAELoRAGenerator, train_generator
from lora_factory.arguments import CollectArguments, TrainArguments
from lora_factory.collection.collect import collect_adapters
from lora_factory.errors import LoraFactoryError
from lora_factory.models.classifiers import image_accuracy, load_image_classifier

timm = pytest.importorskip("timm")

TASKS = [brightness_task("bright", wanted=True), brightness_task("dark", wanted=False)]
NAMES = {0: "no", 1: "yes"}


@pytest.fixture(params=["test_vit", "test_resnet"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, CollectArguments]:
    """A random model: a ViT as `save_pretrained` writes it, and a ResNet as timm's own repositories are."""
    folder = tmp_path / "base"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(request.param, num_classes=2)
    details = {key: value for key, value in model.pretrained_cfg.items() if isinstance(value, str | int | tuple)}
    details |= {"num_classes": 2, "input_size": (3, 32, 32)} if request.param == "test_resnet" else {"num_classes": 2}
    if request.param == "test_vit":
        config = TimmWrapperConfig(architecture="test_vit", pretrained_cfg=details, id2label=NAMES)
        wrapped = TimmWrapperForImageClassification(config)
        wrapped.timm_model.load_state_dict(model.state_dict())
        wrapped.save_pretrained(folder)
    else:
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        values = {"architecture": "test_resnet", "num_classes": 2, "label_names": ["no", "yes"]}
        (folder / "config.json").write_text(json.dumps({**values, "pretrained_cfg": details}))
    targets = {"test_vit": "qkv,proj", "test_resnet": "conv2,fc"}[request.param]
    steps = {"test_vit": 24, "test_resnet": 100}[request.param]
    settings = CollectArguments(
        rank=2, lora_alpha=8.0, steps=steps, snapshots=2, batch_size=8, learning_rate=2e-2, target_modules=targets
    )
    return folder, settings


def test_from_timm_to_an_adapter_of_plain_peft(
    case: tuple[Path, CollectArguments], pico_encoder_folder: Path, tmp_path: Path
) -> None:
    base, settings = case
    zoo = collect_adapters(TASKS, base, tmp_path / "zoo", settings)
    alone = collect_adapters(TASKS[1:], base, tmp_path / "alone", settings)
    bright, dark = (zoo.record(task.name, "seed-0") for task in TASKS)
    same = alone.record("dark", "seed-0")
    assert dark.validation_losses == same.validation_losses, "the run before it has not changed the base"
    assert max(bright.validation_losses[-1], dark.validation_losses[-1]) < 0.67, "chance is 0.693"
    arguments = TrainArguments(steps=300, width=16, text_encoder=str(pico_encoder_folder))
    train_generator(zoo, tmp_path / "generator", arguments, tasks=TASKS)
    generator = CVAELoRAGenerator.from_pretrained(tmp_path / "generator")
    images = [bright_or_dark(number, bright=True) for number in range(4)]
    generator.save_adapter("Is it bright?", tmp_path / "adapter", images=images)
    model = generator.generate_adapter("Is it bright?", images=images)
    plain = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(base), tmp_path / "adapter")
    inputs = load_image_classifier(base)[1]
    pixels = inputs.collate(inputs.encode(TASKS[0].examples("test")), torch.device("cpu"))["pixel_values"]
    with torch.no_grad():
        logits = plain.eval()(pixel_values=pixels).logits
        torch.testing.assert_close(logits, model(pixel_values=pixels).logits)
        with plain.disable_adapter():
            assert not torch.allclose(plain(pixel_values=pixels).logits, logits)
    assert image_accuracy(model, inputs, TASKS[0].examples("test")) >= 0.75


def test_a_config_that_timm_cannot_build(case: tuple[Path, CollectArguments]) -> None:
    path = case[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_args": {"no_such_argument": 1}}))
    with pytest.raises(LoraFactoryError, match=r"cannot load the image classifier .*no_such_argument"):
        load_image_classifier(case[0])
