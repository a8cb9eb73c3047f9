"""Token sequences of texts, kept with a zoo so that no process tokenises what another one has."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_factory._version import __version__
from lora_factory.arguments import TokenOptions
from lora_factory.models.inputs import CausalInputs, Seq2SeqInputs, TokenSequence
from lora_factory.utils.cache import TensorCache
from lora_factory.utils.paths import sha256_file, sha256_text


class TokenCache:
    """What texts become for a language model, on disk.

    Args:
        folder: Where the files lie; made on the first write. Several processes may share it.
        inputs: Encodes what is not there.
    """

    def __init__(self, folder: str | Path, inputs: CausalInputs | Seq2SeqInputs) -> None:
        self.tensors, self.inputs = TensorCache(folder), inputs
        versions = [__version__, version("transformers"), version("tokenizers")]
        self._reader = json.dumps([type(inputs).__name__, tokenizer_fingerprint(inputs.tokenizer), versions])

    def encode(self, examples: Sequence[Any], options: TokenOptions) -> list[TokenSequence]:
        """As ``inputs.encode``, from the disk where these examples were encoded with these settings before."""
        settings = [options.sequence_length, options.packing, options.max_tokens, options.chat_template]
        key = self._reader, json.dumps([settings, examples], default=repr)
        if (tensors := self.tensors.read(*key)) is not None:
            return _sequences(tensors)
        sequences = list(self.inputs.encode(examples, options))
        with contextlib.suppress(OSError, SafetensorError):  # a full disk or a read-only zoo: it is only a cache
            self.tensors.write(_tensors(sequences), *key)
        return sequences


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that a tokenizer saves of itself: vocabulary, rules, special tokens and chat template."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):  # the padding of its last call, which the next one sets anew
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    with tempfile.TemporaryDirectory(prefix="lora_factory-") as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return sha256_text("\n".join(f"{path.name} {sha256_file(path)}" for path in files))


def _tensors(sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
    """Ids and labels of all sequences, shape ``(tokens,)``, and the sequences' lengths."""
    return {
        "tokens": torch.tensor([*chain.from_iterable(row.tokens for row in sequences)], dtype=torch.int32),
        "labels": torch.tensor([*chain.from_iterable(row.labels for row in sequences)], dtype=torch.int32),
        "lengths": torch.tensor([len(row.tokens) for row in sequences]),
    }


def _sequences(tensors: Mapping[str, Tensor]) -> list[TokenSequence]:
    lengths = tensors["lengths"].tolist()
    rows = zip(tensors["tokens"].split(lengths), tensors["labels"].split(lengths), strict=True)
    return [TokenSequence(tokens.tolist(), labels.tolist()) for tokens, labels in rows]
