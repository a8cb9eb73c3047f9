"""The HTTP server under load: nothing lost, nothing mixed up, how fast, and how much memory.

    lora-factory demo
    python benchmarks/server.py --generator demo-output/full/generator --requests 5000

`lora-factory serve` runs as a process of its own; 64 clients ask it in OpenAI's form. First every question is asked
alone, with every adapter and without one; then the requests go to the base model, and then to twelve adapters of which
eight have room. Every answer is compared with those that were given alone: equal, another adapter's, or neither. The
base model is in 32-bit numbers for that: a batch of 16-bit numbers is rounded in another way than one row. Memory is
the resident set of the server's process.
"""

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from rich.console import Console
from rich.table import Table

from lora_factory import CVAELoRAGenerator
from lora_factory.models.loading import load_base_model

QUESTIONS = ("The first thing to know is", "import ", "In the year of", "This software is")
TEXTS = (
    "Legal notices and licence terms of software packages",
    "Typed stubs of Python functions and classes",
    "Rhymed poems about nature",
    "Letters of the nineteenth century",
    "Change logs of programs",
    "Configuration files",
    "Shell scripts that install packages",
    "Tables of numbers",
    "Error messages of compilers",
    "Manual pages of commands",
    "Questions and answers about Linux",
    "Recipes for soups",
)
CLIENTS, ADAPTERS = 64, 8


@dataclass
class Round:
    """What came of many requests."""

    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    found: Counter[str] = field(default_factory=Counter)
    memory: tuple[float, float] = (0.0, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--generator", required=True, help="folder of a generator for a causal language model")
    parser.add_argument("--requests", type=int, default=5000, help="of each round (default: 5000)")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer (default: 8)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as base, socket.socket() as free:
        layout = CVAELoRAGenerator.from_pretrained(options.generator).layout
        for part in load_base_model(layout.base_model, revision=layout.base_revision, dtype="float32"):
            part.save_pretrained(base)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        words = [
            "--generator",
            options.generator,
            "--base-model",
            base,
            "--port",
            str(port),
            "--adapters",
            str(ADAPTERS),
        ]
        command = [sys.executable, "-m", "lora_factory.cli", "serve", *words]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            rounds, batch = asyncio.run(drill(f"http://127.0.0.1:{port}", server, options.requests, options.tokens))
        finally:
            server.terminate()
            server.wait()
    show(rounds, batch, options)


async def drill(url: str, server: subprocess.Popen, requests: int, tokens: int) -> tuple[dict[str, Round], float]:
    limits = httpx2.Limits(max_connections=CLIENTS)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        while True:
            try:
                base = (await client.get("/v1/models")).json()["data"][0]["id"]
                break
            except httpx2.TransportError:
                assert server.poll() is None, "the server did not start"
                await asyncio.sleep(0.2)
        adapted = [f"factory:{text}" for text in TEXTS]
        alone = {}
        for name in (base, *adapted):
            for question in QUESTIONS:
                alone[name, question] = await ask(client, name, question, tokens)
        rounds = {}
        for title, names in (("base model", [base]), (f"{len(TEXTS)} adapters", adapted)):
            rounds[title] = await one_round(client, server, names, requests, tokens, alone)
        lines = (await client.get("/metrics")).text.splitlines()
        counts = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
    batches, together = counts["lora_factory_batches_total"], counts["lora_factory_batched_requests_total"]
    return rounds, (together - len(alone)) / (batches - len(alone))


async def ask(client: httpx2.AsyncClient, model: str, prompt: str, tokens: int) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    response = await client.post("/v1/completions", json=body)
    response.raise_for_status()
    return str(response.json()["choices"][0]["text"])


async def one_round(
    client: httpx2.AsyncClient,
    server: subprocess.Popen,
    names: list[str],
    requests: int,
    tokens: int,
    alone: dict[tuple[str, str], str],
) -> Round:
    result, todo = Round(), iter(range(requests))
    before = memory(server.pid)

    async def work() -> None:
        for number in todo:
            name, question = names[number % len(names)], QUESTIONS[number // len(names) % len(QUESTIONS)]
            start = time.perf_counter()
            try:
                answer = await ask(client, name, question, tokens)
            except httpx2.HTTPError as error:
                result.found[f"lost ({type(error).__name__})"] += 1
                continue
            result.times.append(time.perf_counter() - start)
            others = {text for (other, asked), text in alone.items() if asked == question and other != name}
            if answer == alone[name, question]:
                result.found["equal"] += 1
            else:
                result.found["another adapter's" if answer in others else "neither"] += 1

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(CLIENTS)))
    result.seconds = time.perf_counter() - start
    result.memory = before, memory(server.pid)
    return result


def memory(process: int) -> float:
    """Resident megabytes of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def show(rounds: dict[str, Round], batch: float, options: argparse.Namespace) -> None:
    table = Table(title=f"{options.requests} requests of {CLIENTS} clients, {options.tokens} tokens an answer")
    for column in ("model", "requests/s", "p50 s", "p99 s", "MB before", "MB after", "answers, against those alone"):
        table.add_column(column)
    for title, result in rounds.items():
        cuts = statistics.quantiles(result.times, n=100)
        found = ", ".join(f"{number} {kind}" for kind, number in result.found.most_common())
        speed = f"{len(result.times) / result.seconds:.1f}"
        sizes = (f"{size:.0f}" for size in result.memory)
        table.add_row(title, speed, f"{cuts[49]:.2f}", f"{cuts[98]:.2f}", *sizes, found)
    Console(width=140).print(table)
    print(f"{batch:.1f} requests a batch")


if __name__ == "__main__":
    main()
