"""The app: what stands behind the page, and a click-through in a browser where one is installed."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import shutil
import socket
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.generators import make_generator
from helpers.hub import ask, publish_base
from helpers.images import bright_or_dark, save_classifier
from helpers.models import TRAINING_TEXT, attach
from helpers.training import save_word_encoder
from hub_server.local import LocalHub
from peft import PeftModel
from transformers import LlamaForCausalLM

from lora_factory import CVAELoRAGenerator
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.cli.commands import main
from lora_factory.errors import LoraFactoryError
from lora_factory.models.image_encoders import ImageEncoder
from lora_factory.models.loading import load_base_model
from lora_factory.serving import app as app_module
from lora_factory.serving.app import closeness_html, error_html, open_app
from lora_factory.serving.side_by_side import MAX_IMAGES, SideBySide, Wish, split_examples
from lora_factory.serving.trial import try_adapter

LAW = "Permission is hereby granted"
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def work(generator_folder: Path) -> Iterator[SideBySide]:
    """A tiny generator with its base model."""
    both = SideBySide(CVAELoRAGenerator.from_pretrained(generator_folder))
    yield both
    both.close()


async def compared(work: SideBySide, wish: Wish, prompt: str, tokens: int = 12) -> tuple[Any, list[tuple[str, str]]]:
    order = wish.order()
    made = await work.make(order)
    return made, [pair async for pair in work.answers(order, prompt, tokens, chat=False)]


def test_both_answers_grow_and_are_those_of_try(work: SideBySide, generator_folder: Path) -> None:
    made, pairs = asyncio.run(compared(work, Wish(LAW, rank=1), "Hello"))
    generator = CVAELoRAGenerator.from_pretrained(generator_folder)
    trial = try_adapter(generator, "Hello", LAW, max_new_tokens=12, chat_template=False, rank=1)
    assert pairs[-1] == (trial.base, trial.adapted)
    assert trial.base != trial.adapted
    assert len(pairs) > 2
    for row in (0, 1):
        assert all(pairs[-1][row].startswith(pair[row]) for pair in pairs)
    assert any(base and adapted and (base, adapted) != pairs[-1] for base, adapted in pairs)  # side by side
    assert made.generation["rank"] == 1


def test_the_archive_is_a_peft_folder(work: SideBySide, tmp_path: Path) -> None:
    made = asyncio.run(work.make(Wish(LAW, "poems", 0.25, "\n".join(TRAINING_TEXT)).order()))
    zipfile.ZipFile(io.BytesIO(made.archive())).extractall(tmp_path)
    generation = json.loads((tmp_path / "adapter" / "generation.json").read_text())
    assert generation["text"] == f"0.75 * {LAW!r} + 0.25 * 'poems'"
    assert generation["conditions"] == ["hidden"]
    model, _ = load_base_model(work.generator.layout.base_model)
    PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert work.closeness({LAW: 0.75, "poems": 0.25}, made) != work.closeness({LAW: 0.75, "poems": 0.25})


def test_wishes_are_bounded_and_nothing_is_friendly(work: SideBySide, tmp_path: Path) -> None:
    for wish, words in (
        (Wish("  "), "nothing to go by yet; describe the task"),
        (Wish("a" * 2001), "2,001 characters; give 2,000 or fewer"),
        (Wish("a", "b" * 2001), "2,001 characters"),
        (Wish("a", "b", 1.5), "from 0 to 1"),
        (Wish("a", examples="x\n" * 65), "65 examples are too many"),
        (Wish("a", examples="x" * 8001), "8,001 characters"),
        (Wish("a", images=[tmp_path] * (MAX_IMAGES + 1)), "17 images are too many"),
        (Wish("a", images=[tmp_path / "none.png"]), "cannot be read"),
        (Wish("a", rank=0), "rank=0"),
        (Wish("a", seed=-1), "seed"),
        (Wish("a", temperature=-1.0), "temperature"),
    ):
        with pytest.raises(LoraFactoryError, match=words):
            wish.order()
    for prompt, tokens, words in (
        (" ", 5, "the prompt is empty"),
        ("a" * 8001, 5, "8,001 characters"),
        ("a", 0, "max_new_tokens=0 must be from 1 to"),
        ("a", work.longest + 1, "must be from 1 to"),
    ):
        with pytest.raises(LoraFactoryError, match=words):
            asyncio.run(compared(work, Wish(LAW), prompt, tokens))
    with pytest.raises(LoraFactoryError, match="above the generator's"):
        asyncio.run(work.make(Wish(LAW, rank=work.rank + 1).order()))


def test_a_mixture_needs_two_different_texts() -> None:
    assert Wish(" a ", "a").mixture() == "a"
    assert Wish("", "b").mixture() == "b"
    assert Wish("a", "b", 0.3).mixture() == {"a": 0.7, "b": 0.3}
    assert Wish().mixture() is None


def test_examples_are_lines_or_paragraphs() -> None:
    assert split_examples("one\ntwo\n") == ["one", "two"]
    assert split_examples("one\nstill one\n  \n\n two\n") == ["one\nstill one", " two"]
    assert split_examples(" \n") == []


def test_distance_is_told_in_a_sentence(work: SideBySide) -> None:
    told = {text: work.closeness(text) for text in ("poems", LAW, "zz qq", "a b c d")}
    for text, one in told.items():
        found = work.generator.explain(text)
        assert (one.verdict == "far") == (found["farther_than"] >= 1)
        assert (one.verdict, one.sentence) == (found["verdict"], found["sentence"])
        assert one.nearest[0] == (found["nearest"][0]["task"], found["distance"])
    assert "far" in {one.verdict for one in told.values()}
    far = next(one for one in told.values() if one.verdict == "far")
    assert "Far from every task that the generator knows" in closeness_html(far)


def test_what_others_wrote_is_no_html(work: SideBySide) -> None:
    shown = error_html(LoraFactoryError("<script>x</script> \x1b"))
    assert "<script>" not in shown and "\x1b" not in shown
    work.generator.config.tasks[0]["name"], name = "<b>bold</b>", work.generator.config.tasks[0]["name"]
    try:
        shown = closeness_html(work.closeness("poems")) + app_module._head(work)
    finally:
        work.generator.config.tasks[0]["name"] = name
    assert "<b>" not in shown and "&lt;b&gt;" in shown


def test_what_cannot_be_pushed_is_refused(work: SideBySide) -> None:
    made = asyncio.run(work.make(Wish(LAW).order()))
    with pytest.raises(LoraFactoryError, match="others cannot load"):  # its base model is a folder
        work.push(made, "alice/law", private=False)
    with pytest.raises(LoraFactoryError, match="the repository is not named"):
        work.push(made, " ", private=False)


def test_what_is_pushed_is_what_was_compared(
    hub: LocalHub, pico_model_folder: Path, pico_encoder_folder: Path, tmp_path: Path
) -> None:
    folder = publish_base(hub, pico_model_folder, pico_encoder_folder, tmp_path / "generator")
    result = ask(
        hub,
        f"""
