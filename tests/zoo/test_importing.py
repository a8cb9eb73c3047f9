"""Adapters of foreign origin in a zoo: what they do stays the same, and whatever is not plain LoRA is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lora_factory.arguments import CollectArguments, ImportArguments
from lora_factory.cli import commands as cli
from lora_factory.errors import LoraFactoryError
from lora_factory.hub.card_reading import card_description
from lora_factory.zoo.importing import AdapterSource, import_adapters, read_list
from lora_factory.zoo.store import AdapterZoo

BASE = "someone/pico"
NAMED = ImportArguments(base_model=BASE)
CARD = "---\nlicense: mit\n---\n# Model card\n\n<!-- hints -->\n\nWrites   short\nrhymes about [birds](x).\n\nMore."
TOKENS = torch.arange(3, 19)[None]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 3, "use_rslora": True},
    "patterns": {"rank_pattern": {"v_proj": 1}, "alpha_pattern": {"q_proj": 5}},
    "modules": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0], "lora_alpha": 3},
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, pico_model_folder: Path) -> Path:
    """A folder with one adapter of each kind, trained for two steps by plain PEFT; never written to by a test."""
    folder = tmp_path_factory.mktemp("adapters")
    dora, saved = {"use_dora": True}, {"modules_to_save": ["lm_head"]}
    for number, (name, options) in enumerate((KINDS | {"dora": dora, "saved": saved}).items()):
        train_adapter(pico_model_folder, folder / name, number, **options)
        (folder / name / "README.md").write_text(CARD)
    return folder


def train_adapter(base: Path, folder: Path, seed: int, **options: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(**({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]} | options))
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(2):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder)


@pytest.fixture
def copy(adapters: Path, tmp_path: Path) -> Path:
    """A copy of the plain adapter, to be changed."""
    return Path(shutil.copytree(adapters / "plain", tmp_path / "copy"))


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder: Path, factor: float) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)  # memory-mapped: the file is written anew beside it
    save_file({key: tensor * factor for key, tensor in tensors.items()}, folder / "new")
    (folder / "new").replace(path)


@torch.no_grad()
def logits(base: Path, adapter: Path | None) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(base)
    return (PeftModel.from_pretrained(model, str(adapter)) if adapter else model).eval()(TOKENS).logits


def refusal(source: Path, folder: Path, arguments: ImportArguments = NAMED) -> str:
    before = sorted(folder.rglob("*"))
    with pytest.raises(LoraFactoryError, match="nothing was imported") as info:
        import_adapters([source], folder, arguments)
    assert all(path.name == "zoo.json" for path in set(folder.rglob("*")) - set(before))
    return str(info.value)


def origin_of(zoo: AdapterZoo, task: str) -> dict[str, Any]:
    return json.loads((zoo.folder / task / "imported" / "import.json").read_text())


@pytest.mark.parametrize("first", KINDS)
def test_other_modules_ranks_and_scalings_do_what_they_did(
    adapters: Path, pico_model_folder: Path, tmp_path: Path, first: str
) -> None:
    kinds = [first, *(kind for kind in KINDS if kind != first)]
    report = import_adapters([adapters / kind for kind in kinds], tmp_path / "zoo", NAMED)
    zoo, base = report.zoo, logits(pico_model_folder, None)
    assert zoo.tasks == sorted(KINDS) and not report.refused and not zoo.verify()
    assert {module.rank for module in zoo.layout.modules} == {4}
    assert len({module.scaling for module in zoo.layout.modules}) == 1
    assert [module.path.rpartition(".")[2] for module in zoo.layout.modules] == [
        *("down_proj", "q_proj", "v_proj"),  # of layer 0
        *("q_proj", "v_proj"),
    ]
    assert zoo.layout.base_model == BASE
    for kind in kinds:
        expected = logits(pico_model_folder, adapters / kind)
        torch.testing.assert_close(logits(pico_model_folder, zoo.folder / kind / "imported"), expected)
        assert not torch.allclose(expected, base, atol=1e-2)
        record = zoo.record(kind, "imported")
        assert record.descriptions == ("Writes short rhymes about [birds](x).",) and record.license == "mit"
        settings = CollectArguments(**record.arguments)
        assert (settings.rank, settings.target_modules) == (4, "down_proj,q_proj,v_proj")
        assert settings.lora_alpha == zoo.layout.lora_config["lora_alpha"]
    origin = origin_of(zoo, "rslora")
    assert origin["padded"] and origin["use_rslora"] and origin["source"] == str(adapters / "rslora")


def test_adapters_of_one_form_stay_bit_for_bit(adapters: Path, copy: Path, tmp_path: Path) -> None:
    change_weights(copy, 0.5)
    zoo = import_adapters([adapters / "plain", copy], tmp_path / "zoo", NAMED).zoo
    for folder in (adapters / "plain", copy):
        assert torch.equal(
            zoo.final(folder.name, "imported"), zoo.layout.flatten(load_file(folder / "adapter_model.safetensors"))
        )
        assert not origin_of(zoo, folder.name)["padded"]
    patterns = import_adapters([adapters / "patterns"], tmp_path / "patterns", NAMED).zoo
    assert {module.rank for module in patterns.layout.modules} == {1, 2}, "with its patterns"
    weights = load_file(adapters / "patterns" / "adapter_model.safetensors")
    assert torch.equal(patterns.final("patterns", "imported"), patterns.layout.flatten(weights))


def test_a_zoo_that_is_there_keeps_its_layout(adapters: Path, pico_model_folder: Path, tmp_path: Path) -> None:
    layout = import_adapters([adapters / "wide"], tmp_path / "zoo", NAMED).zoo.layout
    report = import_adapters([adapters / "rslora"], tmp_path / "zoo", NAMED)
    assert report.zoo.layout == layout and layout.modules[0].scaling == 1.5
    torch.testing.assert_close(
        logits(pico_model_folder, report.zoo.folder / "rslora/imported"),
        logits(pico_model_folder, adapters / "rslora"),
    )
    import_adapters([adapters / "plain"], tmp_path / "narrow", NAMED)
    with pytest.raises(LoraFactoryError, match=r"has rank 4, expected at most 2; .*import it into a new zoo"):
        import_adapters([adapters / "wide"], tmp_path / "narrow", NAMED)


def test_a_new_zoo_has_the_rank_that_was_asked_for(adapters: Path, pico_model_folder: Path, tmp_path: Path) -> None:
    padded = import_adapters([adapters / "patterns"], tmp_path / "padded", replace(NAMED, rank=5)).zoo
    assert {module.rank for module in padded.layout.modules} == {5}
    torch.testing.assert_close(
        logits(pico_model_folder, padded.folder / "patterns/imported"),
        logits(pico_model_folder, adapters / "patterns"),
    )
    with pytest.raises(LoraFactoryError, match="rank=3 is below that of all adapters, 4"):
        import_adapters([adapters / "wide"], tmp_path / "low", replace(NAMED, rank=3))
    sources = [adapters / kind for kind in ("wide", "modules", "plain")]
    report = import_adapters(sources, tmp_path / "three", replace(NAMED, rank=3))
    assert report.zoo.tasks == ["modules", "plain"] and "has rank 4, expected at most 3" in str(report.refused)


def test_a_zoo_of_an_earlier_version_takes_more_adapters(
    adapters: Path, pico_model_folder: Path, tmp_path: Path
) -> None:
    """It was in canonical form: scaling 1, and the import's record says so."""
    zoo = import_adapters([adapters / "wide"], tmp_path / "new", NAMED).zoo
    plain = {"r": 4, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    modules = tuple(replace(module, scaling=1.0) for module in zoo.layout.modules)
    layout = replace(zoo.layout, modules=modules, lora_config=dict(zoo.layout.lora_config) | plain)
    old = AdapterZoo.create(tmp_path / "old", layout)
    origin = {key: value for key, value in origin_of(zoo, "wide").items() if key != "padded"} | {"canonical": True}
    row = zoo.layout.widen(zoo.final("wide", "imported"), layout)[None]
    old.add_run(zoo.record("wide", "imported"), row, extra_files={"import.json": json.dumps(origin)})
    report = import_adapters([adapters / "wide", adapters / "rslora"], old.folder, NAMED)
    assert report.zoo.layout == layout and not report.refused and origin_of(report.zoo, "wide")["canonical"]
    torch.testing.assert_close(
        logits(pico_model_folder, report.zoo.folder / "rslora/imported"),
        logits(pico_model_folder, adapters / "rslora"),
    )


def test_sizes_that_contradict_those_of_an_earlier_adapter_are_refused(
    adapters: Path, copy: Path, tmp_path: Path
) -> None:
    tensors = load_file(copy / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("q_proj.lora_A.weight"))
    tensors[key] = torch.zeros(2, tensors[key].shape[1] + 1)
    save_file(tensors, copy / "new")
    (copy / "new").replace(copy / "adapter_model.safetensors")
    report = import_adapters([adapters / "plain", copy, adapters / "wide"], tmp_path / "zoo", NAMED)
    assert report.zoo.tasks == ["plain", "wide"]
    assert "1 of 4 modules have no room in the zoo: model.layers" in report.refused[str(copy)]


def test_what_is_no_plain_lora_is_refused_and_the_rest_is_taken(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["import", *(str(adapters / name) for name in ("dora", "plain", "saved"))]
    assert cli.main([*words, "--output-dir", str(tmp_path / "zoo"), "--base-model", BASE]) == 2
    said = capsys.readouterr()
    assert f"{adapters / 'plain'} -> plain/imported" in said.out
    assert "DoRA trains a magnitude vector besides A and B" in said.out
    assert "it stores whole modules, which are no LoRA weights" in said.out
    assert "2 of 3 adapters were refused, the others are in the zoo" in said.err
    assert AdapterZoo(tmp_path / "zoo").tasks == ["plain"]


def test_pickles_are_refused_with_the_command_that_converts_them(copy: Path, tmp_path: Path) -> None:
    weights = copy / "adapter_model.safetensors"
    tensors = load_file(weights)
    torch.save(tensors, copy / "adapter_model.bin")
    weights.unlink()
    reason = refusal(copy, tmp_path / "zoo")
    assert "adapter_model.bin is a pickle, which can run code" in reason
    command = reason.partition("convert it with: ")[2]
    subprocess.run(command.replace("python -c", f"{sys.executable} -c"), shell=True, check=True)
    assert import_adapters([copy], tmp_path / "zoo", NAMED).imported == {str(copy): "copy/imported"}


def test_checkpoints_become_snapshots(adapters: Path, copy: Path, tmp_path: Path) -> None:
    final = load_file(copy / "adapter_model.safetensors")
    for step, factor in ((100, 0.25), (20, 0.5), (3, 1.0)):
        shutil.copytree(adapters / "plain", copy / f"checkpoint-{step}")
        change_weights(copy / f"checkpoint-{step}", factor)
    zoo = import_adapters([copy], tmp_path / "zoo", NAMED).zoo
    record, vector = zoo.record("copy", "imported"), zoo.layout.flatten(final)
    assert record.snapshot_steps == (3, 20, 100, 101) and record.steps == 101
    factors = torch.tensor([1.0, 0.5, 0.25, 1.0])[:, None]
    assert torch.equal(zoo.snapshots("copy"), factors * vector)
    shutil.copytree(adapters / "plain", copy / "checkpoint-200")
    last = import_adapters([AdapterSource(str(copy), run="last")], tmp_path / "zoo", replace(NAMED, snapshots=2)).zoo
    assert last.record("copy", "last").snapshot_steps == (100, 200), "the adapter itself is the last checkpoint"
    change_config(copy / "checkpoint-20", lora_alpha=9)
    with pytest.raises(LoraFactoryError, match="checkpoint-20 has other modules, ranks or scaling"):
        import_adapters([AdapterSource(str(copy), run="third")], tmp_path / "zoo", NAMED)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"base_model_name_or_path": "someone/else"}, "it is for the base model someone/else, the zoo is for"),
        ({"revision": "fed"}, "it is for commit fed of someone/pico, the zoo for abc"),
        ({"target_modules": ["q_proj"]}, "belongs to another adapter"),
        ({"r": 3}, "the weights have rank 2"),
    ],
)
def test_another_base_or_contradictions_are_refused(
    adapters: Path, copy: Path, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    import_adapters([adapters / "plain"], tmp_path / "zoo", replace(NAMED, base_revision="abc"))
    change_config(copy, **config)
    assert words in refusal(copy, tmp_path / "zoo")


def test_a_local_base_is_taken_only_on_the_users_word(copy: Path, tmp_path: Path) -> None:
    import_adapters([copy], tmp_path / "zoo", replace(NAMED, base_revision="abc"))
    change_config(copy, revision="abc")
    assert "pass base_model='someone/pico' if that folder is a copy of it" in refusal(
        copy, tmp_path / "zoo", ImportArguments(run_name="other")
    )
    assert import_adapters([copy], tmp_path / "zoo", replace(NAMED, run_name="other")).imported


def test_modules_that_the_zoo_lacks_and_nan_are_refused(adapters: Path, copy: Path, tmp_path: Path) -> None:
    import_adapters([adapters / "plain"], tmp_path / "zoo", NAMED)
    assert (
        "1 of 2 modules have no room in the zoo: model.layers.0.mlp.down_proj is not among the 4 modules there; "
        "import it into a new zoo"
    ) in refusal(adapters / "modules", tmp_path / "zoo")
    change_weights(copy, float("nan"))
    assert "hold NaN" in refusal(copy, tmp_path / "zoo")


def test_a_list_names_tasks_and_descriptions(adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "plain", tmp_path / "plain")
    lines = [
        "# adapters",
        "plain\tbirds\tWrite about birds",
        "",
        f"{adapters / 'wide'}\t\t\tsecond",
        "nobody/no-hub@v1",
        "plain birds Write about birds",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    assert read_list(tmp_path / "list.txt")[2] == AdapterSource("nobody/no-hub@v1")
    report = import_adapters([tmp_path / "list.txt"], tmp_path / "zoo", NAMED)
    assert set(report.imported.values()) == {"birds/imported", "wide/second"}
    assert report.zoo.descriptions("birds") == ("Write about birds",)
    unreachable, spaces = report.refused.values()
    assert "cannot download nobody/no-hub" in unreachable
    assert spaces == "there is no such folder; in a list, tabs stand between folder, task and description, not spaces"


def test_importing_again_changes_nothing_and_conflicts_are_named(adapters: Path, copy: Path, tmp_path: Path) -> None:
    first = import_adapters([adapters / "plain"], tmp_path / "zoo", NAMED)
    before = first.zoo.fingerprint()
    assert import_adapters([adapters / "plain"], tmp_path / "zoo", NAMED).imported == first.imported
    assert first.zoo.fingerprint() == before
    change_weights(copy, 2.0)
    other = AdapterSource(str(copy), task="plain")
    with pytest.raises(LoraFactoryError, match="the zoo has another run imported of task plain"):
        import_adapters([other], tmp_path / "zoo", NAMED)
    report = import_adapters([adapters / "plain", other], tmp_path / "new", NAMED)
    assert f"it would be plain/imported, as {adapters / 'plain'} is" in report.refused[str(copy)]
    (copy / "README.md").unlink()
    assert "give a description" in refusal(copy, tmp_path / "zoo")
    shutil.copytree(copy, tmp_path / "second")
    with pytest.raises(LoraFactoryError, match=r"FOLDER<TAB>TASK<TAB>DESCRIPTION") as error:
        import_adapters([copy, tmp_path / "second"], tmp_path / "another", NAMED)
    assert str(error.value).startswith(f"nothing was imported: {copy}, {tmp_path / 'second'}: it has no model card")
    assert str(error.value).count("it has no model card") == 1


@pytest.mark.parametrize(
    "stored", [None, "models/pico", "./pico", "../x/pico", "C:\\models\\pico", "other/Pico", BASE.upper()]
)
def test_the_users_word_is_taken_for_a_base_without_a_name_of_its_own(
    copy: Path, tmp_path: Path, stored: str | None
) -> None:
    change_config(copy, base_model_name_or_path=stored)
    assert import_adapters([copy], tmp_path / "zoo", NAMED).zoo.layout.base_model == BASE
    assert import_adapters([copy], tmp_path / "zoo", replace(NAMED, run_name="again")).imported


def test_an_adapter_without_a_base_asks_for_one(copy: Path, tmp_path: Path) -> None:
    change_config(copy, base_model_name_or_path=None)
    assert "names no base model; pass base_model=" in refusal(copy, tmp_path / "zoo", ImportArguments())


def test_the_file_of_an_adapter_in_place_of_its_folder(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert cli.main(["import", str(copy / name), "--output-dir", str(tmp_path / "zoo")]) == 2
        assert f"name its folder, {copy}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("content", [b"\xff\xfea\x00", "né".encode("latin-1"), bytes(range(256))])
def test_a_list_that_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(LoraFactoryError, match=r"list\.txt is no UTF-8 text.*name its folder"):
        import_adapters([tmp_path / "list.txt"], tmp_path / "zoo", NAMED)


def test_a_list_may_begin_with_a_byte_order_mark_and_hold_nonsense(copy: Path, tmp_path: Path) -> None:
    odd = "~nobody-here/x\n" + "x" * 5000 + "\n\0\n"
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + f"{copy}\n{odd}".encode())
    report = import_adapters([tmp_path / "list.txt"], tmp_path / "zoo", NAMED)
    assert list(report.imported) == [str(copy)] and len(report.refused) == 3


def test_a_folder_of_checkpoints_alone_is_an_adapter(adapters: Path, tmp_path: Path) -> None:
    for step, factor in ((10, 0.25), (9, 1.0)):
        shutil.copytree(adapters / "plain", tmp_path / "run" / f"checkpoint-{step}")
        change_weights(tmp_path / "run" / f"checkpoint-{step}", factor)
    source = AdapterSource(str(tmp_path / "run"), descriptions=("Write rhymes.",))
    zoo = import_adapters([source], tmp_path / "zoo", NAMED).zoo
    assert zoo.record("run", "imported").snapshot_steps == (9, 10)
    plain = zoo.layout.flatten(load_file(adapters / "plain" / "adapter_model.safetensors"))
    assert torch.equal(zoo.snapshots("run"), torch.tensor([[1.0], [0.25]]) * plain)


def test_one_snapshot_reads_no_other_checkpoint(copy: Path, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        shutil.copytree(copy, copy.parent / "made" / f"checkpoint-{step}")
    for step in (1, 2):  # whoever reads these fails
        (copy.parent / "made" / f"checkpoint-{step}" / "adapter_model.safetensors").write_bytes(b"")
    source = AdapterSource(str(copy.parent / "made"), "t", ("Write rhymes.",))
    zoo = import_adapters([source], tmp_path / "zoo", replace(NAMED, snapshots=1)).zoo
    assert zoo.record("t", "imported").snapshot_steps == (3,)


def test_no_expression_of_an_adapter_is_run(
    adapters: Path, copy: Path, pico_model_folder: Path, tmp_path: Path
) -> None:
    slow = "a*" * 10 + "!"
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in (
            slow,
            ".*q_proj",
            "[qv]_proj",
            "(q|v)_proj",
            r"layers\.\d+\.self_attn\.q_proj",
            "(",
            "q_proj|v_proj",
        ):
            change_config(copy, **{option: {pattern: 2}})
            assert "is a regular expression, which is not run" in refusal(copy, tmp_path / "zoo")
        change_config(copy, **{option: {}})
    for options in (
        {"target_modules": slow},
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": slow},
        {"layers_pattern": slow, "layers_to_transform": [0, 1]},
    ):
        change_config(copy, **({"target_modules": ["q_proj", "v_proj"], "exclude_modules": None} | options))
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        zoo = import_adapters([copy], folder, NAMED).zoo
        stored = json.loads((zoo.folder / "copy/imported/adapter_config.json").read_text())
        assert stored["target_modules"] == [module.path for module in zoo.layout.modules]
        assert not (stored["exclude_modules"] or stored["layers_pattern"])
        torch.testing.assert_close(
            logits(pico_model_folder, zoo.folder / "copy/imported"), logits(pico_model_folder, adapters / "plain")
        )


@pytest.mark.parametrize(
    "name", ["{}", "^model.layers.0.self_attn.{}", r"layers\.0\.self_attn\.{}", r"^model\.layers\.0\.self_attn\.{}$"]
)
def test_patterns_that_are_names_do_what_they_do_in_peft(pico_model_folder: Path, tmp_path: Path, name: str) -> None:
    options = {"rank_pattern": {name.format("q_proj"): 1}, "alpha_pattern": {name.format("v_proj"): 7}}
    train_adapter(pico_model_folder, tmp_path / "own", 0, **options)
    (tmp_path / "own" / "README.md").write_text(CARD)
    zoo = import_adapters([tmp_path / "own"], tmp_path / "zoo", NAMED).zoo
    torch.testing.assert_close(
        logits(pico_model_folder, zoo.folder / "own/imported"), logits(pico_model_folder, tmp_path / "own")
    )


GENERATED = {
    "trl": "# Model Card for out\n\nThis model is a fine-tuned version of [b](https://huggingface.co/b).\nIt has been "
    "trained using [TRL](https://github.com/huggingface/trl).\n\nThis model was trained with SFT.\n",
    "unsloth": "- **License:** mit\n\nThis llama model was trained 2x faster with [Unsloth](https://x) and TRL.\n",
    "trainer": "# out\n\nThis model is a fine-tuned version of [b](https://b) on the None dataset.\nIt achieves the "
    "following results on the evaluation set:\n- Loss: 1.0\n\n## Model description\n\nMore information needed\n\n"
    "### Training hyperparameters\n\nThe following hyperparameters were used during training:\n- seed: 42\n",
    "axolotl": "<details><summary>See axolotl config</summary>\n\naxolotl version: `0.4.1`\n```yaml\na b: c\n```\n\n"
    "</details><br>\n\nThis model was trained from scratch on the a b dataset.\n",
    "dpo": "This model was trained with DPO, a method introduced in [Direct Preference Optimization: Your Language "
    "Model is Secretly a Reward Model](https://huggingface.co/papers/2305.18290).\n",
    "gguf": "This model was finetuned and converted to GGUF format using [Unsloth](https://x).\n",
    "diffusers": "These are me/x LoRA adaption weights for a/b.\n\nThe weights were trained using "
    "[DreamBooth](https://dreambooth.github.io/).\n\nLoRA for the text encoder was enabled: False.\n\n"
    "Special VAE used for training: a/b.\n\nWeights for this model are available in Safetensors format.\n",
}


@pytest.mark.parametrize("kind", GENERATED)
def test_what_trainers_write_is_no_description(kind: str) -> None:
    assert card_description(GENERATED[kind]) is None
    assert card_description(GENERATED[kind] + "\nWrites short poems on birds.\n") == "Writes short poems on birds."


def test_the_card_that_peft_writes_is_no_description(pico_model_folder: Path, tmp_path: Path) -> None:
    train_adapter(pico_model_folder, tmp_path / "own", 0)
    assert card_description((tmp_path / "own" / "README.md").read_text()) is None
    assert "no model card that says what it does" in refusal(tmp_path / "own", tmp_path / "zoo")


@pytest.mark.parametrize(
    "prose",
    [
        "这个适配器用于撰写法律声明和许可条款。",
        "このアダプターは短い詩を書きます。",
        "ตัวแปลงนี้เขียนบทกวีสั้นๆ",
    ],
)
def test_descriptions_are_taken_in_every_script(prose: str) -> None:
    assert card_description(f"\ufeff# 标题\r\n\r\n{prose}\r\n") == prose


@pytest.mark.parametrize(
    "head",
    [
        "license: mit\nn: " + "9" * 30_000,
        "a: " + "[" * 60_000,
        "a: &a [x]\n"
        + "".join(
            f"{two}: &{two} [{','.join([f'*{one}'] * 9)}]\n" for one, two in zip("abcdef", "bcdefg", strict=True)
        ),
        "license: [mit]",
        "!!python/object/apply:os.system [ls]",
        "\0: {",
        "-" * 60_000,
    ],
)
def test_no_card_hangs_or_ends_the_import(copy: Path, tmp_path: Path, head: str) -> None:
    (copy / "README.md").write_text(f"---\n{head}\n---\nWrites short rhymes.\n")
    zoo = import_adapters([copy], tmp_path / "zoo", NAMED).zoo
    assert zoo.descriptions("copy") == ("Writes short rhymes.",)


@pytest.mark.parametrize("card", ["<!--" * 20_000, "\n \n" * 20_000, "---\n" * 20_000, "a" * (1 << 20)])
def test_no_card_is_searched_for_long(card: str) -> None:
    assert card_description(card) is None


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("", None),
        ("# Title\n\n- a list of words\n\n| a | b | c |", None),
        ("---\nlicense: mit\n---\n\n# T\n\n[More Information Needed] for this one", None),
        ("# T\n```\nsome code that runs\n```\nOne two three.\n\nLater words are left.", "One two three."),
        ("Intro: " + "word " * 100, ("Intro: " + "word " * 100)[:300]),
        ("a bell \x07 rings here\n\nThe clean second paragraph.", "The clean second paragraph."),
    ],
)
def test_descriptions_come_from_the_prose_of_a_card(card: str, expected: str | None) -> None:
    assert card_description(card) == expected


def test_one_source_is_no_list_of_letters(copy: Path, tmp_path: Path) -> None:
    for number, source in enumerate((str(copy), copy, AdapterSource(str(copy)))):
        assert len(import_adapters(source, tmp_path / str(number), NAMED).imported) == 1


def test_a_folder_in_another_script_gives_its_task_a_name(copy: Path, tmp_path: Path) -> None:
    shutil.copytree(copy, tmp_path / "猫")
    zoo = import_adapters([tmp_path / "猫"], tmp_path / "zoo", NAMED).zoo
    assert len(zoo.tasks) == 1 and zoo.tasks[0].startswith("category-")


def test_the_card_of_the_last_checkpoint_counts_where_there_is_no_other(copy: Path, tmp_path: Path) -> None:
    shutil.copytree(copy, tmp_path / "run" / "checkpoint-3")
    zoo = import_adapters([tmp_path / "run"], tmp_path / "zoo", NAMED).zoo
    expected = card_description((copy / "README.md").read_text())
    assert zoo.record("run", "imported").descriptions == (expected,)
