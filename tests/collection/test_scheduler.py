"""The work of a collection: shared by processes and launches, and not stopped by what happens to one run."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import SoftFileLease
from helpers.models import attach, random_adapter
from helpers.runs import SMALL, TOGETHER, contents, modification_times, tasks, text_task
from peft import get_peft_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from lora_factory.adapters.attach import AdapterSlot, whole
from lora_factory.arguments import CollectArguments
from lora_factory.cli import commands as cli
from lora_factory.collection import scheduler as collection
from lora_factory.collection.collect import collect_adapters
from lora_factory.collection.scheduler import CollectionError
from lora_factory.collection.trainer import LoRATrainer
from lora_factory.errors import LoraFactoryError, StorageError
from lora_factory.tasks.task import Task
from lora_factory.tasks.task_file import save_tasks
from lora_factory.tasks.text import DataSource
from lora_factory.utils.files import write_json
from lora_factory.utils.safe_files import read_json
from lora_factory.zoo.store import AdapterZoo
from lora_factory.zoo.tools import merge

EIGHT = tuple(f"task-{number}" for number in range(8))


TWO_PROCESSES = """
import os, sys, time
from pathlib import Path
from accelerate import PartialState
from lora_factory.collection.collect import collect_adapters
from lora_factory.tasks.task_file import load_tasks
from lora_factory.zoo.store import AdapterZoo
from helpers.runs import SMALL, TOGETHER

model, folder = sys.argv[1], Path(sys.argv[2])
done, add_run = folder / "done", AdapterZoo.add_run

def counted(zoo, record, snapshots):
    add_run(zoo, record, snapshots)
    (done / f"{os.environ['RANK']}-{record.task}").touch(exist_ok=False)
    end = time.monotonic() + 120
    while len(mine := list(done.glob(os.environ["RANK"] + "-*"))) >= 2 and len(list(done.iterdir())) < len(mine) + 2:
        assert time.monotonic() < end, "the other process gets nothing to do"
        time.sleep(0.01)

