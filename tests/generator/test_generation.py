"""Adapters from examples: conditioned on them where the generator listens to them, and refined on them."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers.generators import make_generator
from helpers.models import TRAINING_TEXT, attach, with_template
from peft import get_peft_model_state_dict
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lora_factory.adapters.folder import load_adapter
from lora_factory.adapters.truncation import truncate
from lora_factory.arguments import TokenOptions
from lora_factory.cli.commands import main
from lora_factory.errors import LoraFactoryError, StorageError
from lora_factory.evaluation.perplexity import evaluate_adapters, score_examples
from lora_factory.generator.configuration import CVAELoRAConfig
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.models.inputs import encode_sequences
from lora_factory.models.loading import load_base_model
from lora_factory.models.losses import FrozenBase, query_loss
from lora_factory.tasks.examples import Example
from lora_factory.tasks.task import Task
from lora_factory.training.train import save_generator

TEXT, EXAMPLES = "Continue a tale.", [*TRAINING_TEXT[:3] * 4]


@pytest.fixture
def generator(pico_model_folder: Path, pico_encoder_folder: Path) -> CVAELoRAGenerator:
    """One that listens to texts alone."""
    layout = attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]
    config = CVAELoRAConfig(
        layout=layout.to_dict(),
        modalities={"text": 32},
        text_encoder=str(pico_encoder_folder),
        width=32,
        depth=1,
        latent_size=8,
        tasks=[{"name": name, "descriptions": [name], "license": None} for name in "ab"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = CVAELoRAGenerator(config)
        generator.basis.factors.data.normal_(std=0.1)
        generator.center.copy_(0.5 * generator.basis.identity())
        generator.scale.fill_(0.3)
        torch.nn.init.normal_(generator.network.prior_mean.weight)
        generator.fit_conditions({"text": {name: torch.randn(2, 32) for name in "ab"}})
    return generator.eval()


@torch.no_grad()
def loss(base: FrozenBase, state_dict: dict[str, torch.Tensor]) -> float:
    rows = encode_sequences(base.tokenizer, [Example("", text) for text in EXAMPLES[:3]], TokenOptions())
    return float(query_loss(base, base.layout.flatten(state_dict)[None], [rows]))


def test_an_adapter_is_refined_on_the_users_examples(
    generator: CVAELoRAGenerator, pico_model_folder: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico_model_folder)
    base = FrozenBase(LlamaForCausalLM.from_pretrained(pico_model_folder), tokenizer, generator.layout)
    written = loss(base, generator.generate_state_dict(TEXT))
    with pytest.raises(LoraFactoryError, match=r"not to examples; .* a text and refine_steps=60"):
        generator.generate_adapter(TEXT, pico_model_folder, examples=EXAMPLES)  # not unless it is asked for
    model = generator.generate_adapter(TEXT, pico_model_folder, examples=EXAMPLES, refine_steps=60)
    refined = loss(base, get_peft_model_state_dict(model))
    assert refined < written - 0.01
    options = {"examples": EXAMPLES, "base_model": pico_model_folder, "refine_steps": 60}
    generator.save_adapter(TEXT, tmp_path / "adapter", **options)
    assert loss(base, load_adapter(tmp_path / "adapter")[1]) == pytest.approx(refined, abs=1e-5)
    assert json.loads((tmp_path / "adapter" / "generation.json").read_text())["refined_on"] == len(EXAMPLES)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "before it was refined" in card and EXAMPLES[0] not in card


@pytest.mark.parametrize(
    ("examples", "steps", "message"),
    [(["word"], 4, "they make 1 sequence, and refining needs two"), (EXAMPLES, 2, "none of up to 2 steps")],
)
def test_refining_that_changes_nothing_is_said_and_not_recorded(
    generator: CVAELoRAGenerator,
    pico_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    examples: list[str],
    steps: int,
    message: str,
) -> None:
    monkeypatch.setattr("lora_factory.generator.refine._mean_loss", lambda *_: 1.0)  # never lower
    options = {"examples": examples, "base_model": pico_model_folder, "refine_steps": steps}
    with pytest.warns(UserWarning, match=message):
        folder = generator.save_adapter(TEXT, tmp_path / "adapter", **options)
    assert json.loads((folder / "generation.json").read_text())["refined_on"] == 0
    assert "refined" not in (folder / "README.md").read_text()


def test_a_live_model_with_an_adapter_is_read_without_it(
    generator: CVAELoRAGenerator, pico_model_folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico_model_folder)
    fresh = generator.generate_adapter(TEXT, pico_model_folder, examples=EXAMPLES, refine_steps=6)
    used = generator.generate_adapter("Something else", pico_model_folder)
    used = generator.generate_adapter(
        TEXT, used, examples=EXAMPLES, refine_steps=6, adapter_name="second", tokenizer=tokenizer
    )
    expected, found = get_peft_model_state_dict(fresh), get_peft_model_state_dict(used, adapter_name="second")
    assert all(torch.allclose(expected[key], found[key], atol=1e-6) for key in expected)


def test_examples_alone_need_a_generator_that_listens_to_them(
    generator: CVAELoRAGenerator, pico_model_folder: Path
) -> None:
    with pytest.raises(LoraFactoryError, match="not to examples"):
        generator.generate_adapter(base_model=pico_model_folder, examples=EXAMPLES)
    with pytest.raises(LoraFactoryError, match="not to examples"):
        generator.generate_adapter(TEXT, pico_model_folder, examples=EXAMPLES, refine_steps=0)


def test_a_generator_of_chat_adapters_refines_in_the_template_and_says_so(
    generator: CVAELoRAGenerator, pico_model_folder: Path, pico_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(pico_model_folder, base)
    with_template(pico_tokenizer).save_pretrained(base)
    model, tokenizer = load_base_model(base)
    examples = [Example(f"Tell tale {number}.", text) for number, text in enumerate(EXAMPLES)]
    rows = encode_sequences(tokenizer, examples, TokenOptions(chat_template=True))
    losses = {}
    for in_chat in (False, True):
        generator.config.chat_template = in_chat
        options = {"examples": examples, "base_model": base, "refine_steps": 60}
        generator.save_adapter(TEXT, tmp_path / str(in_chat), **options)
        weights = generator.layout.flatten(load_adapter(tmp_path / str(in_chat))[1])
        with torch.no_grad():
            losses[in_chat] = float(query_loss(FrozenBase(model, tokenizer, generator.layout), weights[None], [rows]))
        assert json.loads((tmp_path / str(in_chat) / "generation.json").read_text())["chat_template"] is in_chat
    assert losses[True] < losses[False] - 0.005
    task = Task.from_examples("tales", [TEXT], examples)
    framed = score_examples(model, tokenizer, task.examples("test"), chat_template=True)
    assert evaluate_adapters([tmp_path / "True"], [task], base)["base model"]["tales"] == framed
    assert evaluate_adapters([tmp_path / "False"], [task], base)["base model"]["tales"] != framed


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"text": ["write fox"]}, "text is a list; one text makes one adapter"),
        ({"text": 3}, "text is a int"),
        ({"text": " \n"}, "text is empty"),
        ({"text": "half \ud800"}, "half of a surrogate pair"),
        ({"examples": "word"}, "examples is 'word'; give a list"),
        ({"examples": Example("a", "b")}, "examples is a single example"),
        ({"examples": {"prompt": "a", "completion": "b"}}, "give a list"),
        ({"examples": []}, "examples=.. is empty"),
        pytest.param({"examples": iter(())}, "examples=.. is empty", id="an empty iterator"),
        ({"examples": ["a", 3]}, "example 1 of 2 is '3'"),
        ({"examples": ["a", ("a", "b", "c")]}, "example 1 of 2 is"),
        ({"examples": [{"question": "a"}]}, "example 0 of 1 is"),
        ({"examples": ["a", " "]}, "example 1 of 2 is empty"),
        ({"images": "a.png"}, "images is 'a.png'; give a list"),
        ({"conditions": [1.0]}, "conditions is a list"),
        ({"conditions": {"text": "words"}}, "no task vectors"),
        ({"seed": -1}, "seed=-1; give an integer from 0 to"),
        ({"seed": 2**64}, "seed="),
        ({"seed": 1.0}, "seed="),
        ({"seed": "1"}, "seed="),
        ({"seed": True}, "seed="),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": 10**400}, "temperature=1000"),
        ({"temperature": 10**5000}, "temperature=\\(thousands of digits"),
        ({"seed": 10**5000}, "seed=\\(thousands of digits"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"refine_steps": -1}, "refine_steps="),
        ({"refine_steps": 2.5}, "refine_steps="),
        ({"refine_steps": 4}, "refine_steps=4 needs examples="),
        ({"conditions": {"text": torch.ones(32)}}, r"text= and conditions=\{'text': \.\.\.\} give the same"),
        ({"images": ["a.png"], "conditions": {"image": torch.ones(8)}}, "images= and conditions="),
        ({"examples": ["a"], "conditions": {"hidden": torch.ones(64)}}, "examples= and conditions="),
        ({"adapter_name": "v1.0"}, "adapter_name is 'v1.0'; PEFT takes a name without dots, for example 'v1_0'"),
        ({"adapter_name": ""}, "adapter_name is ''"),
        ({"adapter_name": "keys"}, "adapter_name is 'keys'"),
        ({"adapter_name": None}, "adapter_name is None"),
    ],
)
def test_what_is_asked_is_checked_before_anything_is_read(
    generator: CVAELoRAGenerator, tmp_path: Path, wish: dict[str, Any], message: str
) -> None:
    with pytest.raises(LoraFactoryError, match=message):
        generator.generate_adapter(**{"text": TEXT, "base_model": tmp_path / "nowhere"} | wish)
    if wish.keys() & {"adapter_name"}:
        return
    with pytest.raises(LoraFactoryError, match=message):
        generator.save_adapter(**{"text": TEXT, "save_directory": tmp_path / "new"} | wish)
    assert not (tmp_path / "new").exists()
    if wish.keys() <= {"text", "conditions", "seed", "temperature"}:
        with pytest.raises(LoraFactoryError, match=message):
            generator.generate_state_dict(**{"text": TEXT} | wish)


def test_numbers_of_numpy_are_numbers(generator: CVAELoRAGenerator, tmp_path: Path) -> None:
    right = generator.generate_state_dict(TEXT, seed=3, temperature=0.5)
    found = generator.generate_state_dict(TEXT, seed=numpy.int64(3), temperature=numpy.float32(0.5))
    assert all(torch.equal(right[key], found[key]) for key in right)
    generator.save_adapter(TEXT, tmp_path / "adapter", seed=numpy.uint8(3), temperature=numpy.float32(0.5))
    assert json.loads((tmp_path / "adapter" / "generation.json").read_text())["seed"] == 3
    generator.generate_state_dict(TEXT, seed=2**64 - 1, temperature=1)
    vector = generator.conditions(TEXT)["text"]
    found = generator.generate_state_dict(conditions={"text": vector.numpy()})
    assert all(torch.equal(value, found[key]) for key, value in generator.generate_state_dict(TEXT).items())


def test_examples_in_any_form_are_the_same_examples(generator: CVAELoRAGenerator, pico_model_folder: Path) -> None:
    pairs = [(f"Tell tale {number}.", text) for number, text in enumerate(EXAMPLES[:4])]
    forms: list[Any] = [
        [Example(*pair) for pair in pairs],
        pairs,
        [list(pair) for pair in pairs],
        [{"prompt": prompt, "completion": completion} for prompt, completion in pairs],
        iter(pairs),
        tuple(pairs),
    ]
    adapters = [generator.generate_adapter(TEXT, pico_model_folder, examples=form, refine_steps=3) for form in forms]
    first, *others = [get_peft_model_state_dict(model) for model in adapters]
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)
    texts: list[Any] = [EXAMPLES[:4], [{"text": text} for text in EXAMPLES[:4]], (text for text in EXAMPLES[:4])]
    adapters = [generator.generate_adapter(TEXT, pico_model_folder, examples=form, refine_steps=3) for form in texts]
    first, *others = [get_peft_model_state_dict(model) for model in adapters]
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


def test_a_text_far_from_every_task_is_warned_of(generator: CVAELoRAGenerator, tmp_path: Path) -> None:
    near, far = generator.conditions(TEXT)["text"], generator.conditions("Gibberish")["text"]
    across = far - far @ near * near
    rows = generator.get_buffer("text_task_vectors")
    rows.copy_(torch.stack([near, near + 0.1 * across]))  # two tasks next to each other, one of them the text's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generator.generate_state_dict(TEXT)
    rows.copy_(torch.stack([across, across + 0.01 * near]))
    message = "'Continue a tale.' is far from every task.* from the nearest one, b"
    with pytest.warns(UserWarning, match=message):
        generator.generate_state_dict(TEXT)
    with pytest.warns(UserWarning, match=message):
        generator.save_adapter(TEXT, tmp_path / "adapter")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            generator.generate_state_dict(TEXT)
    assert len(caught) == 1


def test_the_command_line_names_the_nearest_tasks(
    generator: CVAELoRAGenerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    near, far = generator.conditions(TEXT)["text"], generator.conditions("Gibberish")["text"]
    generator.get_buffer("text_task_vectors").copy_(torch.stack([near, far]))
    generator.save_pretrained(tmp_path / "generator")
    words = ["generate", "--generator", str(tmp_path / "generator"), "--text", TEXT]
    assert main([*words, "--output-dir", str(tmp_path / "adapter")]) == 0
    distance = 1 - float(near @ far)
    said = capsys.readouterr().out
    assert f"nearest tasks, by cosine distance: a (0.00), b ({distance:.2f})" in said
    assert f"are {distance:.2f} from their nearest neighbour" in said
    for flag, value in (("--temperature", "nan"), ("--seed", "-1"), ("--refine-steps", "-2")):
        assert main([*words, "--output-dir", str(tmp_path / "none"), flag, value]) == 2
        assert f"{flag} {value}; give" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_full_disk_is_named_when_a_generator_is_saved(
    generator: CVAELoRAGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(StorageError, match=rf"cannot write {tmp_path}/new: .*no space left"):
        generator.save_pretrained(tmp_path / "new")
    with pytest.raises(StorageError, match=rf"cannot write {tmp_path}/new: .*no space left"):
        save_generator(generator, tmp_path / "new", {})


def test_what_a_generator_does_not_listen_to_is_said_in_words_of_the_command_line(
    generator: CVAELoRAGenerator,
) -> None:
    with pytest.raises(LoraFactoryError, match=r"train a generator with images= \(--images\) of every task$"):
        generator.encode_images(["x.png"])


KNOWN = ("Continue a rhymed poem.", "Write Python code.", "State the law.")


@pytest.fixture(params=["core", "conv1d"])
def knowing(request: pytest.FixtureRequest, pico_model_folder: Path, pico_encoder_folder: Path) -> CVAELoRAGenerator:
    """One whose three tasks have one description each; at full scale it listens to them alike."""
    layout = attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]
    generator = make_generator(layout, pico_encoder_folder, request.param)
    generator.config.tasks = [{"name": text.split()[1], "descriptions": [text], "license": None} for text in KNOWN]
    texts = {text: generator.text_encoder.encode([text]) for text in KNOWN}
    generator.fit_conditions({"text": texts, "hidden": {text: torch.ones(1, 64) for text in KNOWN}})
    return generator


def deltas(generator: CVAELoRAGenerator, text: Any, **options: Any) -> torch.Tensor:
    weights = generator.generate_state_dict(text, **options)
    modules = generator.layout.modules
    return torch.cat([(m.scaling * weights[m.key_b].double() @ weights[m.key_a].double()).flatten() for m in modules])


def test_texts_add_up_by_their_weights(knowing: CVAELoRAGenerator, pico_model_folder: Path, tmp_path: Path) -> None:
    if knowing.basis is None:  # the paper's network makes weights, which are what adds up there

        def change(text: Any) -> torch.Tensor:
            return knowing.layout.flatten(knowing.generate_state_dict(text)) - knowing.center
    else:

        def change(text: Any) -> torch.Tensor:
            return deltas(knowing, text) - deltas(knowing, {KNOWN[0]: 0})

    first, second = (change(text) for text in KNOWN[:2])
    assert first.norm() > 0.01 and (first - second).norm() > 0.01
    for left, right in ((0.7, 0.3), (1, 1), (0.5, -2.0), (0, -1)):
        found = change({KNOWN[0]: left, KNOWN[1]: right})
        torch.testing.assert_close(found, left * first + right * second, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(change({KNOWN[0]: 1.0}), first, rtol=1e-4, atol=1e-6)
    mixture = {KNOWN[0]: 0.5, KNOWN[1]: numpy.float32(-2)}
    expected = knowing.generate_state_dict(mixture)
    found = get_peft_model_state_dict(knowing.combine(mixture, pico_model_folder, temperature=0.0))
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    folder = knowing.save_adapter(mixture, tmp_path / "adapter")
    saved = load_adapter(folder)[1]
    assert all(torch.equal(value, expected[key]) for key, value in saved.items())
    made = json.loads((folder / "generation.json").read_text())
    assert made["text"] == "0.5 * 'Continue a rhymed poem.' + -2 * 'Write Python code.'"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, 'text is empty; give texts with their weights: {"legal notices": 0.7'),
        ({TEXT: math.nan}, "the weight of 'Continue a tale.' is nan; give a finite number"),
        ({TEXT: 10**400}, "the weight of 'Continue a tale.' is 1000"),
        ({TEXT: -math.inf}, "is -inf"),
        ({TEXT: "1"}, "is '1'"),
        ({TEXT: None}, "is None"),
        ({TEXT: True}, "is True"),
        ({" ": 1.0}, "text is empty"),
        ({3: 1.0}, "text is a int"),
    ],
)
def test_mixtures_without_a_text_or_a_weight_are_refused(
    generator: CVAELoRAGenerator, tmp_path: Path, texts: dict[Any, Any], message: str
) -> None:
    for make in (generator.generate_state_dict, generator.combine, generator.explain):
        with pytest.raises(LoraFactoryError, match=message):
            make(texts)
    with pytest.raises(LoraFactoryError, match=message):
        generator.save_adapter(texts, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_no_condition_is_exactly_the_centre(knowing: CVAELoRAGenerator) -> None:
    expected = knowing.center if knowing.basis is None else knowing.basis.adapters(knowing.center[None])[0]
    found = knowing.layout.flatten(knowing.generate_state_dict({KNOWN[0]: 0}))
    assert torch.equal(found, expected.detach())
    if knowing.basis is not None:
        with torch.no_grad():
            assert torch.equal(knowing.assemble(knowing.made({}, 1))[0], expected)
            assert torch.equal(knowing.cores({}, 2), knowing.center.expand(2, -1))
            vectors, present = {"text": knowing.text_task_vectors[:2]}, {"text": torch.tensor([[True], [False]])}
            cores = knowing.cores(vectors, 2, present=present)
        assert torch.equal(cores[1], knowing.center) and not torch.equal(cores[0], knowing.center)


def test_explain_says_how_near_a_text_is_and_what_is_made_of_it(knowing: CVAELoRAGenerator) -> None:
    uses = []
    for text in KNOWN:
        found = knowing.explain(text)
        assert found["nearest"][0] == {"task": text.split()[1], "similarity": 1.0} and len(found["nearest"]) == 3
        assert found["distance"] == 0 and found["farther_than"] == 0
        assert found["verdict"] == "near" and found["sentence"].startswith("Near a task that the generator knows")
        uses.append(found["use"])
    assert sorted(uses)[1] == pytest.approx(1, abs=0.02)
    strange = knowing.explain("zq xx 0o0o ++ ##")
    assert strange["distance"] > 0.01 and 0 <= strange["farther_than"] <= 1
    assert strange["distance"] == pytest.approx(1 - strange["nearest"][0]["similarity"], abs=1e-4)
    assert knowing.explain({KNOWN[0]: 0})["use"] == 0
    doubled = knowing.explain({KNOWN[0]: 2})
    assert doubled["use"] == pytest.approx(2 * uses[0], rel=1e-3) and doubled["nearest"][0]["task"] == "a"
    vector = knowing.conditions(KNOWN[1])["text"]
    assert knowing.explain(conditions={"text": vector}) == knowing.explain(KNOWN[1])
    with pytest.raises(LoraFactoryError, match="nothing to condition on"):
        knowing.explain()


def test_a_condition_far_from_all_tasks_is_farther_than_all(knowing: CVAELoRAGenerator) -> None:
    known = torch.nn.functional.normalize(knowing.text_task_vectors, dim=1)
    away = knowing.explain(conditions={"text": -known.sum(0)})
    assert away["farther_than"] == 1 and away["distance"] > 1
    assert away["verdict"] == "far" and away["sentence"].startswith("Far from every task that the generator knows")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (KNOWN[0], {}),
        (KNOWN[0], {"seed": 3, "temperature": 0.5}),
        (KNOWN[0], {"rank": 1}),
        ({KNOWN[0]: 0.7, 'a "quoted" it\'s': -1 / 3}, {"rank": 1}),
        ({KNOWN[0]: 1 + 1e-6}, {}),
        (f"0.5 * {KNOWN[0]!r} + 2 * {KNOWN[1]!r}", {}),  # a text that reads like a mixture
        (None, {"examples": EXAMPLES}),
        ({KNOWN[0]: 0.25, KNOWN[1]: 2}, {"examples": EXAMPLES}),
        (KNOWN[0], {"examples": EXAMPLES, "rank": 1, "refine_steps": 4}),
    ],
)
def test_the_call_in_a_card_writes_the_same_bytes(
    knowing: CVAELoRAGenerator,
    pico_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: Any,
    options: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    knowing.save_pretrained("generator")
    generator = CVAELoRAGenerator.from_pretrained("generator")
    if "examples" in options:
        options = options | {"base_model": pico_model_folder}
    folder = generator.save_adapter(text, "adapter", **options)
    code = (folder / "README.md").read_text().split("```python\n")[2].split("```")[0]
    before = generator.save_adapter(text, "before", **(options | {"refine_steps": 0}))
    exec(code, {})
    found = hashlib.sha256(Path("again", "adapter_model.safetensors").read_bytes()).hexdigest()
    assert found == json.loads((before / "generation.json").read_text())["sha256"]


def test_a_lower_rank_is_the_nearest_and_its_loss_is_recorded(
    knowing: CVAELoRAGenerator, pico_model_folder: Path, tmp_path: Path
) -> None:
    whole = knowing.generate_state_dict(KNOWN[0])
    layout, expected, lost = truncate(knowing.layout, whole, 1)
    found = knowing.generate_state_dict(KNOWN[0], rank=1)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    model = knowing.generate_adapter(KNOWN[0], pico_model_folder, rank=numpy.int64(1))
    layout.check(get_peft_model_state_dict(model))
    folder = knowing.save_adapter(KNOWN[0], tmp_path / "adapter", rank=1)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 1
    made = json.loads((folder / "generation.json").read_text())
    assert (made["rank"], made["rank_error"]) == (1, round(lost, 6)) and lost > 0.01
    own = knowing.save_adapter(KNOWN[0], tmp_path / "own")
    made = json.loads((own / "generation.json").read_text())
    assert (made["rank"], made["rank_error"]) == (None, 0)
    same = knowing.generate_state_dict(KNOWN[0], rank=2)
    for module in knowing.layout.modules:
        torch.testing.assert_close(
            same[module.key_b] @ same[module.key_a], whole[module.key_b] @ whole[module.key_a], rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (3, "rank=3 is above the generator's, 2; give 2 or less"),
        (0, "rank=0; give an integer from 1 to 1048576"),
        (-1, "rank=-1; give"),
        (1.5, "rank=1.5; give"),
    ],
)
def test_ranks_that_the_generator_has_not_are_refused(
    generator: CVAELoRAGenerator, tmp_path: Path, rank: Any, message: str
) -> None:
    with pytest.raises(LoraFactoryError, match=message):
        generator.generate_state_dict(TEXT, rank=rank)
    with pytest.raises(LoraFactoryError, match=message):
        generator.save_adapter(TEXT, tmp_path / "adapter", rank=rank)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_of_a_lower_rank_is_refined(
    generator: CVAELoRAGenerator, pico_model_folder: Path, tmp_path: Path
) -> None:
    options = {"examples": EXAMPLES, "base_model": pico_model_folder, "rank": 1, "refine_steps": 6}
    folder = generator.save_adapter(TEXT, tmp_path / "adapter", **options)
    layout, refined = load_adapter(folder)
    start = generator.generate_state_dict(TEXT, rank=1)
    layout.check(start)
    base = FrozenBase(*load_base_model(pico_model_folder), layout)
    assert loss(base, refined) < loss(base, start) - 1e-3
