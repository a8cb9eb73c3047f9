"""Every method of the digits benchmark, scored on seen and unseen sets of digits."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from lora_factory import AdapterZoo, CVAELoRAGenerator, train_generator
from lora_factory.adapters.attach import adapters_in_batch
from lora_factory.arguments import TrainArguments
from lora_factory.collection.multitask import train_multitask
from lora_factory.collection.trainer import LoRATrainer
from lora_factory.evaluation.baselines import PcaRidge, Retrieval, SimilarityMixture, other_task, uniform_soup
from lora_factory.models.image_encoders import image_vectors
from lora_factory.models.inputs import frozen
from lora_factory.tasks.images import ImageTask

TOGETHER = 16  # adapters that are scored in one batch
Method = Callable[[ImageTask], torch.Tensor]


class Study:
    """Seen and unseen tasks, the zoo of both, and every method as a function from a task to weights ``(D,)``."""

    def __init__(
        self,
        trainer: LoRATrainer,
        seen: Sequence[ImageTask],
        unseen: Sequence[ImageTask],
        zoo: AdapterZoo,
        folder: Path,
    ) -> None:
        self.trainer, self.seen, self.unseen, self.folder = trainer, list(seen), list(unseen), folder
        self.all, self.zoo = zoo, zoo.select([task.name for task in seen])
        rows = trainer.inputs.encode(seen[0].examples("test"))
        self.pixels = trainer.inputs.collate(rows, torch.device("cpu"))["pixel_values"]

    def rows(self, arguments: TrainArguments, multitask_steps: int) -> list[dict]:
        """Accuracies of all methods for one seed; as many seen tasks are scored as there are unseen ones."""
        methods = self.methods(arguments, multitask_steps)
        parts = {"seen": self.seen[: len(self.unseen)], "unseen": self.unseen}
        found = []
        for (method, condition), make in tqdm(methods.items(), desc=f"score seed {arguments.seed}"):
            accuracies = {part: self.accuracies(make, tasks) for part, tasks in parts.items()}
            means = {part: float(values.mean()) for part, values in accuracies.items()}
            lowest = float(accuracies["unseen"].min())
            found.append({"seed": arguments.seed, "method": method, "condition": condition, **means, "lowest": lowest})
        return found

    def methods(self, arguments: TrainArguments, multitask_steps: int) -> dict[tuple[str, str], Method]:
        """By name and condition; what has to be trained is trained here, once."""
        names = [task.name for task in self.seen]
        images = {task.name: task.images() for task in (*self.seen, *self.unseen)}
        generator = self.generator(arguments, {name: images[name] for name in names})
        ways = self.conditions(generator, images)
        weights = {name: self.zoo.snapshots(name) for name in names}
        means = torch.stack([rows.mean(0) for rows in weights.values()])
        soup, zeros = uniform_soup(weights), torch.zeros(self.zoo.layout.size)
        multitask = self.multitask(arguments.seed, multitask_steps)
        found: dict[tuple[str, str], Method] = {
            ("base model", ""): lambda task: zeros,
            ("original LoRA", ""): lambda task: self.all.final(task.name, "seed-0"),
            ("uniform soup", ""): lambda task: soup,
            ("multi-task LoRA", ""): lambda task: multitask,
        }
        for way, vectors in ways.items():
            joined = _joined(vectors, names)
            for name, kind in (("retrieval", Retrieval), ("mixture", SimilarityMixture), ("PCA + ridge", PcaRidge)):
                fitted = kind.fit(torch.stack([joined[task] for task in names]), means)
                found[name, way] = partial(
                    lambda fitted, joined, task: fitted.generate(joined[task.name]), fitted, joined
                )
            found["generated", way] = partial(_generated, generator, vectors)
        found["generated", "another task's text"] = lambda task: _generated(
            generator, ways["text"], task, name=other_task(task.name, list(images))
        )
        new_words = {task.name: _new_words(task) for task in (*self.seen, *self.unseen)}
        encoded = {"text": dict(zip(new_words, generator.text_encoder.encode(list(new_words.values())), strict=True))}
        found["generated", "text in new words"] = partial(_generated, generator, encoded)
        return found

    def conditions(self, generator: CVAELoRAGenerator, images: dict) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
        """Task vectors by way, modality and task: a sentence, up to 128 images of the set, and both."""
        tasks = (*self.seen, *self.unseen)
        texts = generator.text_encoder.encode([task.descriptions[0] for task in tasks])
        text = {task.name: row for task, row in zip(tasks, texts, strict=True)}
        image = {name: rows.mean(0) for name, rows in image_vectors(generator.image_encoder, images).items()}
        return {"text": {"text": text}, "images": {"image": image}, "both": {"text": text, "image": image}}

    def generator(self, arguments: TrainArguments, images: dict) -> CVAELoRAGenerator:
        folder = self.folder / f"generator-{arguments.seed}"
        if not (folder / "config.json").is_file():
            train_generator(self.zoo, folder, arguments, images=images, base_model=self.folder / "base")
        generator = CVAELoRAGenerator.from_pretrained(folder)
        self.generated_layout = generator.layout
        return generator

    def multitask(self, seed: int, steps: int) -> torch.Tensor:
        path = self.folder / f"multi-task-{seed}.safetensors"
        if not path.is_file():
            save_file({"weights": train_multitask(self.trainer, self.seen, seed=seed, steps=steps)}, path)
        return load_file(path)["weights"]

    def accuracies(self, make: Method, tasks: Sequence[ImageTask]) -> torch.Tensor:
        """The share of right answers of every task on the test images, shape ``(tasks,)``."""
        found = []
        for start in range(0, len(tasks), TOGETHER):
            group = tasks[start : start + TOGETHER]
            adapters = torch.stack([make(task) for task in group])
            layout = self.zoo.layout if adapters.shape[1] == self.zoo.layout.size else self.generated_layout
            rows = [[row.tokens[0] for row in self.trainer.inputs.encode(task.examples("test"))] for task in group]
            model = self.trainer.model
            with frozen(model), model.disable_adapter(), adapters_in_batch(model, layout, adapters):
                logits = model(pixel_values=self.pixels.repeat(len(group), 1, 1, 1)).logits
            right = logits.argmax(-1).view(len(group), -1) == torch.tensor(rows)
            found.append(right.float().mean(1))
        return torch.cat(found)


def _generated(generator: CVAELoRAGenerator, vectors: dict, task: ImageTask, name: str | None = None) -> torch.Tensor:
    conditions = {modality: rows[name or task.name] for modality, rows in vectors.items()}
    return generator.layout.flatten(generator.generate_state_dict(conditions=conditions))


def _joined(vectors: dict[str, dict[str, torch.Tensor]], names: list[str]) -> dict[str, torch.Tensor]:
    """One vector per task: the modalities side by side, each minus its mean and in units of its spread."""
    parts = []
    for rows in vectors.values():
        known = torch.stack([rows[name] for name in names])
        center = known.mean(0)
        scale = (known - center).norm(dim=1).mean()
        parts.append({name: (row - center) / scale for name, row in rows.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _new_words(task: ImageTask) -> str:
    """A question in a wording that the generator has not read."""
    listed = task.descriptions[0].removeprefix("Is the digit one of ").removesuffix("?")
    return f"Does the picture show {listed.replace(' and ', ' or ')}?"
