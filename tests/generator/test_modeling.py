"""The generator as a Transformers model: saving, loading, generating, attaching, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.conditions import normal
from helpers.generators import make_generator
from helpers.models import attach, random_adapter
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.errors import LoraFactoryError, StorageError
from lora_factory.generator import generation
from lora_factory.generator.configuration import CVAELoRAConfig
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.generator.writer import AdapterWriter
from lora_factory.models.hidden_states import example_states
from lora_factory.models.loading import load_base_model
from lora_factory.models.losses import FrozenBase
from lora_factory.tasks.given import as_examples

TEXT = "Continue a rhymed poem."
TOKENS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module")
def layout(pico_model_folder: Path) -> AdapterLayout:
    return attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]


@pytest.fixture(scope="module", params=["core", "conv1d"])
def generator(request: pytest.FixtureRequest, layout: AdapterLayout, pico_encoder_folder: Path) -> CVAELoRAGenerator:
    return make_generator(layout, pico_encoder_folder, request.param)


@pytest.fixture(scope="module")
def core_generator(layout: AdapterLayout, pico_encoder_folder: Path) -> CVAELoRAGenerator:
    return make_generator(layout, pico_encoder_folder, "core")


@pytest.fixture
def folder(core_generator: CVAELoRAGenerator, tmp_path: Path) -> Path:
    core_generator.save_pretrained(tmp_path / "generator")
    return tmp_path / "generator"


def weights(generator: CVAELoRAGenerator, text: str = TEXT, **options: float) -> torch.Tensor:
    return generator.layout.flatten(generator.generate_state_dict(text, **options))


def same_state(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_forward_and_backward(generator: CVAELoRAGenerator, layout: AdapterLayout) -> None:
    adapters = torch.stack([random_adapter(layout, seed) for seed in range(4)])
    both = {"text": torch.randn(4, 32), "hidden": torch.randn(4, 64)}
    generator.train()
    try:
        outputs = [
            generator(adapters, {name: both[name] for name in names}, generator=torch.Generator().manual_seed(0))
            for names in (["text", "hidden"], ["text"], ["hidden"])
        ]
        sum(output.loss for output in outputs).backward()
    finally:
        generator.eval()
    for output in outputs:
        assert output.loss.isfinite() and output.reconstruction > 0 and output.kl > 0
        assert 0 <= output.active_latents <= 8
    gradients = {name: parameter.grad for name, parameter in generator.named_parameters()}
    assert gradients.pop("basis.factors", None) is None, "adapters are only projected on the basis"
    assert gradients.pop("center") is None, "the center is trained through the base alone"
    assert gradients and all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    generator.zero_grad()


@pytest.mark.parametrize("loader", [CVAELoRAGenerator, AutoModel], ids=["class", "auto"])
def test_round_trip_is_exact(
    generator: CVAELoRAGenerator, tmp_path: Path, loader: type[CVAELoRAGenerator] | type[AutoModel]
) -> None:
    generator.save_pretrained(tmp_path / "generator")
    loaded = loader.from_pretrained(tmp_path / "generator")
    assert type(loaded) is CVAELoRAGenerator
    assert not loaded.training
    assert same_state(loaded, generator)
    assert loaded.layout == generator.layout
    options = {"temperature": 0.7, "seed": 3}
    again = loader.from_pretrained(tmp_path / "generator")
    assert torch.equal(weights(loaded, **options), weights(again, **options))
    # Weights in a memory-mapped file are aligned otherwise, which may change the order of a sum.
    torch.testing.assert_close(weights(loaded, **options), weights(generator, **options), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [1_000, 20_000], ids=["in the config", "in the weights"])
def test_a_full_disk_leaves_the_generator_that_is_saved_over(
    folder: Path, core_generator: CVAELoRAGenerator, tmp_path: Path, limit: int
) -> None:
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # as a full disk
    try:
        for place in (folder, tmp_path / "new"):
            with pytest.raises(StorageError, match="cannot write"):
                core_generator.save_pretrained(place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for place in (folder, tmp_path / "new"):
        core_generator.save_pretrained(place)
        assert same_state(CVAELoRAGenerator.from_pretrained(place), core_generator)
    assert (folder / "notes.txt").read_text() == "mine"


def test_what_a_save_does_not_write_again_goes_only_where_it_is_old_weights(
    folder: Path, core_generator: CVAELoRAGenerator
) -> None:
    (folder / "notes.txt").write_text("mine")
    kept = {"config.json", "notes.txt"}
    core_generator.save_pretrained(folder, variant="fp16")
    assert {path.name for path in folder.iterdir()} == {*kept, "model.safetensors", "model.fp16.safetensors"}
    (folder / "model.fp16.safetensors").unlink()
    state = {
        name: value + 1 if value.is_floating_point() else value for name, value in core_generator.state_dict().items()
    }
    core_generator.save_pretrained(folder, state_dict=dict(state), max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {*index["weight_map"].values()}
    assert len(shards) > 1 and {path.name for path in folder.iterdir()} == {
        *kept,
        *shards,
        "model.safetensors.index.json",
    }
    saved = {name: value for shard in shards for name, value in load_file(folder / shard).items()}
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)
    core_generator.save_pretrained(folder, is_main_process=False)
    assert {path.name for path in folder.iterdir()} == {*kept, *shards, "model.safetensors.index.json"}
    core_generator.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {*kept, "model.safetensors"}
    assert same_state(CVAELoRAGenerator.from_pretrained(folder), core_generator)


def test_config_round_trip(generator: CVAELoRAGenerator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path / "generator")
    config = AutoConfig.from_pretrained(tmp_path / "generator")
    assert type(config) is CVAELoRAConfig
    for name in ("layout", "modalities", "directions", "tasks", "decoder", "width", "latent_size", "format_version"):
        assert getattr(config, name) == getattr(generator.config, name)
    assert list(config.channels) == [3, 4]


@pytest.mark.parametrize("version", [3, 4])
def test_a_few_examples_were_taken_for_the_task_up_to_format_3(
    layout: AdapterLayout, pico_encoder_folder: Path, pico_model_folder: Path, tmp_path: Path, version: int
) -> None:
    width = 96 + 24 * 24
    values = {**make_generator(layout, pico_encoder_folder, hidden=width).config.to_dict(), "format_version": version}
    generator = CVAELoRAGenerator(CVAELoRAConfig.from_dict({**values, "directions": {"hidden": 2}})).eval()
    hidden = {name: normal(1, width, seed=seed) + normal(9, width, seed=9) for seed, name in enumerate("abc")}
    generator.fit_conditions({"text": {name: normal(2, 32) for name in "abc"}, "hidden": hidden})
    generator.save_pretrained(tmp_path / "saved")
    loaded = CVAELoRAGenerator.from_pretrained(tmp_path / "saved")
    state = loaded.standardiser.state_dict()
    assert ("hidden_noise" in state) == ("text_filter" in state) == (version == 4)
    states = example_states(FrozenBase(*load_base_model(pico_model_folder), layout), as_examples(["A text.", "More."]))
    condition = loaded.encode_examples(["A text.", "More."], pico_model_folder)["hidden"]
    assert torch.equal(condition, states.mean(0)) == (version == 3)
    assert torch.equal(condition, generator.task_vector("hidden", states))


def test_a_generator_of_format_2_writes_what_it_wrote(
    layout: AdapterLayout, pico_encoder_folder: Path, pico_model_folder: Path, tmp_path: Path
) -> None:
    new = make_generator(layout, pico_encoder_folder, hidden=96).config  # 96: without the memory of examples
    values = {**new.to_dict(), "format_version": 2}
    del values["directions"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = CVAELoRAGenerator(CVAELoRAConfig.from_dict(values))
        for parameter in generator.parameters():
            parameter.data.normal_(std=0.1)
    shapes = {name: tuple(value.shape) for name, value in generator.standardiser.state_dict().items()}
    assert shapes["text_basis"] == (32, 32) and shapes["hidden_basis"] == (96, 96)
    generator.eval().save_pretrained(tmp_path / "old")
    assert json.loads((tmp_path / "old" / "config.json").read_text())["format_version"] == 2
    loaded = CVAELoRAGenerator.from_pretrained(tmp_path / "old")
    assert torch.equal(weights(loaded), weights(CVAELoRAGenerator.from_pretrained(tmp_path / "old")))
    torch.testing.assert_close(weights(loaded), weights(generator), rtol=1e-4, atol=1e-6)
    condition = loaded.encode_examples(["An old text.", "Another."], pico_model_folder)
    assert condition["hidden"].shape == (96,)
    assert all(value.isfinite().all() for value in loaded.generate_state_dict(conditions=condition).values())


def test_task_vectors_that_are_not_finite_are_refused(layout: AdapterLayout, pico_encoder_folder: Path) -> None:
    generator = make_generator(layout, pico_encoder_folder)
    rows = {"poems": torch.ones(2, 64), "code": torch.tensor([[1.0] * 63 + [torch.inf]])}
    with pytest.raises(LoraFactoryError, match="task 'code': its vectors of examples hold NaN or infinite"):
        generator.fit_conditions({"hidden": rows})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_precision_comes_back(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    saved = CVAELoRAGenerator.from_pretrained(folder, dtype=dtype)
    saved.save_pretrained(tmp_path / "generator")
    loaded = CVAELoRAGenerator.from_pretrained(tmp_path / "generator")
    assert loaded.center.dtype == dtype and same_state(loaded, saved)


def test_half_precision_generates_too(folder: Path, core_generator: CVAELoRAGenerator) -> None:
    half = CVAELoRAGenerator.from_pretrained(folder, dtype=torch.bfloat16)
    expected = weights(core_generator)
    assert (weights(half) - expected).norm() < 0.05 * expected.norm()


def written(generator: CVAELoRAGenerator, base: Path, folder: Path) -> dict[str, Any]:
    """All that a generator makes, by the call that makes it."""
    drawn, mixed = {"temperature": 1.0, "seed": 3}, {TEXT: 0.7, "Python source code": 0.3}
    saved = [generator.save_adapter(TEXT, folder / "one", **drawn)]
    saved += generator.save_adapters({"a": TEXT, "b": "Python source code"}, folder / "many", rank=1)
    return {
        "generate_state_dict": generator.generate_state_dict(mixed, **drawn),
        "numbers": generator.generate_state_dict(conditions={"text": [0.1 + number / 300 for number in range(32)]}),
        "generate_adapters": [*generator.generate_adapters([TEXT, "Python source code"], **drawn)],
        "generate_adapter": get_peft_model_state_dict(generator.generate_adapter(TEXT, base, rank=2)),
        "explain": generator.explain(TEXT),
        "files": {path.relative_to(folder): path.read_bytes() for one in saved for path in one.iterdir()},
    }


@pytest.mark.parametrize("how", [torch.bfloat16, torch.float16, torch.float64, "autocast"], ids=str)
def test_the_precision_of_the_caller_changes_nothing(
    generator: CVAELoRAGenerator, pico_model_folder: Path, tmp_path: Path, how: torch.dtype | str
) -> None:
    expected = written(generator, pico_model_folder, tmp_path / "plain")
    if isinstance(how, str):
        with torch.autocast("cpu", torch.bfloat16):
            made = written(generator, pico_model_folder, tmp_path / "other")
            assert torch.is_autocast_enabled("cpu")
    else:
        torch.set_default_dtype(how)
        try:
            made = written(generator, pico_model_folder, tmp_path / "other")
            assert torch.get_default_dtype() == how
        finally:
            torch.set_default_dtype(torch.float32)
    assert made.pop("files") == expected.pop("files")
    assert made.pop("explain") == expected.pop("explain")
    torch.testing.assert_close(made, expected, rtol=0, atol=0)


def test_temperature_zero_needs_no_seed(generator: CVAELoRAGenerator) -> None:
    assert torch.equal(weights(generator, seed=0), weights(generator, seed=1))
    assert not torch.equal(weights(generator), weights(generator, "Python source code"))


def test_samples_depend_on_the_seed_alone(generator: CVAELoRAGenerator) -> None:
    torch.rand(5)
    first = weights(generator, temperature=1.0, seed=1)
    state = torch.random.get_rng_state()
    assert torch.equal(weights(generator, temperature=1.0, seed=1), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(weights(generator, temperature=1.0, seed=2), first)
    center = weights(generator)
    near = weights(generator, temperature=0.01, seed=1)
    assert 0 < (near - center).norm() < 0.1 * (first - center).norm()


def test_generating_leaves_the_mode_as_it_was(layout: AdapterLayout, pico_encoder_folder: Path) -> None:
    generator = make_generator(layout, pico_encoder_folder, "conv1d").train()
    before = {name: buffer.clone() for name, buffer in generator.named_buffers()}
    trained = weights(generator)
    assert generator.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in generator.named_buffers())
    assert torch.equal(weights(generator.eval()), trained)


def test_samples_vary_as_prior_and_spread_say(core_generator: CVAELoRAGenerator) -> None:
    generator, vectors = copy.deepcopy(core_generator), {"text": core_generator.text_encoder.encode([TEXT])}
    with torch.no_grad():
        generator.spread.copy_(torch.linspace(0.1, 0.5, len(generator.spread)))
        cold = generator.made(vectors, 1)
        drawn = torch.cat([generator.made(vectors, 1, seed=seed, temperature=0.5) for seed in range(400)]) - cold
        decoder, variance = generator.network.decoder, generator.network.prior_log_variance.exp()
        expected = (variance[:, None] * decoder.square()).sum(0) + generator.spread_over(generator.spread).square()
    ratio = drawn.square().mean(0) / (0.25 * expected)
    assert 0.9 < float(ratio.mean()) < 1.1 and 0.6 < float(ratio.min()) and float(ratio.max()) < 1.5


def test_task_vectors_stand_in_for_the_text(generator: CVAELoRAGenerator) -> None:
    vector = generator.text_encoder.encode([TEXT])[0]
    by_vector = generator.layout.flatten(generator.generate_state_dict(conditions={"text": vector}))
    assert torch.equal(by_vector, weights(generator))
    hidden = generator.layout.flatten(generator.generate_state_dict(conditions={"hidden": torch.ones(64)}))
    both = generator.layout.flatten(generator.generate_state_dict(TEXT, conditions={"hidden": torch.ones(64)}))
    assert not torch.allclose(hidden, by_vector) and not torch.allclose(both, by_vector)


@pytest.mark.parametrize(
    ("text", "conditions", "message"),
    [
        ("", None, "empty"),
        ("  \n", None, "empty"),
        (None, None, "pass a text"),
        (None, {"text": torch.zeros(31)}, r"'text' has shape \(31,\)"),
        (None, {"picture": torch.zeros(32)}, "'picture' has shape"),
        (None, {"hidden": torch.zeros(32)}, r"'hidden' \(of examples\) has shape \(32,\); this generator takes "),
    ],
)
def test_wrong_conditions_are_refused(
    core_generator: CVAELoRAGenerator,
    tmp_path: Path,
    text: str | None,
    conditions: dict[str, torch.Tensor] | None,
    message: str,
) -> None:
    with pytest.raises(LoraFactoryError, match=message):
        core_generator.generate_state_dict(text, conditions=conditions)
    with pytest.raises(LoraFactoryError, match=message):
        core_generator.save_adapter(text, tmp_path / "adapter", conditions=conditions)
    assert list(tmp_path.iterdir()) == []


def test_generate_adapter_attaches_to_a_model(core_generator: CVAELoRAGenerator, pico_model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        base = pico_model(TOKENS).logits
        model = core_generator.generate_adapter(TEXT, pico_model.train())
        assert isinstance(model, PeftModel)
        assert not any(module.training for module in model.modules())
        written = core_generator.layout.flatten(get_peft_model_state_dict(model))
        assert torch.equal(written, weights(core_generator))
        assert not torch.allclose(model(TOKENS).logits, base, atol=1e-2)
        with model.disable_adapter():
            assert torch.equal(model(TOKENS).logits, base)


def test_generate_adapter_loads_a_folder(
    core_generator: CVAELoRAGenerator, pico_model_folder: Path, pico_model: LlamaForCausalLM
) -> None:
    model = core_generator.generate_adapter(TEXT, pico_model_folder, seed=3, temperature=0.5)
    expected = core_generator.generate_adapter(TEXT, pico_model, seed=3, temperature=0.5)
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


def test_generate_adapter_takes_the_base_that_the_layout_names(
    layout: AdapterLayout, pico_model_folder: Path, pico_encoder_folder: Path
) -> None:
    here = AdapterLayout.from_dict({**layout.to_dict(), "base_model": str(pico_model_folder)})
    generator = make_generator(here, pico_encoder_folder, "core")
    model = generator.generate_adapter(TEXT)
    assert torch.equal(layout.flatten(get_peft_model_state_dict(model)), weights(generator))


@torch.no_grad()
def test_generate_adapter_adds_a_second_one(core_generator: CVAELoRAGenerator, pico_model: LlamaForCausalLM) -> None:
    model = core_generator.generate_adapter(TEXT, pico_model)
    first = model(TOKENS).logits
    second = core_generator.generate_adapter("Python source code", model, adapter_name="code")
    assert second is model
    assert set(model.peft_config) == {"default", "code"}
    assert model.active_adapters == ["code"]
    assert not torch.allclose(model(TOKENS).logits, first)
    model.set_adapter("default")
    assert torch.equal(model(TOKENS).logits, first)
    core_generator.generate_adapter("Python source code", model)  # overwrites the slot of its name
    changed = model(TOKENS).logits
    model.set_adapter("code")
    assert torch.equal(model(TOKENS).logits, changed)


def test_base_model_of_another_size_is_one_clear_error(
    core_generator: CVAELoRAGenerator, layout: AdapterLayout
) -> None:
    sizes = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    wide = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, **sizes))
    with pytest.raises(LoraFactoryError, match=r"q_proj.*shape \(64, 64\).*pass base_model='pico/llama'"):
        core_generator.generate_adapter(TEXT, wide)
    shallow = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=1, **sizes))
    with pytest.raises(LoraFactoryError, match=r"no module 'model.layers.1\S+'.*pass base_model='pico/llama'"):
        core_generator.generate_adapter(TEXT, shallow)
    for model in (wide, shallow):
        assert not any("lora" in name for name, _ in model.named_modules())


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def drop_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["network.prior_mean.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "network.more": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["center"] = tensors["center"][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def poison_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["basis.factors"][0] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")

    return edit


def cut_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "cvae_lora", "lay', encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "download it, or train it with lora-factory train or train_generator, again$"),
        (drop_weight, "network.prior_mean.weight; download it, or train it .*, again$"),
        (add_weight, "network.more"),
        (cut_weight, "center"),
        (poison_weight, "basis.factors.*NaN"),
        (remove_weights, "model.safetensors"),
        (cut_config, "config"),
        (edit_config(layout=None), "needs layout and modalities"),
        (edit_config(decoder="transformer"), "choose 'core' or 'conv1d'"),
        (edit_config(width=0), "must be at least 1"),
        (edit_config(width="wide"), "cannot load a generator"),
        (edit_config(format_version=1), "has format 1.*train it again, with lora-factory train or train_generator$"),
        (edit_config(format_version=5), "format_version=5.*pip install --upgrade lora-factory$"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damaged_generators_are_refused(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(LoraFactoryError, match=rf"(?s){message}"):
        CVAELoRAGenerator.from_pretrained(folder)


def test_what_is_no_generator_is_refused(pico_model_folder: Path, tmp_path: Path) -> None:
    for source in (pico_model_folder, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(LoraFactoryError):
            CVAELoRAGenerator.from_pretrained(source)
    with pytest.raises(LoraFactoryError, match="needs layout and modalities"):
        CVAELoRAGenerator(CVAELoRAConfig())


@pytest.mark.parametrize("load", [CVAELoRAGenerator.from_pretrained, AdapterWriter.open])
def test_what_is_something_else_is_not_to_be_downloaded_again(load: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "zoo.json").write_text("{}")
    with pytest.raises(LoraFactoryError, match=r"is a zoo, not a generator; .*, or train_generator$"):
        load(tmp_path)
    with pytest.raises(LoraFactoryError, match=r"is a file; name the generator's folder$"):
        load(tmp_path / "zoo.json")
    with pytest.raises(LoraFactoryError, match=r"neither a folder nor a Hub id; write user/name$"):
        load(tmp_path / "not" / "there")


PLAIN_PEFT = """
import json, sys
sys.modules["lora_factory"] = None  # any import of it fails
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    print(json.dumps(model(torch.arange(3, 19)[None]).logits.tolist()))
"""


def test_saved_adapter_serves_plain_peft(
    core_generator: CVAELoRAGenerator, pico_model: LlamaForCausalLM, pico_model_folder: Path, tmp_path: Path
) -> None:
    folder = core_generator.save_adapter(TEXT, tmp_path / "adapter", temperature=1.0, seed=5)
    generation = json.loads((folder / "generation.json").read_text(encoding="utf-8"))
    assert (generation["text"], generation["seed"], generation["temperature"]) == (TEXT, 5, 1.0)
    assert generation["base_model"] == "pico/llama"
    assert [entry["similarity"] for entry in generation["nearest_tasks"]] == sorted(
        (entry["similarity"] for entry in generation["nearest_tasks"]), reverse=True
    )
    with torch.no_grad():
        expected = core_generator.generate_adapter(TEXT, pico_model, temperature=1.0, seed=5)(TOKENS).logits
    words = [sys.executable, "-c", PLAIN_PEFT, str(pico_model_folder), str(folder)]
    process = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
    torch.testing.assert_close(torch.tensor(json.loads(process.stdout)), expected, rtol=0, atol=1e-6)


def test_a_generator_without_tasks_saves_adapters(
    layout: AdapterLayout, pico_encoder_folder: Path, tmp_path: Path
) -> None:
    generator = CVAELoRAGenerator(
        CVAELoRAConfig(
            layout=layout.to_dict(), modalities={"text": 32}, text_encoder=str(pico_encoder_folder), width=8
        )
    )
    folder = generator.eval().save_adapter(TEXT, tmp_path / "adapter")
    assert json.loads((folder / "generation.json").read_text(encoding="utf-8"))["nearest_tasks"] == []


def test_a_failing_save_leaves_nothing(
    core_generator: CVAELoRAGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    kept = core_generator.save_adapter(TEXT, tmp_path / "kept")
    before = {file.name: file.read_bytes() for file in kept.iterdir()}
    monkeypatch.setattr(generation, "save_adapter_weights", full)
    for name, overwrite in (("new", False), ("kept", True)):
        with pytest.raises(StorageError, match="no space left"):
            core_generator.save_adapter("Other text", tmp_path / name, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == before


def test_an_existing_folder_is_replaced_on_request_alone(core_generator: CVAELoRAGenerator, tmp_path: Path) -> None:
    folder = core_generator.save_adapter(TEXT, tmp_path / "adapter")
    before = load_file(folder / "adapter_model.safetensors")
    with pytest.raises(LoraFactoryError, match="already there"):
        core_generator.save_adapter("Other text", folder)
    assert torch.equal(core_generator.layout.flatten(before), weights(core_generator))
    core_generator.save_adapter("Other text", folder, overwrite=True)
    after = core_generator.layout.flatten(load_file(folder / "adapter_model.safetensors"))
    assert torch.equal(after, weights(core_generator, "Other text"))
    shutil.rmtree(folder)
