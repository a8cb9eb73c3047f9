"""Take adapters that others trained into a zoo: PEFT folders and Hub ids, checked and brought into one layout."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_factory._version import __version__
from lora_factory.adapters.folder import ADAPTER_FILE, CONFIG_FILE, MAX_ADAPTER_BYTES, load_adapter
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.arguments import ImportArguments
from lora_factory.errors import LoraFactoryError
from lora_factory.hub.card_reading import card_description, card_license, read_card
from lora_factory.hub.cards import CARD_FILE
from lora_factory.hub.client import download_files
from lora_factory.utils.paths import local_path, recorded_name, safe_name, sha256_file, task_names
from lora_factory.utils.printable import few
from lora_factory.utils.safe_files import (
    MAX_CONFIG_BYTES,
    checked_file,
    is_hub_id,
    read_json_object,
    read_text,
    reading,
)
from lora_factory.zoo.run_record import RunRecord
from lora_factory.zoo.store import ORIGIN_FILE, ZOO_FILE, AdapterZoo

SEVERAL = "list several in a text file and import that, one a line: FOLDER<TAB>TASK<TAB>DESCRIPTION"
_PICKLE_FILE = "adapter_model.bin"
_LIMITS = {CONFIG_FILE: MAX_CONFIG_BYTES, ADAPTER_FILE: MAX_ADAPTER_BYTES, CARD_FILE: MAX_CONFIG_BYTES}
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})")
_NO_COMMIT = (None, "", "main")
_WEIGHTS_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
# An adapter may record a folder of the machine that trained it, models/llama, which has the form of a Hub id.
_FOLDERS = ("", "model", "models", "checkpoints", "out", "output", "outputs", "base", "pretrained", "weights", "data")


@dataclass(frozen=True)
class AdapterSource:
    """One adapter to import.

    Attributes:
        source: PEFT folder, or Hub id, which may end in "@" and a revision.
        task: Name of its task; default: the name of the folder or repository.
        descriptions: What it does; default: the first paragraph of its model card.
        run: Name of its run; default: `ImportArguments.run_name`.
    """

    source: str
    task: str | None = None
    descriptions: tuple[str, ...] = ()
    run: str | None = None


@dataclass(frozen=True)
class ImportReport:
    """The result of an import.

    Attributes:
        zoo: The zoo.
        imported: The task and run of every source that is in the zoo now, as "task/run".
        refused: Why the other sources are not.
    """

    zoo: AdapterZoo
    imported: dict[str, str]
    refused: dict[str, str]


@dataclass(frozen=True)
class _Candidate:
    """An adapter whose configuration was found right; its weights are read later, one adapter at a time."""

    source: str
    commit: str | None
    folder: Path
    layout: AdapterLayout
    task: str
    run: str
    descriptions: tuple[str, ...]
    license: str | None


def import_adapters(
    sources: str | Path | AdapterSource | Sequence[str | Path | AdapterSource],
    output_dir: str | Path,
    arguments: ImportArguments | None = None,
    *,
    token: str | bool | None = None,
) -> ImportReport:
    """Take PEFT adapters into a zoo, each as a run of its task.

    Adapters of the zoo's layout are stored bit for bit. A new zoo has the modules of all adapters, with the largest
    rank; smaller adapters are padded with zeros, and their B takes up the difference in scaling, which changes nothing
    of what they do. An existing zoo keeps its layout. The folder's ``checkpoint-*`` folders become the run's
    checkpoints; the adapter in the folder itself comes last, unless it equals the last checkpoint.

    Args:
        sources: PEFT folders, Hub ids, or text files that list such: see `read_list`; one, or several.
        output_dir: The zoo's folder; made when missing, continued when it is there.
        arguments: Base model, rank and checkpoints.
        token: Access token for the Hub.

    Returns:
        The zoo, and which sources are in it; one that is refused does not stop the others.

    Raises:
        LoraFactoryError: When no source can be imported; names the reasons.
    """
    arguments = arguments or ImportArguments()
    if arguments.base_model:
        arguments = replace(arguments, base_model=recorded_name(arguments.base_model))
    refused: dict[str, str] = {}
    candidates: list[_Candidate] = []
    for entry in _entries(sources):
        try:
            candidates.append(_candidate(entry, arguments, token, candidates))
        except LoraFactoryError as error:
            refused[entry.source] = str(error)
    imported: dict[str, str] = {}
    if candidates:
        zoo = _open_zoo(local_path(output_dir), candidates, arguments)
        for candidate in candidates:
            try:
                _take_in(zoo, candidate, arguments)
                imported[candidate.source] = f"{candidate.task}/{candidate.run}"
            except LoraFactoryError as error:
                refused[candidate.source] = str(error)
    if not imported:
        alike: dict[str, list[str]] = {}
        for source, reason in refused.items():
            alike.setdefault(reason, []).append(source)
        reasons = "; ".join(f"{', '.join(named)}: {reason}" for reason, named in alike.items())
        raise LoraFactoryError(f"nothing was imported: {reasons or 'no adapter was named'}")
    return ImportReport(AdapterZoo(output_dir), imported, refused)


def read_list(path: str | Path) -> list[AdapterSource]:
    """Read a text file that lists adapters, one per line.

    A line holds the folder (relative to the file) or Hub id, then, each after a tab and as far as wanted, the names
    and texts that `AdapterSource` has: task, description, run. Empty lines and those that start with # are skipped.
    """
    path = local_path(path)
    try:
        text = read_text(path, MAX_CONFIG_BYTES)
    except LoraFactoryError as error:
        raise LoraFactoryError(f"{error}; to import one adapter, name its folder, {path.parent}") from error
    entries = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        source, task, description, run, *_ = [*(part.strip() for part in line.split("\t")), "", "", ""]
        with contextlib.suppress(LoraFactoryError, OSError):  # a name that cannot be a folder's may be a Hub id
            beside = path.parent / local_path(source)
            source = str(beside) if beside.is_dir() else source
        entries.append(AdapterSource(source, task or None, (description,) if description else (), run or None))
    return entries


def _entries(sources: str | Path | AdapterSource | Sequence[str | Path | AdapterSource]) -> list[AdapterSource]:
    entries: list[AdapterSource] = []
    for source in [sources] if isinstance(sources, str | Path | AdapterSource) else sources:
        if isinstance(source, AdapterSource):
            entries.append(source)
            continue
        path = local_path(source)
        try:
            is_file = path.is_file()
        except OSError:  # the name is too long for a file
            is_file = False
        if is_file and (path.suffix in _WEIGHTS_ENDINGS or path.name == CONFIG_FILE):
            raise LoraFactoryError(f"{path} is one file of an adapter; name its folder, {path.parent}")
        entries += read_list(path) if is_file else [AdapterSource(str(source))]
    return entries


def _candidate(
    entry: AdapterSource, arguments: ImportArguments, token: str | bool | None, others: Sequence[_Candidate]
) -> _Candidate:
    """Find an adapter's files and read its configuration and card."""
    folder, commit = local_path(entry.source), None
    name = folder.absolute().name
    with reading(entry.source[:300], "name a folder or a Hub id"):  # a name may be too long for the file system
        is_folder = folder.is_dir()
    if not is_folder and re.search(r"\s", entry.source.strip()):
        raise LoraFactoryError(
            "there is no such folder; in a list, tabs stand between folder, task and description, not spaces"
        )
    if not is_folder:
        repo_id, _, revision = entry.source.partition("@")
        name, seen = repo_id.rpartition("/")[2], set()

        def limit_of(file: str) -> int:
            seen.add(file)
            inside, _, last = file.rpartition("/")
            return _LIMITS.get(last, 0) if not inside or _CHECKPOINT.fullmatch(inside) else 0

        folder = download_files(repo_id, limit_of, revision=revision or None, token=token)
        commit = folder.name
        if ADAPTER_FILE not in seen and _PICKLE_FILE in seen:
            raise _pickle_error(Path(name), f"hf download {repo_id} --local-dir {shlex.quote(name)} && ")
    parts = _parts(folder)
    layout = _read(parts[-1][1], arguments.base_model)[0]
    text = read_card(folder) or read_card(parts[-1][1])
    descriptions = entry.descriptions or tuple(filter(None, [card_description(text)]))
    if not descriptions:
        raise LoraFactoryError(
            f"it has no model card that says what it does; give a description (--description), or {SEVERAL}"
        )
    latin = re.sub(r"[^A-Za-z0-9._-]+|\.\.+", "-", name).strip("-._")[:100]
    task = safe_name(entry.task or latin or task_names([name])[name])  # a name without Latin letters gets a hash
    run = safe_name(entry.run or arguments.run_name)
    if twin := next((other.source for other in others if (other.task, other.run) == (task, run)), None):
        raise LoraFactoryError(f"it would be {task}/{run}, as {twin} is; give it another name of a task or of a run")
    return _Candidate(entry.source, commit, folder, layout, task, run, descriptions, card_license(text))


