"""Cards of generators, adapters and zoos: plain data, rendered through the templates in ``model_card_templates``."""

from __future__ import annotations

import re
import warnings
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]  # it is public, not re-exported
from jinja2 import Environment, StrictUndefined, Template

from lora_factory.adapters.folder import CONDITION_FILE, Generation
from lora_factory.hub.base_kinds import CAUSAL, BaseKind
from lora_factory.utils.printable import printable
from lora_factory.utils.safe_files import MAX_CONFIG_BYTES, is_hub_id, read_text, reading

CARD_FILE = "README.md"
# All that a card's head may hold, in this order; what comes from outside is checked before it gets there.
YAML_FIELDS = (
    *("license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model", "base_model_relation"),
    *("datasets", "tags", "viewer", "model-index"),
)
LICENSES = frozenset(
    "afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-openrail-m bsd bsd-2-clause bsd-3-clause"
    " bsd-3-clause-clear bsl-1.0 cc cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0"
    " cc-by-nc-nd-4.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0"
    " cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0"
    " etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 llama2 llama3 llama3.1"
    " llama3.2 llama3.3 mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 pddl postgresql"
    " unlicense wtfpl zlib".split()
)
# What users hand in for each kind of task vector; "hidden" is the internal name of that of examples.
_GIVEN = {"text": "description", "hidden": "examples", "image": "images"}
MARK = "<!-- written by lora-factory:"
NOTE = "<!-- parts that lora-factory wrote; what you add to them stays:"


_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*")  # of a heading
_NO_PARAGRAPH = re.compile(r"\s*([|><]|```|~~~)| {0,3}([-*+]|\d{1,9}[.)])\s| {4}")  # tables, quotes, HTML, code, lists


