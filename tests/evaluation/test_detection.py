"""Detection: average precision as pycocotools has it, and boxes that a model writes with its certainty."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_models import make_tokenizer, tiny_florence

from lora_factory.errors import LoraFactoryError
from lora_factory.evaluation.detection import Detection, detect, mean_average_precision, score_detections
from lora_factory.models.inputs import ImageInputs
from lora_factory.models.loading import load_base_model, load_processor
from lora_factory.tasks.boxes import Box, boxes_to_text
from lora_factory.tasks.examples import ImageExample

Truth = list[tuple[str, Box]]


def random_truth(images: int, labels: str, seed: int) -> list[Truth]:
    source = random.Random(seed)
    truth = []
    for _ in range(images):
        corners = [(source.uniform(0, 300), source.uniform(0, 300)) for _ in range(source.randint(1, 4))]
        boxes = [Box(x, y, x + source.uniform(5, 200), y + source.uniform(5, 200)) for x, y in corners]
        truth.append([(source.choice(labels), box) for box in boxes])
    return truth


def perturbed(truth: list[Truth], seed: int) -> list[list[Detection]]:
    """Boxes moved by a few pixels, some missing, some of another label, some of nothing."""
    source = random.Random(seed)
    found = []
    for pairs in truth:
        rows = []
        for label, box in pairs:
            moved = sorted(value + source.gauss(0, 8) for value in box[::2])
            high = sorted(value + source.gauss(0, 8) for value in box[1::2])
            kind = source.choice("abc") if source.random() < 0.2 else label
            if source.random() < 0.9:
                rows.append(Detection(kind, Box(moved[0], high[0], moved[1], high[1]), source.random()))
        rows.append(Detection(source.choice("abc"), Box(1, 1, 50, 50), source.random()))
        found.append(rows)
    return found


def pycocotools_figures(found: list[list[Detection]], truth: list[Truth]) -> dict[str, float]:
    labels = sorted({label for pairs in truth for label, _ in pairs})

    def entry(number: int, image: int, label: str, box: Box) -> dict[str, object]:
        size = [box.x1, box.y1, box.x2 - box.x1, box.y2 - box.y1]
        area = size[2] * size[3]
        return {"id": number, "image_id": image, "category_id": labels.index(label), "bbox": size, "area": area}

    pairs = [(image, label, box) for image, row in enumerate(truth) for label, box in row]
    rows = [(image, one) for image, row in enumerate(found) for one in row if one.label in labels]
    reference = COCO()
    reference.dataset = {
        "images": [{"id": image} for image in range(len(truth))],
        "categories": [{"id": index} for index in range(len(labels))],
        "annotations": [entry(number + 1, *pair) | {"iscrowd": 0} for number, pair in enumerate(pairs)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        reference.createIndex()
        results = [
            entry(n + 1, image, one.label, one.box) | {"score": one.score} for n, (image, one) in enumerate(rows)
        ]
        judge = COCOeval(reference, reference.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    figures = dict(zip(("map", "map_50", "map_75"), judge.stats.tolist(), strict=False))
    for index, label in enumerate(labels):
        precision = judge.eval["precision"][:, :, index, 0, -1]
        figures |= {f"map/{label}": precision.mean(), f"map_50/{label}": precision[0].mean()}
        figures[f"map_75/{label}"] = precision[5].mean()
    return figures


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_that_of_pycocotools(seed: int) -> None:
    truth = random_truth(12, "abc" if seed else "ab", seed)
    found = perturbed(truth, seed)
    figures = mean_average_precision(found, truth)
    expected = pycocotools_figures(found, truth)
    assert 0.05 < expected["map_75"] < expected["map_50"] < 0.99
    assert figures == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("boxes", [5, 10, 20])
def test_a_recall_on_a_threshold_counts_as_in_pycocotools(boxes: int) -> None:
    truth: list[Truth] = [[("a", Box(0, 0, 10 + number, 20))] for number in range(boxes)]
    found = [[Detection("a", row[0][1], 0.9 - number / 100)] for number, row in enumerate(truth)]
    found[boxes // 2] = [Detection("a", Box(200, 200, 220, 220), 0.95)]
    figures = mean_average_precision(found, truth)
    assert figures == pytest.approx(pycocotools_figures(found, truth), abs=1e-6)


def test_perfect_boxes_and_none() -> None:
    truth = random_truth(4, "ab", 0)
    perfect = [[Detection(label, box, 0.5) for label, box in row] for row in truth]
    figures = mean_average_precision(perfect, truth)
    assert figures == pytest.approx(dict.fromkeys(figures, 1.0))
    assert "map_50/b" in figures
    assert set(mean_average_precision([[]] * 4, truth).values()) == {0.0}
    with pytest.raises(LoraFactoryError, match="no box in 1 references"):
        mean_average_precision([[]], [[]])
    with pytest.raises(LoraFactoryError, match="1 predictions and 4 references"):
        mean_average_precision([[]], truth)


@pytest.fixture(scope="module")
def florence_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_florence(tmp_path_factory.mktemp("models") / "pico-florence", ["dog cat Locate the objects."])


class _Writes:
    """A model that writes the same answer to every question, each token with a given probability."""

    device = torch.device("cpu")
    training = False

    def __init__(self, tokens: list[int], chances: list[float]) -> None:
        self.tokens, self.chances = tokens, chances

    def eval(self) -> None: ...

    def train(self, mode: bool) -> None: ...

    def generate(self, input_ids: torch.Tensor, **options: object) -> SimpleNamespace:
        rows = torch.tensor([[2, *self.tokens]]).expand(len(input_ids), -1)
        return SimpleNamespace(sequences=rows, scores=None)

    def compute_transition_scores(self, sequences: torch.Tensor, scores: None, **options: object) -> torch.Tensor:
        return torch.tensor([self.chances]).log().expand(len(sequences), -1)


@pytest.mark.parametrize("locations", [True, False], ids=["location tokens", "locations spelled out"])
def test_boxes_are_read_with_the_certainty_of_their_tokens(locations: bool) -> None:
    tokenizer, size = make_tokenizer(["dog cat"], image=locations), (200, 100)
    boxes = [Box(20, 10, 60, 50), Box(1, 1, 3, 5)]
    parts = ["dog", *(boxes_to_text("", [box], size) for box in boxes), "!"]
    pairs = [
        (token, chance)
        for part, chance in zip(parts, (0.1, 0.5, 0.25, 0.9), strict=True)
        for token in tokenizer(part, add_special_tokens=False).input_ids
    ]
    model = _Writes([0, *(token for token, _ in pairs), 2], [1.0, *(chance for _, chance in pairs), 1.0])
    inputs = SimpleNamespace(
        tokenizer=tokenizer, questions=lambda rows, device: {"input_ids": torch.zeros(len(rows), 1)}
    )
    example = ImageExample.of_boxes(Image.new("RGB", size), "dog", boxes)
    found = detect(model, inputs, [example] * 3, batch_size=2)
    assert len(found) == 3
    assert [one.label for one in found[2]] == ["dog", "dog"]
    assert [one.score for one in found[2]] == pytest.approx([0.5, 0.25])
    for one, box in zip(found[2], boxes, strict=True):
        assert one.box == pytest.approx(box, abs=0.11)
    assert score_detections(found, [example] * 3)["map_75"] == pytest.approx(1.0)


def test_a_real_model_answers(florence_folder: Path) -> None:
    model, _ = load_base_model(florence_folder)
    example = ImageExample.of_boxes(Image.new("RGB", (9, 9)), "dog", [(1, 1, 5, 5)])
    found = detect(model, ImageInputs(load_processor(florence_folder), True), [example] * 2, max_new_tokens=12)
    assert found[0] == found[1]
    assert score_detections(found, [example] * 2)["map"] <= 1
