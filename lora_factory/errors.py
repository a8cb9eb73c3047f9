"""The exceptions that users are meant to read."""

from __future__ import annotations


class LoraFactoryError(ValueError):
    """A wrong input, file or setting; the message names the value, the expectation and the call that fixes it."""


class NewerFormatError(LoraFactoryError):
    """A file that a newer version of this package wrote."""


class UnreadableError(LoraFactoryError):
    """A file or folder that may be whole, and cannot be read now: it is not allowed, or its disk does not answer."""


class StorageError(LoraFactoryError):
    """A folder that cannot be written, because the disk is full, read-only or gone."""