@dataclass(frozen=True, kw_only=True)
class Origins:
    """The base model and the tasks that something was made from, and the licence that it inherits.

    Attributes:
        base_model: Hub id (or folder) of the base model.
        base_revision: Its commit, if known.
        base_license: Its licence, if known.
        tasks: The training tasks, as in a generator's config.
        kind: What kind of model the base is.
    """

    base_model: str
    base_revision: str | None
    base_license: str | None = None
    tasks: Sequence[Mapping[str, Any]] = ()
    kind: BaseKind = CAUSAL

    @property
    def license(self) -> str:
        """One identifier of the Hub for base and data: theirs if it is the same, "other" or "unknown" if not."""
        given = {self.base_license, *(task.get("license") for task in self.tasks)}
        names = {(license or "unknown").lower() for license in given}
        if len(names) == 1 and names <= LICENSES:
            return names.pop()
        return "unknown" if "unknown" in names else "other"

    @property
    def datasets(self) -> list[str]:
        """The Hub ids of the tasks' data sets, as far as they are known."""
        names = {task.get("dataset") for task in self.tasks}
        return sorted(name for name in names if name and is_hub_id(name))

    def head(self, **values: Any) -> dict[str, Any]:  # noqa: ANN401
        """The card's head: what is inherited, and these values."""
        base = {"base_model": self.base_model} if is_hub_id(self.base_model) else {}
        return {**self.license_fields, "datasets": self.datasets, **base, **values}

    @property
    def license_fields(self) -> dict[str, str]:
        """``license``; where it is "other", the names of all licences and the base model's page as well."""
        if self.license != "other":
            return {"license": self.license}
        given = [self.base_license, *(task.get("license") for task in self.tasks)]
        names = dict.fromkeys(re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")[:40] for name in given if name)
        link = {"license_link": f"https://huggingface.co/{self.base_model}"} if is_hub_id(self.base_model) else {}
        return {"license": "other", "license_name": "-and-".join(filter(None, names)), **link}


@dataclass(frozen=True, kw_only=True)
class _Card:
    """The fields of all cards.

    Attributes:
        title: Name of the repository's content: folder or Hub id.
        origins: Base model, and the training tasks.
        tags: More tags.
    """

    title: str
    origins: Origins
    tags: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class GeneratorCard(_Card):
    """The card of a generator.

    Attributes:
        facts: What the table of its properties says, by heading.
        versions: Versions of the packages that wrote it.
        comparison: What ``comparison.compare`` returned for it, if it was compared.
        plot: File name of the headroom plot, if there is one.
        from_zoo: Whether it was trained on a zoo's adapters; else through the base model, on the tasks' data.
    """

    facts: Mapping[str, str]
    versions: Mapping[str, str]
    comparison: Mapping[str, Any] | None = None
    plot: str | None = None
    from_zoo: bool = True

    @property
    def text(self) -> str:
        """Markdown with a YAML head."""
        tags = ["lora", "lora-factory", "adapter-generation", *self.tags]
        results = eval_results(self.comparison, self.origins) if self.comparison else []
        index = eval_results_to_model_index(self.title, results) if results else None
        head = self.origins.head(library_name="lora-factory", tags=tags, **{"model-index": index})
        return render("generator.md", head, card=self, results=_results(self.comparison) if self.comparison else None)


@dataclass(frozen=True, kw_only=True)
class AdapterCard(_Card):
    """The card of one generated adapter, or of several in one repository.

    Attributes:
        generations: How each was made, by sub-folder; "" for the folder that the card is in.
        subfolder: That folder's name, if it is one of several in a repository.
    """

    generations: Mapping[str, Generation]
    subfolder: str | None = None

    @property
    def text(self) -> str:
        """Markdown with a YAML head."""
        tags = ["lora", "lora-factory", "generated-adapter", *self.tags]
        head = self.origins.head(library_name="peft", pipeline_tag=self.origins.kind.pipeline_tag, tags=tags)
        if "base_model" in head:
            head["base_model_relation"] = "adapter"
        if (one := self.generations.get("")) is not None:
            return render("adapter.md", head, card=self, it=one)
        return render("adapters.md", head, card=self)

    @property
    def _one(self) -> Generation:
        return self.generations[""]

    @property
    def _given(self) -> list[str]:
        """What the adapter was made of: description, examples, images."""
        names = ["text"] if self._one.text else []
        return list(dict.fromkeys(_GIVEN.get(name, "task vectors") for name in (*names, *self._one.conditions)))

    @property
    def sources(self) -> str:
        """What it was written from."""
        return " and ".join("a description" if noun == "description" else noun for noun in self._given)

    @property
    def wanted(self) -> str:
        """What it is for."""
        return " and ".join(f"the {noun}" for noun in self._given)

    @property
    def refined(self) -> str:
        """How many examples it was refined on."""
        count = self._one.refined_on
        return f"{count} example{'' if count == 1 else 's'}"

    @property
    def generator(self) -> str:
        """Where a reader of the card finds the generator; a folder's name says nothing to readers on the Hub."""
        it, on_hub = self._one, "/" in self.title and is_hub_id(self.title)
        known = it.generator and (it.generator_commit or not on_hub)
        return it.generator if it.generator and known else "FOLDER-OF-THE-GENERATOR"

    @property
    def condition_file(self) -> str:
        """The file of its task vectors, seen from beside its folder."""
        return f"{self.title.rpartition('/')[2]}/{CONDITION_FILE}"


@dataclass(frozen=True, kw_only=True)
class ZooCard(_Card):
    """The card of a zoo, which is a data set on the Hub.

    Attributes:
        facts: What the table of its properties says, by heading.
    """

    facts: Mapping[str, str]

    @property
    def text(self) -> str:
        """Markdown with a YAML head."""
        tags = ["lora", "lora-factory", "adapter-zoo", *self.tags]
        head = {**self.origins.license_fields, "tags": tags, "viewer": False}
        return render("zoo.md", head, card=self)


def eval_results(comparison: Mapping[str, Any], origins: Origins) -> list[EvalResult]:
    """The generated adapters' mean perplexity over seeds and folds for each task; controls are in the card's table."""
    datasets = {task["name"]: task["dataset"] for task in origins.tasks if is_hub_id(task.get("dataset") or "")}
    found: dict[str, list[float]] = {}
    for cell in comparison["cells"]:
        if cell["method"] == "generated" and cell.get("perplexity") is not None:
            found.setdefault(cell["task"], []).append(cell["perplexity"])
    return [
        EvalResult(
            task_type=origins.kind.pipeline_tag or "other",
            dataset_name=printable(task),
            dataset_type=datasets.get(task, "unknown"),
            dataset_split="test",
            metric_type="perplexity",
            metric_name="Perplexity",
            metric_value=round(fmean(values), 4),
        )
        for task, values in found.items()
    ]


def keep_handwritten(card: str, old: str) -> str:
    """A new card with what people have added to the old one.

    What they added to one of our sections follows that section, their own sections the one of ours that they followed;
    without our mark in the old card, its text follows ours. What they changed in our own text is written anew, with a
    warning; so is what stands under headings of ours in a card without a note of our parts, such as earlier versions'.
    Fields of the old head that we do not write stay, as do its tags and a licence that somebody has filled in.

    Raises:
        ValueError: When the old head is no YAML mapping.
    """
    merged, lost = _merge(card, old)
    if lost:
        warnings.warn(
            f"the card is written anew, without this line of the old one: {printable(lost)[:200]!r}; if it is yours, "
            "add it again in a paragraph of its own, which stays",
            stacklevel=3,
        )
    return merged


def _merge(card: str, old: str) -> tuple[str, str | None]:
    """What `keep_handwritten` returns, and the first line of the old text that may be somebody's and is not kept."""
    head, body = split_card(card)
    old_head, old_body = split_card(old)
    tags = [*head.get("tags", ()), *_listed(old_head.get("tags"))]
    old_head.pop("model-index", None)  # the results of what is being replaced
    merged = {**old_head, **head, "tags": list(dict.fromkeys(str(tag) for tag in tags if isinstance(tag, str | int)))}
    if old_head.get("license", "unknown") != "unknown":
        merged |= {name: old_head[name] for name in ("license", "license_name", "license_link") if name in old_head}
    blocks = _blocks(body)
    kept, lost = _handwritten(old_body, [_digest(block) for block in blocks])
    sections: dict[str, str] = {"": ""}
    for block in blocks:
        if heading := _heading(block):
            sections.setdefault(_section(*heading), "")
        sections[next(reversed(sections))] += block
    text = ""
    for name in dict.fromkeys((*sections, *kept)):
        text += sections.get(name, "")
        if words := "".join(kept.get(name, ())).strip("\n"):
            text = f"{text.rstrip(chr(10))}\n\n{words}\n\n"
    new_lines = set(body.splitlines())
    lines = (line for block in lost for line in block.splitlines() if line.strip() and line not in new_lines)
    return _join(merged, text.strip("\n") + "\n"), next(lines, None)


def has_handwriting(card: str) -> bool:
    """Return whether people have added something to the text of a card."""
    return bool(_handwritten(split_card(card)[1], ())[0])


def _handwritten(body: str, new: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """What people added to a card's text, by the section of ours that it follows, and what else may be theirs.

    Args:
        body: The text.
        new: The digests of the blocks of the card that replaces it: they tell what is ours in a card without its own.
    """
    blocks = _blocks(body)
    noted = re.search(rf"(?m)^{NOTE}((?: [0-9a-f]{{8}}){{1,999}}) -->", body)
    marked = bool(noted) or MARK in body
    places, missing = _placed(blocks, noted[1].split() if noted else new)
    names, kept, lost = our_headings(), dict[str, list[str]](), list[str]()
    # The last section of ours; whether this is under a heading of theirs, and after a block of theirs.
    section, theirs, follows = ("" if marked else "end"), not marked, False
    for number, block in enumerate(blocks):
        if block.startswith((MARK, NOTE)):
            continue
        before, place, after = places[number]
        known = place is not None
        # Where none of our blocks is missing, one more is an addition; else it may be ours with changes.
        added = bool(noted) and bisect(missing, before) >= bisect(missing, after)
        if heading := _heading(block):
            level, title = heading
            first = marked and level == 1 and not section
            theirs = not known and (added or not (first or (level == 2 and title in names)))
            if not theirs:
                section = _section(level, title) if marked else section
                names.discard(title)
        if not known and (added or theirs):
            texts = kept.setdefault(section, [])
            texts += [block] if follows else ["\n" * bool(texts), block]
        elif not known and (noted or not re.match(r"\||```|~~~|#", block)):
            lost.append(block)
        follows = not known and (added or theirs)
    return kept, lost


def _placed(blocks: Sequence[str], ours: Sequence[str]) -> tuple[list[tuple[int, int | None, int]], list[int]]:
    """For each block the place in our list of digests of the last one of ours, its own and of the next one of ours.

    With them come the places of those that are missing.
    """
    digests = [*map(_digest, blocks), ""]
    pairs = {pair: number for number, pair in enumerate(pairwise((*ours, "")))}
    own = [pairs.pop(pair, None) for pair in pairwise(digests)]  # of two that are alike, ours has ours after it
    free: dict[str, list[int]] = {}
    for number in sorted({*range(len(ours))} - {*own}, reverse=True):
        free.setdefault(ours[number], []).append(number)
    for number, digest in enumerate(digests[:-1]):
        if own[number] is None and (places := free.get(digest)):
            own[number] = places.pop()
    following, next_one = list[int](), len(ours)
    for place in reversed(own):
        following.append(next_one)
        next_one = next_one if place is None else place
    found, last = list[tuple[int, int | None, int]](), -1
    for place, after in zip(own, reversed(following), strict=True):
        found.append((last, place, after))
        last = last if place is None else place
    return found, sorted(place for places in free.values() for place in places)


def handwritten(folder: Path) -> str | None:
    """The card of a folder that is to be replaced; None when it has none.

    Raises:
        LoraFactoryError: When what people have added to it could not be carried over into a new card.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    with reading(path, "mend its head or move it away, so that nothing in it is lost"):
        text = read_text(path, MAX_CONFIG_BYTES)
        _merge(text, text)
    return text


def with_handwritten(card: str, folder: Path) -> str:
    """A new card with what people have added to the one in a folder that is to be replaced."""
    old = handwritten(folder)
    return card if old is None else keep_handwritten(card, old)


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """A card's head as a mapping, and its text.

    Raises:
        ValueError: When the head is no YAML mapping.
    """
    import yaml

    match = re.match(r"\s*---[ \t]*\r?\n(?:(.*?)\r?\n)?---[ \t]*(?:\r?\n|$)", card, re.DOTALL)
    try:
        head = yaml.safe_load(match[1] or "") if match else {}
    except yaml.YAMLError as error:
        raise ValueError(f"the head of the card is no YAML: {error}") from error
    if not isinstance(head or {}, dict):
        raise ValueError("the head of the card is no YAML mapping")
    return head or {}, card[match.end() :] if match else card


def our_headings() -> set[str]:
    """The second-level headings of all our templates."""
    folder = files("lora_factory.model_card_templates")
    sources = (entry.read_text(encoding="utf-8") for entry in folder.iterdir() if entry.name.endswith(".md"))
    return {heading.strip() for source in sources for heading in re.findall(r"(?m)^## (.+)$", source)}


def render(template: str, head: Mapping[str, Any], **values: Any) -> str:  # noqa: ANN401
    """Fill in a template, under a head of the fields of `YAML_FIELDS` that have a value.

    The digests of the text's blocks follow it: they tell what people add later from what was written here.
    """
    text = _template(template).render(mark=MARK, **values).strip("\n") + "\n"
    digests = " ".join(_digest(block) for block in _blocks(text) if not block.startswith(MARK))
    return _join(
        {name: head[name] for name in YAML_FIELDS if head.get(name) or head.get(name) is False}
        | {"tags": list(dict.fromkeys(map(printable, head["tags"])))},
        f"{text}\n{NOTE} {digests} -->\n",
    )


@cache
def _template(name: str) -> Template:
    """A compiled template; compiling takes 40 ms, filling in 1."""
    source = files("lora_factory.model_card_templates").joinpath(name).read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters |= {"md": inline, "python": _python, "heard": heard}
    return environment.from_string(source)


def inline(text: object) -> str:
    """Text from outside on one line, with what Markdown, HTML or a table would act on made harmless."""
    flat = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~#!$])", r"\\\1", flat)


def heard(modalities: Iterable[str]) -> str:
    """The names of modalities as users know them: those of their arguments."""
    return ", ".join({"hidden": "examples"}.get(name, name) for name in modalities)


def _python(value: object) -> str:
    """A Python literal that cannot end the code block it stands in."""
    literal = repr(value).replace("`", "\\x60")
    return literal if '"' in literal else literal.replace("'", '"')


def _results(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Findings and the headroom table of a comparison."""
    from lora_factory.reporting.report import markdown_table
    from lora_factory.reporting.summary import findings
    from lora_factory.reporting.tables import comparison_tables

    table = comparison_tables(comparison)[0]
    return {"findings": findings(comparison), "table": markdown_table(table), "note": table.note}


def _blocks(text: str) -> list[str]:
    """A text's headings, paragraphs, tables, blocks of code and comments, each with the blank lines after it.

    What is opened and not closed, code or a comment, ends with the text and is closed there.
    """
    blocks, closing, ended, prose = list[str](), "", True, False
    for line in text.replace("\r\n", "\n").strip("\n").split("\n"):
        opened = None if closing else re.match(r" {0,3}(`{3,}(?=[^`]*$)|~{3,}|<!--)", line)
        alone = bool(opened or (not closing and _heading(line)))
        underline = prose and _UNDERLINE.fullmatch(line)
        if line.strip() and not closing and not underline and (alone or ended):
            blocks.append("")
            prose = True
        if blocks:
            blocks[-1] += line + "\n"
        if opened:
            closing = opened[1]
            ended = closing == "<!--" and "-->" in line
        elif closing:
            ended = "-->" in line if closing == "<!--" else _closes(line, closing)
        else:
            ended = bool(alone or underline or not line.strip())
        closing = "" if ended else closing
        prose = prose and not (ended or closing) and not _NO_PARAGRAPH.match(line)
    if closing:
        blocks[-1] += closing.replace("<!--", "-->") + "\n"
    return blocks


def _closes(line: str, fence: str) -> bool:
    """Return whether a line ends a block of code that a fence has opened."""
    mark = line.strip()
    return not line.startswith("    ") and mark.startswith(fence) and not mark.strip(fence[0])


def _heading(block: str) -> tuple[int, str] | None:
    """Level and title of a block that is a heading: with number signs, underlined, or in HTML."""
    first = block.partition("\n")[0].rstrip()
    if sharp := re.match(r" {0,3}(#{1,6})(?=[ \t]|$)", first):
        title = first[sharp.end() :].strip()
        bare = title.rstrip("#")
        return len(sharp[1]), (bare.rstrip() if not bare or bare[-1] in " \t" else title)
    if tag := re.match(r" {0,3}<[hH]([1-6])\b[^<>]*>", first):
        return int(tag[1]), re.sub("<[^<>]*>", "", first[tag.end() :]).strip()
    *lines, last = block.rstrip().split("\n")
    if lines and _UNDERLINE.fullmatch(last) and not any(map(_NO_PARAGRAPH.match, lines)):
        return (1 if "=" in last else 2), " ".join(map(str.strip, lines))
    return None


def _section(level: int, title: str) -> str:
    """What a section of ours is found by: its title; the card's own differs between a folder and the Hub."""
    return "#" if level == 1 else title


def _digest(block: str) -> str:
    """Eight digits for a block, whatever its white space."""
    return sha256(" ".join(block.split()).encode()).hexdigest()[:8]


def _join(head: Mapping[str, Any], body: str) -> str:
    return f"---\n{yaml_dump(dict(head), sort_keys=False).strip()}\n---\n\n{body}"


def _listed(value: Any) -> list[Any]:  # noqa: ANN401
    return value if isinstance(value, list) else [] if value is None else [value]
