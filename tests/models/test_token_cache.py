"""Token sequences on disk: made once, by whoever comes first, and never those of something else."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.models import TRAINING_TEXT, make_tokenizer
from helpers.runs import SMALL, contents, tasks
from transformers import PreTrainedTokenizerBase

from lora_factory.arguments import CollectArguments
from lora_factory.collection.collect import collect_adapters
from lora_factory.collection.multitask import train_multitask
from lora_factory.collection.progress import make_accelerator
from lora_factory.errors import LoraFactoryError
from lora_factory.hub.client import preview
from lora_factory.models.inputs import CausalInputs, Seq2SeqInputs, TokenSequence
from lora_factory.models.token_cache import TokenCache
from lora_factory.tasks.examples import Example
from lora_factory.training.train import zoo_factory
from lora_factory.utils.cache import TensorCache
from lora_factory.zoo.hub import zoo_writer
from lora_factory.zoo.store import HIDDEN_FOLDER

EXAMPLES = [
    Example("Who? ", "The fox."),
    Example("", TRAINING_TEXT[0]),
    Example("What \N{WHITE SMILING FACE}? ", "A letter."),
]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that a tokenizer has read, in their order."""
    texts: list[str] = []
    tokenize = PreTrainedTokenizerBase.__call__

    def counted(self: PreTrainedTokenizerBase, text: str | None = None, **options: object) -> object:
        texts.append(str(text))
        return tokenize(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", counted)
    return texts


def cached(folder: Path, tokenizer: PreTrainedTokenizerBase, kind: type = CausalInputs) -> TokenCache:
    return TokenCache(folder, kind(tokenizer))


@pytest.mark.parametrize("kind", [CausalInputs, Seq2SeqInputs])
@pytest.mark.parametrize("options", [{}, {"packing": False}, {"max_tokens": 21}])
def test_cached_sequences_are_those_of_the_tokenizer(
    kind: type, options: dict, pico_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, read: list[str]
) -> None:
    arguments = replace(SMALL, **options)
    expected: Sequence[TokenSequence] = kind(pico_tokenizer).encode(EXAMPLES, arguments)
    assert cached(tmp_path, pico_tokenizer, kind).encode(EXAMPLES, arguments) == expected
    same = make_tokenizer(bos=True)
    same(["one", "two three"], padding=True, truncation=True, max_length=2)
    read.clear()
    found = cached(tmp_path, same, kind).encode(EXAMPLES, arguments)
    assert found == expected and not read, "another object of the same tokenizer reads what this one left"
    assert {type(number) for row in found for number in row.tokens + row.labels} == {int}


def test_whatever_a_sequence_depends_on_makes_another_file(
    pico_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, read: list[str]
) -> None:
    cached(tmp_path, pico_tokenizer).encode(EXAMPLES, SMALL)
    framed = make_tokenizer(bos=True)
    framed.chat_template = "{{ messages[0].content }}"
    more = make_tokenizer(bos=True)
    more.add_tokens(["fox"])
    changed = [EXAMPLES[0]._replace(completion="The fox!"), *EXAMPLES[1:]]
    moved = [Example("Who", "? The fox."), *EXAMPLES[1:]]
    others: list[tuple[TokenCache, Sequence[Example], CollectArguments]] = [
        *((cached(tmp_path, pico_tokenizer), rows, SMALL) for rows in (changed, moved, EXAMPLES[:2], EXAMPLES[::-1])),
        *((cached(tmp_path, one), EXAMPLES, SMALL) for one in (make_tokenizer(bos=False), framed, more)),
        (cached(tmp_path, pico_tokenizer, Seq2SeqInputs), EXAMPLES, SMALL),
    ]
    for options in ({"sequence_length": 17}, {"packing": False}, {"max_tokens": 30}):
        others.append((cached(tmp_path, pico_tokenizer), EXAMPLES, replace(SMALL, **options)))
    for count, (cache, examples, arguments) in enumerate(others, 2):
        read.clear()
        assert cache.encode(examples, arguments) == list(cache.inputs.encode(examples, arguments))
        assert len(list(tmp_path.iterdir())) == count and read
    read.clear()
    cached(tmp_path, pico_tokenizer).encode(EXAMPLES, replace(SMALL, learning_rate=1.0, rank=8, seeds=(3,)))
    assert not read, "these change no sequence"


@pytest.mark.parametrize("damage", ["cut", "altered", "emptied", "other"])
def test_a_damaged_file_is_written_anew(
    damage: str, pico_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, read: list[str]
) -> None:
    cache = cached(tmp_path, pico_tokenizer)
    expected = cache.encode(EXAMPLES, SMALL)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    altered = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    file.write_bytes({"cut": whole[:-4], "altered": altered, "emptied": b"", "other": b"{}" * 99}[damage])
    assert cache.encode(EXAMPLES, SMALL) == expected
    assert file.read_bytes() == whole and list(tmp_path.iterdir()) == [file]
    read.clear()
    assert cache.encode(EXAMPLES, SMALL) == expected and not read


def test_a_cache_that_cannot_be_written_stops_nothing(pico_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert cached(tmp_path / "file", pico_tokenizer).encode(EXAMPLES, SMALL)
    with pytest.raises(LoraFactoryError, match="hold no token to learn from"):
        cached(tmp_path / "tokens", pico_tokenizer).encode(
            [Example("only a prompt", "")], replace(SMALL, sequence_length=1)
        )
    assert not (tmp_path / "tokens").exists()


def test_a_zoo_is_tokenised_once(pico_model_folder: Path, tmp_path: Path, read: list[str]) -> None:
    work, both = tasks("prose", "code"), replace(SMALL, seeds=(0, 1))
    one = collect_adapters(work, pico_model_folder, tmp_path / "one", SMALL, base_model_name="pico/llama")
    files = sorted((one.folder / HIDDEN_FOLDER / "tokens").iterdir())
    texts = [text for text in read if text != "a"]  # by which the tokenizer's special tokens are found
    assert len(files) == 4 and len(texts) == len(set(texts)), "training and validation of two tasks"
    read.clear()
    zoo = collect_adapters(tasks("prose", "code"), pico_model_folder, one.folder, both, base_model_name="pico/llama")
    factory = zoo_factory(zoo, pico_model_folder, make_accelerator(SMALL, tmp_path), zoo.layout.with_rank(4))
    train_multitask(factory, work, seed=0, steps=1)
    assert zoo.runs("prose") == ["seed-0", "seed-1"] and not set(read) - {"a"}
    assert files == sorted((one.folder / HIDDEN_FOLDER / "tokens").iterdir())

    pushed, _ = preview(zoo_writer(zoo), "me/zoo")
    assert not zoo.verify() and not any(HIDDEN_FOLDER in name for name in pushed)
    shutil.rmtree(zoo.folder / HIDDEN_FOLDER)
    assert not zoo.verify() and preview(zoo_writer(zoo), "me/zoo")[0] == pushed
    factory.keep_tokens(zoo.folder)
    zoo_factory(zoo, pico_model_folder, factory.accelerator, zoo.layout).encode(EXAMPLES)
    assert not (zoo.folder / HIDDEN_FOLDER).exists(), "only a collection makes the place for them"
    collect_adapters(work, pico_model_folder, tmp_path / "two", both, base_model_name="pico/llama")
    assert contents(tmp_path / "two") == contents(zoo.folder)


def test_a_file_altered_at_random_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    cache, chance = TensorCache(tmp_path), random.Random(0)
    tensors = {"ids": torch.arange(20), "lengths": torch.tensor([7, 13], dtype=torch.int32)}
    cache.write(tensors, "key")
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for number in range(400):
        content = bytearray(whole)
        if number % 4 == 0:
            content = content[: chance.randrange(len(content))]
        else:
            content[chance.randrange(min(len(content), 300))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        found = cache.read("key")
        assert found is None or all(torch.equal(found[name], tensors[name]) for name in tensors)
    path.unlink()
    path.mkdir()
    assert cache.read("key") is None
