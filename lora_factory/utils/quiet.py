"""Hide the messages of other libraries while they load what this package has checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_transformers(*, keep_bars: bool = False) -> Iterator[None]:
    """Hide the warnings and the progress bars of transformers, and put things back afterwards.

    Args:
        keep_bars: Leave progress bars as they are; a download should show one.
    """
    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not keep_bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars and not keep_bars:
            transformers_logging.enable_progress_bar()
