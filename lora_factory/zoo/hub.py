"""Push a zoo to the Hub as a data set repository, and download one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_factory._version import __version__
from lora_factory.errors import LoraFactoryError
from lora_factory.hub.cards import CARD_FILE, Origins, ZooCard
from lora_factory.hub.client import Writer, about_model, check_base_model, download_files
from lora_factory.utils.files import write_json, write_text
from lora_factory.utils.safe_files import MAX_CONFIG_BYTES, checked_file
from lora_factory.zoo.run_record import FORMAT_VERSION
from lora_factory.zoo.store import RECORD_FILE, ZOO_FILE, AdapterZoo
from lora_factory.zoo.tools import run_files


def download_zoo(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> AdapterZoo:
    """Download a zoo; see ``AdapterZoo.from_hub``. Only files that a record names are downloaded."""

    def small(name: str) -> int:
        parts = name.split("/")
        return MAX_CONFIG_BYTES * (name == ZOO_FILE or (len(parts) == 3 and parts[2] == RECORD_FILE))

    folder = download_files(repo_id, small, repo_type="dataset", revision=revision, token=token)
    zoo, limits = AdapterZoo(folder), dict[str, int]()
    for task in zoo.tasks:
        for run in zoo.runs(task):
            limits |= run_files(zoo, zoo.record(task, run))
    if limits:
        download_files(
            repo_id, lambda name: limits.get(name, 0), repo_type="dataset", revision=folder.name, token=token
        )
    if missing := [name for name in limits if not (folder / name).exists()]:
        raise LoraFactoryError(f"{repo_id} lacks {len(missing)} files of its runs, first {missing[0]}")
    return zoo


def zoo_writer(zoo: AdapterZoo, *, tags: Sequence[str] = (), token: str | bool | None = None) -> Writer:
    """Return a function that writes a zoo's data set repository; see ``AdapterZoo.push_to_hub``.

    Raises:
        LoraFactoryError: When a file of the zoo is damaged.
    """
    check_base_model(zoo.layout)
    if problems := zoo.verify():
        raise LoraFactoryError(f"{len(problems)} files of the zoo are damaged, nothing is pushed: {problems[0]}")
    layout = zoo.layout
    records = {task: [zoo.record(task, run) for run in zoo.runs(task)] for task in zoo.tasks}
    known = ("descriptions", "license", "dataset")
    tasks = [
        {"name": name, "runs": len(runs), **{key: getattr(runs[0], key) for key in known}}
        for name, runs in records.items()
    ]
    origins = Origins(
        base_model=layout.base_model,
        base_revision=layout.base_revision,
        base_license=about_model(layout.base_model, token)[0],
        tasks=tasks,
    )
    facts = {
        "weights of an adapter": f"{layout.size:,}",
        "runs": str(sum(map(len, records.values()))),
        "snapshots": str(sum(len(run.snapshot_steps) for runs in records.values() for run in runs)),
        "fingerprint": zoo.fingerprint(),
        "written with": f"lora-factory {__version__}",
    }

    limits = {name: limit for runs in records.values() for run in runs for name, limit in run_files(zoo, run).items()}
    for name, limit in limits.items():
        checked_file(zoo.folder, name, limit)

    def write(folder: Path, title: str) -> set[str]:
        for name, limit in limits.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            # A link, since a zoo may be larger than the disk's free space; what it leads to is a file of the zoo.
            (folder / name).symlink_to(checked_file(zoo.folder, name, limit).resolve())
        write_json(folder / ZOO_FILE, {"format_version": FORMAT_VERSION, "layout": layout.to_dict()})
        write_text(folder / CARD_FILE, ZooCard(title=title, origins=origins, facts=facts, tags=tags).text)
        return set(limits)

    return write
