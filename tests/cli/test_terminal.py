"""What a terminal of 80 characters shows, and what a file gets: no broken word, no codes that nobody asked for."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

WORDS = "permission is hereby granted free of charge to any person obtaining a copy of the software"
FIRST, REST = "permission is hereby granted free of charge to any person obtaining a copy of", "the software"
FOLDER = "models/" + "a-long-name-of-a-folder-" * 2
CODE = f"""
import warnings
from types import SimpleNamespace
from lora_factory.cli import commands as cli
from lora_factory.cli.output import say

def run(options):
    warnings.warn("the text is\\n far")
    say("{WORDS} {"x" * 100}", wrap=True)
    score = SimpleNamespace(perplexity=665.14, bits_per_character=3.126, accuracy=None)
    row = {{task: score for task in ("licences", "letters", "poems", "python_code")}}
    cli._print_scores({{name: row for name in ("base model", {FOLDER!r})}})
    cli._print_scores({{name: row for name in ("base model", {WORDS!r})}})

cli._demo = run
assert cli.main(["demo"]) == 0
"""


def on_a_terminal(code: str, **environment: str) -> str:
    """What a terminal of 80 characters gets of a Python program."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    program = [sys.executable, "-c", code]
    with subprocess.Popen(program, stdout=theirs, stderr=theirs, env=inherited | environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux: the other end is closed
                part = b""
            if not part:
                break
            shown += part
    os.close(ours)
    assert process.returncode == 0, shown.decode()
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_a_narrow_terminal(environment: dict[str, str], coloured: bool) -> None:
    shown = on_a_terminal(CODE, **{"TERM": "xterm-256color"} | environment)
    assert ("\x1b" in shown) is coloured
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).split("\n")
    table = [line for line in lines if line.startswith(" ")]
    assert [line for line in lines if not line.startswith(" ")][:4] == [
        "warning: the text is far",
        FIRST,
        REST,
        "x" * 100,
    ]
    assert max(map(len, table)) <= 80
    assert sum(line.count("665.14 / 3.126") for line in table) == 16
    assert {*WORDS.split(), FOLDER, "python_code"} <= {word for line in table for word in line.split()}
    headings = [line.split()[1:] for line in table if line.startswith("  model ")]
    assert [name for some in headings for name in some] == ["licences", "letters", "poems", "python_code"] * 2
    assert max(map(len, headings)) == 2  # beside a description there is room for more than one task


def test_a_file_gets_whole_lines_without_codes() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert not re.search("[\x1b\r]", done.stdout + done.stderr)
    assert f"{WORDS} {'x' * 100}\n" in done.stdout
    assert done.stderr == "warning: the text is far\n"
