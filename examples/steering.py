"""Between two texts and beyond: what each text would change is multiplied by its weight, and added up.

    python examples/own_data.py  # makes the generator
    python examples/steering.py

Weights may be negative, and need not add up to 1.
"""

import torch

from lora_factory import CVAELoRAGenerator
from lora_factory.models.loading import load_base_model

YEAR_FIRST, DAY_FIRST = "Write the date with dots, year first", "Write the date with dots, day first"

generator = CVAELoRAGenerator.from_pretrained("examples-output/generator")
base, tokenizer = load_base_model(generator.layout.base_model)
model = generator.combine({YEAR_FIRST: 0.5, DAY_FIRST: 0.5}, base)  # a peft.PeftModel

prompt = tokenizer("day 09, month 02, year 2024: ", return_tensors="pt")
first = {"year first": "2", "day first": "0"}  # how the two answers begin
for share in (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5):
    generator.apply(model, {YEAR_FIRST: 1 - share, DAY_FIRST: share})  # takes the same weights, in place
    with torch.no_grad():
        odds = model(**prompt).logits[0, -1].softmax(-1)
    told = {name: float(odds[tokenizer.encode(token)[-1]]) for name, token in first.items()}
    print(f"{share:5.2f} of day first: " + ", ".join(f"{name} {odd:.0%}" for name, odd in told.items()))
