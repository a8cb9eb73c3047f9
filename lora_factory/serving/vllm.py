"""vLLM writes adapters on demand: a request for the model ``factory:Legal notices`` generates that adapter.

The package brings the plugin along (entry point ``vllm.general_plugins``); an environment variable switches it on::

    LORA_FACTORY_GENERATOR=generator VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora

``--max-lora-rank`` must be the generator's rank or more; where ``VLLM_PLUGINS`` is set, it must name ``lora_factory``.
``LORA_FACTORY_ADAPTERS_MB`` bounds the adapters' folders (default: 4096); there are 1000 at most. vLLM keeps every
adapter that it has resolved, and reads its folder again when it has left the engine's memory. So a folder goes only
after ``POST /v1/unload_lora_adapter``, when another adapter needs its room.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from lora_factory.errors import LoraFactoryError
from lora_factory.serving.adapter_cache import AdapterCache
from lora_factory.serving.limits import PREFIX
from lora_factory.utils.paths import recorded_name

_LOGGER = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what its own loggers say


class GeneratedLoRARequest(LoRARequest, array_like=True, omit_defaults=True, weakref=True):  # type: ignore[call-arg]
    """A request for a generated adapter; as long as vLLM holds it, the adapter's folder stays."""


class FactoryResolver(LoRAResolver):
    """Generates the adapters of model names that start with ``factory:``.

    Args:
        cache: Where the adapters are written.
    """

    def __init__(self, cache: AdapterCache) -> None:
        """Keep the cache."""
        self._cache = cache
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="lora-factory")  # vLLM's own threads stay free

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Generate the adapter of a model name, unless it is there already.

        Args:
            base_model_name: The base model that vLLM serves.
            lora_name: The model name of a request.

        Returns:
            The request that vLLM loads the adapter with; None, with a line in the log, when the name is not ours or is
            no text, the adapter is for another base model, or it cannot be written.
        """
        if not lora_name.startswith(PREFIX):
            return None
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._worker, self._resolve, base_model_name, lora_name
            )
        except LoraFactoryError as error:
            _LOGGER.error("no adapter for the model name %.80a: %s", lora_name, error)
            return None

    def _resolve(self, base_model_name: str, lora_name: str) -> LoRARequest:
        def request(folder: Path) -> GeneratedLoRARequest:
            return GeneratedLoRARequest(lora_name, adapter_id(lora_name), str(folder), base_model_name)

        ours = self._cache.generator.layout.base_model
        if recorded_name(base_model_name) != recorded_name(ours):
            raise LoraFactoryError(f"vLLM serves {base_model_name!r}, the generator is for {ours!r}; serve that one")
        return self._cache.lend(lora_name.removeprefix(PREFIX), request)


def adapter_id(lora_name: str) -> int:
    """The number of an adapter, the same in every process: 1 to 2³¹ - 1, since vLLM keeps them as int32."""
    digest = hashlib.sha256(lora_name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % (2**31 - 1) + 1


def register() -> None:
    """Register the resolver with vLLM, if ``LORA_FACTORY_GENERATOR`` names a generator; vLLM calls this.

    Raises:
        LoraFactoryError: When ``LORA_FACTORY_ADAPTERS_MB`` is no number above 0.
    """
    generator = os.environ.get("LORA_FACTORY_GENERATOR", "").strip()
    if not generator:
        return
    given = os.environ.get("LORA_FACTORY_ADAPTERS_MB", "4096")
    if not given.isdecimal() or not int(given):
        raise LoraFactoryError(f"LORA_FACTORY_ADAPTERS_MB={given!r}; expected a whole number of megabytes above 0")
    cache = AdapterCache(generator, max_bytes=int(given) << 20)
    LoRAResolverRegistry.register_resolver("lora-factory", FactoryResolver(cache))
