"""Limits on what a request for an adapter may hold, and the prefix of a model's name that asks for one.

The server, the app and the vLLM plugin use them.
"""

PREFIX = "factory:"  # before the text, in the name of a model
MAX_TEXT = 2_000  # characters of a description
MAX_EXAMPLES, MAX_EXAMPLE = 64, 8_000  # examples; characters of one
