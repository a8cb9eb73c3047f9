"""The app: a page in the browser that writes adapters, and shows their answers beside those of the base model."""

from __future__ import annotations

import asyncio
import contextlib
import html
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from lora_factory.arguments import APP_PORT
from lora_factory.errors import LoraFactoryError
from lora_factory.serving.limits import MAX_TEXT
from lora_factory.utils.extras import require
from lora_factory.utils.printable import printable
from lora_factory.utils.safe_files import is_hub_id

if TYPE_CHECKING:
    from lora_factory.generator.generation import Order
    from lora_factory.serving.kept_adapters import WrittenAdapter
    from lora_factory.serving.side_by_side import Closeness, SideBySide

HOST = "127.0.0.1"
_FILES_KEPT = (600, 3600)  # seconds between two looks for old files; seconds that a file is kept
_SESSIONS = 16  # whose last adapter stays in memory
_LOGGER = logging.getLogger(__name__)
_AS_WRITTEN = "Written for the task."
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
_CSS = """
footer, .built-with { display: none !important }
.gradio-container { width: 100%; max-width: 1240px !important; margin: 0 auto !important }
.html-container { padding: 0 !important }
#head h1 { font-size: 1.5rem; font-weight: 650; margin: 0 0 .25rem; letter-spacing: -.01em }
#head p { margin: 0; color: var(--body-text-color-subdued); line-height: 1.5; overflow-wrap: anywhere }
.lf-note { padding: .75rem 1rem; border-radius: 8px; border: 1px solid var(--border-color-primary);
  background: var(--background-fill-secondary); line-height: 1.5; overflow-wrap: anywhere }
.lf-note.error { border-color: #dc2626; box-shadow: inset 3px 0 0 #dc2626 }
.lf-note.far { box-shadow: inset 3px 0 0 var(--body-text-color) }
.lf-note a { color: var(--link-text-color); text-decoration: underline }
.lf-note p { margin: 0 }
.lf-note p.small { font-size: .85rem; color: var(--body-text-color-subdued); margin-top: .5rem }
.lf-note .verdict { font-weight: 600 }
.lf-tasks { display: grid; grid-template-columns: fit-content(50%) minmax(3rem, 1fr) auto; gap: .4rem .75rem;
  align-items: center; margin-top: .6rem; font-size: .9rem }
.lf-tasks span { overflow-wrap: anywhere }
.lf-tasks .track { position: relative; height: 2px; background: var(--border-color-primary) }
.lf-tasks .track i { position: absolute; top: -4px; width: 10px; height: 10px; margin-left: -5px; border-radius: 50%;
  background: var(--color-accent) }
.lf-tasks .number { font-variant-numeric: tabular-nums; color: var(--body-text-color-subdued) }
.lf-note code { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere }
@media (max-width: 640px) {
  .gradio-container .main { padding: 12px 14px !important }
  #base textarea, #adapted textarea { height: 13rem !important }
}
"""


@contextlib.contextmanager
def open_app(
    generator: str | Path | None,
    *,
    base_model: str | Path | None = None,
    revision: str | None = None,
    port: int = APP_PORT,
) -> Iterator[str]:
    """Serve the app to this machine while the block runs.

    Nothing is shared, counted or asked for elsewhere; temporary files lie in one folder, which goes with the app.

    Args:
        generator: Folder or Hub id; None: the page says how to come by one.
        base_model: Folder or Hub id of the base model; default: the one that the generator names.
        revision: Branch, tag or commit of a generator on the Hub.
        port: TCP port.

    Yields:
        The page's address.

    Raises:
        LoraFactoryError: When a package is missing, the port is not free, or generator or base model cannot be loaded.
    """
    if not 1 <= port <= 65535:
        raise LoraFactoryError(f"port={port} must be from 1 to 65535")
    require("app", "the app", "gradio")
    with tempfile.TemporaryDirectory(prefix="lora-factory-app-") as folder, contextlib.ExitStack() as stack:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # both are read when gradio is imported
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "gradio"))
        work = None if generator is None else _load(generator, base_model, revision)
        if work is not None:
            stack.callback(work.close)
        page = _page(work, Path(folder))
        stack.callback(page.close, verbose=False)
        yield _launch(page, port)


def _load(generator: str | Path, base_model: str | Path | None, revision: str | None) -> SideBySide:
    from lora_factory.generator.modeling import CVAELoRAGenerator
    from lora_factory.serving.side_by_side import SideBySide

    return SideBySide(CVAELoRAGenerator.from_pretrained(generator, revision=revision), base_model)


