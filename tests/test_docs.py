"""The documentation: links that lead somewhere, commands that parse, messages that the code writes, a strict build."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
from functools import cache
from pathlib import Path

import pytest

import lora_factory
from lora_factory.cli.commands import parse
from lora_factory.generator.files import CONFIG_FILE
from lora_factory.tasks.task_file import load_tasks

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LINKED = [
    *PAGES,
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md")),
]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs and GitHub both make them of plain words."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            broken.append(target)
    assert broken == []


def test_the_command_line_page_is_that_of_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    page = runpy.run_path(str(ROOT / "docs" / "tools" / "cli_page.py"))["page"]()
    stored = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert stored == page, "docs/cli.md is out of date; run: python docs/tools/cli_page.py"
    assert "With `--zoo`, these are decided by the zoo and may not be given: `--lora-alpha`, " in page


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: lora_factory\.(\w+)$", page, flags=re.MULTILINE)) == sorted(lora_factory.__all__)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "cli.md"], ids=name_of)
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        if "base_model: " in block or block.startswith("# collect.yaml"):
            Path("collect.yaml").write_text(block)
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            command = re.sub(r"^accelerate launch .* -m lora_factory.cli", "lora-factory", line)
            if command.startswith("lora-factory "):
                try:
                    parse(shlex.split(command, comments=True)[1:])
                except SystemExit:
                    pytest.fail(line)


def test_quick_start_is_the_example() -> None:
    example = (ROOT / "examples" / "quick_start.py").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert example.endswith(code)


def test_the_task_file_of_the_page_loads(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "task-files.md").read_text(encoding="utf-8")
    (tmp_path / "tasks.yaml").write_text(re.findall(r"^```yaml\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)[0])
    (tmp_path / "licences").mkdir()
    for split in ("train", "test"):
        rows = (f'{{"text": "Permission is granted, clause {number} of {split}."}}' for number in range(20))
        (tmp_path / "licences" / f"{split}.jsonl").write_text("\n".join(rows))
    (task,) = load_tasks(tmp_path / "tasks.yaml")
    assert (task.name, task.license, len(task.descriptions)) == ("licences", "mit", 2)
    assert len(task.examples("test")) == 20 and task.examples("validation")


def test_the_snippets_for_the_hub_are_calls_that_exist() -> None:
    page = (ROOT / "docs" / "hub-library.md").read_text(encoding="utf-8")
    install, code, command = re.findall(r"^\t`([^`]+)`,$", page, flags=re.MULTILINE)
    assert install == "pip install lora-factory"
    calls = [node.func.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert len(calls) == 3 and all(hasattr(lora_factory.CVAELoRAGenerator, name) for name in calls)
    parse(shlex.split(command)[1:])
    (counted,) = re.findall(r'countDownloads: `path:"(.*)"`', page)
    assert counted == CONFIG_FILE


def literals() -> list[str]:
    """Every text of the package, with … in place of what is filled in."""
    found = []
    for path in (ROOT / "lora_factory").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%(\.\d)?[sdf]( %%)?", "…", node.value))
    return found


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text(encoding="utf-8")
    texts = literals()
    headings = re.findall(r"^### (.+)$", page, flags=re.MULTILINE)
    messages = [message for heading in headings for message in re.findall(r"`([^`]+)`", heading)]
    assert len(messages) > 25
    assert [message for message in messages if not any(message in text for text in texts)] == []


def test_every_page_is_in_the_navigation() -> None:
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages == set(re.findall(r"[\w/-]+\.md", listed))


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml"):
        pytest.importorskip(module)
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    page = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    assert all(f'id="lora_factory.{name}"' in page for name in lora_factory.__all__)
    assert "_option(" not in page
    method = (tmp_path / "site" / "concepts" / "method" / "index.html").read_text(encoding="utf-8")
    assert method.count("<math") > 20 and "arithmatex" not in method
    assert not (tmp_path / "site" / "tools").exists()
