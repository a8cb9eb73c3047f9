"""Reading YAML and JSON files of plain values that people write: bounded, and without keys that stand twice."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from lora_factory.errors import LoraFactoryError
from lora_factory.utils.safe_files import MAX_CONFIG_BYTES, read_text, reading

_INT = "tag:yaml.org,2002:int"
MAX_VALUES = 1_000_000  # a task file of 10 000 tasks with 100 lines each


def read_values(path: str | Path, what: str) -> Any:  # noqa: ANN401
    """The mappings, lists, texts and numbers of a YAML file, or of a JSON file whose name ends in ``.json``.

    Args:
        path: An ordinary file in UTF-8.
        what: What the file is, for errors: "task file".

    Returns:
        The value; None for an empty file.

    Raises:
        LoraFactoryError: When the file cannot be read, is no valid YAML or JSON, has more than 16 MiB, names one key
            twice, or holds more than a million values once its aliases are written out.
    """
    path = Path(path).expanduser()
    text = read_text(path, MAX_CONFIG_BYTES)
    with reading(path, f"write a {what} of YAML or JSON in UTF-8"):
        try:
            is_json = path.suffix.lower() == ".json" and text.strip()
            content = json.loads(text, object_pairs_hook=without_doubles) if is_json else yaml.load(text, _PlainLoader)
            _check_length(content, f"{what} {path}")
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise LoraFactoryError(
                f"{what} {path} is not valid YAML or JSON: {' '.join(str(error).split())}"
            ) from error
    return content


class _PlainLoader(yaml.SafeLoader):
    """YAML of plain values: no key stands twice, and 010, 0x10 and 1:30 are texts, not 8, 16 and 90."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML's own way
        first: [(tag, form) for tag, form in resolvers if tag != _INT]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice, of which PyYAML keeps the last without a word."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_PlainLoader.add_implicit_resolver(_INT, re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object from its pairs, for ``object_pairs_hook``.

    Raises:
        ValueError: When a key stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        ((doubled, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {doubled!r} stands twice")
    return found


def _check_length(content: object, what: str) -> None:
    """Refuse aliases that blow a small file up, before anything walks through or prints what it holds."""
    left, count = [content], 0
    while left:
        value = left.pop()
        count += 1
        if count > MAX_VALUES:
            raise LoraFactoryError(f"{what} holds more than {MAX_VALUES:,} values; write several files")
        left += [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