def _launch(page: Any, port: int) -> str:  # noqa: ANN401
    """Serve a page of gradio in a thread; returns its address."""
    import gradio
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # A web page that calls itself by a name for this machine's address is not let in.
    own = Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1"])
    theme = gradio.themes.Base(
        primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", font=_FONTS, font_mono=("monospace",)
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_label_text_color="*neutral_800",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_200",
        block_title_text_weight="600",
        block_border_width="1px",
        block_radius="8px",
        input_radius="6px",
        input_background_fill="white",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
    )
    try:
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=theme,
            css=_CSS,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            max_file_size="10mb",
            state_session_capacity=_SESSIONS,
            app_kwargs={"middleware": [own], "docs_url": None, "redoc_url": None},
        )
    except OSError as error:
        raise LoraFactoryError(f"port={port} is not free ({error}); give another one") from error
    return str(address)


def _page(work: SideBySide | None, folder: Path) -> Any:  # noqa: ANN401
    """The page, as gradio's ``Blocks``."""
    import gradio

    with gradio.Blocks(
        title="lora-factory", analytics_enabled=False, fill_width=True, delete_cache=_FILES_KEPT
    ) as page:
        if work is None:
            gradio.HTML(_NOTHING_LOADED, elem_id="head", padding=False)
        else:
            _Form(work, folder)
    page.queue(max_size=32, default_concurrency_limit=4)
    return page


