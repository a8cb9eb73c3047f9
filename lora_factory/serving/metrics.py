"""Counts of a server, in the text format that Prometheus reads."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from threading import Lock

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # upper bounds of the histogram's buckets
_HELP = {
    "requests_total": "Requests answered, by route and HTTP status.",
    "prompt_tokens_total": "Tokens of prompts that were read.",
    "generated_tokens_total": "Tokens of answers.",
    "batches_total": "Calls of the model's generate.",
    "batched_requests_total": "Requests that were answered in those calls.",
    "adapters_generated_total": "Adapters that the generator wrote.",
    "adapters_evicted_total": "Adapters that made room for others.",
    "queue_length": "Requests that wait.",
    "adapters": "Adapters in the model.",
}


class Metrics:
    """Counters and the time that requests take; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: Counter[str] = Counter(
            {name: 0 for name in _HELP if name.endswith("_total") and name != "requests_total"}
        )
        self._requests: Counter[tuple[str, int]] = Counter()
        self._times = [0] * (len(_SECONDS) + 1)
        self._seconds = 0.0

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name] += by

    def request(self, route: str, status: int, seconds: float) -> None:
        """Note an answered request.

        Args:
            route: Its path, one of the server's own.
            status: HTTP status.
            seconds: From its arrival to the end of the answer.
        """
        with self._lock:
            self._requests[route, status] += 1
            self._times[bisect_left(_SECONDS, seconds)] += 1
            self._seconds += seconds

    def text(self, gauges: Mapping[str, int]) -> str:
        """All of it.

        Args:
            gauges: What is read at this moment: ``queue_length`` and ``adapters``.
        """
        with self._lock:
            counts, requests = dict(self._counts), sorted(self._requests.items())
            times, seconds = list(self._times), self._seconds
        lines = [*_head("requests_total", "counter")]
        lines += [
            f'lora_factory_requests_total{{route="{route}",status="{status}"}} {number}'
            for (route, status), number in requests
        ]
        for name, number in {**counts, **gauges}.items():
            kind = "counter" if name in counts else "gauge"
            lines += [*_head(name, kind), f"lora_factory_{name} {number}"]
        lines += [
            "# HELP lora_factory_request_seconds Time from a request's arrival to the end of its answer.",
            "# TYPE lora_factory_request_seconds histogram",
        ]
        total = 0
        for bound, number in zip((*map(str, _SECONDS), "+Inf"), times, strict=True):
            total += number
            lines.append(f'lora_factory_request_seconds_bucket{{le="{bound}"}} {total}')
        lines += [f"lora_factory_request_seconds_sum {seconds:.6f}", f"lora_factory_request_seconds_count {total}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str) -> tuple[str, str]:
    return f"# HELP lora_factory_{name} {_HELP[name]}", f"# TYPE lora_factory_{name} {kind}"
