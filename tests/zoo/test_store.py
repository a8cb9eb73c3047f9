import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.zoos import BASE, COMMIT, layout_of, pico, record_of, snapshots_of
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_factory.errors import LoraFactoryError, StorageError
from lora_factory.utils.paths import sha256_file
from lora_factory.zoo import store as zoo_module
from lora_factory.zoo.run_record import RunRecord
from lora_factory.zoo.store import AdapterZoo

RUN_FILES = ["adapter_config.json", "adapter_model.safetensors", "checkpoints.safetensors", "run.json"]


@pytest.fixture(scope="module")
def layout():
    return layout_of()


@pytest.fixture
def zoo(tmp_path, layout):
    zoo = AdapterZoo.create(tmp_path / "zoo", layout)
    zoo.add_run(record_of("python", "seed-10"), snapshots_of(layout, seed=10))
    zoo.add_run(record_of("python", "seed-2", count=1), snapshots_of(layout, 1, seed=2))
    zoo.add_run(record_of("c-headers", license="MIT"), snapshots_of(layout, seed=3))
    return zoo


def test_what_goes_in_comes_out(zoo, layout):
    zoo = AdapterZoo(zoo.folder)
    assert zoo.layout == layout
    assert zoo.tasks == ["c-headers", "python"]
    assert zoo.runs("python") == ["seed-2", "seed-10"]
    assert zoo.has_run("python", "seed-2")
    assert not zoo.has_run("python", "seed-3")
    assert not zoo.has_run("rust", "seed-2")
    ten, two = snapshots_of(layout, seed=10), snapshots_of(layout, 1, seed=2)
    assert torch.equal(zoo.snapshots("python"), torch.cat([two, ten]))
    assert torch.equal(zoo.snapshots("python", "seed-10"), ten)
    assert torch.equal(zoo.snapshots("python", "seed-10", rows=slice(1, 3)), ten[1:])
    assert torch.equal(zoo.snapshots("python", rows=slice(-1, None)), torch.stack([two[-1], ten[-1]]))
    assert torch.equal(zoo.final("python", "seed-10"), ten[-1])
    assert torch.equal(zoo.final("python", "seed-2"), two[0])
    assert zoo.descriptions("python") == ("Write python", "python é")
    assert zoo.verify() == []


def test_the_folder_is_what_the_architecture_draws(zoo, layout):
    assert sorted(os.listdir(zoo.folder)) == ["c-headers", "python", "zoo.json"]
    run = zoo.folder / "c-headers" / "seed-0"
    assert sorted(os.listdir(run)) == RUN_FILES
    checkpoints = load_file(run / "checkpoints.safetensors")
    for module in layout.modules:
        assert tuple(checkpoints[module.key_a].shape) == (3, *module.shape_a)
    for name in RUN_FILES[1:3]:
        with safe_open(run / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    record = zoo.record("c-headers", "seed-0")
    assert record.sha256 == {name: sha256_file(run / name) for name in RUN_FILES[:3]}
    assert record == replace(record_of("c-headers", license="MIT"), sha256=record.sha256)
    assert json.loads((run / "run.json").read_text())["descriptions"] == ["Write c-headers", "c-headers é"]


def test_record_round_trip_through_json():
    record = record_of(sha256={"a.json": "00"}, base_revision=None, validation_losses=())
    again = RunRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    assert again == record
    assert hash(again) == hash(record)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear", "r": 4, "use_rslora": True},
        {"target_modules": ["embed_tokens", "o_proj"], "rank_pattern": {"o_proj": 3}, "alpha_pattern": {"o_proj": 5}},
    ],
)
def test_a_run_folder_is_an_adapter_that_plain_peft_loads(tmp_path, options):
    layout = layout_of(**options)
    zoo = AdapterZoo.create(tmp_path / "zoo", layout)
    zoo.add_run(record_of(), snapshots_of(layout))
    folder = zoo.folder / "python" / "seed-0"
    config = LoraConfig.from_pretrained(str(folder))
    assert (config.base_model_name_or_path, config.revision, config.inference_mode) == (BASE, COMMIT, True)

    tokens = torch.arange(12).reshape(2, 6)
    expected = get_peft_model(pico(), layout.peft_config())
    result = set_peft_model_state_dict(expected, layout.unflatten(zoo.final("python", "seed-0")))
    assert not result.unexpected_keys
    loaded = PeftModel.from_pretrained(pico(), str(folder))
    with torch.no_grad():
        logits = expected(tokens).logits
        assert torch.equal(loaded(tokens).logits, logits)
        assert not torch.allclose(pico()(tokens).logits, logits)