class _Form:
    """The fields of the page and what happens when its buttons are pressed.

    Args:
        work: Generator and base model.
        folder: For archives that are to be downloaded.
    """

    def __init__(self, work: SideBySide, folder: Path) -> None:
        import gradio

        self.work, self.folder = work, folder
        gradio.HTML(_head(work), elem_id="head", padding=False)
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=5, min_width=320):
                inputs = self._adapter_fields()
                asked = self._prompt_fields()
            with gradio.Column(scale=7, min_width=320):
                self._answer_fields()
        self._wire(inputs, asked)

    def _adapter_fields(self) -> list[Any]:
        import gradio

        hears = self.work.hears
        text, images, shown = "text" in hears, "image" in hears, "hidden" in hears
        title = " and ".join(name for name, heard in (("Examples", shown), ("Images", images)) if heard)
        self.text = gradio.Textbox(
            "",
            label="Task",
            info="What the adapter is for, in a sentence.",
            lines=2,
            max_length=MAX_TEXT,
            visible=text,
            elem_id="task",
        )
        self.closeness = gradio.HTML("", visible=False, elem_id="closeness", padding=False)
        with gradio.Accordion("Mix with a second task", open=False, visible=text):
            self.second = gradio.Textbox("", label="Second task", lines=2, max_length=MAX_TEXT, elem_id="second")
            self.share = gradio.Slider(0, 1, 0.5, step=0.05, label="Share of the second task", elem_id="share")
        with gradio.Accordion(title.capitalize(), open=False, visible=bool(title)):
            examples = gradio.Textbox(
                "",
                label="Examples of the task",
                info="One a line, or separated by blank lines.",
                visible=shown,
                lines=5,
                max_lines=12,
                elem_id="examples",
            )
            pictures = gradio.Gallery(
                label="Images of the task",
                type="filepath",
                file_types=["image"],
                columns=4,
                height=220,
                sources=["upload", "clipboard"],
                buttons=[],
                interactive=True,
                visible=images,
                elem_id="images",
            )
        return [self.text, self.second, self.share, examples, pictures]

    def _prompt_fields(self) -> list[Any]:
        import gradio

        from lora_factory.serving.side_by_side import MAX_PROMPT

        longest, rank = self.work.longest, self.work.rank
        template = bool(self.work.tokenizer.chat_template)
        prompt = gradio.Textbox(
            "",
            label="Prompt",
            info="Both models continue it, or answer it.",
            lines=3,
            max_lines=10,
            max_length=MAX_PROMPT,
            elem_id="prompt",
        )
        with gradio.Accordion("Settings", open=False):
            ranks = gradio.Slider(1, rank, rank, step=1, label="Rank", visible=rank > 1, elem_id="rank")
            temperature = gradio.Slider(
                0, 2, 0, step=0.1, label="Temperature", info="0 writes the most likely adapter.", elem_id="temperature"
            )
            seed = gradio.Number(
                0, label="Seed", info="Without effect at temperature 0.", precision=0, minimum=0, elem_id="seed"
            )
            tokens = gradio.Slider(
                1, longest, min(100, longest), step=1, label="Longest answer, in tokens", elem_id="tokens"
            )
            chat = gradio.Checkbox(
                bool(self.work.generator.config.chat_template),
                label="Ask as a message in the chat template",
                visible=template,
                elem_id="chat",
            )
        with gradio.Row():
            self.run = gradio.Button("Write the adapter and compare", variant="primary", elem_id="run", min_width=200)
            self.stop = gradio.Button("Stop", visible=False, elem_id="stop", min_width=80, scale=0)
        self.notice = gradio.HTML("", visible=False, elem_id="notice", padding=False)
        return [ranks, temperature, seed, prompt, tokens, chat]

    def _answer_fields(self) -> None:
        import gradio

        with gradio.Row():
            self.base, self.adapted = (
                gradio.Textbox(
                    label=label,
                    info=info,
                    placeholder="The answer comes here.",
                    lines=16,
                    max_lines=16,
                    interactive=False,
                    buttons=["copy"],
                    min_width=280,
                    elem_id=name,
                )
                for label, info, name in (
                    ("Base model", "As it is.", "base"),
                    ("With the adapter", _AS_WRITTEN, "adapted"),
                )
            )
        self.made = gradio.State(None, time_to_live=_FILES_KEPT[1])
        self.download = gradio.DownloadButton(
            "Download the adapter (ZIP)", size="md", interactive=False, elem_id="download"
        )
        with gradio.Accordion("Push the adapter to the Hub", open=False):
            self.repository = gradio.Textbox(
                "", label="Repository", info="user/name", max_lines=1, elem_id="repository"
            )
            self.private = gradio.Checkbox(True, label="Make a new repository private")
            self.push = gradio.Button("Push", interactive=False, elem_id="push")
            self.pushed = gradio.HTML("", visible=False, elem_id="pushed", padding=False)

    def _wire(self, inputs: list[Any], asked: list[Any]) -> None:
        import gradio

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        gradio.on(
            [self.text.blur, self.text.submit, self.second.blur, self.share.release],
            self.measure,
            [self.text, self.second, self.share],
            [self.closeness],
            trigger_mode="always_last",
            **quiet,
        )
        buttons = [self.run, self.stop]
        results = [self.notice, self.closeness, self.base, self.adapted, self.made, self.download, self.push]
        running = self.run.click(self.compare, [*inputs, *asked], [*results, self.pushed, *buttons], **quiet)
        self.stop.click(self.stopped, None, [self.notice, *buttons], cancels=[running], **quiet)
        self.push.click(self.publish, [self.made, self.repository, self.private], [self.pushed], **quiet)

    def measure(self, text: str, second: str, share: float) -> Any:  # noqa: ANN401
        """Say how far the text is from the known tasks."""
        from lora_factory.serving.side_by_side import Wish

        try:
            mixture = Wish(text, second, share).mixture()
            return _shown("" if mixture is None else closeness_html(self.work.closeness(mixture)))
        except LoraFactoryError as error:
            return _shown(error_html(error))

    async def compare(
        self,
        text: str,
        second: str,
        share: float,
        examples: str,
        images: list[tuple[str, str | None]] | None,
        rank: int,
        temperature: float,
        seed: int | None,
        prompt: str,
        tokens: int,
        chat: bool,
    ) -> AsyncIterator[dict[Any, Any]]:
        """Write an adapter, then answer the prompt with and without it."""
        import gradio

        from lora_factory.serving.side_by_side import Wish

        yield {
            self.notice: _shown(note_html("The adapter is being written …")),
            self.base: "",
            self.adapted: gradio.Textbox("", info=_AS_WRITTEN),
            self.made: None,
            self.download: gradio.DownloadButton(interactive=False, value=None),
            self.push: gradio.Button(interactive=False),
            self.pushed: _shown(""),
            self.run: gradio.Button(interactive=False),
            self.stop: gradio.Button(visible=True),
        }
        try:
            files = [Path(image) for image, _ in images or ()]
            own = None if rank == self.work.rank else int(rank)
            wish = Wish(text, second, share, examples, files, own, float(temperature), int(seed or 0))
            order = await asyncio.to_thread(wish.order)
            made = await self.work.make(order)
            closeness = await asyncio.to_thread(self.work.closeness, order.text, made)
            with self._archive(made) as archive:
                yield {
                    self.closeness: _shown(closeness_html(closeness)),
                    self.notice: _shown(note_html("The models answer …") if prompt.strip() else ""),
                    self.adapted: gradio.Textbox(info=_written_for(order)),
                    self.made: made,
                    self.download: gradio.DownloadButton(interactive=True, value=str(archive)),
                    self.push: gradio.Button(interactive=True),
                }
            answers = ("", "")
            async for answers in self.work.answers(order, prompt, int(tokens), chat=chat):
                yield dict(zip((self.base, self.adapted), answers, strict=True))
            ending = {self.base: answers[0], self.adapted: answers[1], self.notice: _shown("")}
        except LoraFactoryError as error:
            ending = {self.notice: _shown(error_html(error))}
        except Exception as error:  # the page is to say so, whatever it is
            _LOGGER.exception("a comparison failed")
            ending = {self.notice: _shown(error_html(f"{type(error).__name__}; the terminal says more"))}
        yield ending | self._idle()  # at once: gradio may leave out what comes shortly before the end

    def stopped(self) -> dict[Any, Any]:
        """What the page shows after a stop."""
        return {self.notice: _shown(""), **self._idle()}

    async def publish(self, made: WrittenAdapter | None, repository: str, private: bool) -> AsyncIterator[Any]:
        """Push the adapter that was compared last."""
        if made is None:
            yield _shown(error_html("there is no adapter yet; write one first"))
            return
        yield _shown(note_html("The adapter is being pushed …"))
        try:
            address = await asyncio.to_thread(self.work.push, made, repository, private=private)
            link = f'<a href="{html.escape(address)}" target="_blank" rel="noopener">{html.escape(address)}</a>'
            yield _shown(f'<div class="lf-note" role="status"><p>Pushed: {link}</p></div>')
        except LoraFactoryError as error:
            yield _shown(error_html(error))

    def _idle(self) -> dict[Any, Any]:
        import gradio

        return {self.run: gradio.Button(interactive=True), self.stop: gradio.Button(visible=False)}

    @contextlib.contextmanager
    def _archive(self, made: WrittenAdapter) -> Iterator[Path]:
        """The adapter's folder as a file; gradio copies it when it is shown, and removes its copy in time."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            path = Path(folder, f"adapter-{made.generation['sha256'][:12]}.zip")
            path.write_bytes(made.archive())
            yield path


def closeness_html(closeness: Closeness) -> str:
    """How far a text is from the known tasks: a sentence, and the nearest tasks on a scale from 0 to 1."""
    rows = "".join(
        f'<span>{_text(task)}</span><span class="track"><i style="left:{100 * min(1.0, distance):.1f}%"></i></span>'
        f'<span class="number">{distance:.2f}</span>'
        for task, distance in closeness.nearest
    )
    return (
        f'<div class="lf-note {closeness.verdict}" role="status"><p class="verdict">{_text(closeness.sentence)}</p>'
        f'<div class="lf-tasks">{rows}</div><p class="small">Cosine distance from the nearest known tasks; 0 is '
        f"the same. The adapter is changed {closeness.use:.1f} times as much as for a known task.</p></div>"
    )


def note_html(text: str) -> str:
    """A line that says what happens."""
    return f'<div class="lf-note" role="status"><p>{_text(text)}</p></div>'


def error_html(error: object) -> str:
    """An error, as a sentence."""
    text = printable(error).rstrip(".")
    return f'<div class="lf-note error" role="alert"><p>{_text(text[:1].upper() + text[1:])}.</p></div>'


def _written_for(order: Order) -> str:
    """What an adapter is for, on one line: the fields may have been changed since."""
    named = [f"“{shorten(printable(text), 60, placeholder=' …')}”" for text in order.texts]
    named += ["the examples"] * (order.examples is not None) + ["the images"] * (order.images is not None)
    return f"Written for {' and '.join(named)}."


def _text(text: str) -> str:
    return html.escape(printable(text))


def _shown(value: str) -> Any:  # noqa: ANN401
    """A place for HTML that is there while it holds something."""
    import gradio

    return gradio.HTML(value, visible=bool(value))


def _head(work: SideBySide) -> str:
    layout, config = work.generator.layout, work.generator.config
    base = layout.base_model if is_hub_id(layout.base_model) else Path(layout.base_model).name
    names = [printable(task["name"]) for task in config.tasks or ()]
    known = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return (
        "<h1>lora-factory</h1>"
        f"<p>Describe a task, and compare {_text(base)} with and without an adapter that is written for it.</p>"
        + (f"<p>Known tasks: {_text(known)}.</p>" if known else "")
    )


_NOTHING_LOADED = """
<h1>lora-factory</h1>
<div class="lf-note" style="margin-top: 1rem">
<p class="verdict">No generator is loaded.</p>
<p class="small">Start the app with a folder, or with the id of one on the Hub:<br>
<code>lora-factory app --generator user/name</code></p>
<p class="small">To make one from real text in a few minutes:<br>
<code>lora-factory demo --fast</code></p>
</div>
"""
