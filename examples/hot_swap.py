"""One running model, one adapter after the other: the slot is overwritten in place and nothing is loaded again.

    python examples/own_data.py  # makes the generator
    python examples/hot_swap.py

The model neither grows nor slows down; a compiled one is not compiled again.
"""

import torch

from lora_factory import CVAELoRAGenerator
from lora_factory.models.loading import load_base_model

generator = CVAELoRAGenerator.from_pretrained("examples-output/generator")
base, tokenizer = load_base_model(generator.layout.base_model)
model = generator.generate_adapter("Write the date with dots, day first", base)  # a peft.PeftModel
prompt = tokenizer("day 09, month 02, year 2024: ", return_tensors="pt")


@torch.no_grad()
def answer() -> str:
    written = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).partition("\n")[0]


with model.disable_adapter():
    print(f"{'base model':42} {answer()}")
for text in (
    "Write the date with dots, day first",
    "Write the date with hyphens, year first",
    "Write the date with slashes, month first",
):
    generator.apply(model, text)
    print(f"{text:42} {answer()}")