def _parts(folder: Path) -> list[tuple[int | None, Path]]:
    """The steps and folders of an adapter's checkpoints in their order, then the adapter itself where it is there."""
    numbers = {}
    for path in folder.iterdir():
        if (match := _CHECKPOINT.fullmatch(path.name)) and (path / CONFIG_FILE).exists():
            numbers[int(match[1])] = path
    parts: list[tuple[int | None, Path]] = sorted(numbers.items())
    whole = any((folder / name).exists() for name in (CONFIG_FILE, ADAPTER_FILE, _PICKLE_FILE))
    return parts if parts and not whole else [*parts, (None, folder)]


def _read(folder: Path, base_model: str = "") -> tuple[AdapterLayout, torch.Tensor]:
    """The layout and the weights ``(D,)`` of a PEFT folder."""
    if (folder / _PICKLE_FILE).exists() and not (folder / ADAPTER_FILE).exists():
        raise _pickle_error(folder)
    layout, state_dict = load_adapter(folder, base_model=base_model)
    return layout, layout.flatten(state_dict)


def _pickle_error(folder: Path, before: str = "") -> LoraFactoryError:
    code = (
        "import sys, torch; from safetensors.torch import save_file; "
        "save_file({k: v.contiguous() for k, v in torch.load(sys.argv[1], weights_only=True).items()}, sys.argv[2])"
    )
    files = shlex.join([str(folder / _PICKLE_FILE), str(folder / ADAPTER_FILE)])
    return LoraFactoryError(
        f"{_PICKLE_FILE} is a pickle, which can run code when it is read; if you trust its author, convert it with: "
        f"{before}python -c {shlex.quote(code)} {files}"
    )


