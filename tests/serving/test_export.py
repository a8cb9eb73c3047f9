"""Adapters as GGUF files and as merged models."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers.models import attach, lora_config, save_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lora_factory.adapters.folder import load_adapter
from lora_factory.cli import main
from lora_factory.errors import LoraFactoryError, StorageError
from lora_factory.serving.export import export_gguf, export_merged

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# llama.cpp's names, as its documentation has them
NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
TOKENS = torch.arange(3, 19)[None]


def adapter_folder(base: Path, folder: Path, **options: Any) -> Path:
    """The folder of a random adapter of the model in `base`."""
    model, layout = attach(AutoModelForCausalLM.from_pretrained(base), lora_config(**options))
    model.peft_config["default"].base_model_name_or_path = str(base)
    return save_adapter(model, layout, 0, folder)


def contents(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor.data for tensor in reader.tensors}


def rows_of_llama_cpp(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A weight of q_proj or k_proj as llama.cpp has it: row 2i and 2i + 1 of a head are i and i + half there."""
    size = len(weight) // heads
    order = [
        head * size + half * size // 2 + row for head in range(heads) for row in range(size // 2) for half in (0, 1)
    ]
    return weight[order]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 3, "lora_alpha": 7, "target_modules": LINEAR},
        {"r": 4, "lora_alpha": 3, "target_modules": LINEAR, "use_rslora": True},
        {"target_modules": LINEAR, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 9, "down_proj": 1.5}},
        {"target_modules": LINEAR, "rank_pattern": {"k_proj": 5}, "use_rslora": True},
    ],
    ids=["q and v", "all", "rsLoRA", "patterns", "rsLoRA with patterns"],
)
def test_what_llama_cpp_adds_is_what_peft_adds(
    pico_model_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    adapter = adapter_folder(pico_model_folder, tmp_path / "adapter", **options)
    fields, tensors = contents(export_gguf(adapter, tmp_path / "adapter.gguf"))
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    base = LlamaForCausalLM.from_pretrained(pico_model_folder)
    before = {name: module.weight.clone() for name, module in base.named_modules() if name.endswith(tuple(LINEAR))}
    merged = dict(PeftModel.from_pretrained(base, adapter).merge_and_unload().named_modules())
    targets = options.get("target_modules", ["q_proj", "v_proj"])
    assert len(tensors) == 2 * 2 * len(targets)
    for path, weight in before.items():
        last, block = path.rpartition(".")[2], path.split(".")[2]
        if last not in targets:
            continue
        name = f"blk.{block}.{NAMES[last]}.weight"
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert a.dtype == b.dtype == np.float32
        # llama.cpp: alpha / rank, the rank being B's number of columns
        added = torch.from_numpy(b @ a) * fields["adapter.lora.alpha"] / b.shape[1]
        expected = merged[path].weight - weight
        if heads := {"q_proj": 4, "k_proj": 2}.get(last):
            expected = rows_of_llama_cpp(expected, heads)
        torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)


def test_plain_lora_is_written_to_the_bit(pico_model_folder: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(pico_model_folder, tmp_path / "adapter", r=3, lora_alpha=7, target_modules=["v_proj"])
    fields, tensors = contents(export_gguf(adapter, tmp_path / "adapter.gguf"))
    _, weights = load_adapter(adapter)
    assert fields["adapter.lora.alpha"] == 7.0
    for layer in (0, 1):
        for ours, theirs in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
            weight = weights[f"base_model.model.model.layers.{layer}.self_attn.v_proj.{ours}.weight"]
            assert np.array_equal(tensors[f"blk.{layer}.attn_v.weight.{theirs}"], weight.numpy())


def test_qwen_keeps_the_order_of_its_rows(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_hidden_layers=2, **sizes)).save_pretrained(tmp_path / "base")
    adapter = adapter_folder(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"])
    fields, tensors = contents(export_gguf(adapter, tmp_path / "adapter.gguf"))
    assert fields["general.architecture"] == "qwen2"
    weight = load_adapter(adapter)[1]["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    assert np.array_equal(tensors["blk.1.attn_q.weight.lora_b"], weight.numpy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens cannot be exported: in llama.cpp embeddings"),
        ({"target_modules": ["mlp.extra"]}, r"extra cannot be exported: llama.cpp has no such tensor"),
    ],
)
def test_modules_that_llama_cpp_cannot_adapt_are_named(
    pico_model: LlamaForCausalLM, pico_model_folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    pico_model.model.layers[0].mlp.extra = torch.nn.Linear(32, 4)
    model, layout = attach(pico_model, lora_config(**options))
    model.peft_config["default"].base_model_name_or_path = str(pico_model_folder)
    adapter = save_adapter(model, layout, 0, tmp_path / "adapter")
    with pytest.raises(LoraFactoryError, match=message):
        export_gguf(adapter, tmp_path / "adapter.gguf")
    assert not list(tmp_path.glob("*gguf*"))


def test_other_base_models_are_refused_in_words(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4)).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        LoraFactoryError, match=r"is a 'gpt2'; adapters of these can become GGUF files: .*llama.*qwen3"
    ):
        export_gguf(tmp_path / "adapter", tmp_path / "adapter.gguf")


