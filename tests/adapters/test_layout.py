import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.layouts import CASES, llama, randomise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import save_file
from torch import nn

from lora_factory.adapters.attach import AdapterSlot, attach_adapter
from lora_factory.adapters.folder import save_adapter_config, save_adapter_weights
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.errors import LoraFactoryError
from lora_factory.utils.printable import natural_key

BASE = "someone/pico"


def adapter_of(model):
    return randomise(get_peft_model_state_dict(model, save_embedding_layers=False))


@pytest.fixture(scope="module", params=CASES)
def case(request):
    make, config = CASES[request.param]
    model = get_peft_model(make(), replace(config))
    state_dict = adapter_of(model)
    layout = AdapterLayout.from_state_dict(
        state_dict, model.peft_config["default"], base_model=BASE, base_revision="abc"
    )
    return model, state_dict, layout


@pytest.fixture(scope="module")
def small():
    make, config = CASES["q/v only"]
    model = get_peft_model(make(), replace(config))
    state_dict = adapter_of(model)
    config = model.peft_config["default"]
    return state_dict, config, AdapterLayout.from_state_dict(state_dict, config, base_model=BASE)


def same(left, right):
    assert set(left) == set(right)
    for key in left:
        assert left[key].dtype == right[key].dtype
        assert left[key].shape == right[key].shape
        assert torch.equal(left[key], right[key]), key


def test_round_trip_is_bit_exact(case):
    _, state_dict, layout = case
    vector = layout.flatten(state_dict)
    assert vector.shape == (layout.size,)
    assert layout.size == sum(tensor.numel() for tensor in state_dict.values())
    same(layout.unflatten(vector), state_dict)
    assert all(tensor.is_contiguous() for tensor in layout.unflatten(vector).values())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    leading=st.lists(st.integers(1, 3), max_size=2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_round_trip_with_snapshots_and_dtypes(case, leading, dtype, seed):
    _, _, layout = case
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(*leading, layout.size, generator=generator).to(dtype)
    state_dict = layout.unflatten(vector)
    for module in layout.modules:
        assert tuple(state_dict[module.key_a].shape) == (*leading, *module.shape_a)
    assert torch.equal(layout.flatten(state_dict), vector)
    assert layout.flatten(state_dict).dtype == dtype


def test_scaling_and_rank_are_those_of_the_live_model(case):
    model, _, layout = case
    live = dict(model.base_model.model.named_modules())
    for module in layout.modules:
        assert live[module.path].scaling["default"] == module.scaling
        assert live[module.path].r["default"] == module.rank


def test_dictionary_round_trip_through_json(case):
    _, _, layout = case
    again = AdapterLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again == layout
    assert hash(again) == hash(layout)
    assert again.fingerprint() == layout.fingerprint()


def test_peft_config_builds_the_same_adapter(case):
    model, state_dict, layout = case
    config = AdapterLayout.from_dict(json.loads(json.dumps(layout.to_dict()))).peft_config()
    assert (config.base_model_name_or_path, config.revision, config.inference_mode) == (BASE, "abc", True)
    fresh = PeftModel(model.unload(), config)
    assert set(get_peft_model_state_dict(fresh, save_embedding_layers=False)) == set(state_dict)
    result = set_peft_model_state_dict(fresh, layout.unflatten(layout.flatten(state_dict)))
    assert not result.unexpected_keys
    same(get_peft_model_state_dict(fresh, save_embedding_layers=False), state_dict)


def test_adapter_config_is_what_peft_writes(case, tmp_path):
    _, _, layout = case
    layout = AdapterLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
    save_adapter_config(layout, tmp_path)
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    layout.peft_config().save_pretrained(tmp_path / "peft")
    theirs = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    listed = {name: sorted(value) for name, value in theirs.items() if isinstance(value, list)}
    assert list(ours) == list(theirs) and ours == {**theirs, **listed}
    assert PeftConfig.from_pretrained(tmp_path) == layout.peft_config()


def test_gradients_pass_through(small):
    _, _, layout = small
    vector = torch.randn(3, layout.size, requires_grad=True)
    weight = torch.randn(layout.size)
    (layout.flatten(layout.unflatten(vector)) * weight).sum().backward()
    assert torch.equal(vector.grad, weight.expand(3, -1))


def test_order_is_natural_and_a_comes_first():
    model = get_peft_model(llama(layers=11), LoraConfig(r=1, target_modules=["q_proj", "v_proj"]))
    state_dict = get_peft_model_state_dict(model)
    shuffled = dict(sorted(state_dict.items(), reverse=True))
    layout = AdapterLayout.from_state_dict(shuffled, model.peft_config["default"], base_model=BASE)
    paths = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(11) for name in "qv"]
    assert [module.path for module in layout.modules] == paths
    first = layout.modules[0]
    vector = layout.flatten(state_dict)
    assert torch.equal(vector[:32], state_dict[first.key_a].flatten())
    assert torch.equal(vector[32:64], state_dict[first.key_b].flatten())