def _open_zoo(folder: Path, candidates: Sequence[_Candidate], arguments: ImportArguments) -> AdapterZoo:
    """The zoo, made if need be to hold all candidates that fit the first one."""
    if (folder / ZOO_FILE).exists():
        return AdapterZoo(folder)
    commits = (candidate.layout.base_revision for candidate in candidates)
    revision = arguments.base_revision or next((name for name in commits if name not in _NO_COMMIT), None)
    base = arguments.base_model or candidates[0].layout.base_model
    layouts = []
    for candidate in candidates:  # those for another base model are refused later, by name
        with contextlib.suppress(LoraFactoryError):
            layouts.append(_for_base(candidate.layout, base, revision, arguments))
    if not layouts:
        _for_base(candidates[0].layout, base, revision, arguments)
    limit = arguments.rank or max(layout.rank for layout in layouts)
    fitting: list[AdapterLayout] = []
    known: dict[str, tuple[tuple[int, ...], ...]] = {}
    for layout in layouts:  # those of a higher rank or other sizes are refused later, too
        sizes = {module.path: module.sizes for module in layout.modules}
        if layout.rank <= limit and all(known.get(path, size) == size for path, size in sizes.items()):
            known |= sizes
            fitting.append(layout)
    if not fitting:
        lowest = min(layout.rank for layout in layouts)
        raise LoraFactoryError(f"rank={limit} is below that of all adapters, {lowest}; leave it out")
    highest = max(layout.rank for layout in fitting)
    same = len({layout.modules for layout in fitting}) == 1 and arguments.rank in (0, highest)
    return AdapterZoo.create(folder, fitting[0] if same else AdapterLayout.union(fitting, arguments.rank or None))