@pytest.mark.slow
def test_a_run_folder_loads_where_lora_factory_cannot_be_imported(zoo, tmp_path):
    pico().save_pretrained(tmp_path / "base")
    script = (
        "import sys; sys.modules['lora_factory'] = None\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])\n"
        "print(model.peft_config['default'].base_model_name_or_path)\n"
    )
    run = str(zoo.folder / "python" / "seed-2")
    command = [sys.executable, "-c", script, str(tmp_path / "base"), run]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == BASE
    assert "missing" not in result.stderr.lower()


def test_bfloat16_is_stored_as_it_is_and_read_as_float32(tmp_path, layout):
    zoo = AdapterZoo.create(tmp_path, layout)
    vectors = snapshots_of(layout).bfloat16()
    zoo.add_run(record_of(), vectors)
    assert zoo.snapshots("python").dtype == torch.float32
    assert torch.equal(zoo.snapshots("python"), vectors.float())
    stored = load_file(tmp_path / "python" / "seed-0" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_extra_files_are_stored_and_guarded(tmp_path, layout):
    zoo = AdapterZoo.create(tmp_path, layout)
    zoo.add_run(record_of(), snapshots_of(layout), extra_files={"README.md": "# é\n"})
    path = tmp_path / "python" / "seed-0" / "README.md"
    assert path.read_text(encoding="utf-8") == "# é\n"
    path.write_text("other")
    (problem,) = zoo.verify()
    assert str(path) in problem
    for name in ("run.json", "checkpoints.safetensors", "../x", ".tmp-x"):
        with pytest.raises(LoraFactoryError):
            zoo.add_run(record_of(run="seed-1"), snapshots_of(layout), extra_files={name: ""})
    assert zoo.runs("python") == ["seed-0"]


def test_opening_teaches_when_there_is_no_zoo(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(LoraFactoryError, match=r"no zoo in .*lora-factory collect"):
            AdapterZoo(folder)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format_version": 2}', '{"format_version": 1}', '{"format_version":1,"layout":{}}']
)
def test_a_damaged_zoo_file_is_named(tmp_path, text):
    (tmp_path / "zoo.json").write_text(text)
    with pytest.raises(LoraFactoryError, match=r"zoo\.json"):
        AdapterZoo(tmp_path)


def test_create_opens_a_zoo_of_the_same_layout_only(zoo, layout, tmp_path):
    before = (zoo.folder / "zoo.json").stat().st_mtime_ns
    again = AdapterZoo.create(zoo.folder, layout)
    assert again.tasks == zoo.tasks
    assert (zoo.folder / "zoo.json").stat().st_mtime_ns == before
    for other in (layout_of(r=3), replace(layout, base_model="someone/else")):
        with pytest.raises(LoraFactoryError, match="holds a zoo of"):
            AdapterZoo.create(zoo.folder, other)
    (tmp_path / "file").touch()
    with pytest.raises(LoraFactoryError, match="is a file"):
        AdapterZoo.create(tmp_path / "file", layout)


def test_of_two_processes_that_make_a_zoo_one_does(layout, tmp_path, monkeypatch):
    write_json, other = zoo_module.write_json, layout_of(r=3)

    def just_after_another_process(path, values, **options):
        write_json(path, values | {"layout": other.to_dict()}, **options)
        write_json(path, values, **options)

    monkeypatch.setattr(zoo_module, "write_json", just_after_another_process)
    with pytest.raises(LoraFactoryError, match="holds a zoo of"):
        AdapterZoo.create(tmp_path / "zoo", layout)
    assert AdapterZoo(tmp_path / "zoo").layout == other
    assert [path.name for path in (tmp_path / "zoo").iterdir()] == ["zoo.json"]


def test_a_file_among_the_tasks_is_no_task(zoo):
    (zoo.folder / "notes").write_text("mine")
    for read in (zoo.final, lambda *names: zoo.snapshots(names[0], names[1])):
        with pytest.raises(LoraFactoryError, match="has no run 'seed-0' of task 'notes'"):
            read("notes", "seed-0")
    assert zoo.problems("notes", "seed-0") and zoo.tasks == AdapterZoo(zoo.folder).tasks


def test_a_zoo_stays_the_same_where_the_working_folder_changes(zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(zoo.folder.parent)
    near = AdapterZoo(zoo.folder.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert near.fingerprint() == zoo.fingerprint()


def test_opening_reads_no_weights(zoo, monkeypatch):
    monkeypatch.setattr(zoo_module, "safe_open", None)
    monkeypatch.setattr(zoo_module, "sha256_file", None)
    opened = AdapterZoo(zoo.folder)
    assert opened.runs("python") == ["seed-2", "seed-10"]
    assert opened.record("python", "seed-2").seed == 0


def test_opening_imports_neither_peft_nor_transformers(zoo):
    script = (
        "import sys\n"
        "from lora_factory.zoo.store import AdapterZoo\n"
        "zoo = AdapterZoo(sys.argv[1])\n"
        "zoo.snapshots('python'); assert not zoo.verify()\n"
        "assert not {'peft', 'transformers'} & set(sys.modules)\n"
    )
    root = str(Path(zoo_module.__file__).parent.parent)
    subprocess.run([sys.executable, "-c", script, str(zoo.folder.absolute())], cwd=root, check=True)


def test_a_file_is_hashed_once_an_object(zoo, monkeypatch):
    opened, hashed = AdapterZoo(zoo.folder), []
    monkeypatch.setattr(zoo_module, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    for _ in range(3):
        opened.snapshots("python", "seed-2")
    assert len(hashed) == 1


def test_unknown_tasks_and_runs_name_what_there_is(zoo):
    with pytest.raises(LoraFactoryError, match=r"no task 'rust'; it has c-headers, python"):
        zoo.snapshots("rust")
    with pytest.raises(LoraFactoryError, match="no run 'seed-9'"):
        zoo.record("python", "seed-9")
    for name in ("..", "../zoo", ".tmp-x", ""):
        with pytest.raises(LoraFactoryError, match="cannot be a file name"):
            zoo.record(name, "seed-0")
        with pytest.raises(LoraFactoryError, match="cannot be a file name"):
            zoo.has_run("python", name)


def test_leftovers_of_crashes_are_not_seen(zoo):
    fingerprint = zoo.fingerprint()
    run = zoo.folder / "python" / "seed-2"
    shutil.copytree(run, zoo.folder / "python" / ".tmp-seed-3-abc")
    shutil.copytree(zoo.folder / "python", zoo.folder / ".tmp-rust-abc")
    (zoo.folder / "empty-task").mkdir()
    (zoo.folder / "half" / "seed-0").mkdir(parents=True)
    (zoo.folder / "half" / "seed-0" / "adapter_config.json").write_text("{}")
    (zoo.folder / ".tmp-zoo.json-abc").write_text("{")
    opened = AdapterZoo(zoo.folder)
    assert opened.tasks == ["c-headers", "python"]
    assert opened.runs("python") == ["seed-2", "seed-10"]
    assert not opened.has_run("half", "seed-0")
    assert opened.fingerprint() == fingerprint
    assert opened.verify() == []


def test_a_run_that_fails_half_way_leaves_nothing(zoo, layout, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(zoo_module, "write_json", fail)
    with pytest.raises(StorageError, match="disk full"):
        zoo.add_run(record_of("rust"), snapshots_of(layout))
    assert os.listdir(zoo.folder / "rust") == []
    assert zoo.tasks == ["c-headers", "python"]


def test_a_run_is_never_replaced(zoo, layout):
    path = zoo.folder / "python" / "seed-2" / "run.json"
    before = path.stat().st_mtime_ns
    with pytest.raises(LoraFactoryError, match=r"python/seed-2 is already there; delete"):
        zoo.add_run(record_of(run="seed-2"), snapshots_of(layout))
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "spoil", "message"),
    [
        ({"base_model": "someone/else"}, lambda x: x, "is for someone/else"),
        ({"base_revision": None}, lambda x: x, "choose another zoo folder"),
        ({}, lambda x: x[:2], "snapshots have shape"),
        ({}, lambda x: x[:, 1:], "snapshots have shape"),
        ({}, lambda x: x[0], "snapshots have shape"),
        ({}, lambda x: x.index_fill(0, torch.tensor([1]), torch.nan), r"snapshots \[1\] hold NaN"),
        ({}, lambda x: x.index_fill(0, torch.tensor([2]), torch.inf), r"snapshots \[2\] hold NaN"),
        ({}, lambda x: x.int(), "integers"),
    ],
)
def test_wrong_runs_are_refused_and_leave_nothing(zoo, layout, change, spoil, message):
    with pytest.raises(LoraFactoryError, match=message):
        zoo.add_run(record_of("rust", **change), spoil(snapshots_of(layout)))
    assert not (zoo.folder / "rust").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"task": "../x"},
        {"run": ""},
        {"descriptions": ()},
        {"descriptions": ("a", " ")},
        {"descriptions": "text"},
        {"snapshot_steps": (), "validation_losses": ()},
        {"snapshot_steps": (3, 2, 1)},
        {"snapshot_steps": (1, 1, 2)},
        {"validation_losses": (1.0,)},
        {"validation_losses": (1.0, float("nan"), 1.0)},
        {"sha256": {"../../etc": "00"}},
    ],
)
def test_wrong_records_are_refused_at_birth(change):
    with pytest.raises(LoraFactoryError):
        record_of(**change)


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip_byte, cut, Path.unlink])
@pytest.mark.parametrize("name", RUN_FILES[:3])
def test_verify_and_reading_find_a_damaged_file(zoo, damage, name):
    assert zoo.verify() == []
    path = zoo.folder / "python" / "seed-10" / name
    damage(path)
    (problem,) = zoo.verify()
    assert str(path) in problem
    assert f"delete the folder {path.parent}" in problem
    opened = AdapterZoo(zoo.folder)
    calls = {"adapter_model.safetensors": lambda: opened.final("python", "seed-10")}
    calls["checkpoints.safetensors"] = lambda: opened.snapshots("python")
    if name in calls:
        with pytest.raises(LoraFactoryError, match=r"cut short or altered|is missing") as info:
            calls[name]()
        assert str(info.value) == problem
    opened.snapshots("c-headers")


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda path: path.write_text("[]"),
        lambda path: path.write_text("{}"),
        lambda path: path.write_text(path.read_text().replace('"steps"', '"paces"')),
        lambda path: path.write_text(path.read_text().replace("seed-10", "seed-11")),
        lambda path: path.write_text(path.read_text().replace('"adapter_config.json"', '"other.json"')),
        lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": []})),
        lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"descriptions": 3})),
        lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"validation_losses": ["a"] * 3})),
    ],
)
def test_a_damaged_record_is_named(zoo, damage):
    path = zoo.folder / "python" / "seed-10" / "run.json"
    damage(path)
    (problem,) = zoo.verify()
    assert str(path) in problem
    with pytest.raises(LoraFactoryError, match=r"run\.json.*delete the folder"):
        zoo.record("python", "seed-10")


