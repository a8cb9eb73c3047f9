"""Images with prompts and answers: what comes out of files, of COCO annotations and of data sets, good and broken."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from helpers.images import RED, animals, write_coco, write_image
from PIL import Image

from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.boxes import Box
from lora_factory.tasks.coco_tasks import detection_tasks
from lora_factory.tasks.examples import ImageExample, StoredImage
from lora_factory.tasks.image_sources import CocoSource, ImageRows
from lora_factory.tasks.task import Task
from lora_factory.tasks.task_file import load_tasks, save_tasks
from lora_factory.tasks.text import DataSource


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    ending = "jpg" if mode == "CMYK" else "png"
    image = StoredImage.of(write_image(tmp_path / f"a.{ending}", mode)).open()
    assert (image.mode, image.size) == ("RGB", (40, 20))
    if mode == "RGBA":  # wholly transparent: the page behind it
        assert image.getpixel((0, 0)) == (255, 255, 255)
    if mode == "RGB":
        assert image.getpixel((0, 0)) == RED


def test_sixteen_bits_keep_their_shades(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 40 * 20).reshape(20, 40).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    shades = np.asarray(StoredImage.of(tmp_path / "deep.png").open())[..., 0]
    assert np.abs(shades - values / 257).max() <= 1


def test_a_turned_photo_is_put_upright_without_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    stored = StoredImage.of(write_image(tmp_path / "a.jpg", exif=exif))
    image = stored.open()
    assert image.size == stored.size == (20, 40)
    assert not image.getexif()
    assert "exif" not in image.info


@pytest.mark.parametrize("content", [b"", b"no image", None, "cut"], ids=["empty", "text", "missing", "cut short"])
def test_a_broken_image_is_named(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "broken.png"
    if content == "cut":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[:2000]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LoraFactoryError, match=r"broken\.png"):
        StoredImage.of(path).open()


def test_an_image_that_was_not_annotated_is_refused(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png")
    example = ImageExample.of_boxes(path, "dog", [(0, 0, 9, 9)], size=(80, 40))
    with pytest.raises(LoraFactoryError, match=r"is 40 x 20 pixels .* its boxes are for 80 x 40"):
        example.open()


def test_one_task_a_category(tmp_path: Path) -> None:
    tasks = detection_tasks(tmp_path / "photos", animals(tmp_path))
    assert [task.name for task in tasks] == ["dog", "traffic_light"]
    assert tasks[1].descriptions[0] == "Detect the traffic light in the picture."
    rows = [row for split in ("train", "validation", "test") for row in tasks[0].examples(split)]
    (row,) = [row for row in rows if row.image.name.endswith("0.png")]
    assert (row.prompt, row.label, row.size) == ("<OD>", "dog", (40, 20))
    assert row.boxes == (Box(4, 2, 14, 7), Box(0, 0, 40, 20))
    assert row.completion == "dog<loc_100><loc_100><loc_350><loc_350><loc_0><loc_0><loc_999><loc_999>"
    assert row.open().size == (40, 20)
    assert {len(tasks[1].examples(split)) for split in ("validation", "test")} == {1}


def test_tasks_go_through_a_task_file(tmp_path: Path) -> None:
    tasks = detection_tasks(tmp_path / "photos", animals(tmp_path), ["dog"], license="CC-BY-4.0")
    save_tasks(tasks, tmp_path / "tasks.yaml")
    text = (tmp_path / "tasks.yaml").read_text(encoding="utf-8")
    assert "kind: coco" in text
    assert str(tmp_path) not in text
    (loaded,) = load_tasks(tmp_path / "tasks.yaml")
    assert loaded.fingerprint() == tasks[0].fingerprint()
    assert loaded.license == "CC-BY-4.0"


def test_every_category_of_a_task_file(tmp_path: Path) -> None:
    annotations = animals(tmp_path)
    data = "data: {kind: coco, path: photos, annotations: boxes.json}"
    path = tmp_path / "tasks.yaml"
    for entry, given in (
        (data, {}),
        (f'descriptions: "Where is a {{}}?"\n  {data}', {"descriptions": ["Where is a {}?"]}),
    ):
        path.write_text(f"tasks:\n- {entry}\n", encoding="utf-8")
        expected = detection_tasks(tmp_path / "photos", annotations, **given)
        loaded = load_tasks(path)
        assert [(task.name, task.descriptions) for task in loaded] == [
            (task.name, task.descriptions) for task in expected
        ]
        assert [task.fingerprint() for task in loaded] == [task.fingerprint() for task in expected]
    write_coco(tmp_path, {"yeti": []})
    for entry, message in (
        (data, "shows a category; annotate some"),
        (f"metric: a\n  {data}", "unknown key 'metric'"),
    ):
        path.write_text(f"tasks:\n- {entry}\n", encoding="utf-8")
        with pytest.raises(LoraFactoryError, match=message):
            load_tasks(path)


def test_the_fingerprint_is_of_the_pixels_and_boxes(tmp_path: Path) -> None:
    annotations = animals(tmp_path)
    (before,) = detection_tasks(tmp_path / "photos", annotations, ["dog"])
    animals(tmp_path / "copy")
    (copy,) = detection_tasks(tmp_path / "copy" / "photos", tmp_path / "copy" / "boxes.json", ["dog"])
    first = before.fingerprint()
    assert copy.fingerprint() == first
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "photos" / "0.png")
    (after,) = detection_tasks(tmp_path / "photos", annotations, ["dog"])
    assert after.fingerprint() != first


def test_boxes_of_crowds_and_empty_boxes_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = [(0, [4, 2, 10, 5]), (1, [4, 2, 0, 5]), (2, [90, 2, 5, 5]), (2, [-90, 2, 5, 5])]
    path = write_coco(tmp_path, {"dog": pairs})
    with caplog.at_level(logging.WARNING):
        found = CocoSource(str(tmp_path / "photos"), str(path), "dog").load("dog")
    assert [row.boxes for row in found["train"]] == [(Box(4, 2, 14, 7),)]
    assert "2 of 3 images" in caplog.text
    write_coco(tmp_path, {"dog": pairs}, iscrowd=1)
    with pytest.raises(LoraFactoryError, match=r"no image of .* shows the category 'dog'"):
        detection_tasks(tmp_path / "photos", path, ["dog"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_text("{"), "is no valid JSON"),
        (lambda path: path.write_text("[]"), "holds list, expected a JSON object"),
        (lambda path: path.write_text(path.read_text().replace('"image_id": 5', '"image_id": 77')), "KeyError: 77"),
        (lambda path: path.write_text(path.read_text().replace("[4, 2, 10, 5]", "[4, 2, 10]")), "is no COCO"),
        (lambda path: path.unlink(), "no annotation file"),
        (lambda path: (path.parent / "photos" / "3.png").unlink(), r"no image .*3\.png, which .* names"),
    ],
    ids=["no JSON", "a list", "unknown image", "three numbers", "missing", "image missing"],
)
def test_damaged_annotations_are_one_clear_error(tmp_path: Path, damage: Any, message: str) -> None:
    path = animals(tmp_path)
    damage(path)
    with pytest.raises(LoraFactoryError, match=message):
        for task in detection_tasks(tmp_path / "photos", path):
            task.examples("train")


@pytest.mark.parametrize("category", ["yeti", "horse"])
def test_a_category_without_images_says_which_there_are(tmp_path: Path, category: str) -> None:
    path = animals(tmp_path)
    with pytest.raises(LoraFactoryError, match=f"'{category}'; choose of dog, traffic light"):
        detection_tasks(tmp_path / "photos", path, [category])
    source = CocoSource(str(tmp_path / "photos"), str(path), category)
    with pytest.raises(LoraFactoryError, match=category):
        Task("animal", ("Find it.",), source).examples("train")


def data_set(folder: Path, *, as_list: bool = False) -> Path:
    names = datasets.ClassLabel(names=["cat", "dog"])
    inner = {"bbox": datasets.List(datasets.Value("float32")), "category": names}
    kind = datasets.List(inner) if as_list else {name: datasets.List(feature) for name, feature in inner.items()}
    features = datasets.Features({"image": datasets.Image(), "objects": kind, "question": datasets.Value("string")})

    def objects(number: int) -> Any:
        boxes = [[4.0, 2.0, 10.0, 5.0], [1.0, 1.0, 2.0, 2.0]][: number % 3]
        kinds = [1, 0][: len(boxes)]
        if as_list:
            return [{"bbox": box, "category": one} for box, one in zip(boxes, kinds, strict=True)]
        return {"bbox": boxes, "category": kinds}

    rows = [
        {"image": Image.new("RGB", (40, 20), (n, 0, 0)), "objects": objects(n), "question": f"What is {n}?"}
        for n in range(9)
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.mark.parametrize("as_list", [False, True], ids=["lists by name", "list of objects"])
@pytest.mark.parametrize(("form", "box"), [("xywh", Box(4, 2, 14, 7)), ("xyxy", Box(4, 2, 10, 5))])
def test_boxes_of_a_data_set(tmp_path: Path, as_list: bool, form: Any, box: Box) -> None:
    path = data_set(tmp_path, as_list=as_list)
    task = Task("dogs", ("Find dogs.",), ImageRows(str(path), category="dog", box_format=form))
    rows = [row for split in ("train", "validation", "test") for row in task.examples(split)]
    assert len(rows) == 6
    assert {row.boxes for row in rows} == {(box,)}
    assert {row.open().getpixel((0, 0))[0] for row in rows} == {1, 2, 4, 5, 7, 8}


def test_questions_of_a_data_set_in_a_task_file(tmp_path: Path) -> None:
    data_set(tmp_path)
    (tmp_path / "tasks.yaml").write_text(
        """\
