"""The exceptions that users are meant to read."""

from __future__ import annotations


class LoraFactoryError(ValueError):
    """A wrong input, file or setting; the message names the value, the expectation and the call that fixes it."""


class NewerFormatError(LoraFactoryError):
    """A file that a newer version of this package wrote."""


class StorageError(LoraFactoryError):
    """A folder that cannot be written, because the disk is full, read-only or gone."""