def _take_in(zoo: AdapterZoo, candidate: _Candidate, arguments: ImportArguments) -> None:
    """Check an adapter against the zoo and store its checkpoints as a run, unless that was done before."""
    layout = _for_base(candidate.layout, zoo.layout.base_model, zoo.layout.base_revision, arguments)
    if misfits := layout.misfits(zoo.layout):
        raise LoraFactoryError(
            f"{len(misfits)} of {len(layout.modules)} modules have no room in the zoo: {few(misfits)}; import it into "
            "a new zoo, of its rank or a higher one"
        )
    digest = sha256_file(_parts(candidate.folder)[-1][1] / ADAPTER_FILE)
    if zoo.has_run(candidate.task, candidate.run):
        run = zoo.folder / candidate.task / candidate.run
        imported = (run / ORIGIN_FILE).is_file()
        if imported and read_json_object(checked_file(run, ORIGIN_FILE, MAX_CONFIG_BYTES)).get("sha256") == digest:
            return
        raise LoraFactoryError(
            f"the zoo has another run {candidate.run} of task {candidate.task}; give it another name of a task or run"
        )
    steps, rows = _snapshots(candidate, arguments)
    padded = layout.modules != zoo.layout.modules
    if padded:
        rows = layout.widen(rows.float(), zoo.layout)
    config, shared = candidate.layout.lora_config, zoo.layout.lora_config
    origin_facts = {
        "source": candidate.source,
        "commit": candidate.commit,
        "sha256": digest,
        "padded": padded,
        **{name: config.get(name) for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")},
    }
    names = sorted({module.path.rpartition(".")[2] for module in zoo.layout.modules})
    record = RunRecord(
        task=candidate.task,
        run=candidate.run,
        descriptions=candidate.descriptions,
        seed=0,
        base_model=zoo.layout.base_model,
        base_revision=zoo.layout.base_revision,
        steps=steps[-1],
        snapshot_steps=steps,
        validation_losses=(),
        train_tokens=0,
        data_fingerprint="",
        versions={"lora-factory": __version__},
        # What training through the base needs to attach a LoRA of this kind to the base model; the rest is not known.
        arguments={"rank": shared["r"], "lora_alpha": shared["lora_alpha"], "target_modules": ",".join(names)},
        license=candidate.license,
    )
    zoo.add_run(record, rows, extra_files={ORIGIN_FILE: json.dumps(origin_facts, indent=2) + "\n"})


def _snapshots(candidate: _Candidate, arguments: ImportArguments) -> tuple[tuple[int, ...], torch.Tensor]:
    """The steps (0 where none is known) and weights ``(K, D)`` of an adapter's checkpoints and of itself.

    Only what is kept is read, one file at a time.
    """

    def vector(folder: Path) -> torch.Tensor:
        layout, weights = _read(folder, arguments.base_model)
        if layout.modules != candidate.layout.modules:
            raise LoraFactoryError(f"{folder.name} has other modules, ranks or scaling than the adapter itself")
        return weights

    parts = _parts(candidate.folder)
    last = vector(parts[-1][1])
    if parts[-1][0] is None and len(parts) > 1:
        step, folder = parts[-2]
        if torch.equal(last, vector(folder)):  # a trainer saves its last checkpoint in the folder itself, too
            parts.pop()
        else:
            parts[-1] = ((step or 0) + 1, candidate.folder)
    parts = parts[-arguments.snapshots :]
    rows = last.new_empty(len(parts), len(last))
    rows[-1] = last
    for number, (_, folder) in enumerate(parts[:-1]):
        row = vector(folder)
        if row.dtype != rows.dtype:
            rows = rows.float()
        rows[number] = row
    return tuple(step or 0 for step, _ in parts), rows


def _for_base(layout: AdapterLayout, base: str, revision: str | None, arguments: ImportArguments) -> AdapterLayout:
    """The layout under the zoo's name of the base model, once it was found to be for that."""
    vouched = arguments.base_model == base and _may_be(layout.base_model, base)
    if layout.base_model != base and not vouched:
        raise LoraFactoryError(
            f"it is for the base model {layout.base_model}, the zoo is for {base}; import it into another zoo"
            + (
                f", or pass base_model={base!r} if that folder is a copy of it"
                if _may_be(layout.base_model, base)
                else ""
            )
        )
    if layout.base_revision not in (*_NO_COMMIT, revision):
        raise LoraFactoryError(
            f"it is for commit {layout.base_revision} of {base}, the zoo for {revision or 'no commit in particular'}; "
            "import it into another zoo"
        )
    return replace(layout, base_model=base, base_revision=revision)


def _may_be(stored: str, base: str) -> bool:
    """Return whether the base name in an adapter may mean the base model that the user names.

    It does not where it is the Hub id of a model of another name. A name without an owner and one below a folder such
    as ``models/`` are as likely paths of the machine that trained the adapter.
    """
    owner, _, name = stored.rpartition("/")
    same = name.lower() == base.rpartition("/")[2].lower()
    return same or not is_hub_id(stored) or owner in _FOLDERS or Path(stored).exists()