def test_a_base_with_other_heads_is_refused(pico_model_folder: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(pico_model_folder, tmp_path / "adapter")
    other = LlamaForCausalLM.from_pretrained(pico_model_folder).config
    other.num_attention_heads, other.num_key_value_heads, other.hidden_size = 3, 3, 33
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(LoraFactoryError, match=r"q_proj has 32 outputs, which the base model's 3 heads cannot share"):
        export_gguf(adapter, tmp_path / "adapter.gguf", base_model=tmp_path / "other")


def test_nothing_is_replaced(pico_model_folder: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(pico_model_folder, tmp_path / "adapter")
    (tmp_path / "mine.gguf").write_text("mine")
    with pytest.raises(LoraFactoryError, match="already there and is not replaced"):
        export_gguf(adapter, tmp_path / "mine.gguf")
    assert (tmp_path / "mine.gguf").read_text() == "mine"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    with pytest.raises(LoraFactoryError, match="already there"):
        export_merged(adapter, tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["mine"]


@torch.no_grad()
def test_a_merged_folder_is_a_model_of_its_own(
    pico_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_folder(pico_model_folder, tmp_path / "adapter", target_modules=LINEAR)
    expected = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(pico_model_folder), adapter)(TOKENS).logits
    words = ["export", "--adapter", str(adapter), "--format", "merged", "--output", str(tmp_path / "merged")]
    assert main(words) == 0
    assert f"wrote {tmp_path / 'merged'}" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    texts = [
        AutoTokenizer.from_pretrained(folder)("a b").input_ids for folder in (pico_model_folder, tmp_path / "merged")
    ]
    assert texts[0] == texts[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


@torch.no_grad()
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_weight_that_input_and_output_share_is_merged_where_the_adapter_is(
    pico_model_folder: Path, tmp_path: Path, module: str
) -> None:
    config = LlamaConfig.from_pretrained(pico_model_folder, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(pico_model_folder).save_pretrained(tmp_path / "base")
    adapter = adapter_folder(tmp_path / "base", tmp_path / "adapter", target_modules=[module])
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    before, expected = plain(TOKENS).logits, PeftModel.from_pretrained(plain, adapter)(TOKENS).logits
    assert (expected - before).abs().max() > 0.01
    merged = AutoModelForCausalLM.from_pretrained(export_merged(adapter, tmp_path / "merged"))
    torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_command_writes_a_gguf_file(
    pico_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_folder(pico_model_folder, tmp_path / "adapter")
    words = ["export", "--adapter", str(adapter), "--output", str(tmp_path / "new" / "adapter.gguf")]
    assert main(words) == 0
    assert len(contents(tmp_path / "new" / "adapter.gguf")[1]) == 8
    assert main(words) == 2
    assert "already there" in capsys.readouterr().err


def test_an_overflow_in_half_precision_is_no_broken_model(pico_model_folder: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(pico_model_folder).half().save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(pico_model_folder).save_pretrained(tmp_path / "half")
    adapter = adapter_folder(tmp_path / "half", tmp_path / "adapter", lora_alpha=1e7)
    with pytest.raises(LoraFactoryError, match="cannot merge"):
        export_merged(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_file_that_does_not_fit_is_an_error_and_gone(pico_model_folder: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(pico_model_folder, tmp_path / "adapter")
    whole = export_gguf(adapter, tmp_path / "whole.gguf").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (600, whole // 2, whole - 100, whole - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # as a full disk
        try:
            with pytest.raises(StorageError, match=r"cannot write .*cut\.gguf"):
                export_gguf(adapter, tmp_path / "cut.gguf")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "whole.gguf"]
