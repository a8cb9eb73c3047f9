"""Programs that serve adapters as they are asked for: an HTTP server, vLLM, llama.cpp.

In: a generator, and requests for adapters and answers. Out: answers of a model with the adapter that was asked for.
"""
