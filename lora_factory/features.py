"""Vectors of texts and examples, kept on disk so that none is computed twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from lora_factory.answer_states import example_states
from lora_factory.base_loss import Base
from lora_factory.data_source import Example
from lora_factory.encoders import HiddenStateEncoder
from lora_factory.files import cache_folder
from lora_factory.model_inputs import CausalInputs
from lora_factory.tensor_cache import TensorCache

if TYPE_CHECKING:
    from lora_factory.tasks import Task

FEATURE_EXAMPLES = 128  # training examples a task whose hidden states are computed


def example_features(base: Base, tasks: Sequence[Task]) -> dict[str, Tensor]:
    """Hidden states of every task's first 128 training examples on the frozen base; those of texts are cached.

    Args:
        base: The base model, with or without adapters attached.
        tasks: Tasks with training examples.

    Returns:
        Shape ``(examples, width)`` by the name of the task; a progress bar shows on the main process.
    """
    states, bar = {}, tqdm(tasks, desc="hidden states", disable=not PartialState().is_local_main_process)
    if not isinstance(base.inputs, CausalInputs):
        return {task.name: example_states(base, task.examples("train")[:FEATURE_EXAMPLES]) for task in bar}
    encoder, cache = HiddenStateEncoder(base.model, base.tokenizer), FeatureCache(cache_folder() / "features")

    def encode(texts: list[str]) -> Tensor:
        return encoder.encode([Example(*text.split("\0", 1)) for text in texts])

    for task in bar:
        texts = ["\0".join(row) for row in task.examples("train")[:FEATURE_EXAMPLES]]
        states[task.name] = cache.get_or_compute(encoder.identifier, texts, encode)
    return states


class FeatureCache(TensorCache):
    """Vectors of texts on disk, one small file each, so that no text is encoded twice."""

    def get_or_compute(self, identifier: str, texts: Sequence[str], function: Callable[[list[str]], Tensor]) -> Tensor:
        """Read the vectors of texts, computing those that are missing.

        Args:
            identifier: Names the encoder, as ``TextEncoder.identifier`` does; other encoders, other vectors.
            texts: At least one text.
            function: Encodes the missing texts, each once, in their order: shape ``(missing, width)``.

        Returns:
            The vectors in the order of the texts, shape ``(texts, width)``.
        """
        cached = ((text, self.read(identifier, text)) for text in dict.fromkeys(texts))
        known = {text: tensors["vector"] for text, tensors in cached if tensors is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing:
            computed = function(missing).cpu()
            for text, vector in zip(missing, computed, strict=True):
                self.write({"vector": vector.contiguous()}, identifier, text)
                known[text] = vector
        return torch.stack([known[text] for text in texts])
