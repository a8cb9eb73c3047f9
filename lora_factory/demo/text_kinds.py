"""The kinds of real text in a Python environment with lora-factory's dependencies, and where they lie in it."""

from __future__ import annotations

import doctest
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path

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
        key: Names the text, the same on every machine.
        read: Fetches the text; None when it cannot be read as UTF-8 or is too large to be written by hand.
    """

    key: str
    read: Callable[[], str | None]


@dataclass(frozen=True)
class TextKind:
    """One kind of text.

    Attributes:
        name: The task's name.
        descriptions: What the text is, in several wordings.
        candidates: Finds the texts of this kind in the running environment.
    """

    name: str
    descriptions: tuple[str, ...]
    candidates: Callable[[], Iterable[Candidate]]


def _python_code() -> Iterator[Candidate]:
    return _files(Path(sysconfig.get_path("stdlib")), "stdlib", ["*.py"], _NOT_LIBRARY)


def _cpp_headers() -> Iterator[Candidate]:
    # ATen/ops holds thousands of generated declarations.
    return _package_files(
        ["torch"], "include/c10/**/*.h", "include/ATen/**/*.h", "include/torch/**/*.h", skipped=["ops"]
    )


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


def _unit_tests() -> Iterator[Candidate]:
    return _package_files(["sympy", "networkx", "numpy", "pandas"], "tests/**/test_*.py")


def _cython() -> Iterator[Candidate]:
    packages = ["pyarrow", "numpy", "pandas", "aiohttp", "multidict", "frozenlist", "propcache", "yarl"]
    return _package_files(packages, "*.pyx", "*.pxd", "*.pxi")


def _api_docstrings() -> Iterator[Candidate]:
    for file in _package_files(["numpy", "networkx", "pandas"], "*.py", skipped=["tests"]):
        yield Candidate(file.key, partial(_numpy_docstrings, file))


def _interactive_sessions() -> Iterator[Candidate]:
    for file in _package_files(["sympy"], "*.py", skipped=["tests"]):
        yield Candidate(file.key, partial(_sessions, file))


def _type_stubs() -> Iterator[Candidate]:
    packages = ["numpy", "pandas", "torch", "tokenizers", "PIL", "safetensors", "attr", "yarl", "frozenlist"]
    return _package_files(packages, "*.pyi", skipped=["tests"])


def _published_distributions() -> Iterator[Distribution]:
    """Distributions that came from a package index; a project under development stays private."""
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


KINDS: tuple[TextKind, ...] = (
    TextKind(
        "python_code",
        (
            "Python source code of library modules: imports, functions, classes and comments.",
            "Write ordinary Python program code the way the standard library does.",
            "Implementation files in the Python programming language (.py).",
            "Continue a Python module with working function bodies and class definitions.",
            "Code in Python that implements general-purpose library features.",
        ),
        _python_code,
    ),
    TextKind(
        "cpp_headers",
        (
            "C++ header files: include guards, namespaces, templates, class and function declarations.",
            "Write declarations for a C++ library, as found in .h files.",
            "Headers of a C++ tensor library with templates, macros and inline functions.",
            "Continue a .h file written in modern C++.",
            "C and C++ interface code: #include lines, structs and member functions.",
        ),
        _cpp_headers,
    ),
    TextKind(
        "licences",
        (
            "Software licence texts: permissions, conditions, warranty disclaimers and limits of liability.",
            "Write the legal terms under which a program may be copied and distributed.",
            "Open-source licence agreements and copyright notices.",
            "Legal prose in English that grants rights to use, modify and redistribute software.",
            "Continue a LICENSE file with clauses about redistribution and liability.",
        ),
        _licences,
    ),
    TextKind(
        "reference_docs",
        (
            "Reference documentation of a programming language: its syntax and semantics, explained in prose.",
            "Write a chapter of the language manual that explains statements, expressions and data types.",
            "Formal explanations of Python's grammar and execution rules, in the style of a language reference.",
            "Manual pages about how the language works, with grammar rules and footnotes.",
            "Continue a help topic that describes a keyword or an operator in detail.",
        ),
        _reference_docs,
    ),
    TextKind(
        "unit_tests",
        (
            "Unit tests: short test functions that assert what a mathematical or data library returns.",
            "Write pytest cases that check results with assert statements.",
            "Test suites with functions named test_ and many assertions.",
            "Automated regression tests which compare computed values with the expected ones.",
            "Continue a test_*.py file with more assertions.",
        ),
        _unit_tests,
    ),
    TextKind(
        "package_readmes",
        (
            "README pages of software packages: what the project does, how to install it and how to start.",
            "Write the Markdown project description shown on a package index.",
            "Introductions to open-source projects with badges, features, installation and usage.",
            "Continue a README.md that presents a library to new users.",
            "Marketing and getting-started text of published packages, with links and command lines.",
        ),
        _package_readmes,
    ),
    TextKind(
        "cython",
        (
            "Cython code: typed extension modules with cdef classes and C declarations.",
            "Write .pyx and .pxd files that bind C++ libraries for use from an interpreter.",
            "Extension modules in Cython with cdef, cimport and nogil blocks.",
            "Continue a Cython source file that wraps native functions and memory.",
            "Bindings between C++ and an interpreted language, written in Cython syntax.",
        ),
        _cython,
    ),
    TextKind(
        "api_docstrings",
        (
            "API documentation in NumPy's docstring style: Parameters, Returns, Notes and Examples sections.",
            "Write the documentation of a scientific function with its parameters and return values.",
            "Structured docstrings with underlined section headings and typed argument lists.",
            "Continue the description of a numerical routine: arguments, shapes, results and notes.",
            "Help texts of functions for arrays, tables and graphs, section by section.",
        ),
        _api_docstrings,
    ),
    TextKind(
        "interactive_sessions",
        (
            "Interactive interpreter sessions: lines typed at the >>> prompt and the results printed below.",
            "Write doctest examples of symbolic mathematics with their output.",
            "Transcripts of a console in which expressions are entered and evaluated one by one.",
            "Continue a session at the prompt that simplifies, integrates and solves formulas.",
            "Prompt and answer examples from a computer algebra system.",
        ),
        _interactive_sessions,
    ),
    TextKind(
        UNSEEN_KIND,
        (
            "Type stub files (.pyi): annotated signatures of Python functions and classes without bodies.",
            "Write Python type hints for a library: overloads, type variables and ellipsis bodies.",
            "Stubs that declare the argument and return types of a Python module for a type checker.",
            "Continue a .pyi file with class and function signatures.",
            "Static typing declarations for Python packages, all bodies replaced by three dots.",
        ),
        _type_stubs,
    ),
)
