"""The paper's two experiments run from end to end, offline, on tiny models of the same architectures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import paper_detection
import paper_language
import pytest

REMARK = "it proves only that the code runs"
METHODS = ["Original LoRA", "Original model", "Model Soup", "COND P-DIFF", "ICM-LoRA"]


def run(experiment: object, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["experiment", "--smoke", "--output", str(folder)])
    experiment.main()


def test_detection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(paper_detection, tmp_path, monkeypatch)
    result = json.loads((tmp_path / "detection.json").read_text(encoding="utf-8"))
    assert (result["methods"], result["tasks"]) == (METHODS, ["disc", "square"])
    assert len(result["cells"]) == len(METHODS) * 2
    assert all(0 <= cell["map_75"] <= cell["map_50"] <= 1 for cell in result["cells"])
    found = {(cell["method"], cell["task"]): cell["map_50"] for cell in result["cells"]}
    for task in ("disc", "square"):  # a LoRA of a task's own finds its boxes, the base model none
        assert found["Original LoRA", task] > 0.9 and found["Original model", task] < 0.1
    printed = capsys.readouterr().out
    assert all(method in printed for method in METHODS)
    assert "| **1.000** |" in printed and "**0.000**" not in printed
    assert all(REMARK in text for text in (printed, (tmp_path / "detection.md").read_text(encoding="utf-8")))
    page = (tmp_path / "detection.html").read_text(encoding="utf-8")
    assert "data:image/svg+xml" in page
    assert "florence-community/Florence-2-base" in page and REMARK in page
    config = json.loads((tmp_path / "generator" / "config.json").read_text(encoding="utf-8"))
    modules = [module["path"] for module in config["layout"]["modules"]]
    assert "lm_head" in modules
    assert "model.vision_tower.convs.0.conv" in modules


def test_language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(paper_language, tmp_path, monkeypatch)
    cells = json.loads((tmp_path / "language.json").read_text(encoding="utf-8"))
    loss = {(cell["method"], cell["task"]): cell["loss"] for cell in cells}
    assert set(loss) == {(method, task) for method in METHODS for task in ("arxiv", "ubuntu")}
    assert all(loss["Original LoRA", task] < loss["Original model", task] - 0.5 for task in ("arxiv", "ubuntu"))
    printed = capsys.readouterr().out
    assert "| ICM-LoRA" in printed and REMARK in printed


def test_the_papers_number_of_weights() -> None:
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration

    from lora_factory.adapters.layout import AdapterLayout

    config = Florence2Config(
        text_config=BartConfig(
            vocab_size=51289,
            d_model=768,
            encoder_layers=6,
            decoder_layers=6,
            encoder_ffn_dim=3072,
            decoder_ffn_dim=3072,
        ).to_dict(),
        vision_config={"projection_dim": 768},
    )
    with torch.device("meta"):
        model = Florence2ForConditionalGeneration(config)
        settings = paper_detection.COLLECT
        lora = LoraConfig(r=settings.rank, target_modules=settings.target_modules.split(","))
        state_dict = get_peft_model_state_dict(get_peft_model(model, lora), save_embedding_layers=False)
    assert AdapterLayout.from_state_dict(state_dict, lora, base_model="florence").size == 482482  # Table 4, r = 2
