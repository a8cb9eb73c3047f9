"""Five hundred files damaged at random are refused with our error or read, and nothing else is written or attached."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import struct
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.generators import make_generator
from helpers.images import animals
from helpers.models import attach, random_adapter
from PIL import Image
from transformers import LlamaForCausalLM

from lora_factory.adapters.attach import attach_adapter
from lora_factory.adapters.folder import load_adapter
from lora_factory.arguments import ImportArguments
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.tasks.examples import StoredImage
from lora_factory.tasks.image_files import read_image
from lora_factory.tasks.image_sources import read_coco
from lora_factory.tasks.task_file import load_tasks
from lora_factory.zoo.importing import AdapterSource, import_adapters
from lora_factory.zoo.run_record import RunRecord
from lora_factory.zoo.store import AdapterZoo

FILES = {"generator": 90, "adapter": 110, "zoo": 90, "tasks": 70, "coco": 70, "image": 70}
SECONDS = 5 * 4  # a single damaged file may take 5 s; this machine may be busy with other things
BYTES = 1536 << 20
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1.5, 10**15, 2**64, 10**299, 10**400, float("nan"), float("inf"), -float("inf")),
    *("", "x", "\0", "\ud800", "a\udc00b", "\u202e", "../../outside", "/etc/passwd", "~", "x" * 5000, "9" * 4400),
    *("x" * (1 << 20), "a*" * 10 + "!", "(a+)+$", "é" * 300, [], {}, [[]], [None], {"": {}}, {"a*" * 10 + "!": 2}),
    *([0] * 100_000, {str(number): number for number in range(20_000)}),
)


class TooLong(BaseException):
    """No parser catches this."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield from places(item, (*path, key))


def deep(depth: int, kind: str) -> str:
    return {"list": "[" * depth + "]" * depth, "open": "[" * depth, "object": '{"a":' * depth + "1" + "}" * depth}[
        kind
    ]


def damage_json(path: Path, chance: random.Random) -> str:
    """One change of the structure of a JSON file."""
    value = json.loads(path.read_text(encoding="utf-8"))
    *way, last = chance.choice([place for place in places(value) if place])
    parent = value
    for step in way:
        parent = parent[step]
    change = chance.choice(["replace", "replace", "replace", "delete", "add", "double", "deep"])
    if change == "delete":
        del parent[last]
    elif change == "add" and isinstance(parent, dict):
        parent[chance.choice(["", "x", "\ud800", "a" * 10_000, "format_version", "auto_map"])] = chance.choice(VALUES)
    elif change == "double" and isinstance(parent, list):
        parent.append(parent[last])
    elif change == "deep":
        parent[last] = "DEEP"
    else:
        parent[last] = chance.choice(VALUES)
    text = json.dumps(value, ensure_ascii=chance.random() < 0.8)
    shape = chance.choice(["list", "open", "object"])
    text = text.replace('"DEEP"', deep(chance.choice([70, 2_000, 100_000]), shape))
    path.write_bytes(text.encode(errors="surrogatepass"))
    return f"{change} at {[*way, last]}"


