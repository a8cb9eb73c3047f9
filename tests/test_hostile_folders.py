"""Damaged and hostile folders of generators and adapters are refused, or loaded as they were, to the bit."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.generators import make_generator
from helpers.models import attach
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lora_factory.adapters.attach import attach_adapter
from lora_factory.adapters.folder import load_adapter
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.modeling import CVAELoRAGenerator

Damage = Callable[[Path], None]
EXAMPLES = 150  # of each kind of folder
# Values of every type, among them what YAML, HTML, paths and regular expressions make mischief of.
NASTY = st.sampled_from(
    [
        *[None, True, -1, 0, 2**31, 10**30, 1e308, "", "x", [], [1], {}, {"a": {}}, [[]] * 3],
        *["../../outside", "/etc/passwd", "~/.ssh", "..", "a/../../b", "open_clip:local-dir:/etc", "\0", "\ud800"],
        *["---\nlicense: mit\n---", "<script>alert(1)</script>", "{{ 7 * 7 }}", "!!python/object/apply:os.system"],
        *["(a+)+$", ".*" * 30, {"(.*)*x": 3}, {"(": 3}, "9" * 5000, "x" * 100_000],
    ]
)
LORA_OPTIONS = ("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_dora", "bias")
LORA_OPTIONS += ("modules_to_save", "megatron_config", "layer_replication", "init_lora_weights", "exclude_modules")
ATTACKS: dict[str, Any] = {
    "auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil--evil.Config"},
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "attn_implementation": "evil/kernel",
    "_attn_implementation": "evil/kernel",
    "dtype": "__import__",
    "architectures": ["os.system"],
    "_name_or_path": "/etc",
}


def edit_json(name: str, path: list[str | int], value: Any) -> Damage:
    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        place = values
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        (folder / name).write_text(json.dumps(values))

    return damage


def edit_bytes(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: void((folder / name).write_bytes(change((folder / name).read_bytes())))


def edit_tensors(name: str, change: Callable[[dict[str, torch.Tensor], str], None], index: int) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors, sorted(tensors)[index % len(tensors)])
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})

    return damage


def replace_file(name: str, make: Callable[[Path], None]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def void(_: object) -> None:
    """Drop a value."""


def rewrite_header(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[bytes], bytes]:
    def rewrite(content: bytes) -> bytes:
        (size,) = struct.unpack("<Q", content[:8])
        header = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
        return struct.pack("<Q", len(header)) + header + content[8 + size :]

    return rewrite


def rename(new: str) -> Callable[[dict[str, torch.Tensor], str], None]:
    return lambda tensors, key: tensors.update({new.format(key): tensors.pop(key)})


def put(value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor], str], None]:
    return lambda tensors, key: tensors.update({key: value(tensors[key])})


TENSOR_CHANGES = [
    *[rename(new) for new in ("../../{}", "/tmp/{}", "{}.more", "{}\n", "")],
    lambda tensors, key: void(tensors.pop(key)),
    lambda tensors, key: tensors.update({"more": torch.ones(2)}),
    put(lambda tensor: tensor.to(torch.int32)),
    put(lambda tensor: tensor.double()),
    put(lambda tensor: tensor.to(torch.float8_e4m3fn)),
    put(lambda tensor: tensor.to(torch.bool)),
    put(lambda tensor: tensor[None]),
    put(lambda tensor: tensor.flatten()[:-1] if tensor.numel() > 1 else tensor.repeat(3)),
    put(lambda tensor: torch.empty(0)),
    put(lambda tensor: tensor * torch.nan),
    put(lambda tensor: tensor + torch.inf),
]


def weights_damages(name: str) -> st.SearchStrategy[Damage]:
    headers = [
        lambda header: dict(reversed(header.items())),  # harmless: the same tensors in another order
        lambda header: {key: {**value, "data_offsets": [0, 4]} for key, value in header.items()},
        lambda header: {key: {**value, "shape": [2**40]} for key, value in header.items()},
        lambda header: {**header, "__metadata__": {"format": "pickle"}},
    ]
    lengths = st.sampled_from([0, 1, 2**20, 2**27, 2**40, 2**63 - 1, 2**64 - 1])
    return st.one_of(
        st.integers(0, 5000).map(lambda n: edit_bytes(name, lambda content: content[: n % len(content)])),
        lengths.map(lambda n: edit_bytes(name, lambda content: struct.pack("<Q", n) + content[8:])),
        st.tuples(st.integers(8, 400), st.integers(0, 255)).map(
            lambda at: edit_bytes(name, lambda content: content[: at[0]] + bytes([at[1]]) + content[at[0] + 1 :])
        ),
        st.sampled_from(headers).map(lambda change: edit_bytes(name, rewrite_header(change))),
        st.tuples(st.sampled_from(TENSOR_CHANGES), st.integers(0, 99)).map(lambda it: edit_tensors(name, *it)),
    )


def file_damages(names: list[str]) -> st.SearchStrategy[Damage]:
    makers = [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("/etc/passwd"),
        lambda path: path.symlink_to(path.parent.parent / "outside" / path.name),
        lambda path: path.symlink_to(path.name),
        lambda path: os.mkfifo(path),
        lambda path: void(path.write_bytes(b"")),
        lambda path: void(path.write_bytes(b"\x80\x04\x95 a pickle")),
        lambda path: void(path.write_text("[" * 200_000)),
        lambda path: void(path.write_text('{"format_version": 1')),
    ]
    return st.tuples(st.sampled_from(names), st.sampled_from(makers)).map(lambda it: replace_file(*it))


MODULE: list[str | int] = ["layout", "modules", 0]
CONFIG_PATHS = [
    *[[name] for name in ("model_type", "format_version", "layout", "modalities", "text_encoder", "tasks", "decoder")],
    *[[name] for name in ("width", "depth", "latent_size", "channels", "kl_weight", "zoo_fingerprint", "auto_map")],
    *[["tasks", 0, name] for name in ("name", "descriptions", "license")],
    *[["modalities", name] for name in ("text", "../x", "a.b")],
    *[["layout", name] for name in ("format_version", "base_model", "base_revision", "modules", "lora_config")],
    *[[*MODULE, name] for name in ("path", "key_a", "key_b", "shape_a", "shape_b", "scaling")],
    *[["layout", "lora_config", name] for name in LORA_OPTIONS],
]
GENERATOR_DAMAGES = st.one_of(
    weights_damages("model.safetensors"),
    file_damages(["config.json", "model.safetensors"]),
    st.tuples(st.sampled_from(CONFIG_PATHS), NASTY).map(lambda it: edit_json("config.json", *it)),
    st.sampled_from(sorted(ATTACKS)).map(lambda name: edit_json("config.json", [name], ATTACKS[name])),
    st.just(lambda folder: void((folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}'))),
)
ADAPTER_DAMAGES = st.one_of(
    weights_damages("adapter_model.safetensors"),
    file_damages(["adapter_config.json", "adapter_model.safetensors"]),
    st.tuples(st.sampled_from([[name] for name in (*LORA_OPTIONS, "base_model_name_or_path")]), NASTY).map(
        lambda it: edit_json("adapter_config.json", *it)
    ),
)


@pytest.fixture(scope="module")
def folders(
    pico_model_folder: Path, pico_encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Path]]:
    """A whole generator and a whole adapter, with a copy of them outside of the folders that are damaged."""
    root = tmp_path_factory.mktemp("hostile")
    layout = attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]
    generator = make_generator(layout, pico_encoder_folder, "core")
    generator.save_pretrained(root / "generator")
    generator.save_adapter("Poems", root / "adapter")
    shutil.copytree(root / "generator", root / "outside")
    shutil.copytree(root / "adapter", root / "outside", dirs_exist_ok=True)
    before = listing(root)
    yield {"root": root, "base": pico_model_folder}
    assert listing(root) == before, "something outside of the damaged folders was written or removed"


def listing(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def damaged(folders: dict[str, Path], kind: str, damage: Damage) -> Path:
    """A fresh copy of a whole folder, with the damage done."""
    copy = folders["root"] / "damaged"
    shutil.copytree(folders["root"] / kind, copy)
    damage(copy)
    return copy


relaxed = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@relaxed
@given(damage=GENERATOR_DAMAGES)
@example(damage=edit_json("config.json", ["depth"], 10**9))
@example(damage=edit_json("config.json", [*MODULE, "shape_a"], [10**9, 32]))
def test_generators(folders: dict[str, Path], damage: Damage) -> None:
    copy = damaged(folders, "generator", damage)
    before = listing(copy)
    try:
        generator = CVAELoRAGenerator.from_pretrained(copy)
        config = json.loads((folders["root"] / "generator" / "config.json").read_text())
        assert generator.layout.modules == AdapterLayout.from_dict(config["layout"]).modules
        state = generator.state_dict()
        expected = load_file(folders["root"] / "generator" / "model.safetensors")
        assert all(torch.equal(state[name], expected[name]) for name in expected.keys() | state.keys())
        assert generator.config._attn_implementation != "evil/kernel"
    except LoraFactoryError as error:
        assert len(str(error)) < 3000
    finally:
        assert listing(copy) == before
        shutil.rmtree(copy)


@relaxed
@given(damage=ADAPTER_DAMAGES)
def test_adapters(folders: dict[str, Path], damage: Damage) -> None:
    copy = damaged(folders, "adapter", damage)
    before = listing(copy)
    try:
        layout, state_dict = load_adapter(copy)
        attach_adapter(LlamaForCausalLM.from_pretrained(folders["base"]), layout, state_dict)
        expected, weights = load_adapter(folders["root"] / "adapter")
        assert [module.path for module in layout.modules] == [module.path for module in expected.modules]
        assert all(torch.equal(state_dict[name], weights[name]) for name in weights.keys() | state_dict.keys())
    except LoraFactoryError as error:
        assert len(str(error)) < 3000
    finally:
        assert listing(copy) == before
        shutil.rmtree(copy)