def test_an_embedding_has_the_keys_that_peft_gives_it():
    make, config = CASES["embeddings"]
    model = get_peft_model(make(), replace(config))
    layout = AdapterLayout.from_state_dict(adapter_of(model), model.peft_config["default"], base_model=BASE)
    assert {"lm_head", "model.layers.1.self_attn.q_proj"} < {module.path for module in layout.modules}
    embedding = next(module for module in layout.modules if "embed" in module.path)
    assert embedding.key_a == "base_model.model.model.embed_tokens.lora_embedding_A"
    assert (embedding.shape_a, embedding.shape_b) == ((4, 48), (32, 4))


@given(st.lists(st.integers(0, 3000), min_size=1))
def test_natural_key_sorts_numbers_as_numbers(numbers):
    names = sorted((f"epoch_{number}.x" for number in numbers), key=natural_key)
    assert names == [f"epoch_{number}.x" for number in sorted(numbers)]


@given(st.lists(st.text()))
def test_natural_key_sorts_anything(names):
    sorted(names, key=natural_key)


def test_fingerprint_sees_geometry_and_base_only(small):
    state_dict, config, layout = small
    other = {
        "alpha": AdapterLayout.from_state_dict(state_dict, replace(config, lora_alpha=5), base_model=BASE),
        "base": replace(layout, base_model="someone/else"),
        "modules": replace(layout, modules=layout.modules[1:]),
    }
    fingerprints = {layout.fingerprint(), *(entry.fingerprint() for entry in other.values())}
    assert len(fingerprints) == 4
    dropout = AdapterLayout.from_state_dict(state_dict, replace(config, lora_dropout=0.5), base_model=BASE)
    assert dropout.fingerprint() == replace(layout, base_revision="x").fingerprint() == layout.fingerprint()


def test_mixed_dtypes_become_float32(small):
    state_dict, _, layout = small
    mixed = {key: value.bfloat16() if "lora_A" in key else value for key, value in state_dict.items()}
    assert layout.flatten(mixed).dtype == torch.float32


def change(state_dict, tensor):
    """The first key, and a copy in which its tensor is replaced by a function of it."""
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    return key, {**state_dict, key: tensor(state_dict[key])}


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda old: old[:1], "another shape"),
        (lambda old: old.T, "another shape"),
        (lambda old: old[None], "another shape"),
        (lambda old: old.clone().fill_(math.nan), "NaN"),
        (lambda old: torch.where(old == old.max(), math.inf, old), "infinity"),
        (lambda old: old.int(), "integers"),
    ],
)
def test_check_refuses_a_wrong_tensor_and_names_it(small, tensor, message):
    state_dict, _, layout = small
    key, wrong = change(state_dict, tensor)
    with pytest.raises(LoraFactoryError, match=message) as info:
        layout.check(wrong)
    assert key in str(info.value)
    with pytest.raises(LoraFactoryError, match=message):
        layout.flatten(wrong)


def test_check_refuses_missing_and_unknown_keys(small):
    state_dict, _, layout = small
    layout.check(state_dict)
    missing = dict(state_dict)
    key = missing.popitem()[0]
    with pytest.raises(LoraFactoryError, match=r"1 of 8 keys are missing .*lora_B.*peft_config") as info:
        layout.check(missing)
    assert key in str(info.value)
    with pytest.raises(LoraFactoryError, match=r"1 are unknown \(surplus\)"):
        layout.check({**state_dict, "surplus": torch.zeros(1)})
    with pytest.raises(LoraFactoryError, match="8 of 8 keys are missing"):
        layout.flatten({})


def test_snapshots_must_agree_on_their_number(small):
    state_dict, _, layout = small
    stacked = {key: torch.stack([value] * 3) for key, value in state_dict.items()}
    assert layout.flatten(stacked).shape == (3, layout.size)
    with pytest.raises(LoraFactoryError, match="another shape"):
        layout.check(stacked)
    _, uneven = change(stacked, lambda old: old[:2])
    with pytest.raises(LoraFactoryError, match="another shape"):
        layout.flatten(uneven)


