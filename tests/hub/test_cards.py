"""Model cards: as the golden files have them, valid for the Hub, nothing smuggled in, hand writing kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.comparisons import make_comparison
from helpers.images import brightness_task, save_classifier
from hub_server.state import card_problems
from huggingface_hub import ModelCard, metadata_load
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from tiny_models import tiny_florence, tiny_t5

from lora_factory.adapters.folder import Generation, save_adapter_config
from lora_factory.arguments import CollectArguments
from lora_factory.collection.trainer import open_trainer
from lora_factory.hub.base_kinds import base_kind
from lora_factory.hub.cards import (
    YAML_FIELDS,
    AdapterCard,
    GeneratorCard,
    Origins,
    ZooCard,
    has_handwriting,
    inline,
    keep_handwritten,
    split_card,
)
from lora_factory.reporting.report import html_page, markdown_tables
from lora_factory.tasks.examples import ImageExample
from lora_factory.tasks.task import Task

GOLDEN = Path(__file__).parents[1] / "golden"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HOSTILE = (
    "x\n---\nlicense: mit\n---\n# <script>alert(1)</script> | `a` [b](javascript:c) ![d](e) {{ 7 * 7 }} ```\n## Limits"
)
TASKS: tuple[dict[str, Any], ...] = (
    {"name": "a", "descriptions": ["Legal notices"], "license": "MIT", "dataset": "alice/legal"},
    {"name": "code_x", "descriptions": ["Python | code", "Programs"], "license": None},
)
ORIGINS = Origins(base_model="pico/llama", base_revision=COMMIT, base_license="apache-2.0", tasks=TASKS)
VERSIONS = {"lora-factory": "0.1.0", "peft": "0.21.2"}


def generation(**changes: Any) -> Generation:
    values: dict[str, Any] = {
        "text": "Answer questions\nabout `Linux`",
        "conditions": (),
        "seed": 3,
        "temperature": 0.7,
        "nearest_tasks": ({"task": "a", "similarity": 0.4321}, {"task": "code_x", "similarity": 0.1}),
        "distance": 0.5679,
        "zoo_distance": 0.3,
        "generator": "alice/generator",
        "generator_commit": COMMIT,
        "base_model": "pico/llama",
        "base_revision": COMMIT,
        "sha256": "f" * 64,
        "versions": VERSIONS,
    }
    return Generation(**(values | changes))


def generator_card(**changes: Any) -> str:
    values: dict[str, Any] = {"title": "alice/generator", "origins": ORIGINS, "versions": VERSIONS}
    facts = {"weights of an adapter": "448", "listens to": "text"}
    return GeneratorCard(**(values | {"facts": facts} | changes)).text


def adapter_card(it: Generation, **changes: Any) -> str:
    values: dict[str, Any] = {"title": "alice/adapter", "origins": ORIGINS, "generations": {"": it}}
    return AdapterCard(**(values | changes)).text


CARDS = {
    "generator": lambda: generator_card(comparison=make_comparison(), plot="headroom.svg", tags=["mine"]),
    "generator-bare": lambda: generator_card(
        origins=Origins(base_model="/home/me/base", base_revision=None), facts={}, title="generator"
    ),
    "adapter": lambda: adapter_card(generation()),
    "adapter-from-vectors": lambda: adapter_card(
        generation(text=None, conditions=("hidden", "image"), generator="my-generator", generator_commit=None)
    ),
    "adapters": lambda: (
        AdapterCard(
            title="alice/both", origins=ORIGINS, generations={"legal": generation(), "code": generation(text="Code")}
        ).text
    ),
    "adapters-one": lambda: adapter_card(generation(), title="alice/both", subfolder="legal"),
    "zoo": lambda: (
        ZooCard(
            title="alice/zoo",
            origins=Origins(base_model="a/b", base_revision=None, tasks=[{**TASKS[0], "runs": 2}]),
            facts={"runs": "2"},
        ).text
    ),
}


@pytest.mark.parametrize("name", CARDS)
def test_cards_read_as_meant(name: str, tmp_path: Path) -> None:
    card = CARDS[name]()
    assert card == (GOLDEN / f"{name}.md").read_text(encoding="utf-8")
    assert card_problems(card) == ([], [])
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert set(metadata_load(tmp_path / "README.md")) <= set(YAML_FIELDS)


def test_results_reach_the_model_index() -> None:
    data = ModelCard(generator_card(comparison=make_comparison())).data
    values = {(it.dataset_name, it.metric_name): it.metric_value for it in data.eval_results}
    assert values["a", "Perplexity"] == 3.3201  # exp(1.2), the mean over two seeds
    assert {name for _, name in values} == {"Perplexity"}  # baselines and controls are not the model's own results
    assert {it.dataset_type for it in data.eval_results if it.dataset_name == "a"} == {"alice/legal"}
    assert data.model_name == "alice/generator"


def test_a_mixed_licence_is_named_and_a_generator_is_no_adapter() -> None:
    origins = Origins(
        base_model="pico/llama", base_revision=None, base_license="llama3", tasks=[{**TASKS[0], "license": "MIT"}]
    )
    fields = ModelCard(generator_card(origins=origins)).data.to_dict()
    assert fields["license"] == "other" and fields["license_name"] == "llama3-and-mit"
    assert fields["license_link"] == "https://huggingface.co/pico/llama"
    assert fields["base_model"] == "pico/llama" and "base_model_relation" not in fields
    card = AdapterCard(title="alice/adapter", origins=origins, generations={"": generation()}).text
    assert ModelCard(card).data.to_dict()["base_model_relation"] == "adapter"


@pytest.mark.parametrize(
    ("base", "tasks", "expected"),
    [
        ("mit", ["MIT", "mit"], "mit"),
        ("mit", ["apache-2.0"], "other"),
        ("mit", [None], "unknown"),
        (None, ["mit"], "unknown"),
        ("psf-2.0", ["psf-2.0"], "other"),
        ("mit\nx: y", ["mit"], "other"),
    ],
)
def test_licences_are_inherited(base: str | None, tasks: list[str | None], expected: str) -> None:
    rows = [{"name": "x", "license": license} for license in tasks]
    assert Origins(base_model="a/b", base_revision=None, base_license=base, tasks=rows).license == expected


def test_nothing_is_smuggled_into_a_card() -> None:
    tasks = [{"name": HOSTILE, "descriptions": [HOSTILE], "license": HOSTILE, "dataset": HOSTILE}]
    origins = Origins(base_model="pico/llama", base_revision=HOSTILE, base_license=HOSTILE, tasks=tasks)
    hostile = generation(
        text=HOSTILE, generator=HOSTILE, nearest_tasks=({"task": HOSTILE, "similarity": 1.0},), conditions=(HOSTILE,)
    )
    plain = generation(text="x", conditions=("text",))
    for card, same in (
        (generator_card(origins=origins, tags=[HOSTILE]), generator_card()),
        (adapter_card(hostile, origins=origins), adapter_card(plain)),
    ):
        assert set(split_card(card)[0]) <= set(split_card(same)[0]) | {"license_name", "license_link"}
        assert split_card(card)[0]["license"] == "other"
        body = split_card(card)[1]
        outside = "".join(body.split("```")[::2])
        assert body.count("```") == same.count("```"), "a code block was opened or closed"
        assert "<script" not in outside and not re.search(r"(?<!\\)\]\(javascript", outside) and "49" not in card
        assert [line for line in body.splitlines() if line.startswith("## ")] == [
            line for line in same.splitlines() if line.startswith("## ")
        ]


def test_the_call_that_makes_an_adapter_again_is_python() -> None:
    calls: list[Any] = []

    class Recorder:
        @staticmethod
        def from_pretrained(*arguments: Any, **keywords: Any) -> type[Recorder]:
            return Recorder

        @staticmethod
        def save_adapter(*arguments: Any, **keywords: Any) -> None:
            calls.append((arguments, keywords))

    texts = (HOSTILE, 'it\'s "quoted" \\ \u202e', "plain")
    for text in texts:
        code = adapter_card(generation(text=text)).split("```python\n")[2].split("```")[0]
        exec(code.split("\n", 1)[1], {"CVAELoRAGenerator": Recorder})
    assert calls == [((text, "again"), {"seed": 3, "temperature": 0.7}) for text in texts]


def test_a_card_says_what_its_adapter_was_made_of() -> None:
    alone = adapter_card(generation(text=None, conditions=("hidden",)))
    assert "written from examples by a" in alone and "| condition | examples |" in alone
    assert "The task of the examples, as" in alone and "description" not in alone and "hidden" not in alone
    both = adapter_card(generation(conditions=("hidden", "image"), refined_on=1))
    assert "written from a description and examples and images by a" in both
    assert "generator and refined on 1 example." in both and "| refined on | 1 example, which is not kept |" in both
    assert "without any training" not in both and "Nothing was fine-tuned" not in both
    assert "and refined on 2 examples." in adapter_card(generation(refined_on=2))


def test_a_card_names_a_generator_that_its_readers_have() -> None:
    local: dict[str, Any] = {"generator": "my-generator", "generator_commit": None}
    assert 'from_pretrained("my-generator")' in adapter_card(generation(**local), title="adapter")
    assert 'from_pretrained("FOLDER-OF-THE-GENERATOR")' in adapter_card(generation(**local))
    assert f'from_pretrained("alice/generator", revision="{COMMIT}")' in adapter_card(generation())


def test_a_generator_without_a_zoo_is_made_of_no_adapters() -> None:
    assert "over\nthe weights of adapters that were fine-tuned on 2 tasks, made with" in generator_card()
    card = generator_card(from_zoo=False)
    assert (
        "that was\ntrained through the base model on the data of 2 tasks, made with" in card
        and "fine-tuned" not in card
    )


def test_hand_written_parts_survive() -> None:
    first = adapter_card(generation())
    assert keep_handwritten(first, first) == first
    head, body = first.split("---\n\n", 1)
    edited = f"{head}language: en\n---\n\n{body}\n## My notes\n\nWatch out.\n```\n## Limits\n```\n"
    second = adapter_card(generation(seed=4))
    merged = keep_handwritten(second, edited)
    assert merged.endswith("## My notes\n\nWatch out.\n```\n## Limits\n```\n")
    assert "seed=4" in merged and "seed=3" not in merged
    assert merged.count("## Limits") == 2 and ModelCard(merged).data.language == "en"
    assert keep_handwritten(second, merged) == merged
    with pytest.raises(ValueError, match="YAML"):
        keep_handwritten(first, "---\n- a\n---\n")


WORDS = {
    "a section": "## Notes\n\nMINE\n",
    "a title": "# Notes\n\nMINE\n",
    "a small heading": "### Notes\n\nMINE\n",
    "an underlined heading": "Notes\n-----\n\nMINE\n",
    "an indented heading": " ## Notes ##\n\nMINE\n",
    "a heading after a tab": "##\tNotes\n\nMINE\n",
    "a heading in HTML": '<h2 align="center">Notes</h2>\n\nMINE\n',
    "a section named as ours": "## Limits\n\nMINE\n",
    "a heading and open code": "## Notes\n\n```\nMINE\n\n## Limits\n",
    "lines of Windows": "## Notes\r\n\r\nMINE\r\n",
}
LOOSE = {
    "a paragraph": "MINE\n",
    "a list": "- MINE\n- more\n---\n",
    "code": "~~~\n# MINE\n\n## Limits\n```\n~~~\n",
    "a comment": "<!-- MINE\n\n## Limits\n-->\n",
}


@pytest.mark.parametrize("words", [*WORDS.values(), *LOOSE.values()], ids=[*WORDS, *LOOSE])
def test_what_people_add_anywhere_in_a_card_stays(words: str) -> None:
    first, second = generator_card(), generator_card(title="bob/other", facts={"weights": "9"}, from_zoo=False)
    head, body = first.split("---\n\n", 1)
    text = re.sub(r"```.*?```", lambda code: code[0].replace("\n", " "), body, flags=re.DOTALL)
    gaps = [match.end() for match in re.finditer("\n\n", text)] * (words != WORDS["a heading and open code"])
    for gap in (*gaps, len(body)):
        merged = keep_handwritten(second, f"{head}---\n\n{body[:gap]}\n{words}\n{body[gap:]}")
        assert merged.count("MINE") == 1 and "bob/other" in merged and "alice/generator" not in merged
        assert merged.count("written by lora-factory") == 1 and merged.count("Nothing is tested for a new") == 1
        assert keep_handwritten(second, merged) == merged
        once_more = keep_handwritten(first, merged)
        assert once_more.count("MINE") == 1 and keep_handwritten(second, once_more) == merged


def without_note(card: str) -> str:
    """A card as versions wrote it that did not note its parts."""
    return card[: card.index("\n<!-- parts that")]


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_sections_that_people_added_to_a_card_of_an_earlier_version_stay(words: str) -> None:
    old = without_note(generator_card()).replace("Nothing is tested for", "In earlier words, nothing is known of")
    with pytest.warns(UserWarning, match="without this line.*In earlier words"):
        merged = keep_handwritten(generator_card(), f"{old}\n{words}")
    assert merged.count("MINE") == 1 and "In earlier words" not in merged
    assert merged.replace("\n" + words.replace("\r\n", "\n"), "").startswith(generator_card())
    assert keep_handwritten(generator_card(), merged) == merged


def test_nothing_of_an_earlier_version_stays_as_if_people_had_written_it() -> None:
    old = without_note(generator_card(title="old", facts={"weights": "1"}))
    with pytest.warns(UserWarning, match="without this line"):
        assert keep_handwritten(generator_card(), old.replace("A first adapter", "An adapter")) == generator_card()


def test_a_changed_part_of_a_card_is_written_anew_with_a_warning() -> None:
    first = generator_card()
    changed = first.replace("should be near to one of", "MUST be near to one of")
    with pytest.warns(UserWarning, match="'MUST be near to one of the training tasks.'"):
        assert keep_handwritten(first, changed) == first
    assert keep_handwritten(first, first.replace("\n", "\r\n")) == first


def test_a_card_without_our_mark_follows_ours() -> None:
    mine, limits = "# Mine\n\nIntroduction\n\n## Thanks\n\nMINE\n", "\n## Limits\n\nOld words\n"
    with pytest.warns(UserWarning, match="without this line of the old one: 'Old words'"):
        merged = keep_handwritten(generator_card(), f"---\ntags: [x]\n---\n{mine}{limits}")
    assert merged.endswith(f"-->\n\n{mine}") and keep_handwritten(generator_card(), merged) == merged
    assert has_handwriting(merged) and not has_handwriting(generator_card())


def test_inline_keeps_words_and_disarms_the_rest() -> None:
    assert inline("snake_case, 50 %\n(ok)") == "snake_case, 50 % (ok)"
    assert inline("a\x1b[31m<b>|`c`") == "a \\[31m&lt;b&gt;\\|\\`c\\`"


@pytest.mark.parametrize(
    ("kind", "tag", "classes"),
    [
        ("causal", "text-generation", "AutoPeftModelForCausalLM"),
        ("encoder-decoder", "text2text-generation", "AutoPeftModelForSeq2SeqLM"),
        ("texts and images", "image-text-to-text", "AutoModelForImageTextToText"),
        ("reads images, for texts", "image-text-to-text", "AutoModelForImageTextToText"),
        ("classifier", "image-classification", "AutoModelForImageClassification"),
    ],
)
def test_the_code_of_a_card_loads_the_adapter(
    kind: str, tag: str, classes: str, pico_model_folder: Path, tmp_path: Path
) -> None:
    words = ["one two Locate the dog"]
    bases: dict[str, Any] = {
        "causal": lambda: pico_model_folder,
        "encoder-decoder": lambda: tiny_t5(tmp_path / "base", words),
        "texts and images": lambda: tiny_florence(tmp_path / "base", words),
        "reads images, for texts": lambda: tiny_florence(tmp_path / "base", words),
        "classifier": lambda: save_classifier(tmp_path / "base"),
    }
    tasks: list[Any] = [brightness_task("bright", wanted=True)] if kind == "classifier" else []
    if kind == "texts and images":
        rows = [ImageExample.of_boxes(Image.new("RGB", (8, 8)), "dog", [(0, 0, 4, 4)])] * 3
        tasks = [Task.from_examples("dog", ["Find it"], rows, rows, rows)]
    settings = CollectArguments(rank=2, target_modules="all-linear", dtype="float32")
    trainer = open_trainer(bases[kind](), settings, Accelerator(cpu=True), tasks)
    layout = trainer.layout
    origins = Origins(base_model=layout.base_model, base_revision=None, kind=base_kind(layout))
    it = generation(base_model=layout.base_model, base_revision=None)
    state_dict = layout.unflatten(trainer.initial + 0.1)
    for name in ("", "sub"):
        (tmp_path / "adapter" / name).mkdir(parents=True, exist_ok=True)
        save_adapter_config(layout, tmp_path / "adapter" / name)
        save_file(state_dict, tmp_path / "adapter" / name / "adapter_model.safetensors", metadata={"format": "pt"})
    title = str(tmp_path / "adapter")
    cards = [
        AdapterCard(title=title, origins=origins, generations={"": it}).text,
        AdapterCard(title=title, origins=origins, generations={"": it}, subfolder="sub").text,
        AdapterCard(title=title, origins=origins, generations={"sub": it}).text,
    ]
    assert classes in cards[0]
    for card in cards:
        assert split_card(card)[0]["pipeline_tag"] == tag
        found: dict[str, Any] = {}
        exec(card.split("```python\n")[1].split("```")[0], found)
        loaded = get_peft_model_state_dict(found["model"], save_embedding_layers=False)
        assert loaded.keys() == state_dict.keys()
        assert all(torch.equal(tensor, state_dict[name]) for name, tensor in loaded.items())


def test_nothing_that_turns_the_direction_of_text_reaches_a_card_or_a_report() -> None:
    hidden = "".join(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x61C, 0x1B, 0x7F, 0)))
    name = f"a{hidden}b"
    task = {"name": name, "descriptions": [name], "license": name, "dataset": name}
    origins = Origins(base_model=name, base_revision=name, base_license=name, tasks=[{**task, "runs": 1}])
    it = generation(text=name, generator=name, nearest_tasks=({"task": name, "similarity": 1.0},), base_model=name)
    comparison = json.loads(json.dumps(make_comparison()).replace('"a"', json.dumps(name)))
    comparison["base_model"] = name
    pages = [
        generator_card(origins=origins, facts={"x": name}, comparison=comparison, tags=[name]),
        adapter_card(it, origins=origins, tags=[name]),
        AdapterCard(title="alice/x", origins=origins, generations={"legal": it}).text,
        ZooCard(title="alice/x", origins=origins, facts={"x": name}, tags=[name]).text,
        markdown_tables(comparison),
        html_page(comparison),
    ]
    for place, page in enumerate(pages):
        assert not set(page) & set(hidden), place
        assert "a b" in page, place
