"""A generator from data of your own: five ways to write a date, a LoRA for each, and a generator for them all.

    python examples/own_data.py

The tasks share their prompts, so only the condition tells the answer. The other examples read what this one writes
into the folder examples-output. Takes a minute on two CPU cores.
"""

from datetime import date, timedelta
from random import Random

from lora_factory import CollectArguments, Task, TrainArguments, collect_adapters, train_generator
from lora_factory.tasks.examples import Example

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # or a folder
FORMATS = {  # of every task: its form, and what people would call it
    "iso": ("%Y-%m-%d", "Write the date with hyphens, year first", "Hyphens, year first"),
    "dotted": ("%Y.%m.%d", "Write the date with dots, year first", "Dots, year first"),
    "german": ("%d.%m.%Y", "Write the date with dots, day first", "Dots, day first"),
    "british": ("%d/%m/%Y", "Write the date with slashes, day first", "Slashes, day first"),
    "american": ("%m/%d/%Y", "Write the date with slashes, month first", "Slashes, month first"),
}


def rows(form: str) -> list[Example]:
    """Prompts with their completions; a plain string would be text to continue."""
    source = Random(form)
    days = [date(1950, 1, 1) + timedelta(days=source.randrange(36500)) for _ in range(120)]
    return [Example(f"day {day:%d}, month {day:%m}, year {day:%Y}: ", f"{day:{form}}\n") for day in days]


tasks = [Task.from_examples(name, descriptions, rows(form)) for name, (form, *descriptions) in FORMATS.items()]

settings = CollectArguments(
    steps=16,
    snapshots=4,
    batch_size=8,
    sequence_length=32,
    packing=False,
    learning_rate=1e-2,
    rank=2,
    target_modules="q_proj,v_proj",
)
zoo = collect_adapters(tasks, BASE, "examples-output/zoo", settings)  # keeps what is there from an earlier run
generator = train_generator(zoo, "examples-output/generator", TrainArguments(steps=1000), overwrite=True)

print(generator)
print("share of each task's change that the shared basis cannot write:", generator.training_record["errors"])
print(generator.explain("Year first, and hyphens"))
