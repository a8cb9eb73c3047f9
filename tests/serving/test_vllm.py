"""The resolver in vLLM's own registry, found by its own loader of plugins."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.generators import make_generator
from helpers.models import attach
from transformers import LlamaForCausalLM

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.serving import adapter_cache
from lora_factory.serving.adapter_cache import AdapterCache

pytest.importorskip("vllm")
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.plugins import load_plugins_by_group

from lora_factory.errors import LoraFactoryError
from lora_factory.serving.vllm import FactoryResolver, adapter_id, register

pytestmark = pytest.mark.filterwarnings("ignore:the text .* is far from every task")


@pytest.fixture(scope="module")
def generator_folder(
    pico_model_folder: Path, pico_encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    layout = attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]
    layout = AdapterLayout.from_dict({**layout.to_dict(), "base_model": str(pico_model_folder)})
    folder = tmp_path_factory.mktemp("generator") / "generator"
    make_generator(layout, pico_encoder_folder).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    LoRAResolverRegistry.resolvers.clear()
    yield
    LoRAResolverRegistry.resolvers.clear()


@pytest.fixture
def resolver(generator_folder: Path, tmp_path: Path) -> FactoryResolver:
    return FactoryResolver(AdapterCache(str(generator_folder), parent=tmp_path))


def resolve(resolver: FactoryResolver, base: Path | str, *names: str) -> list[LoRARequest | None]:
    async def all_at_once() -> list[LoRARequest | None]:
        return await asyncio.gather(*(resolver.resolve_lora(str(base), name) for name in names))

    return asyncio.run(all_at_once())


def test_vllm_finds_the_plugin_and_its_resolver_generates(
    generator_folder: Path, pico_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_FACTORY_GENERATOR", str(generator_folder))
    load_plugins_by_group("vllm.general_plugins")["lora_factory"]()
    assert list(LoRAResolverRegistry.get_supported_resolvers()) == ["lora-factory"]
    resolver = LoRAResolverRegistry.get_resolver("lora-factory")
    (request,) = resolve(resolver, pico_model_folder, "factory:Legal notices")
    assert isinstance(request, LoRARequest)
    assert request.lora_name == "factory:Legal notices" and request.base_model_name == str(pico_model_folder)
    assert Path(request.lora_path, "adapter_model.safetensors").is_file()


def test_without_a_generator_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_FACTORY_GENERATOR", raising=False)
    register()
    assert not LoRAResolverRegistry.get_supported_resolvers()
    monkeypatch.setenv("LORA_FACTORY_GENERATOR", "generator")
    monkeypatch.setenv("LORA_FACTORY_ADAPTERS_MB", "much")
    with pytest.raises(LoraFactoryError, match=r"LORA_FACTORY_ADAPTERS_MB='much'; expected a whole number"):
        register()


def test_requests_at_once_generate_each_name_once(
    resolver: FactoryResolver, pico_model_folder: Path, generated: list[str]
) -> None:
    names = [f"factory:text {number % 4}" for number in range(64)]
    requests = resolve(resolver, pico_model_folder, *names)
    assert [request.lora_name for request in requests if request] == names
    assert sorted(generated) == [f"text {number}" for number in range(4)]
    assert len({request.lora_path for request in requests if request}) == 4
    assert {(request.lora_name, request.lora_int_id) for request in requests if request} == {
        (name, adapter_id(name)) for name in names
    }


def test_ids_are_stable_and_fit_in_what_vllm_keeps_them_in() -> None:
    assert adapter_id("factory:Legal notices") == 1759908406  # of sha256sum's first 16 digits
    ids = [adapter_id(f"factory:{number}") for number in range(5000)]
    assert all(0 < one < 2**31 for one in ids) and len(set(ids)) > 4990


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Legal notices",
        "factory",
        "Factory:x",
        "factory:",
        "factory: ",
        "factory:a\0b",
        "factory:\ud800",
        "factory:" + "x" * 10_000_000,
    ],
    ids=["empty", "no prefix", "no colon", "case", "no text", "blank", "NUL", "surrogate", "10 MB"],
)
def test_other_names_are_none(
    resolver: FactoryResolver, pico_model_folder: Path, generated: list[str], name: str
) -> None:
    assert resolve(resolver, pico_model_folder, name) == [None]
    assert not generated


def test_attacking_names_stay_in_the_cache(resolver: FactoryResolver, pico_model_folder: Path, tmp_path: Path) -> None:
    names = ["factory:../../etc/passwd", "factory:/etc/passwd", "factory:日本語 🦜\u202e", "factory:a\n\x1b[31mb"]
    for request in resolve(resolver, pico_model_folder, *names):
        assert request is not None and Path(request.lora_path).parent.parent == tmp_path
        assert request.lora_path.isascii()


def test_another_base_or_no_generator_is_none_with_a_line_in_the_log(
    resolver: FactoryResolver,
    pico_model_folder: Path,
    tmp_path: Path,
    generated: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert resolve(resolver, "meta-llama/Llama-3.2-1B", "factory:Legal notices") == [None]
    assert "vLLM serves 'meta-llama/Llama-3.2-1B', the generator is for" in caplog.text
    missing = FactoryResolver(AdapterCache("no/generator", parent=tmp_path))
    assert resolve(missing, pico_model_folder, "factory:Legal notices") == [None]
    assert "cannot load a generator from 'no/generator'" in caplog.text
    assert not generated


def test_a_folder_stays_while_vllm_holds_its_request(
    generator_folder: Path, pico_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_cache, "MAX_ADAPTERS", 2)
    resolver = FactoryResolver(AdapterCache(str(generator_folder), parent=tmp_path))
    held = {name: resolve(resolver, pico_model_folder, name)[0] for name in ("factory:one", "factory:two")}
    paths = {name: Path(request.lora_path) for name, request in held.items() if request}
    assert resolve(resolver, pico_model_folder, "factory:three") == [None]
    assert all(path.is_dir() for path in paths.values())
    del held["factory:one"]  # as POST /v1/unload_lora_adapter does
    gc.collect()
    (request,) = resolve(resolver, pico_model_folder, "factory:three")
    assert request is not None
    assert not paths["factory:one"].exists() and paths["factory:two"].is_dir()


def test_a_request_crosses_to_the_engine(resolver: FactoryResolver, pico_model_folder: Path) -> None:
    import msgspec

    (request,) = resolve(resolver, pico_model_folder, "factory:one")
    there = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=LoRARequest)
    assert request is not None
    assert (there.lora_name, there.lora_int_id, there.lora_path) == (
        request.lora_name,
        request.lora_int_id,
        request.lora_path,
    )
