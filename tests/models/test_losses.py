"""Losses that are computed in parts are those of the whole."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from lora_factory.models.losses import label_losses, next_token_labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_that_is_read_in_parts_gives_the_same_losses_and_gradients(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 11, 70_000, generator=source, dtype=dtype, requires_grad=True)
    labels = torch.randint(70_000, (3, 11), generator=source)
    labels[0, :5] = -100
    whole = functional.cross_entropy(logits.float().movedim(-1, 1), labels, reduction="none")
    torch.testing.assert_close(label_losses(logits, labels), whole, rtol=1e-5, atol=1e-5)
    (wanted,) = torch.autograd.grad(whole.sum(), logits)
    (found,) = torch.autograd.grad(label_losses(logits, labels).sum(), logits)
    torch.testing.assert_close(found, wanted)


def test_the_mean_over_next_tokens_is_the_models_own(pico_model: LlamaForCausalLM) -> None:
    tokens = torch.arange(3, 35).view(2, 16)
    labels = tokens.masked_fill(tokens < 8, -100)
    wanted = next_token_labels(labels)
    losses = label_losses(pico_model(tokens).logits, wanted)
    torch.testing.assert_close(losses.sum() / (wanted != -100).sum(), pico_model(tokens, labels=labels).loss)
