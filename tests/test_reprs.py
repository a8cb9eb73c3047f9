"""Zoos, generators and tasks say what they are, as text and as HTML that no name can break."""

from __future__ import annotations

import shutil
from pathlib import Path

from helpers.generators import make_generator
from helpers.models import attach
from helpers.training import make_zoo
from transformers import LlamaForCausalLM

from lora_factory import Task
from lora_factory.tasks.text import DataSource


def test_a_zoo(pico_model: LlamaForCausalLM, tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "<b>zoo", attach(pico_model)[1])
    folder = tmp_path / "<b>zoo"
    assert repr(zoo) == (
        f"AdapterZoo(folder: {folder}, tasks: 4 (code; law; prose; ...), base model: pico/llama, rank: 2, modules: 4, "
        "weights of an adapter: 448)"
    )
    html = zoo._repr_html_()
    assert "<b>" not in html and "&lt;b&gt;zoo</td>" in html and "<th>tasks</th>" in html
    shutil.rmtree(folder)
    assert "unreadable" in repr(zoo)


def test_a_generator(pico_model: LlamaForCausalLM, pico_encoder_folder: Path) -> None:
    generator = make_generator(attach(pico_model)[1], pico_encoder_folder)
    text = repr(generator)
    assert text.startswith("CVAELoRAGenerator(base model: pico/llama, rank: 2, modules: 4")
    assert "known tasks: 3 (code; law; poems)" in text and "\n" not in text
    generator.config.tasks[0]["name"] = "<script>alert(1)</script>\u202e"
    assert "<script>" not in generator._repr_html_() and "\u202e" not in generator._repr_html_()


def test_a_task() -> None:
    task = Task.from_examples("law", ("Legal notices", "Licences"), [f"Clause {n}." for n in range(30)], license="MIT")
    assert repr(task) == (
        "Task(name: law, description: Legal notices (and 1 more), data: 24 train, 3 validation, 3 test examples, "
        "licence: MIT)"
    )
    other = Task("law", ("A <i>tag</i> & more",), DataSource("rows.jsonl"), metric="exact_match")
    assert other._repr_html_() == (
        "<table><caption>Task</caption><tr><th>name</th><td>law</td></tr><tr><th>description</th>"
        "<td>A &lt;i&gt;tag&lt;/i&gt; &amp; more</td></tr><tr><th>data</th><td>rows.jsonl</td></tr>"
        "<tr><th>metric</th><td>exact_match</td></tr></table>"
    )
