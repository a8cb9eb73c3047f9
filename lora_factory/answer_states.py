"""Hidden states of examples on any base model (Eq. 1): what conditions made of a user's examples consist of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_factory.arguments import CollectArguments
from lora_factory.base_loss import Base
from lora_factory.encoders import HiddenStateEncoder, masked_mean
from lora_factory.evaluation import frozen
from lora_factory.image_data import as_example
from lora_factory.live_models import without_adapters
from lora_factory.model_inputs import CausalInputs, positions
from lora_factory.sequences import IGNORED

BATCH = 8
READ = CollectArguments(packing=False, sequence_length=128)


def example_states(base: Base, examples: Sequence[Any]) -> Tensor:
    """Read examples with the frozen base model alone.

    A causal language model reads prompt and answer as one text, see ``HiddenStateEncoder``. Of an encoder-decoder, and
    of a model that reads images, the states are those in which the answer is predicted: they have seen the rest.

    Returns:
        ``[last state; mean state; mean prediction error]``, float32, on the CPU, ``(examples, 3 * hidden size)``.

    Raises:
        LoraFactoryError: When an example is empty, or not one for this model.
    """
    if isinstance(base.inputs, CausalInputs):
        return HiddenStateEncoder(base.model, base.tokenizer).encode(examples)
    settings = replace(READ, sequence_length=min(READ.sequence_length, positions(base.model) or READ.sequence_length))
    rows = base.inputs.encode([*map(as_example, examples)], settings)
    with frozen(base.model), without_adapters(base.model):
        return torch.cat([_read(base, rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)])


def _read(base: Base, rows: Sequence[Any]) -> Tensor:
    inputs = base.inputs.collate(rows, base.model.device)
    outputs = base.model(**inputs, output_hidden_states=True, use_cache=False)
    states, labels, logits = outputs.get("decoder_hidden_states"), inputs["labels"], outputs.logits
    if states is None:  # a decoder alone predicts the token that follows
        states, labels, logits = outputs.hidden_states, labels[:, 1:], logits[:, :-1]
    hidden, answered = states[-1].float()[:, : labels.shape[1]], labels != IGNORED
    embeddings = base.model.get_output_embeddings().weight.float()
    expected = torch.stack([row.float().softmax(-1) @ embeddings for row in logits])
    error = masked_mean(embeddings[labels.clamp_min(0)] - expected, answered)
    positions = torch.arange(labels.shape[1], device=labels.device)
    last = hidden[torch.arange(len(hidden)), (answered * positions).argmax(1)]
    return torch.cat([last, masked_mean(hidden, answered), error], dim=-1).cpu()
