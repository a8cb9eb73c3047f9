"""Find kinds of real text, such as code, licences and docstrings, in the running Python environment."""

from __future__ import annotations

import doctest
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import Distribution, distributions
from importlib.resources import files
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path

import yaml

UNSEEN_KIND = "type_stubs"
_MAX_FILE_BYTES = 300_000  # larger files are tables or generated
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
_LICENCE_NAME = re.compile(r"(licen[sc]e|copying|notice)", re.IGNORECASE)
_LICENCE_ENDINGS = {"", ".txt", ".md", ".rst", ".apache", ".bsd", ".mit"}
_TRIPLE_QUOTED = re.compile(r'"""(.+?)"""', re.DOTALL)
_PARAMETERS_SECTION = re.compile(r"^(Parameters|Returns)\n-{3,}$", re.MULTILINE)


@dataclass(frozen=True)
class Candidate:
    """A text that may become a document.

    Attributes:
        key: Name of the text that does not depend on the machine.
        read: Returns the text, or None when it is not UTF-8 or too large to be written by hand.
    """

    key: str
    read: Callable[[], str | None]


@dataclass(frozen=True)
class TextKind:
    """One kind of text.

    Attributes:
        name: The task's name.
        descriptions: Descriptions of the text in several wordings.
        candidates: Finds the texts of this kind in the running environment.
    """

    name: str
    descriptions: tuple[str, ...]
    candidates: Callable[[], Iterable[Candidate]]


def _licences() -> Iterator[Candidate]:
    for distribution in _published_distributions():
        for file in distribution.files or ():
            if ".dist-info" in file.parts[0] and _LICENCE_NAME.match(file.name) and file.suffix in _LICENCE_ENDINGS:
                path = Path(str(file.locate()))
                # The version in the folder's name would change the key with every release.
                key = "/".join((distribution.name, *file.parts[1:]))
                yield Candidate(key, partial(_read, path))


def _reference_docs() -> Iterator[Candidate]:
    if find_spec("pydoc_data"):
        from pydoc_data.topics import topics

        for name, text in topics.items():
            yield Candidate(name, partial(str, text))


def _package_readmes() -> Iterator[Candidate]:
    for distribution in _published_distributions():
        yield Candidate(distribution.name, partial(_description, distribution))


def _published_distributions() -> Iterator[Distribution]:
    """Distributions that were installed from a package index; projects under development are left out."""
    for distribution in distributions():
        if distribution.metadata["Name"] and distribution.read_text("direct_url.json") is None:
            yield distribution


def _description(distribution: Distribution) -> str | None:
    return distribution.metadata["Description"]


def _numpy_docstrings(file: Candidate) -> str:
    return "\n\n".join(filter(_PARAMETERS_SECTION.search, _docstrings(file.read())))


def _sessions(file: Candidate) -> str:
    return "\n\n".join(filter(None, map(_session, _docstrings(file.read()))))


def _docstrings(source: str | None) -> Iterator[str]:
    """The triple-quoted texts of a Python file, in order; parsing the files would take longer than all the rest."""
    return map(cleandoc, _TRIPLE_QUOTED.findall(source or ""))


def _session(docstring: str) -> str:
    """The examples of a docstring as they look at Python's prompt."""
    try:
        examples = doctest.DocTestParser().get_examples(docstring)
    except ValueError:
        return ""
    return "".join(_at_prompt(example.source) + example.want for example in examples)


def _at_prompt(source: str) -> str:
    first, *others = source.splitlines()
    return "".join([f">>> {first}\n", *(f"... {line}".rstrip() + "\n" for line in others)])


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size <= _MAX_FILE_BYTES else None
    except (OSError, UnicodeDecodeError):
        return None


def _files(root: Path, name: str, patterns: Sequence[str], skipped: Iterable[str] = ()) -> Iterator[Candidate]:
    """The files below a folder, none in the skipped folders; `name` stands for the folder in the keys."""
    skipped = set(skipped)
    for path in (path for pattern in patterns for path in root.rglob(pattern)):
        key = path.relative_to(root)
        if skipped.isdisjoint(key.parts):
            yield Candidate(f"{name}/{key.as_posix()}", partial(_read, path))


def _package_files(packages: Sequence[str], *patterns: str, skipped: Iterable[str] = ()) -> Iterator[Candidate]:
    """Files of installed packages, found without importing them."""
    for package in packages:
        spec = find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            yield from _files(Path(root), package, patterns, skipped)


def _from_docstrings(packages: Sequence[str], extract: Callable[[Candidate], str]) -> Iterator[Candidate]:
    """Apply ``extract`` to the Python files of installed packages, tests aside."""
    for file in _package_files(packages, "*.py", skipped=["tests"]):
        yield Candidate(file.key, partial(extract, file))


_HEADERS = [f"include/{folder}/**/*.h" for folder in ("c10", "ATen", "torch")]
_CYTHON = "pyarrow numpy pandas aiohttp multidict frozenlist propcache yarl".split()
_STUBS = "numpy pandas torch tokenizers PIL safetensors attr yarl frozenlist".split()
_FINDERS: dict[str, Callable[[], Iterable[Candidate]]] = {
    "python_code": partial(_files, Path(sysconfig.get_path("stdlib")), "stdlib", ["*.py"], _NOT_LIBRARY),
    # ATen/ops holds thousands of generated declarations.
    "cpp_headers": partial(_package_files, ["torch"], *_HEADERS, skipped=["ops"]),
    "licences": _licences,
    "reference_docs": _reference_docs,
    "unit_tests": partial(_package_files, ["sympy", "networkx", "numpy", "pandas"], "tests/**/test_*.py"),
    "package_readmes": _package_readmes,
    "cython": partial(_package_files, _CYTHON, "*.pyx", "*.pxd", "*.pxi"),
    "api_docstrings": partial(_from_docstrings, ["numpy", "networkx", "pandas"], _numpy_docstrings),
    "interactive_sessions": partial(_from_docstrings, ["sympy"], _sessions),
    UNSEEN_KIND: partial(_package_files, _STUBS, "*.pyi", skipped=["tests"]),
}
_DESCRIPTIONS = yaml.safe_load(files("lora_factory.demo").joinpath("descriptions.yaml").read_text(encoding="utf-8"))
KINDS = tuple(TextKind(name, tuple(_DESCRIPTIONS[name]), find) for name, find in _FINDERS.items())