AdapterZoo.add_run = counted
collect_adapters(folder / "tasks.json", model, folder / "two", SMALL)
AdapterZoo.add_run = add_run
collect_adapters(load_tasks(folder / "tasks.json")[:2], model, folder / "together", TOGETHER)
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(pico_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where two processes collected eight tasks, a task each at a time, and two tasks together."""
    folder = tmp_path_factory.mktemp("two-processes")
    (folder / "done").mkdir()
    (folder / "collect.py").write_text(TWO_PROCESSES)
    save_tasks([text_task(name) for name in EIGHT], folder / "tasks.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command += [str(folder / "collect.py"), str(pico_model_folder), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_base_whose_weights_were_replaced_is_not_mixed_into_a_zoo(pico_model_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(pico_model_folder, tmp_path / "base")
    zoo = collect_adapters(tasks("prose"), base, tmp_path / "zoo", SMALL)
    assert collect_adapters(tasks("prose", "code"), base, zoo.folder, SMALL).tasks == ["code", "prose"]
    (base / "adapter_model.safetensors").write_bytes(b"of somebody else")
    LlamaForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="20KB")
    (base / "model.safetensors").unlink()
    zoo.check_base()
    kept = shutil.copytree(base, tmp_path / "kept")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(base)).save_pretrained(base)
    zoo.check_base(kept)
    (zoo.folder / "code" / "seed-0" / "run.json").write_text("{")
    zoo.check_base(kept)  # damage of one run is for those who read it
    with pytest.raises(LoraFactoryError, match=rf"was trained on other weights than those in {re.escape(str(base))}"):
        collect_adapters([text_task("verse")], base, zoo.folder, SMALL)
    with pytest.raises(LoraFactoryError, match="was trained on other weights"):
        merge([zoo], tmp_path / "merged")
    assert zoo.tasks == ["code", "prose"] and not (tmp_path / "merged").exists()


def test_two_processes_write_what_one_writes(two_processes: Path, pico_model_folder: Path, tmp_path: Path) -> None:
    done = [path.name.partition("-") for path in (two_processes / "done").iterdir()]
    assert sorted(task for _, _, task in done) == list(EIGHT), "each task once"
    assert {rank for rank, _, _ in done} == {"0", "1"}, "and two of them by each process, which the script sees to"
    collect_adapters(two_processes / "tasks.json", pico_model_folder, tmp_path / "one", SMALL)
    assert contents(two_processes / "two") == contents(tmp_path / "one")


def test_two_processes_that_share_runs_train_as_one(
    two_processes: Path, pico_model_folder: Path, tmp_path: Path
) -> None:
    one = collect_adapters([text_task(name) for name in EIGHT[:2]], pico_model_folder, tmp_path / "one", TOGETHER)
    two = AdapterZoo(two_processes / "together")
    assert two.tasks == one.tasks
    for task in one.tasks:
        torch.testing.assert_close(two.snapshots(task), one.snapshots(task), rtol=1e-3, atol=1e-5)
        records = [zoo.record(task, "seed-0") for zoo in (one, two)]
        assert records[0].train_tokens == records[1].train_tokens
        assert records[0].validation_losses == pytest.approx(records[1].validation_losses, rel=1e-5)
    alone = replace(TOGETHER, parallel="tasks")
    collect_adapters([text_task(name) for name in EIGHT[:2]], pico_model_folder, tmp_path / "alone", alone)
    assert contents(tmp_path / "alone") == contents(tmp_path / "one"), "one process has all of a batch"


def failing(monkeypatch: pytest.MonkeyPatch, name: str, reason: str) -> None:
    """Make the training of one task fail."""
    train = LoRATrainer.train

    def fail(trainer: LoRATrainer, task: Task, *arguments: Any, **options: Any) -> Any:
        if task.name == name:
            raise LoraFactoryError(reason)
        return train(trainer, task, *arguments, **options)

    monkeypatch.setattr(LoRATrainer, "train", fail)


def test_data_is_checked_before_the_first_run(pico_model_folder: Path, tmp_path: Path) -> None:
    broken = [Task(name, ("Nothing.",), DataSource(str(tmp_path / f"no-{name}.jsonl"))) for name in ("b1", "b2")]
    with pytest.raises(LoraFactoryError, match=r"the data of 2 tasks (.|\n)*b1: .*no-b1.jsonl(.|\n)*b2: .*no-b2"):
        collect_adapters([*tasks("prose"), *broken], pico_model_folder, tmp_path / "zoo", SMALL)
    assert not (tmp_path / "zoo").exists()


def test_what_the_model_cannot_read_is_found_before_the_first_run(pico_model_folder: Path, tmp_path: Path) -> None:
    work = [*tasks("prose"), text_task("long", "fox " * 3000)]
    wide = replace(SMALL, sequence_length=4000, packing=False)
    with pytest.raises(LoraFactoryError, match=r"task 'long' cannot be used: a sequence of \d+ tokens is longer than"):
        collect_adapters(work, pico_model_folder, tmp_path / "zoo", wide)
    assert not AdapterZoo(tmp_path / "zoo").tasks
    with pytest.raises(LoraFactoryError, match=r"the data of 2 tasks (.|\n)*prose: .*template(.|\n)*long: .*template"):
        collect_adapters(work, pico_model_folder, tmp_path / "zoo", replace(SMALL, chat_template=True))
    assert not AdapterZoo(tmp_path / "zoo").tasks


def test_a_task_that_fails_stops_no_other(
    pico_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = [*tasks("prose"), text_task("broken"), *tasks("code")]
    failing(monkeypatch, "broken", "no-such-file")
    with pytest.raises(CollectionError, match=r"1 of 3 runs failed, first broken/seed-0: .*no-such-file") as caught:
        collect_adapters(work, pico_model_folder, tmp_path / "zoo", replace(SMALL, retries=2))
    assert isinstance(caught.value, LoraFactoryError) and set(caught.value.reasons) == {"broken/seed-0"}
    assert AdapterZoo(tmp_path / "zoo").tasks == ["code", "prose"]
    attempts = read_json(tmp_path / "zoo" / ".collection" / "failures" / "broken@seed-0.json")["attempts"]
    assert len(attempts) == 1 and "no-such-file" in attempts[0]["reason"], "it would come again, so it is not retried"
    monkeypatch.undo()
    before = modification_times(tmp_path / "zoo" / "prose")
    mended = [*tasks("prose"), text_task("broken"), *tasks("code")]
    zoo = collect_adapters(mended, pico_model_folder, tmp_path / "zoo", SMALL)
    assert zoo.tasks == ["broken", "code", "prose"] and modification_times(tmp_path / "zoo" / "prose") == before
    assert not list((tmp_path / "zoo" / ".collection" / "failures").iterdir())


def test_a_run_out_of_memory_is_tried_again_and_leaves_no_trace(
    pico_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, calls = LoRATrainer._share_of_loss, []

    def hungry(trainer: LoRATrainer, *arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:  # the second half of the second step, with gradients of the first half
            raise torch.OutOfMemoryError("no memory left")
        return step(trainer, *arguments)

    settings = replace(SMALL, gradient_accumulation=2)
    collect_adapters(tasks("prose", "code"), pico_model_folder, tmp_path / "calm", settings)
    monkeypatch.setattr(LoRATrainer, "_share_of_loss", hungry)
    collect_adapters(tasks("prose", "code"), pico_model_folder, tmp_path / "zoo", settings)
    assert contents(tmp_path / "zoo") == contents(tmp_path / "calm")
    assert "prose/seed-0 failed, attempt 1 of 2: OutOfMemoryError: no memory left" in caplog.text


def test_the_command_says_what_failed(
    pico_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "119")
    examples = tmp_path / "prose.txt"
    examples.write_text("\n\n".join(f"{number} A sentence of some length." for number in range(30)))
    save = '{{"tasks": [{{"name": "{}", "descriptions": ["Text."], "data": {{"path": "{}"}}}}]}}'
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "good.json").write_text(save.format("good", examples))
    (tmp_path / "tasks" / "bad.json").write_text(save.format("bad", tmp_path / "nowhere.txt"))
    words = ["collect", "--tasks", str(tmp_path / "tasks"), "--base-model", str(pico_model_folder), "--steps", "2"]
    words += ["--snapshots", "1", "--retries", "0", "--sequence-length", "16", "--output-dir", str(tmp_path / "zoo")]
    assert cli.main(words) == 2
    assert "task 'bad' cannot be used: no data file" in capsys.readouterr().err
    assert not (tmp_path / "zoo").exists()
    (tmp_path / "nowhere.txt").write_text(examples.read_text())
    with monkeypatch.context() as patch:
        failing(patch, "bad", "it is too hard")
        assert cli.main(words) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "bad/seed-0" in output and "it is too hard" in output
    assert "1 of 2 runs in" in output and "1 failed; mend the cause" in output
    assert cli.main(words) == 0
    assert "2 of 2 runs in" in " ".join(capsys.readouterr().out.split())


def test_a_full_disk_ends_the_collection_and_the_next_one_goes_on(
    pico_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trained, train = [], LoRATrainer.train

    def counted(trainer: LoRATrainer, task: Task, *arguments: object, **options: object) -> object:
        trained.append(task.name)
        return train(trainer, task, *arguments, **options)

    monkeypatch.setattr(LoRATrainer, "train", counted)
    with monkeypatch.context() as patch, pytest.raises(StorageError, match=r"cannot write into .*: .*No space left"):
        patch.setattr(AdapterZoo, "add_run", full)
        collect_adapters(tasks("prose", "code"), pico_model_folder, tmp_path / "zoo", SMALL)
    assert trained == ["prose"], "no other run is trained in vain"
    collect_adapters(tasks("prose", "code"), pico_model_folder, tmp_path / "zoo", SMALL)
    collect_adapters(tasks("prose", "code"), pico_model_folder, tmp_path / "calm", SMALL)
    assert contents(tmp_path / "zoo") == contents(tmp_path / "calm")


def test_what_another_launch_works_on_is_waited_for(
    pico_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zoo" / ".collection" / "leases").mkdir(parents=True)
    other = SoftFileLease(tmp_path / "zoo" / ".collection" / "leases" / "prose@seed-0", lease_duration=60.0)
    other.acquire()
    landed = []

    def wait(seconds: float) -> None:
        landed.append(AdapterZoo(tmp_path / "zoo").tasks)
        if len(landed) == 2:
            other.release()

    monkeypatch.setattr(collection.time, "sleep", wait)
    zoo = collect_adapters(tasks("prose", "code"), pico_model_folder, tmp_path / "zoo", SMALL)
    assert landed == [["code"], ["code"]]
    assert zoo.tasks == ["code", "prose"]


def test_a_lease_that_nobody_wrote_into_is_removed(
    pico_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "_EMPTY_SECONDS", 0.0)
    leases = tmp_path / "zoo" / ".collection" / "leases"
    leases.mkdir(parents=True)
    (leases / "prose@seed-0").touch()  # a process was killed between making the file and writing into it
    assert collect_adapters(tasks("prose"), pico_model_folder, tmp_path / "zoo", SMALL).tasks == ["prose"]


def test_a_run_that_was_taken_over_is_left_to_the_other(
    pico_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lost = iter([True])
    monkeypatch.setattr(SoftFileLease, "compromise", property(lambda lease: next(lost, None)))
    zoo = collect_adapters(tasks("prose"), pico_model_folder, tmp_path / "zoo", SMALL)
    assert "prose/seed-0 was taken over by another process" in caplog.text
    assert zoo.tasks == ["prose"] and zoo.verify() == []


def test_options_that_only_say_how_to_work_change_no_file(pico_model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    collect_adapters(tasks("prose"), pico_model_folder, tmp_path / "plain", SMALL)
    other = replace(SMALL, gradient_checkpointing=True, state_every=1, retries=0, report_to=("tensorboard",))
    collect_adapters(tasks("prose"), pico_model_folder, tmp_path / "zoo", other)
    assert contents(tmp_path / "zoo") == contents(tmp_path / "plain")
    assert list((tmp_path / "zoo" / ".collection" / "logs").rglob("events.out.tfevents.*"))


def test_runs_of_an_older_version_lack_younger_settings_and_are_kept(pico_model_folder: Path, tmp_path: Path) -> None:
    collect_adapters(tasks("prose"), pico_model_folder, tmp_path / "zoo", SMALL)
    path = tmp_path / "zoo" / "prose" / "seed-0" / "run.json"
    values = read_json(path)
    assert values["arguments"].pop("quantization") == ""
    write_json(path, values)
    before = modification_times(tmp_path / "zoo" / "prose")
    collect_adapters(tasks("prose"), pico_model_folder, tmp_path / "zoo", SMALL)
    assert modification_times(tmp_path / "zoo" / "prose") == before


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_trains(bits: str, pico_model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = replace(SMALL, quantization=bits, steps=6, snapshots=6, learning_rate=3e-2)
    zoo = collect_adapters(tasks("prose"), pico_model_folder, tmp_path / "zoo", settings)
    assert zoo.record("prose", "seed-0").arguments["quantization"] == bits
    for first, second in pairwise(zoo.snapshots("prose")[1:]):  # from where B is not 0; a validation in between
        before, after = zoo.layout.unflatten(first), zoo.layout.unflatten(second)
        assert all(not torch.equal(before[key], after[key]) for key in before), "every layer has a gradient"


def test_a_slot_that_fsdp_shards_is_written_read_and_trained(pico_model_folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trained = [one_step(pico_model_folder, mesh) for mesh in (None, init_device_mesh("cpu", (1,)))]
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(*trained)


def one_step(folder: Path, mesh: DeviceMesh | None) -> torch.Tensor:
    """An adapter after a step from given weights, in a model that FSDP shards over a mesh."""
    model, layout = attach(LlamaForCausalLM.from_pretrained(folder))
    for module in [*model.get_base_model().model.layers, model] if mesh else []:
        fully_shard(module, mesh=mesh)
    AdapterSlot(model, layout).load(random_adapter(layout, 0))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(isinstance(parameter, DTensor) == (mesh is not None) for parameter in parameters)
    tokens = torch.arange(3, 35).reshape(2, 16)
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.AdamW(parameters, lr=1e-2).step()
    state_dict = get_peft_model_state_dict(model, save_embedding_layers=False)
    return layout.flatten({key: whole(value).detach() for key, value in state_dict.items()})


@pytest.mark.parametrize(
    ("options", "named", "module"),
    [
        (
            {"quantization": "4bit"},
            r"bitsandbytes; run: pip install 'lora-factory\[quantization\]'",
            "lora_factory.utils.extras.find_spec",
        ),
        ({"report_to": ("wandb",)}, "pip install wandb", "lora_factory.collection.progress.get_available_trackers"),
    ],
)
def test_a_missing_package_is_one_clear_error(
    options: dict[str, object], named: str, module: str, pico_model_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(module, lambda *arguments: None if arguments else [])
    with pytest.raises(LoraFactoryError, match=named):
        collect_adapters(tasks("prose"), pico_model_folder, tmp_path / "zoo", replace(SMALL, **options))
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize(
    "options", [{"parallel": "both"}, {"quantization": "3bit"}, {"report_to": ("paper",)}, {"retries": -1}]
)
def test_options_are_checked_at_birth(options: dict[str, object]) -> None:
    with pytest.raises(LoraFactoryError, match=next(iter(options))):
        CollectArguments(**options)