def rehash(run):
    """Make run.json agree with the files again, as a careless hand would."""
    values = json.loads((run / "run.json").read_text())
    values["sha256"] = {name: sha256_file(run / name) for name in values["sha256"]}
    (run / "run.json").write_text(json.dumps(values))


@pytest.mark.parametrize("name", RUN_FILES[1:3])
def test_a_file_with_the_right_hash_still_has_to_fit_the_layout(zoo, name):
    run = zoo.folder / "python" / "seed-10"
    tensors = load_file(run / name)
    key = next(iter(tensors))
    spoils = (
        {**tensors, key: torch.full_like(tensors[key], torch.nan)},
        {**tensors, "surplus": torch.zeros(1)},
        {other: tensor for other, tensor in tensors.items() if other != key},
    )
    for spoiled in spoils:
        save_file(spoiled, run / name)
        rehash(run)
        (problem,) = zoo.verify()
        assert str(run / name) in problem
    (run / name).write_bytes(b"nothing")
    rehash(run)
    (problem,) = zoo.verify()
    assert str(run / name) in problem


def test_fingerprint_changes_with_every_run_and_only_then(zoo, layout, tmp_path):
    before = zoo.fingerprint()
    assert AdapterZoo(shutil.copytree(zoo.folder, tmp_path / "copy")).fingerprint() == before
    zoo.add_run(record_of("rust"), snapshots_of(layout, seed=5))
    after = zoo.fingerprint()
    assert after != before
    shutil.rmtree(zoo.folder / "rust")
    assert zoo.fingerprint() == before
    zoo.add_run(record_of("rust"), snapshots_of(layout, seed=6))
    assert zoo.fingerprint() not in (before, after)


def test_a_selection_knows_nothing_of_the_rest(tmp_path, layout):
    zoo = AdapterZoo.create(tmp_path / "zoo", layout)
    for task, seed in (("a", 0), ("a", 1), ("b", 0), ("c", 0)):
        zoo.add_run(record_of(task, f"seed-{seed}"), snapshots_of(layout))
    view = zoo.select(["a", "b"], ["seed-0"])
    assert view.tasks == ["a", "b"] and view.runs("a") == ["seed-0"]
    assert view.has_run("a", "seed-0") and not view.has_run("a", "seed-1") and not view.has_run("c", "seed-0")
    with pytest.raises(LoraFactoryError, match="no task 'c'"):
        view.snapshots("c")
    with pytest.raises(LoraFactoryError, match="no run 'seed-0' of task 'c'"):
        view.final("c", "seed-0")
    before = view.fingerprint()
    assert before != zoo.fingerprint()
    zoo.add_run(record_of("d"), snapshots_of(layout))
    assert view.fingerprint() == before and view.tasks == ["a", "b"]
    with pytest.raises(LoraFactoryError, match="none of the runs"):
        zoo.select(["b"], ["seed-1"])