def test_vectors_of_another_size_are_refused(small):
    _, _, layout = small
    for shape in ((), (layout.size - 1,), (layout.size, 2)):
        with pytest.raises(LoraFactoryError, match="vector has shape"):
            layout.unflatten(torch.zeros(shape))


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"{PREFIX}.lora_magnitude_vector", "DoRA"),
        ("base_model.model.score.modules_to_save.weight", "fully trained module"),
        ("base_model.model.lm_head.weight", "save_embedding_layers=False"),
        (f"{PREFIX}.lora_B.bias", "bias"),
        (f"{PREFIX}.bias", "bias"),
        (f"{PREFIX}.lora_A.default.weight", "get_peft_model_state_dict"),
        ("base_model.model.lone.lora_A.weight", r"lone\.lora_B\.weight is missing"),
        ("base_model.model.lone.lora_B.weight", "has no A"),
        ("transformer.lone.lora_A.weight", "get_peft_model_state_dict"),
    ],
)
def test_keys_that_are_no_pair_are_refused_with_a_reason(small, key, message):
    state_dict, config, _ = small
    with pytest.raises(LoraFactoryError, match=message):
        AdapterLayout.from_state_dict({**state_dict, key: torch.zeros(2, 2)}, config, base_model=BASE)


def test_no_lora_weights_at_all_are_refused(small):
    _, config, _ = small
    for state_dict in ({}, {"weight": torch.zeros(1)}):
        with pytest.raises(LoraFactoryError, match="no LoRA weights"):
            AdapterLayout.from_state_dict(state_dict, config, base_model=BASE)


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"ensure_weight_tying": True},
        {"lora_bias": True},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["experts.up"]},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"alora_invocation_tokens": [1]},
    ],
)
def test_options_that_are_not_plain_lora_are_refused(small, option):
    state_dict, config, layout = small
    name = next(iter(option))
    with pytest.raises(LoraFactoryError, match=rf"LoraConfig\({name}=.* is not supported"):
        AdapterLayout.from_state_dict(state_dict, replace(config, **option), base_model=BASE)
    values = layout.to_dict()
    values["lora_config"] |= option
    with pytest.raises(LoraFactoryError, match="is not supported"):
        AdapterLayout.from_dict(values)


def test_real_dora_and_modules_to_save_are_refused():
    for options in ({"use_dora": True}, {"modules_to_save": ["lm_head"]}):
        model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], **options))
        state_dict, plain = get_peft_model_state_dict(model), LoraConfig(r=2, target_modules=["q_proj"])
        with pytest.raises(LoraFactoryError, match=r"DoRA|fully trained|no LoRA weight"):
            AdapterLayout.from_state_dict(state_dict, plain, base_model=BASE)


def test_grouped_convolutions_are_refused():
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(LoraFactoryError, match="grouped convolutions"):
        AdapterLayout.from_state_dict(get_peft_model_state_dict(model), model.peft_config["default"], base_model=BASE)


def test_another_lora_config_than_the_weights_is_refused(small):
    state_dict, config, _ = small
    with pytest.raises(LoraFactoryError, match=r"weights have rank 2 .*say 3"):
        AdapterLayout.from_state_dict(state_dict, replace(config, r=3), base_model=BASE)


def test_patterns_that_contradict_each_other_are_refused(small):
    state_dict, config, _ = small
    patterns = {"q_proj": 3, "layers.0.self_attn.q_proj": 5}
    with pytest.raises(LoraFactoryError, match="several entries of alpha_pattern"):
        AdapterLayout.from_state_dict(state_dict, replace(config, alpha_pattern=patterns), base_model=BASE)


def test_an_empty_base_model_is_refused(small):
    _, _, layout = small
    for name in ("", None, 5):
        with pytest.raises(LoraFactoryError, match="name the Hub id"):
            replace(layout, base_model=name)


