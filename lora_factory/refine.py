"""Take an adapter a few steps further on a user's own examples, and choose between adapters by their loss there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lora_factory.errors import LoraFactoryError
from lora_factory.factory import AdapterFactory
from lora_factory.sequences import TokenSequence
from lora_factory.through_base import query_loss

LEARNING_RATE = 1e-3
BATCH = 16  # sequences a step
CHECK_EVERY = 5  # steps between looks at the held-out sequences


def refine(
    factory: AdapterFactory,
    adapter: Tensor,
    sequences: Sequence[TokenSequence],
    *,
    steps: int = 20,
    learning_rate: float = LEARNING_RATE,
) -> Tensor:
    """Fine-tune an adapter on a few examples with Adam, as long as that helps on those that it is not trained on.

    Every fourth sequence is held out; the weights with the lowest loss on these are returned, which may be the adapter
    as it was. With fewer than four sequences all are trained on, to the end.

    Args:
        factory: The frozen base model.
        adapter: Shape ``(D,)``, for example a generated one.
        sequences: The examples, from ``encode_sequences``.
        steps: Optimizer steps of up to 16 sequences each; 0 returns the adapter as it is.
        learning_rate: Adam's, constant.

    Returns:
        Shape ``(D,)``, on the CPU.

    Raises:
        LoraFactoryError: When the loss is not finite.
    """
    held_out = list(sequences[::4]) if len(sequences) >= 4 else []
    train = [row for number, row in enumerate(sequences) if number % 4] if held_out else list(sequences)
    weights = adapter.detach().clone().to(factory.accelerator.device).requires_grad_(True)
    optimizer = torch.optim.Adam([weights], lr=learning_rate)
    hidden = not factory.accelerator.is_local_main_process
    with factory.slot.disabled():
        best, chosen = _loss(factory, weights, held_out), weights.detach().clone()
        for step in tqdm(range(1, steps + 1), desc="refine", disable=hidden, delay=2, leave=False):
            batch = [train[((step - 1) * BATCH + row) % len(train)] for row in range(min(BATCH, len(train)))]
            loss = query_loss(factory, weights[None], [batch])
            if not torch.isfinite(loss):
                raise LoraFactoryError(
                    f"the loss is {loss.item()} at step {step}; lower learning_rate={learning_rate}"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % CHECK_EVERY == 0 or step == steps:
                measured = _loss(factory, weights, held_out)
                if not held_out or measured < best:
                    best, chosen = measured, weights.detach().clone()
    return chosen.cpu()


@torch.no_grad()
def best_of(
    factory: AdapterFactory, adapters: Tensor, sequences: Sequence[TokenSequence]
) -> tuple[Tensor, list[float]]:
    """The adapter with the lowest loss on a user's examples.

    Args:
        factory: The frozen base model.
        adapters: Candidates of shape ``(n, D)``.
        sequences: The examples, from ``encode_sequences``.

    Returns:
        The best one, shape ``(D,)``, and the loss of each in nats a token.

    Raises:
        LoraFactoryError: When no candidate has a finite loss.
    """
    with factory.slot.disabled():
        losses = torch.stack([query_loss(factory, adapter[None], [sequences]) for adapter in adapters])
    if not torch.isfinite(losses).any():
        raise LoraFactoryError(f"none of {len(adapters)} adapters has a finite loss on the examples; check them")
    return adapters[losses.nan_to_num(torch.inf).argmin()], losses.tolist()


@torch.no_grad()
def _loss(factory: AdapterFactory, weights: Tensor, sequences: Sequence[TokenSequence]) -> float:
    return float(query_loss(factory, weights[None], [sequences])) if sequences else math.inf
