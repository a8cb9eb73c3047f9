"""Arithmetic that does not depend on the precision that the caller has set for other models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def own_precision() -> Iterator[None]:
    """Compute as in a new process: new tensors are float32, and ``torch.autocast`` changes nothing.

    PyTorch has one default type for all threads. It is set only where the caller has set another one.
    """
    accelerator = torch.accelerator.current_accelerator()
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        for device in {"cpu", accelerator.type if accelerator else "cpu"}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if default != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, default)
        yield