def damage_header(path: Path, chance: random.Random) -> str:
    """A safetensors file that says of its tensors what is not so."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    name = chance.choice([name for name in header if name != "__metadata__"])
    changes: dict[str, Callable[[], Any]] = {
        "shape": lambda: header[name].update(shape=chance.choice([[2**40], [0], [], [-1, 2], [2**63, 2], [1.5], "x"])),
        "dtype": lambda: header[name].update(dtype=chance.choice(["F64", "I8", "BOOL", "F8_E4M3", "X", None])),
        "offsets": lambda: header[name].update(data_offsets=chance.choice([[0, 4], [4, 0], [0, 2**60], [-1, 3], []])),
        "rename": lambda: header.update(
            {chance.choice(["", "../x", "9" * 5000, "\ud800", "x.lora_A"]): header.pop(name)}
        ),
        "more": lambda: header.update({f"{number}": header[name] for number in range(5000)}),
        "metadata": lambda: header.update(__metadata__=chance.choice([[], {"a": 1}, "x", {"format": "pickle"}])),
    }
    change = chance.choice(sorted(changes))
    changes[change]()
    text = json.dumps(header).encode()
    length = chance.choice([len(text)] * 6 + [0, 2**27, 2**63, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", length) + text + content[8 + size :])
    return f"header: {change} of {name}, length {length}"


def damage_bytes(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    change = chance.choice(["flip", "cut", "insert", "zeros", "utf-16", "mark", "empty", "noise"])
    at = chance.randrange(max(1, len(content)))
    if change == "flip":
        for _ in range(chance.choice([1, 3, 50])):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    else:
        pieces = {
            "cut": content[:at],
            "insert": content[:at] + chance.randbytes(9) + content[at:],
            "zeros": content[:at] + bytes(100) + content[at + 100 :],
            "utf-16": content.decode("latin-1").encode("utf-16"),
            "mark": b"\xef\xbb\xbf" + content,
            "empty": b"",
            "noise": chance.randbytes(2000),
        }
        content = bytearray(pieces[change])
    path.write_bytes(content)
    return f"{change} at {at}"


def damage_file(path: Path, chance: random.Random) -> str:
    """Something else than a regular file of this folder."""
    change = chance.choice(["folder", "pipe", "passwd", "outside", "itself", "device", "gone"])
    path.unlink()
    makers: dict[str, Callable[[], object]] = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "passwd": lambda: path.symlink_to("/etc/passwd"),
        "outside": lambda: path.symlink_to(path.parent.parent.parent / "outside" / path.name),
        "itself": lambda: path.symlink_to(path.name),
        "device": lambda: path.symlink_to("/dev/zero"),
        "gone": lambda: None,
    }
    makers[change]()
    return change


def damage(folder: Path, chance: random.Random) -> str:
    path = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    ways = [damage_bytes, damage_file]
    ways += (
        [damage_json] * 4 if path.suffix == ".json" else [damage_header] * 2 if path.suffix == ".safetensors" else []
    )
    return f"{path.relative_to(folder)}: {chance.choice(ways)(path, chance)}"


@pytest.fixture(scope="module")
def root(pico_model_folder: Path, pico_encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole folders of every kind, and copies of them outside of those that are damaged."""
    root = tmp_path_factory.mktemp("mutations")
    layout = attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]
    generator = make_generator(layout, pico_encoder_folder, "core")
    generator.save_pretrained(root / "generator")
    generator.save_adapter("Poems", root / "adapter")
    zoo = AdapterZoo.create(root / "zoo", layout)
    facts = {"base_model": layout.base_model, "base_revision": None, "data_fingerprint": "", "versions": {}}
    for seed in (0, 1):
        steps = {
            "seed": seed,
            "steps": 2,
            "snapshot_steps": (1, 2),
            "validation_losses": (1.0, 0.5),
            "train_tokens": 9,
        }
        record = RunRecord(task="poems", run=f"seed-{seed}", descriptions=("Write poems",), **steps, **facts)
        zoo.add_run(record, torch.stack([random_adapter(layout, 2 * seed + row) for row in (0, 1)]))
    (root / "tasks").mkdir()
    (root / "tasks" / "rows.csv").write_text("text,label\n" + "a b c,1\n" * 9)
    rows = [{"text": f"some text {number}"} for number in range(9)]
    (root / "tasks" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [
        {"name": name, "descriptions": ["Write."], "data": {"files": f"rows.{kind}", "text_column": "text"}}
        for name, kind in (("one", "csv"), ("two", "jsonl"))
    ]
    (root / "tasks" / "tasks.json").write_text(json.dumps({"tasks": tasks}))
    (root / "coco").mkdir()
    animals(root / "coco")
    (root / "image").mkdir()
    for ending in ("png", "jpg", "webp", "bmp", "gif"):
        Image.effect_noise((40, 30), 60).convert("RGB").save(root / "image" / f"a.{ending}")
    (root / "outside").mkdir()
    for kind in ("generator", "adapter", "tasks", "coco", "image"):
        shutil.copytree(root / kind, root / "outside", dirs_exist_ok=True)
    return root


def load(kind: str, folder: Path, scratch: Path, model: LlamaForCausalLM) -> None:
    """Read a folder through the public functions."""
    if kind == "generator":
        CVAELoRAGenerator.from_pretrained(folder)
    elif kind == "adapter":
        layout, state_dict = load_adapter(folder)
        source = AdapterSource(str(folder), "poems", ("Write poems",))
        import_adapters([source], scratch / "zoo", ImportArguments(base_model="pico/llama"))
        attach_adapter(model, layout, state_dict).unload()
    elif kind == "zoo":
        zoo = AdapterZoo(folder)
        assert all(isinstance(problem, str) for problem in zoo.verify())
        for task in zoo.tasks:
            zoo.snapshots(task)
    elif kind == "tasks":
        for task in load_tasks(folder / "tasks.json"):
            for split in ("train", "validation", "test"):
                task.examples(split)
    elif kind == "coco":
        read_coco(folder / "boxes.json")
        for path in sorted((folder / "photos").iterdir()):
            StoredImage.of(path).open()
    else:
        for path in sorted(folder.iterdir()):
            read_image(path)
            StoredImage.of(path).open()


def tree(root: Path) -> dict[str, tuple[int, int, int]]:
    return {str(path): (s.st_ino, s.st_size, s.st_mtime_ns) for path in root.rglob("*") if (s := path.lstat())}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_or_read(
    root: Path, kind: str, pico_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    def stop(number: int, frame: types.FrameType | None) -> None:
        raise TooLong

    failures, before = [], tree(root)
    modules = [name for name, _ in pico_model.named_modules()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    earlier, limits = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * BYTES, limits[1]))
    try:
        for seed in range(FILES[kind]):
            folder, scratch = root / "damaged" / kind, tmp_path / str(seed)
            shutil.copytree(root / kind, folder)
            what = damage(folder, random.Random(f"{kind} {seed}"))
            damaged = tree(folder)
            signal.alarm(SECONDS)
            try:
                load(kind, folder, scratch, pico_model)
            except LoraFactoryError as error:
                if isinstance(error.__cause__, MemoryError):
                    failures.append(f"{seed} ({what}): too much memory")
                str(error).encode()  # it can be printed
                if len(str(error)) > 3000:
                    failures.append(f"{seed} ({what}): a message of {len(str(error))} characters")
            except (Exception, TooLong) as error:
                failures.append(f"{seed} ({what}): {type(error).__name__}: {str(error)[:200]!r}")
            finally:
                signal.alarm(0)
            if tree(folder) != damaged:
                failures.append(f"{seed} ({what}): the damaged folder was written to")
            shutil.rmtree(root / "damaged")
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        signal.signal(signal.SIGALRM, earlier)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not failures, "\n".join([f"{len(failures)} of {FILES[kind]}", *failures])
    assert [name for name, _ in pico_model.named_modules()] == modules, "something is attached"
    assert tree(root) == before, "something outside of the damaged folders was written or removed"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10 < BYTES
