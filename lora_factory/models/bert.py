"""Sentence encoders of BERT's architecture, read and computed without transformers, whose import takes seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from lora_factory.utils.safe_files import MAX_CONFIG_BYTES, checked_file, folder_here, read_json_object

MAX_BYTES = 8 << 30  # of the weights of a sentence encoder
MAX_TOKENIZER_BYTES = 64 << 20
# What makes a folder one that is computed here; any other is left to transformers.
_SETTINGS = {"model_type": "bert", "hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False}
_ABSOLUTE = (None, "absolute")
_PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # they do just what tokenizer.json says
_BERT_TOKENIZERS = ("BertTokenizer", "BertTokenizerFast")


class Bert:
    """A BERT with its tokenizer: texts to their last hidden states, as ``transformers.BertModel`` computes them.

    Args:
        folder: What ``save_pretrained`` wrote.
        device: Where to compute.

    Raises:
        ValueError: When it is another architecture, or its tokenizer does more than ``tokenizer.json`` says.
        Exception: Whatever the parsers of a damaged file raise.

    Attributes:
        width: Size of the hidden states.
        limit: The most tokens that it reads.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        config = read_json_object(checked_file(folder, "config.json", MAX_CONFIG_BYTES))
        different = [name for name, value in _SETTINGS.items() if config.get(name, value) != value]
        if different or "model_type" not in config or config.get("position_embedding_type") not in _ABSOLUTE:
            raise ValueError(f"{different or 'it'} is not computed here")
        self.width, self._heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        self._epsilon, self._layers = float(config["layer_norm_eps"]), int(config["num_hidden_layers"])
        names = [*_names(self._layers)]
        with safe_open(checked_file(folder, "model.safetensors", MAX_BYTES), framework="pt") as file:
            prefix = "bert." if "bert.embeddings.LayerNorm.weight" in file.keys() else ""
            self._weights = {name: file.get_tensor(prefix + name).to(device, torch.float32) for name in names}
        positions = len(self._weights["embeddings.position_embeddings.weight"])
        self._tokenizer, self._padding, length = _tokenizer(folder)
        self.limit = min(positions, length)
        self._device = device

    def __call__(self, texts: Sequence[str], limit: int) -> tuple[Tensor, Tensor]:
        """The last hidden states ``(texts, tokens, width)`` and the mask of the tokens that are read."""
        self._tokenizer.enable_truncation(limit)
        read = [one.ids for one in self._tokenizer.encode_batch(list(texts))]
        self._tokenizer.no_truncation()
        length = max(map(len, read))
        ids = torch.tensor([one + [self._padding] * (length - len(one)) for one in read])
        mask = torch.arange(length)[None] < torch.tensor([[len(one)] for one in read])
        ids, mask = ids.to(self._device), mask.to(self._device)
        hidden = functional.embedding(ids, self._weights["embeddings.word_embeddings.weight"])
        hidden = hidden + self._weights["embeddings.token_type_embeddings.weight"][0]
        hidden = hidden + self._weights["embeddings.position_embeddings.weight"][:length]
        hidden = self._norm(hidden, "embeddings")
        whole = None if bool(mask.all()) else mask[:, None, None, :].expand(-1, 1, length, -1)
        for layer in range(self._layers):
            hidden = self._layer(hidden, whole, f"encoder.layer.{layer}")
        return hidden, mask.long()

    def count(self, text: str) -> int:
        """Count the tokens of a text."""
        return len(self._tokenizer.encode(text).ids)

    def _layer(self, hidden: Tensor, mask: Tensor | None, name: str) -> Tensor:
        query, key, value = (
            self._linear(hidden, f"{name}.attention.self.{part}").unflatten(-1, (self._heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        seen = self._linear(seen.transpose(1, 2).flatten(2), f"{name}.attention.output.dense")
        hidden = self._norm(seen + hidden, f"{name}.attention.output")
        inner = functional.gelu(self._linear(hidden, f"{name}.intermediate.dense"))
        return self._norm(self._linear(inner, f"{name}.output.dense") + hidden, f"{name}.output")

    def _linear(self, values: Tensor, name: str) -> Tensor:
        return functional.linear(values, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, values: Tensor, name: str) -> Tensor:
        weight, bias = self._weights[f"{name}.LayerNorm.weight"], self._weights[f"{name}.LayerNorm.bias"]
        return functional.layer_norm(values, weight.shape, weight, bias, self._epsilon)


def open_bert(name: str, revision: str | None, device: torch.device) -> Bert | None:
    """Open a BERT that is on this machine, in a folder or the Hub's cache; None for any other model.

    Args:
        name: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        device: Where to compute.
    """
    try:
        folder = folder_here(name, revision)
        return None if folder is None else Bert(folder, device)
    except Exception:  # transformers reads it then, or says what is wrong with it
        return None


def _names(layers: int) -> list[str]:
    """The names of the weights of a BERT without its pooler, which no mean over tokens makes use of."""
    parts = [f"attention.self.{part}" for part in ("query", "key", "value")]
    parts += ["attention.output.dense", "attention.output.LayerNorm"]
    parts += ["intermediate.dense", "output.dense", "output.LayerNorm"]
    pairs = [f"encoder.layer.{layer}.{part}" for layer in range(layers) for part in parts]
    pairs.append("embeddings.LayerNorm")
    tables = [f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
    return [*tables, *(f"{pair}.{kind}" for pair in pairs for kind in ("weight", "bias"))]


def _tokenizer(folder: Path) -> tuple[Tokenizer, int, int]:
    """A folder's tokenizer, the id that it pads with, and the most tokens that it gives."""
    config = read_json_object(checked_file(folder, "tokenizer_config.json", MAX_CONFIG_BYTES))
    text = checked_file(folder, "tokenizer.json", MAX_TOKENIZER_BYTES).read_text(encoding="utf-8")
    kind, values = config.get("tokenizer_class"), json.loads(text)
    if kind in _BERT_TOKENIZERS:
        _check_normalizer(values.get("normalizer") or {}, config)
    elif kind not in _PLAIN_TOKENIZERS or {"add_bos_token", "add_eos_token"} & config.keys():
        raise ValueError(f"a {kind} is not read here")
    if config.get("padding_side", "right") != "right" or config.get("truncation_side", "right") != "right":
        raise ValueError("it pads or cuts on the left")
    pad = config.get("pad_token")
    pad = pad["content"] if isinstance(pad, dict) else pad
    tokenizer = Tokenizer.from_str(text)
    padding = tokenizer.token_to_id(str(pad))
    if padding is None:
        raise ValueError(f"its padding token {pad!r} is unknown")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, padding, int(config.get("model_max_length") or 1 << 30)


def _check_normalizer(normalizer: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Check that ``tokenizer.json`` says what ``tokenizer_config.json`` does; transformers goes by the latter."""
    said = {
        "type": "BertNormalizer",
        "lowercase": config.get("do_lower_case", True),
        "strip_accents": config.get("strip_accents"),
        "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
    }
    if any(normalizer.get(name) != value for name, value in said.items()):
        raise ValueError("its tokenizer.json and tokenizer_config.json differ")
