"""`lora-factory try`: the base model's answer beside the adapted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import TRAINING_TEXT
from peft import PeftModel
from transformers import AutoTokenizer, GenerationConfig

from lora_factory import CVAELoRAGenerator
from lora_factory.cli.commands import main
from lora_factory.cli.serve import print_side_by_side
from lora_factory.errors import LoraFactoryError
from lora_factory.models.loading import load_base_model
from lora_factory.serving.trial import try_adapter

LAW = "Permission is hereby granted"


def test_answers_are_those_of_the_base_model_and_of_the_saved_adapter(
    generator_folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    generator = CVAELoRAGenerator.from_pretrained(generator_folder)
    trial = try_adapter(generator, "Hello", LAW, max_new_tokens=12, rank=1)
    model, tokenizer = load_base_model(base_folder)
    prompt = AutoTokenizer.from_pretrained(base_folder).encode("<s>[user]Hello[assistant]", add_special_tokens=False)
    greedy = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id)

    def answer(model: torch.nn.Module) -> str:
        whole = model.generate(input_ids=torch.tensor([prompt]), generation_config=greedy)
        return tokenizer.decode(whole[0, len(prompt) :], skip_special_tokens=True)

    assert trial.base == answer(model)
    folder = generator.save_adapter(LAW, tmp_path / "adapter", rank=1)
    adapted = PeftModel.from_pretrained(model, folder)
    assert trial.adapted == answer(adapted)
    assert trial.base != trial.adapted
    assert try_adapter(generator, "Hello", LAW, max_new_tokens=12, chat_template=False).base != trial.base


@pytest.mark.parametrize("columns", [160, 60])
def test_the_command_shows_both(
    generator_folder: Path,
    columns: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    (tmp_path / "examples.txt").write_text("\n\n".join(TRAINING_TEXT))
    words = ["try", "--generator", str(generator_folder), "--prompt", "Hello", "--max-new-tokens", "6"]
    assert main([*words, "--text", LAW, "--examples", str(tmp_path / "examples.txt")]) == 0
    printed = capsys.readouterr().out
    heads = [line for line in printed.splitlines() if "base model" in line or "with the adapter" in line]
    assert len(heads) == (1 if columns == 160 else 2)
    assert main(words) == 2
    assert "give --text, --examples or both" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [160, 60])
def test_an_answer_cannot_steer_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    print_side_by_side({"one": "red \x1b[31m [bold]not markup[/bold]\n  indented", "two": "\x07 \u202e turned"})
    printed = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e"} & set(printed)
    assert "[bold]not markup[/bold]" in printed
    assert "  indented" in printed


def test_what_cannot_be_tried_is_refused(generator_folder: Path) -> None:
    generator = CVAELoRAGenerator.from_pretrained(generator_folder)
    with pytest.raises(LoraFactoryError, match="prompt is empty"):
        try_adapter(generator, "  ", LAW)
    with pytest.raises(LoraFactoryError, match="max_new_tokens=0 must be at least 1"):
        try_adapter(generator, "Hello", LAW, max_new_tokens=0)
