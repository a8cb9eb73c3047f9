"""Fine-tune generated weights on a user's own examples: a few cross-validated steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from lora_factory.adapters.live_models import without_adapters
from lora_factory.arguments import REFINE_STEPS, TokenOptions
from lora_factory.collection.optimise import take_steps
from lora_factory.models.inputs import TokenSequence, positions
from lora_factory.models.losses import Base, fast_attention, query_loss
from lora_factory.tasks.examples import Example, ImageExample
from lora_factory.tasks.given import as_examples

LEARNING_RATE = 1e-3
PARTS = 4  # copies of the adapter, each trained without its part of the examples
BATCH = 4  # sequences a step and copy
CHECK_EVERY = 3  # steps between looks at the parts left out
PATIENCE = 3  # looks without a lower loss before it stops


def refine(
    base: Base,
    adapter: Tensor,
    sequences: Sequence[TokenSequence],
    *,
    steps: int = REFINE_STEPS,
    learning_rate: float = LEARNING_RATE,
) -> Tensor:
    """Fine-tune an adapter on a few examples with Adam, as far as that helps on examples it is not trained on.

    Four copies of the adapter learn side by side, each without another quarter of the sequences. Where their mean loss
    on the quarters left out is lowest they stop, which may be at once; their mean is returned. So all examples are
    used, for the weights as well as for the choice, and averaging takes out some of what each has learned by heart.

    Args:
        base: The frozen base model, its tokenizer and the layout.
        adapter: Shape ``(D,)``, for example a generated one.
        sequences: The examples, as ``base.inputs`` encodes them; a single one cannot be left out, so nothing changes.
        steps: Optimizer steps at most; 0 returns the adapter as it is.
        learning_rate: Adam's, constant.

    Returns:
        Shape ``(D,)``, on the CPU.

    Raises:
        LoraFactoryError: When the loss is not finite.
    """
    start = adapter.detach().cpu().clone()
    parts = min(PARTS, len(sequences))
    if parts < 2 or steps < 1:
        return start
    held_out, train = _left_out(sequences, parts)
    weights = start.to(base.model.device).repeat(parts, 1).requires_grad_(True)
    optimizer = torch.optim.Adam([weights], lr=learning_rate)
    source = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(rows), generator=source).tolist() for rows in train]
    count = min(BATCH, *map(len, train))

    def gradients(step: int) -> float:
        taken = [
            [rows[order[((step - 1) * count + row) % len(rows)]] for row in range(count)]
            for rows, order in zip(train, orders, strict=True)
        ]
        loss = query_loss(base, weights, taken)
        (loss * parts).backward()
        return loss.item()

    longest = max(len(getattr(row, "tokens", ())) for row in sequences)
    with without_adapters(base.model), fast_attention(base, count * parts, longest):
        best, chosen, looks = _mean_loss(base, weights, held_out), start, 0
        steps_taken = take_steps(
            gradients,
            optimizer,
            steps,
            label="refine on the examples",
            advice=f"lower learning_rate={learning_rate}",
            max_grad_norm=math.inf,
            leave=False,
        )
        for step, *_ in steps_taken:
            if step % CHECK_EVERY and step < steps:
                continue
            if (measured := _mean_loss(base, weights, held_out)) < best:
                best, chosen, looks = measured, weights.detach().mean(0).cpu(), 0
            elif (looks := looks + 1) == PATIENCE:
                break
    return chosen


def refine_state_dict(
    base: Base,
    state_dict: dict[str, Tensor],
    examples: Sequence[Example | ImageExample | str],
    steps: int,
    *,
    chat_template: bool = False,
) -> dict[str, Tensor]:
    """`refine` for an adapter as PEFT names it and examples as a user has them.

    When nothing changes, it warns and returns ``state_dict`` itself.
    """
    settings = TokenOptions(chat_template=chat_template)
    if (limit := positions(base.model) or settings.sequence_length) < settings.sequence_length:
        settings = replace(settings, sequence_length=limit)
    sequences = base.inputs.encode(as_examples(examples), settings)
    start = base.layout.flatten(state_dict)
    refined = refine(base, start, sequences, steps=steps)
    if steps and torch.equal(refined, start.cpu()):
        reason = (
            f"they make {len(sequences)} sequence, and refining needs two, one to leave out; give more or longer ones"
            if len(sequences) < 2
            else f"none of up to {steps} steps lowered the loss on those left out; give more examples or other ones"
        )
        warnings.warn(f"the adapter was not refined on the examples: {reason}", stacklevel=4)
        return state_dict
    return base.layout.unflatten(refined)


def _left_out(
    sequences: Sequence[TokenSequence], parts: int
) -> tuple[list[Sequence[TokenSequence]], list[Sequence[TokenSequence]]]:
    """Neighbouring sequences, which may be of one example, in equal parts; and for each part all the others."""
    bounds = [len(sequences) * part // parts for part in range(parts + 1)]
    held_out = [sequences[start:end] for start, end in pairwise(bounds)]
    train: list[Sequence[TokenSequence]] = [[*sequences[:start], *sequences[end:]] for start, end in pairwise(bounds)]
    return held_out, train


@torch.no_grad()
def _mean_loss(base: Base, weights: Tensor, held_out: Sequence[Sequence[TokenSequence]]) -> float:
    losses = [query_loss(base, row[None], [rows]) for row, rows in zip(weights, held_out, strict=True)]
    return float(torch.stack(losses).mean())