import asyncio
from lora_factory.serving.side_by_side import SideBySide, Wish
work = SideBySide(CVAELoRAGenerator.from_pretrained({str(folder)!r}))
made = asyncio.run(work.make(Wish(TEXT, rank=1).order()))
address = work.push(made, " alice/tried ", private=True)
work.close()
result = {{"address": address, "sha256": made.generation["sha256"]}}
""",
    )
    files = hub.files("alice/tried")
    assert "/alice/tried/commit/" in result["address"]
    assert hub.repos["model", "alice/tried"].private
    assert hashlib.sha256(files["adapter_model.safetensors"]).hexdigest() == result["sha256"]
    assert json.loads(files["generation.json"])["rank"] == 1
    assert 'from_pretrained("alice/tried' in files["README.md"].decode()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_the_command_says_what_is_missing(
    generator_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["app", "--port", "0"]) == 2
    assert "--port 0 must be from 1 to 65535" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "--generator", str(generator_folder)]) == 2
    assert "pip install 'lora-factory[app]'" in capsys.readouterr().err


def test_the_page_is_for_this_machine_alone_and_leaves_nothing() -> None:
    pytest.importorskip("gradio")
    port = free_port()
    with open_app(None, port=port) as address:
        assert address == f"http://127.0.0.1:{port}/"
        page = httpx2.get(address)
        assert "No generator is loaded" in page.text and "google" not in page.text.lower().replace("@teamgradio", "")
        assert httpx2.get(address, headers={"Host": "evil.example"}).status_code == 400
        folder = Path(os.environ["GRADIO_TEMP_DIR"]).parent
        assert folder.is_dir()
        with pytest.raises(LoraFactoryError, match=f"port={port} is not free"), open_app(None, port=port):
            pass
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium; make browser installs it")
def test_a_click_through(generator_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    asked: list[str] = []
    with open_app(generator_folder, port=free_port()) as address, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(20_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.click("#run")
        playwright.expect(page.locator("#notice .error")).to_contain_text("Nothing to go by yet")
        page.fill("#task textarea", "zz qq")
        page.locator("#prompt textarea").focus()
        playwright.expect(page.locator("#closeness")).to_contain_text("Cosine distance")
        page.fill("#task textarea", LAW)
        page.click("text=Mix with a second task")
        page.fill("#second textarea", "poems")
        page.fill("#prompt textarea", "Hello")
        page.click("#run")
        playwright.expect(page.locator("#adapted textarea")).not_to_have_value("")
        playwright.expect(page.locator("#stop")).to_be_hidden()
        playwright.expect(page.locator("#adapted")).to_contain_text("“poems”")
        answers = [page.input_value(f"#{name} textarea") for name in ("base", "adapted")]
        assert all(answers) and answers[0] != answers[1]
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "adapter.zip")
        generation = json.loads(zipfile.ZipFile(tmp_path / "adapter.zip").read("adapter/generation.json"))
        assert generation["text"] == f"0.5 * {LAW!r} + 0.5 * 'poems'"
        page.click("text=Push the adapter to the Hub")
        page.fill("#repository input, #repository textarea", "alice/law")
        page.click("#push")
        playwright.expect(page.locator("#pushed .error")).to_contain_text("others cannot load")
        assert page.get_by_role("button", name="Examples").is_visible()
        assert not page.locator("#images").is_visible()  # the generator hears none
        assert not page.locator("footer").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium; make browser installs it")
def test_images_are_dropped_and_answered(base_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    layout = attach(LlamaForCausalLM.from_pretrained(base_folder))[1]
    named = AdapterLayout.from_dict(layout.to_dict() | {"base_model": str(base_folder)})
    encoder, eye = save_word_encoder(tmp_path / "encoder"), save_classifier(tmp_path / "eye")
    generator = make_generator(named, encoder, text=128, hidden=96, images=(eye, ImageEncoder(str(eye)).width))
    generator.scale.mul_(20)
    generator.save_pretrained(tmp_path / "generator")
    files = []
    for number, bright in enumerate((True, False)):
        files.append(tmp_path / f"{number}.png")
        bright_or_dark(number, bright=bright).resize((64, 64)).save(files[-1])
    made = []
    with open_app(tmp_path / "generator", port=free_port()) as address, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for file in files:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(20_000)
            page.goto(address)
            page.get_by_role("button", name="Examples and images").click()
            page.locator("#images input[type=file]").set_input_files(str(file))
            playwright.expect(page.locator("#images img")).to_be_visible()
            page.fill("#prompt textarea", "Hello")
            page.click("#run")
            playwright.expect(page.locator("#adapted textarea")).not_to_have_value("")
            playwright.expect(page.locator("#stop")).to_be_hidden()
            assert page.input_value("#base textarea") != page.input_value("#adapted textarea")
            playwright.expect(page.locator("#adapted")).to_contain_text("Written for the images.")
            with page.expect_download() as download:
                page.click("#download")
            made.append(json.loads(zipfile.ZipFile(download.value.path()).read("adapter/generation.json")))
        browser.close()
    assert [generation["conditions"] for generation in made] == [["image"], ["image"]]
    assert made[0]["sha256"] != made[1]["sha256"]
