"""Task files and data files."""

from __future__ import annotations

import json

import datasets
import yaml

ROWS = [{"text": f"line {number}"} for number in range(20)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_task(folder, data, **changes):
    entry = {"name": "poems", "descriptions": ["Continue a poem."], "data": data} | changes
    path = folder / "tasks.yaml"
    path.write_text(yaml.safe_dump({"tasks": [{key: value for key, value in entry.items() if value is not None}]}))
    return path


def write_local(folder, name):
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(ROWS).to_parquet(folder / name)
    elif name.endswith((".csv", ".tsv")):
        (folder / name).write_text("".join(f"{row}\n" for row in ["text", *(row["text"] for row in ROWS)]))
    elif name.endswith(".txt"):
        (folder / name).write_text("\n\n".join(row["text"] for row in ROWS))
    elif name.endswith(".json"):
        (folder / name).write_text(json.dumps(ROWS))
    else:
        write_rows(folder / name, ROWS)
