"""The one exception that users are meant to read."""


class LoraFactoryError(ValueError):
    """A wrong input, file or setting; the message names the value, the expectation and the call that fixes it."""