def damage(path, value):
    def apply(values):
        target = values
        for step in path[:-1]:
            target = target[step]
        if value is KeyError:
            del target[path[-1]]
        else:
            target[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    "apply",
    [
        damage(["format_version"], 2),
        damage(["format_version"], KeyError),
        damage(["modules"], KeyError),
        damage(["modules"], []),
        damage(["modules"], 3),
        damage(["modules", 0, "path"], "model.other"),
        damage(["modules", 0, "shape_a"], [0, 32]),
        damage(["modules", 0, "shape_a"], [2.0, 32]),
        damage(["modules", 0, "shape_a"], [2]),
        damage(["modules", 0, "shape_a"], None),
        damage(["modules", 0, "shape_a"], [3, 32]),
        damage(["modules", 0, "scaling"], "nan"),
        damage(["modules", 0, "scaling"], "much"),
        damage(["modules", 0, "scaling"], 0.5),
        damage(["modules", 0], {}),
        damage(["lora_config", "r"], 7),
        damage(["lora_config", "r"], "2"),
        damage(["lora_config", "peft_type"], "LOHA"),
        damage(["lora_config", "rank_pattern"], {"(": 2}),
        damage(["lora_config"], None),
        damage(["base_model"], ""),
        damage(["base_revision"], 3),
    ],
)
def test_damaged_dictionaries_are_refused(small, apply):
    values = small[2].to_dict()
    apply(values)
    with pytest.raises(LoraFactoryError):
        AdapterLayout.from_dict(values)


def test_settings_that_peft_does_not_take_are_named(small):
    values = small[2].to_dict()
    values["lora_config"]["task_type"] = "FOO"
    with pytest.raises(LoraFactoryError, match="FOO"):
        AdapterLayout.from_dict(values).peft_config()


def test_keys_that_modules_would_share_are_refused(small):
    values = small[2].to_dict()
    for module in values["modules"]:
        module |= {"key_a": ".lora_A.weight", "key_b": ".lora_B.weight"}
    with pytest.raises(LoraFactoryError, match="are not the LoRA keys of"):
        AdapterLayout.from_dict(values)


def test_modules_out_of_order_or_twice_are_refused(small):
    modules = small[2].modules
    for wrong in (modules[::-1], modules + modules[-1:]):
        with pytest.raises(LoraFactoryError, match="natural order"):
            replace(small[2], modules=wrong)


def updates(layout, vector):
    """Every module's update, ``scaling * B A``."""
    weights = layout.unflatten(vector)
    return {
        module.path: module.scaling * weights[module.key_b].flatten(1) @ weights[module.key_a].flatten(1)
        for module in layout.modules
    }


def llama_layout(targets, **options):
    config = LoraConfig(**({"r": 2, "lora_alpha": 4} | options), target_modules=targets)
    model = get_peft_model(llama(), config)
    return AdapterLayout.from_state_dict(adapter_of(model), model.peft_config["default"], base_model=BASE)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    extra=st.integers(0, 4),
    ratio=st.floats(0.1, 10),
    leading=st.lists(st.integers(1, 2), max_size=2),
    dropped=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_widened_vectors_do_the_same(case, extra, ratio, leading, dropped, seed):
    _, _, full = case
    wider = full.with_rank(max(module.rank for module in full.modules) + extra)
    wider = replace(
        wider,
        modules=tuple(replace(module, scaling=ratio * module.scaling) for module in wider.modules),
        lora_config=dict(wider.lora_config) | {"lora_alpha": ratio * wider.lora_config["lora_alpha"]},
    )
    layout = replace(full, modules=full.modules[min(dropped, len(full.modules) - 1) :])
    vectors = torch.randn(*leading, layout.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    widened = layout.widen(vectors, wider)
    assert widened.shape == (*leading, wider.size) and widened.dtype == vectors.dtype
    missing = [module for module in wider.modules if module.path not in {module.path for module in layout.modules}]
    weights = wider.unflatten(widened)
    assert not any(weights[key].any() for module in missing for key in (module.key_a, module.key_b))
    for before, after in zip(vectors.view(-1, layout.size), widened.view(-1, wider.size), strict=True):
        expected = updates(layout, before)
        for path, update in updates(wider, after).items():
            torch.testing.assert_close(update, expected.get(path, torch.zeros_like(update)))


def test_equal_scalings_are_widened_bit_for_bit(case):
    _, state_dict, layout = case
    vector = layout.flatten(state_dict)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(layout.widen(vector.to(dtype), layout), vector.to(dtype))
    rank = max(module.rank for module in layout.modules) + 3
    wider = layout.with_rank(rank)
    wide = wider.unflatten(layout.widen(vector, wider))
    for module, room in zip(layout.modules, wider.modules, strict=True):
        assert torch.equal(wide[module.key_a][: module.rank], state_dict[module.key_a])
        assert not wide[module.key_a][module.rank :].any() and not wide[module.key_b][:, module.rank :].any()
        if module.scaling == room.scaling:
            assert torch.equal(wide[module.key_b][:, : module.rank], state_dict[module.key_b])


def test_gradients_pass_through_widen(small):
    _, _, layout = small
    vector = torch.randn(layout.size, requires_grad=True)
    layout.widen(vector, layout.with_rank(5)).sum().backward()
    assert torch.equal(vector.grad, torch.ones(layout.size))


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_with_rank_gives_every_module_one_rank_and_the_scaling_without_patterns(case, rank):
    _, _, layout = case
    other = layout.with_rank(rank)
    config = layout.lora_config
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    assert {module.rank for module in other.modules} == {rank}
    assert {module.scaling for module in other.modules} == {scaling}
    assert [module.path for module in other.modules] == [module.path for module in layout.modules]
    assert not other.lora_config["rank_pattern"] and not other.lora_config["alpha_pattern"]
    assert other.lora_config["target_modules"] == config["target_modules"]
    assert AdapterLayout.from_dict(json.loads(json.dumps(other.to_dict()))) == other


def test_ranks_below_1_are_refused(small):
    with pytest.raises(LoraFactoryError, match="rank=0, expected at least 1"):
        small[2].with_rank(0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 1}, "alpha_pattern": {"down_proj": 9}},
    ],
)
def test_a_widened_adapter_changes_no_logits(options):
    torch.manual_seed(0)
    base, ids = llama().eval(), torch.arange(10)[None]
    plain = {name: value.clone() for name, value in base.state_dict().items()}
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], **options)
    model = get_peft_model(base, config)
    state_dict = adapter_of(model)
    layout = AdapterLayout.from_state_dict(state_dict, config, base_model=BASE)
    AdapterSlot(model, layout).load(state_dict)
    expected = model(ids).logits
    wider = AdapterLayout.union([llama_layout(["k_proj", "up_proj"], lora_alpha=5), layout], 8)
    widened = wider.unflatten(layout.widen(layout.flatten(state_dict), wider))
    fresh = llama().eval()
    fresh.load_state_dict(plain)
    torch.testing.assert_close(attach_adapter(fresh, wider, widened)(ids).logits, expected)


