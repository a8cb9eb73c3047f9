"""Which description gives the best adapter? Perplexity on test data, with no folder written between.

    python examples/own_data.py  # makes the generator
    python examples/score_descriptions.py

The command for it: lora-factory evaluate --generator FOLDER --text "..." --text "..." --tasks tasks.yaml
"""

from datetime import date, timedelta

from lora_factory import CVAELoRAGenerator, Task, evaluate_texts
from lora_factory.tasks.examples import Example

FORMS = {"year-first": "%Y-%m-%d", "day-first": "%d.%m.%Y"}
DAYS = [date(2001, 1, 1) + timedelta(days=97 * number) for number in range(60)]


def task(name: str, form: str) -> Task:
    """Texts that no LoRA has learned from; only the test split is read."""
    rows = [Example(f"day {day:%d}, month {day:%m}, year {day:%Y}: ", f"{day:{form}}\n") for day in DAYS]
    return Task.from_examples(name, [name], rows[:20], rows[20:40], rows[40:])


generator = CVAELoRAGenerator.from_pretrained("examples-output/generator")
texts = ["Write the date with hyphens, year first", "Write the date with dots, day first", "Write a poem"]
scores = evaluate_texts(generator, texts, [task(name, form) for name, form in FORMS.items()])

print(f"{'perplexity, lower is better':42}" + "".join(f"{name:>12}" for name in FORMS))
for name, by_task in scores.items():
    print(f"{name:42}" + "".join(f"{score.perplexity:12.2f}" for score in by_task.values()))
