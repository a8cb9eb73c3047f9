"""Take an adapter a few steps further on a user's own examples, and choose between adapters by their loss there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lora_factory.collect import AdapterFactory, TokenSequence
from lora_factory.errors import LoraFactoryError
from lora_factory.through_base import query_loss

LEARNING_RATE = 1e-3
BATCH = 16  # sequences a step


def refine(
    factory: AdapterFactory,
    adapter: Tensor,
    sequences: Sequence[TokenSequence],
    *,
    steps: int = 20,
    learning_rate: float = LEARNING_RATE,
) -> Tensor:
    """Fine-tune an adapter on a few examples: Adam, in their order, from where the adapter stands.

    Args:
        factory: The frozen base model.
        adapter: Shape ``(D,)``, for example a generated one.
        sequences: The examples, from ``encode_sequences``.
        steps: Optimizer steps of 16 sequences each; 0 returns the adapter as it is.
        learning_rate: Adam's, constant.

    Returns:
        Shape ``(D,)``, on the CPU.

    Raises:
        LoraFactoryError: When the loss is not finite.
    """
    weights = adapter.detach().clone().to(factory.accelerator.device).requires_grad_(True)
    optimizer = torch.optim.Adam([weights], lr=learning_rate)
    hidden = not factory.accelerator.is_local_main_process
    with factory.slot.disabled():
        for step in tqdm(range(steps), desc="refine", disable=hidden, delay=2, leave=False):
            batch = [sequences[(step * BATCH + row) % len(sequences)] for row in range(min(BATCH, len(sequences)))]
            loss = query_loss(factory, weights[None], [batch])
            if not torch.isfinite(loss):
                raise LoraFactoryError(
                    f"the loss is {loss.item()} at step {step}; lower learning_rate={learning_rate}"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weights.detach().cpu()


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
