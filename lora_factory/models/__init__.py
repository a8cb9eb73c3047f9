"""Frozen models: how they are loaded, what they read, and the vectors, losses and answers that they give.

In: the name of a model and examples. Out: token sequences, text and image vectors, hidden states, losses, answers.
"""

from lora_factory._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "embedded": "embedded_base_model",
        "hidden_states": "HiddenStateEncoder task_vector",
        "image_encoders": "ImageEncoder",
        "loading": "load_base_model load_processor",
        "losses": "FrozenBase query_loss",
        "text_encoders": "TextEncoder",
    },
)