def test_a_union_has_all_modules_and_names_them():
    first = llama_layout(["q_proj"], r=3, lora_alpha=6, layers_to_transform=[0])
    second = llama_layout(["v_proj", "q_proj"], r=5, lora_alpha=5, exclude_modules=["layers.0.self_attn.v_proj"])
    union = AdapterLayout.union([first, second])
    paths = [f"model.layers.{name}_proj" for name in ("0.self_attn.q", "1.self_attn.q", "1.self_attn.v")]
    assert [module.path for module in union.modules] == paths
    assert {(module.rank, module.scaling) for module in union.modules} == {(5, 2.0)}
    live = get_peft_model(llama(), union.training_config()).base_model.model
    assert [name for name, module in live.named_modules() if hasattr(module, "lora_A")] == paths
    live = get_peft_model(llama(), union.peft_config()).base_model.model
    assert [name for name, module in live.named_modules() if hasattr(module, "lora_A")] == paths
    other = replace(second.modules[0], shape_b=(33, 5))
    with pytest.raises(LoraFactoryError, match=r"has sizes .*32.* in one layout, .*33.* in another"):
        AdapterLayout.union([replace(second, modules=(other, *second.modules[1:])), first])


def test_a_layout_without_room_is_refused(small):
    _, _, layout = small
    first, *others = layout.modules
    vector = torch.zeros(layout.size)
    with pytest.raises(
        LoraFactoryError, match=r"4 of 4 modules have no room.* has rank 2, expected at most 1; .*union"
    ):
        layout.widen(vector, layout.with_rank(1))
    with pytest.raises(LoraFactoryError, match=rf"1 of 4 modules have no room: {first.path} is not among"):
        layout.widen(vector, replace(layout, modules=tuple(others)))
    with pytest.raises(LoraFactoryError, match=r"has sizes \(\(32,\), \(32,\)\), expected \(\(31,\), \(32,\)\)"):
        layout.widen(vector, replace(layout, modules=(replace(first, shape_a=(2, 31)), *others)))


def test_weights_are_written_as_safetensors_writes_them(case, tmp_path):
    state_dict = case[1]
    state_dict = randomise({name: tensor.mT for name, tensor in state_dict.items()})
    save_file(state_dict, tmp_path / "theirs", metadata={"format": "pt"})
    digest = save_adapter_weights(state_dict, tmp_path)
    written = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert written == (tmp_path / "theirs").read_bytes() and digest == hashlib.sha256(written).hexdigest()
