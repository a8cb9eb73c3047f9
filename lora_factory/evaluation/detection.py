"""Object detection as text: parse the boxes that a model writes and score them by mean average precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_factory.errors import LoraFactoryError
from lora_factory.models.inputs import ImageInputs, frozen
from lora_factory.tasks.boxes import Box, text_to_boxes
from lora_factory.tasks.examples import ImageExample
from lora_factory.utils.extras import require

_IOU_50, _IOU_75 = 0, 5  # their indices among COCO's thresholds


class Detection(NamedTuple):
    """A labelled box that a model wrote.

    Attributes:
        label: The label that the model wrote.
        box: Corners in pixels.
        score: Geometric mean of the probabilities of the box's location tokens, at most 1.
    """

    label: str
    box: Box
    score: float


def mean_average_precision(
    found: Sequence[Sequence[Detection]], truth: Sequence[Sequence[tuple[str, Box]]]
) -> dict[str, float]:
    """COCO's mean average precision, overall and per label, as pycocotools computes it.

    Args:
        found: The detections of every image. Those of a label that no image in ``truth`` has change nothing, as in
            COCO.
        truth: The annotated ``(label, box)`` pairs of every image, in the order of ``found``.

    Returns:
        ``map``, the mean over intersections over union of 0.5 to 0.95; ``map_50`` and ``map_75`` at 0.5 and 0.75; and
        each of them per label, for example ``map_50/dog``.

    Raises:
        LoraFactoryError: When the numbers of images differ, no image has a box, or a package is missing.
    """
    if len(found) != len(truth):
        raise LoraFactoryError(f"{len(found)} predictions and {len(truth)} references; give one reference per image")
    require("images", "mean average precision", "torchmetrics", "faster_coco_eval")
    from torchmetrics.detection import MeanAveragePrecision as Backend

    labels = sorted({label for row in truth for label, _ in row})
    if not labels:
        raise LoraFactoryError(f"no box in {len(truth)} references; mean average precision needs one")
    number = {label: index for index, label in enumerate(labels)}
    backend = Backend(
        box_format="xyxy",
        backend="faster_coco_eval",
        extended_summary=True,
        # pycocotools' own; the defaults are rounded to 32 bits, which moves a recall of 0.8 below its threshold
        iou_thresholds=numpy.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=numpy.linspace(0.0, 1.0, 101).tolist(),
    )
    for boxes, row in zip(found, truth, strict=True):
        known = [one for one in boxes if one.label in number]
        prediction = {
            "boxes": torch.tensor([one.box for one in known], dtype=torch.float64).reshape(-1, 4),
            "scores": torch.tensor([one.score for one in known], dtype=torch.float64),
            "labels": torch.tensor([number[one.label] for one in known], dtype=torch.long),
        }
        reference = {
            "boxes": torch.tensor([box for _, box in row], dtype=torch.float64).reshape(-1, 4),
            "labels": torch.tensor([number[label] for label, _ in row], dtype=torch.long),
        }
        backend.update([prediction], [reference])
    result = backend.compute()
    figures = {name: float(result[name]) for name in ("map", "map_50", "map_75")}
    for index, label in enumerate(labels):
        precision = result["precision"][:, :, index, 0, -1]  # all areas, at most 100 detections per image
        figures[f"map/{label}"] = float(precision.mean())
        figures[f"map_50/{label}"] = float(precision[_IOU_50].mean())
        figures[f"map_75/{label}"] = float(precision[_IOU_75].mean())
    return figures


def detect(
    model: PreTrainedModel | PeftModel,
    inputs: ImageInputs,
    examples: Sequence[ImageExample],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 256,
) -> list[list[Detection]]:
    """Let a model write the boxes of images by greedy decoding, and parse them.

    Args:
        model: An image-text-to-text model, with or without an adapter.
        inputs: The model's processor, for example a ``LoRATrainer``'s ``inputs``.
        examples: Images with their sizes and prompts; annotated boxes are not read.
        batch_size: Images per forward pass.
        max_new_tokens: Number of tokens after which an answer is cut off.

    Returns:
        The detections of every image, in the order in which the model wrote them.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    found = []
    with frozen(model):
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            output = base.generate(
                **inputs.questions(batch, base.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
                output_scores=True,
            )
            chances = base.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
            written = output.sequences[:, -chances.shape[1] :]
            for example, tokens, chance in zip(batch, written, chances, strict=True):
                size = example.size if example.boxes else example.image.size
                found.append(_read_boxes(inputs.tokenizer, tokens, chance, size))
    return found


def score_detections(found: Sequence[Sequence[Detection]], examples: Sequence[ImageExample]) -> dict[str, float]:
    """The mean average precision of detections on examples with annotated boxes; see `mean_average_precision`."""
    return mean_average_precision(found, [[(example.label, box) for box in example.boxes] for example in examples])


def _read_boxes(
    tokenizer: PreTrainedTokenizerBase, tokens: Tensor, chances: Tensor, size: tuple[int, int]
) -> list[Detection]:
    """Parse the boxes of one answer; a location is one token, or several where the tokenizer has no token for it."""
    control = {token for token in tokenizer.all_special_ids if not str(tokenizer.decode([token])).startswith("<loc_")}
    pieces = ["" if token in control else str(tokenizer.decode([token])) for token in tokens.tolist()]
    ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
    starts = ends - torch.tensor([len(piece) for piece in pieces])
    detections = []
    for box in text_to_boxes("".join(pieces), size):
        inside = (ends > box.start) & (starts < box.end)
        detections.append(Detection(box.label, box.box, float(chances.cpu()[inside].mean().exp())))
    return detections
