"""Detection tasks: one for every category of a COCO data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.examples import DETECTION_PROMPT
from lora_factory.tasks.image_sources import CocoSource, read_coco
from lora_factory.tasks.task import Task
from lora_factory.utils.paths import task_names

DESCRIPTIONS = (  # the first is the paper's (Table 6), the last the one of its Figure 5
    "Detect the {} in the picture.",
    "Find every {} in the image and draw a box around it.",
    "Locate each {} in a photo.",
    "Detecting {}s in the image",
)


def detection_tasks(
    images: str | Path | Mapping[str, str],
    annotations: str | Path | Mapping[str, str],
    categories: Sequence[str] | None = None,
    *,
    descriptions: Sequence[str] = DESCRIPTIONS,
    prompt: str = DETECTION_PROMPT,
    license: str | None = None,
) -> list[Task]:
    """One task per category of a detection data set in COCO's format, as in the paper: its images, its boxes alone.

    Args:
        images: The folder of images; with a mapping, one for each of "train", "validation" and "test".
        annotations: The COCO file; with a mapping, one for each split. Missing splits are carved out of train.
        categories: Names of categories; default: all that an image of the train split shows.
        descriptions: Templates in which ``{}`` stands for the category.
        prompt: What the model is asked.
        license: Licence of the data.

    Raises:
        LoraFactoryError: The annotations cannot be read, or there is no such category.
    """
    files = annotations if isinstance(annotations, Mapping) else {"train": str(annotations)}
    if "train" not in files:
        raise LoraFactoryError(f"annotations={annotations!r} name no file of the train split; give one to learn from")
    known = {name: boxes for name, boxes in read_coco(files["train"]).boxes.items() if boxes}
    if missing := [name for name in categories or () if name not in known]:
        raise LoraFactoryError(
            f"no image of {files['train']} shows the category {missing[0]!r}; choose of {', '.join(known)}"
        )
    if not known:
        raise LoraFactoryError(f"no image of {files['train']} shows a category; annotate some")
    path = images if isinstance(images, Mapping) else str(images)
    names = task_names(list(known))
    return [
        Task(
            names[category],
            tuple(text.replace("{}", category) for text in descriptions),
            CocoSource(path, files, category, prompt),
            license,
        )
        for category in categories or known
    ]
