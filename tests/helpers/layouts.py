"""Layouts of adapters on many architectures."""

from __future__ import annotations

import torch
from peft import LoraConfig
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(layers: int = 2) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=16))


class Convolutions(nn.Module):
    """Two convolutions of one kind and different widths, one in another place, one 1-D."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, (1, 2))])
        self.head = nn.Conv2d(4, 5, 1)
        self.line = nn.Conv1d(5, 6, 3)


CASES = {
    "q/v only": (llama, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])),
    "all-linear": (llama, LoraConfig(r=3, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")),
    "embeddings": (llama, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj", "lm_head"])),
    "Conv1D": (gpt2, LoraConfig(r=2, target_modules=["c_attn", "c_proj", "wte"], fan_in_fan_out=True)),
    "Conv2d": (Convolutions, LoraConfig(r=2, target_modules=["blocks.0", "blocks.1", "head", "line"])),
    "mixed ranks": (
        llama,
        LoraConfig(
            r=2,
            lora_alpha=6,
            target_modules=LINEAR,
            rank_pattern={"q_proj": 5, "layers.1.mlp.down_proj": 1},
            alpha_pattern={r"layers\.0\.self_attn\.[kv]_proj": 7.5},
        ),
    ),
    "rsLoRA": (llama, LoraConfig(r=5, lora_alpha=3, target_modules=["o_proj"], use_rslora=True)),
}


def randomise(state_dict, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator) for key, value in state_dict.items()}