tasks:
  - name: captions
    descriptions: [Answer questions about photos.]
    data: {kind: images, path: rows.parquet, prompt_column: question, completion_column: question}
""",
        encoding="utf-8",
    )
    (task,) = load_tasks(tmp_path / "tasks.yaml")
    row = task.examples("train")[0]
    assert row.prompt == row.completion
    assert row.prompt.startswith("What is")
    assert row.open().size == (40, 20)
    save_tasks([task], tmp_path / "again.yaml")
    assert load_tasks(tmp_path / "again.yaml")[0].fingerprint() == task.fingerprint()


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        ([0, 1, -1, None], datasets.ClassLabel(names=["cat", "dog"])),
        ([0, 1, 2, None], datasets.Value("int32")),
        ([True, False, True, None], datasets.Value("bool")),
        ([0.1, float("nan"), 0.0, None], datasets.Value("float32")),
        (["  ", "a", "", None], datasets.Value("string")),
    ],
)
def test_cells_beside_images_are_read_as_those_of_texts(tmp_path: Path, values: list[Any], feature: Any) -> None:
    columns = {"image": [Image.new("RGB", (8, 8))] * 4, "q": values, "a": values, "one": ["1"] * 4}
    kinds = {"image": datasets.Image(), "q": feature, "a": feature, "one": datasets.Value("string")}
    path = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(path)
    for question, answer in (("q", "one"), ("one", "a")):
        texts = DataSource(path, prompt_column=question, completion_column=answer).load("t")["train"]
        images = ImageRows(path, prompt_column=question, completion_column=answer).load("t")["train"]
        assert [(row.prompt, row.completion) for row in images] == texts


def of_rows(folder: Path, objects: Any = (None, None), kind: Any = None, **columns: Any) -> ImageRows:
    """Detection, or captions without a kind of objects, on two images."""
    columns = {"image": [Image.new("RGB", (8, 8))] * 2, "a": ["a", "b"], "objects": objects} | columns
    kinds = {"image": datasets.Image(), "a": datasets.Value("string"), "objects": kind or datasets.Value("null")}
    kinds |= {"tags": datasets.List(datasets.Value("string"))} if "tags" in columns else {}
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).save_to_disk(folder / "rows")
    return ImageRows(str(folder / "rows"), **({"category": "cat"} if kind else {"completion_column": "a"}))


NAMES = datasets.ClassLabel(names=["cat"])
BOXES = datasets.List(datasets.List(datasets.Value("float32")))
LISTS = {"bbox": BOXES, "category": datasets.List(NAMES)}
OBJECTS = datasets.List({"bbox": BOXES.feature, "category": NAMES})


@pytest.mark.parametrize(
    ("kind", "whole", "gap"),
    [
        (LISTS, {"bbox": [[0, 0, 4, 4]], "category": [0]}, None),
        (LISTS, {"bbox": [[0, 0, 4, 4]], "category": [0]}, {"bbox": None, "category": None}),
        (LISTS, {"bbox": [[0, 0, 4, 4]], "category": [0]}, {"bbox": [[0, 0, 4, 4]], "category": [-1]}),
        (OBJECTS, [{"bbox": [0, 0, 4, 4], "category": 0}], None),
        (OBJECTS, [{"bbox": [0, 0, 4, 4], "category": 0}], [{"bbox": [0, 0, 4, 4], "category": -1}]),
    ],
)
def test_rows_without_objects_are_left_out(tmp_path: Path, kind: Any, whole: Any, gap: Any) -> None:
    (row,) = of_rows(tmp_path, [gap, whole], kind).load("t")["train"]
    assert (row.image.name, row.boxes) == ("t/train, image of row 1", (Box(0, 0, 4, 4),))


@pytest.mark.parametrize(
    ("kind", "objects"),
    [
        (datasets.Value("string"), "cat"),
        (datasets.List(datasets.Value("float32")), [0.0, 0.0, 4.0, 4.0]),
        ({"boxes": BOXES, "category": datasets.List(NAMES)}, {"boxes": [[0, 0, 4, 4]], "category": [0]}),
        ({"bbox": BOXES.feature, "category": NAMES}, {"bbox": [0, 0, 4, 4], "category": 0}),
        (LISTS, {"bbox": [[0, 0, 4]], "category": [0]}),
    ],
)
def test_columns_of_no_objects_are_named(tmp_path: Path, kind: Any, objects: Any) -> None:
    with pytest.raises(LoraFactoryError, match=r"t/train: column 'objects' holds no objects .* hold the lists bbox"):
        of_rows(tmp_path, [objects] * 2, kind).load("t")


def test_rows_that_lack_what_is_asked_for_are_named(tmp_path: Path) -> None:
    rows = of_rows(tmp_path, image=[None, Image.new("RGB", (8, 8))], tags=[["a"], ["b"]])
    with pytest.raises(LoraFactoryError, match="t/train: row 0 lacks its image; filter such rows out"):
        rows.load("t")["train"][0].open()
    with pytest.raises(LoraFactoryError, match="column 'tags' holds list, not text"):
        replace(rows, completion_column="tags").load("t")
    with pytest.raises(LoraFactoryError, match=r"column 'tags' holds no images .* by image_column"):
        replace(rows, image_column="tags").load("t")
    with pytest.raises(LoraFactoryError, match="no row has text in column 'a'"):
        of_rows(tmp_path / "blank", a=[" ", None]).load("t")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{kind: video, path: x}", "kind='video': choose one of text, coco, images, classes"),
        ("{kind: coco, path: photos, category: dog}", "'coco' needs annotations"),
        ("{kind: coco, path: photos, annotations: a.json, category: 3}", "category=3 .* must be a text"),
        ("{kind: coco, path: {train: a}, annotations: {test: a.json}, category: dog}", "must name the same splits"),
        ("{kind: images, path: x.parquet}", "give either category.* or completion_column"),
        ("{kind: images, path: x.parquet, category: dog, box_format: cxcywh}", "choose xywh or xyxy"),
    ],
)
def test_wrong_task_files_say_what_to_write(tmp_path: Path, data: str, message: str) -> None:
    (tmp_path / "tasks.yaml").write_text(f"tasks: [{{name: a, descriptions: [b], data: {data}}}]", encoding="utf-8")
    with pytest.raises(LoraFactoryError, match=message):
        load_tasks(tmp_path / "tasks.yaml")


def test_images_in_memory_make_a_task_but_no_task_file(tmp_path: Path) -> None:
    rows = [ImageExample(Image.new("RGB", (8, 8), (n, 0, 0)), "Describe it.", f"shade {n}") for n in range(5)]
    task = Task.from_examples("shades", ["Name shades."], rows)
    assert task.has_images
    assert len({row.image.sha256 for split in ("train", "validation", "test") for row in task.examples(split)}) == 5
    with pytest.raises(LoraFactoryError, match="holds images in memory"):
        save_tasks([task], tmp_path / "tasks.yaml")
