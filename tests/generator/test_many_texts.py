"""Adapters for many texts at once: the same as one by one, in few passes, a folder each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.generators import make_generator
from helpers.models import attach
from peft import PeftModel
from transformers import LlamaForCausalLM

from lora_factory.adapters.folder import load_adapter
from lora_factory.cli.commands import main
from lora_factory.errors import LoraFactoryError
from lora_factory.generator import generation
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.generator.networks import CoreCVAE
from lora_factory.models.bert import Bert

TEXTS = [f"{word} number {number}" for number in range(5) for word in ("poem", "law")]


@pytest.fixture(params=["core", "conv1d"])
def generator(request: pytest.FixtureRequest, pico_model_folder: Path, pico_encoder_folder: Path) -> CVAELoRAGenerator:
    layout = attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]
    return make_generator(layout, pico_encoder_folder, request.param)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"rank": 1}])
def test_many_are_the_same_as_one_by_one(
    generator: CVAELoRAGenerator, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "BATCH_WEIGHTS", 3 * generator.layout.size)
    many = list(generator.generate_adapters(TEXTS, **options))
    assert len(many) == len(TEXTS)
    for text, state_dict in zip(TEXTS, many, strict=True):
        torch.testing.assert_close(state_dict, generator.generate_state_dict(text, **options), rtol=1e-4, atol=1e-5)


def test_many_texts_take_one_pass_of_encoder_and_network(
    pico_model_folder: Path, pico_encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]
    generator, passes = make_generator(layout, pico_encoder_folder), []
    for kind, method in ((Bert, "__call__"), (CoreCVAE, "decode")):
        before = getattr(kind, method)

        def counted(self: Any, *values: Any, before: Any = before, name: str = kind.__name__) -> Any:
            passes.append(name)
            return before(self, *values)

        monkeypatch.setattr(kind, method, counted)
    list(generator.generate_adapters(TEXTS))
    assert passes == ["Bert", "CoreCVAE"]


def test_a_folder_for_each(generator: CVAELoRAGenerator, pico_model_folder: Path, tmp_path: Path) -> None:
    folders = generator.save_adapters({"poems": TEXTS[0], "law": TEXTS[1]}, tmp_path / "many")
    assert folders == [tmp_path / "many" / "poems", tmp_path / "many" / "law"]
    alone = generator.save_adapter(TEXTS[1], tmp_path / "law")
    assert {path.name for path in folders[1].iterdir()} == {path.name for path in alone.iterdir()}
    records = [json.loads((folder / "generation.json").read_text()) for folder in (folders[1], alone)]
    assert [record.pop("sha256") and record for record in records] == [records[0]] * 2
    torch.testing.assert_close(load_adapter(folders[1])[1], load_adapter(alone)[1], rtol=1e-4, atol=1e-5)
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(pico_model_folder), folders[0])
    with pytest.raises(LoraFactoryError, match="already there"):
        generator.save_adapters({"new": TEXTS[2], "law": TEXTS[3]}, tmp_path / "many")
    assert not (tmp_path / "many" / "new").exists()
    generator.save_adapters({"new": TEXTS[2], "law": TEXTS[3]}, tmp_path / "many", overwrite=True)
    assert json.loads((folders[1] / "generation.json").read_text())["text"] == TEXTS[3]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "give at least one"),
        (["a"], "by its name"),
        ({"a/b": "x"}, "a file name"),
        ({"a": " "}, "empty"),
    ],
)
def test_what_cannot_be_saved(generator: CVAELoRAGenerator, texts: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(LoraFactoryError, match=message):
        generator.save_adapters(texts, tmp_path / "many")
    assert not (tmp_path / "many").exists()


def test_the_command_reads_a_file_of_texts(
    generator: CVAELoRAGenerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator.save_pretrained(tmp_path / "generator")
    (tmp_path / "lines.txt").write_text("Legal notices\n\nA poem, by hand\n")
    (tmp_path / "named.yaml").write_text("law: Legal notices\npoems: A poem\n")
    command = ["generate", "--generator", str(tmp_path / "generator"), "--texts"]
    assert main([*command, str(tmp_path / "lines.txt"), "--output-dir", str(tmp_path / "lines")]) == 0
    assert main([*command, str(tmp_path / "named.yaml"), "--output-dir", str(tmp_path / "named")]) == 0
    assert {path.name for path in (tmp_path / "lines").iterdir()} == {"Legal_notices", "A_poem_by_hand"}
    assert {path.name for path in (tmp_path / "named").iterdir()} == {"law", "poems"}
    capsys.readouterr()
    assert main([*command, "x.txt", "--text", "Poems", "--output-dir", str(tmp_path / "no")]) == 2
    assert "leave these out" in capsys.readouterr().err
