"""Training on an imported zoo goes into a slot of its layout, however PEFT's configuration names the modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.models import TRAINING_TEXT
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from lora_factory.arguments import ImportArguments, TrainArguments
from lora_factory.collection.multitask import train_multitask
from lora_factory.tasks.task import Task
from lora_factory.training.train import train_generator, zoo_factory
from lora_factory.zoo.importing import import_adapters

HALF = {"layers.0.self_attn.q_proj": 6, "layers.1.self_attn.q_proj": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "layers_to_transform": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "exclude_modules": {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    "regex": {"target_modules": r"model\.layers\.1\.self_attn\.(q|v)_proj"},
    "rank_pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 8}},
    "the same size": {"target_modules": ["q_proj"], "rank_pattern": HALF, "alpha_pattern": HALF},
    "alpha_pattern": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 16}},
    "one path": {"target_modules": ["layers.1.mlp.up_proj", "layers.0.self_attn.v_proj"]},
    "rsLoRA": {"target_modules": ["q_proj"], "use_rslora": True},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_slot_is_the_layouts(
    shape: str, pico_model_folder: Path, pico_encoder_folder: Path, tmp_path: Path
) -> None:
    tasks = []
    for seed, (name, text) in enumerate(zip(("fox", "code"), TRAINING_TEXT, strict=False)):
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=4, lora_alpha=4, **SHAPES[shape])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            get_peft_model(LlamaForCausalLM.from_pretrained(pico_model_folder), config).save_pretrained(
                tmp_path / name
            )
        (tmp_path / name / "README.md").write_text(f"# x\n\nwrite the {name} text please\n")
        rows = [f"{number} {text}" for number in range(4)]
        tasks.append(Task.from_examples(name, [f"Write {name}."], rows, rows[:1], rows[:1]))
    settings = ImportArguments(base_model=str(pico_model_folder))
    zoo = import_adapters([tmp_path / "fox", tmp_path / "code"], tmp_path / "zoo", settings).zoo
    trainer = zoo_factory(zoo, None, Accelerator(cpu=True), zoo.layout, tasks)
    assert trainer.layout.modules == zoo.layout.modules
    assert train_multitask(trainer, tasks, seed=0, steps=1).shape == (zoo.layout.size,)
    arguments = TrainArguments(steps=2, text_encoder=str(pico_encoder_folder), width=32, base_steps=2)
    generator = train_generator(zoo, tmp_path / "generator", arguments, tasks=tasks)
    rank = max(module.rank for module in generator.layout.modules)
    assert generator.layout.modules == zoo.layout.with_rank(rank).modules
