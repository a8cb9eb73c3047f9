"""A generator from LoRAs that you have: PEFT folders or Hub ids of one base model, of any rank and scaling.

    python examples/own_data.py  # makes the adapters that stand for yours
    python examples/existing_adapters.py

An adapter that cannot be taken in is refused with its reason, and does not stop the others.
"""

from lora_factory import TrainArguments, train_generator
from lora_factory.zoo import AdapterSource, import_adapters

adapters = [  # where, the name of the task, and what it is; without the last, the model card's first paragraph
    AdapterSource("examples-output/zoo/iso/seed-0", "iso", ("Write the date with hyphens, year first",)),
    AdapterSource("examples-output/zoo/german/seed-0", "german", ("Write the date with dots, day first",)),
    AdapterSource("examples-output/zoo/british/seed-0", "british", ("Write the date with slashes, day first",)),
]
report = import_adapters(adapters, "examples-output/imported-zoo")
for source, reason in report.refused.items():
    print(f"not imported: {source}: {reason}")

settings = TrainArguments(steps=1000)
generator = train_generator(report.zoo, "examples-output/imported-generator", settings, overwrite=True)
folder = generator.save_adapter("Dots, day first", "examples-output/dots", overwrite=True)
print(f"{folder} is a plain PEFT folder")
# Above 0.2 the generator cannot write the adapter well: give a higher rank=, or leave the adapter out.
print("share of each adapter that the basis cannot write:", generator.training_record["errors"])
