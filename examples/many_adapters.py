"""Many adapters from a list of texts, in one pass: PEFT folders, and GGUF files for llama.cpp and Ollama.

    python examples/own_data.py  # makes the generator
    python examples/many_adapters.py

A file goes to `llama-cli -m base.gguf --lora FILE`, or into Ollama's Modelfile as `ADAPTER FILE`.
"""

from lora_factory import CVAELoRAGenerator
from lora_factory.serving.export import export_gguf

generator = CVAELoRAGenerator.from_pretrained("examples-output/generator")  # or "user/generator" on the Hub
texts = {
    "year-first": "Write the date with hyphens, year first",
    "day-first": "Write the date with dots, day first",
    "month-first": "Write the date with slashes, month first",
}

# On disk, of rank 10, that of all tasks together; rank=2 makes smaller files, and generation.json says what is lost.
folders = generator.save_adapters(texts, "examples-output/adapters", overwrite=True)
for folder in folders:
    file = folder.with_suffix(".gguf")
    file.unlink(missing_ok=True)  # export replaces nothing
    export_gguf(folder, file)
    print(f"{folder} and {file.name}, {file.stat().st_size:,} bytes")

# In memory, one after the other: thousands of texts take no more room than one.
for text, weights in zip(texts.values(), generator.generate_adapters(texts.values()), strict=True):
    print(f"{text}: {len(weights)} tensors, {sum(weight.numel() for weight in weights.values()):,} weights")
