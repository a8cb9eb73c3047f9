"""The line that docs/lm-eval.md shows scores a generated adapter on a local task."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.generators import make_generator
from helpers.models import attach
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.cli.commands import main

pytest.importorskip("lm_eval")
PAGE = (Path(__file__).parents[1] / "docs" / "lm-eval.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL).group(1)


@pytest.mark.slow
def test_the_documented_line(
    pico_model_folder: Path, pico_encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    layout = attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]
    layout = AdapterLayout.from_dict(layout.to_dict() | {"base_model": str(pico_model_folder)})
    generator = make_generator(layout, pico_encoder_folder)
    generator.scale.mul_(20)
    generator.save_pretrained("generator")
    Path("eval-tasks").mkdir()
    Path("eval-tasks/linux.yaml").write_text(block("yaml"))
    Path("linux.jsonl").write_text(block("json"))
    generate, evaluate = block("bash").splitlines()
    assert main(shlex.split(generate)[1:]) == 0
    words = shlex.split(evaluate.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(pico_model_folder)))
    found = {}
    for part, name in ((",peft=my-adapter", "adapted"), ("", "base")):
        line = [word.replace(",peft=my-adapter", part).replace("eval-results", name) for word in words[1:]]
        subprocess.run([sys.executable, "-m", "lm_eval", *line, "--log_samples", "--device", "cpu"], check=True)
        (samples,) = Path(name).rglob("samples_linux_*.jsonl")
        rows = [json.loads(row) for row in samples.read_text().splitlines()]
        found[name] = [float(answer[0][0]) for row in rows for answer in row["resps"]]
    assert len(found["base"]) == 4 and found["base"] != found["adapted"]
    tokenizer = AutoTokenizer.from_pretrained(pico_model_folder)
    prompt = tokenizer("Which command lists files?\nAnswer:").input_ids
    whole = tokenizer("Which command lists files?\nAnswer: ls").input_ids
    for name in ("base", "adapted"):
        model: Any = LlamaForCausalLM.from_pretrained(pico_model_folder)
        scored = PeftModel.from_pretrained(model, "my-adapter") if name == "adapted" else model
        chances = scored.eval()(torch.tensor([whole])).logits[0].log_softmax(-1)
        own = sum(float(chances[place - 1, whole[place]]) for place in range(len(prompt), len(whole)))
        assert own == pytest.approx(found[name][0], abs=1e-3)
