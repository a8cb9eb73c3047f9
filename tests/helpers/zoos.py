"""Zoos of random weights."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.zoo.run_record import RunRecord

BASE, COMMIT = "someone/pico", "0123abc"


def pico() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


def layout_of(**options) -> AdapterLayout:
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(pico(), LoraConfig(**options))
    state_dict = get_peft_model_state_dict(model, save_embedding_layers=False)
    config = model.peft_config["default"]
    return AdapterLayout.from_state_dict(state_dict, config, base_model=BASE, base_revision=COMMIT)


def record_of(task="python", run="seed-0", count=3, **changes) -> RunRecord:
    values = {
        "task": task,
        "run": run,
        "descriptions": (f"Write {task}", f"{task} é"),
        "seed": 0,
        "base_model": BASE,
        "base_revision": COMMIT,
        "steps": 10,
        "snapshot_steps": tuple(range(11 - count, 11)),
        "validation_losses": (1.5,) * count,
        "train_tokens": 640,
        "data_fingerprint": "f" * 64,
        "versions": {"torch": "2"},
        "arguments": {"rank": 2, "learning_rate": 1e-3},
    }
    return RunRecord(**(values | changes))


def snapshots_of(layout, count=3, seed=0):
    return torch.randn(count, layout.size, generator=torch.Generator().manual_seed(seed))
