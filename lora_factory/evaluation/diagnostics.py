"""Measure latents, novelty, spread and storage for a comparison, and collect the points of its plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_factory.evaluation.methods import ComparedMethods

SHOWN_EXAMPLES = 24  # per task in the plot of hidden states
SHOWN_BYTES = 256 << 20  # of checkpoints in the plots and in the mean KL; at least one checkpoint per task in any case


@torch.no_grad()
def diagnose(methods: ComparedMethods) -> dict[str, Any]:
    """Measure the KL of the latents, the novelty of generated adapters, and the spread of samples and of checkpoints.

    Adapters are compared by what the generator's network makes of them, cores or weights, in standard deviations.
    Novelty is the distance to the nearest checkpoint of the task over the median distance between its checkpoints.
    """
    way, seed = methods.first_way, methods.seeds[0]
    novelty, sampled, real = {}, [], []
    for task in methods.fold.seen:
        rows = methods.targets(methods.weights[task.name][:])
        nearest = (rows - methods.made(way, task, seed)).norm(dim=1).min()
        novelty[task.name] = (nearest / torch.pdist(rows).median()).item() if len(rows) > 1 else None
        samples = torch.stack([methods.made(way, task, sample, temperature=1.0) for sample in range(8)])
        if way == "hidden":  # a seed draws other examples too, which is not what the spread is about
            samples = samples - torch.stack([methods.made(way, task, sample) for sample in range(8)])
        sampled.append((samples - samples.mean(0)).norm(dim=1).mean())
        real.append((rows - rows.mean(0)).norm(dim=1).mean())
    kl = _encoded(methods, _shown(methods))["kl"]
    return {
        "fold": methods.fold.number,
        "seed": seed,
        "kl": float(kl.sum(-1).mean()),
        "active_latents": int((kl.mean(0) > 0.01).sum()),
        "latents": kl.shape[1],
        "novelty": novelty,
        "sample_spread": float(torch.stack(sampled).mean()),
        "zoo_spread": float(torch.stack(real).mean()),
    }


def storage(methods: ComparedMethods) -> list[dict[str, Any]]:
    """Bytes that each way of keeping the seen tasks needs (Table 3 of the paper), 4 per weight."""
    adapter = 4 * methods.fold.zoo.layout.size
    examples = (example for task in methods.fold.seen for example in task.examples("train"))
    rows = {
        "data set": sum(len((example.prompt + example.completion).encode()) for example in examples),
        "all LoRA checkpoints": sum(map(len, methods.weights.values())) * adapter,
        "one LoRA per task": len(methods.weights) * adapter,
        "uniform soup": adapter,
        "COND P-DIFF": _bytes(methods.diffusion(methods.seeds[0])),
        "generator": _bytes(methods.fold.generator),
    }
    return [{"what": what, "bytes": size} for what, size in rows.items()]


def points(methods: ComparedMethods) -> dict[str, dict[str, list[Any]]]:
    """Vectors to plot, reduced by PCA: task vectors, latents, and weights of real and generated adapters."""
    shown, tasks = _shown(methods), methods.fold.tasks
    names = [name for name, rows in shown.items() for _ in rows]
    generated = torch.stack([methods.made(methods.first_way, task, methods.seeds[0]) for task in tasks])
    plots = {
        "weights": _principal(
            torch.cat([*shown.values(), generated]),
            [*names, *(task.name for task in tasks)],
            ["real"] * len(names) + ["generated"] * len(generated),
            2,
        ),
    }
    if methods.fold.generator.config.zoo_fingerprint is not None:
        latents = _encoded(methods, shown)
        kinds = ["posterior"] * len(names) + ["prior"] * len(shown)
        plots["latents"] = _principal(torch.cat([latents["mean"], latents["prior"]]), [*names, *shown], kinds, 50)
    for name, title, kind in (("text", "task vectors", "description"), ("hidden", "hidden states", "example")):
        rows = {task: values[:SHOWN_EXAMPLES] for task, values in methods.features.get(name, {}).items()}
        labels = [task for task, values in rows.items() for _ in values]
        if labels:
            plots[title] = _principal(torch.cat(list(rows.values())), labels, [kind] * len(labels), 50)
    return plots


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def _shown(methods: ComparedMethods) -> dict[str, torch.Tensor]:
    """Targets ``(n, targets)`` of every task's checkpoints: all, or as many at even distances as fit `SHOWN_BYTES`."""
    row_bytes = 4 * methods.fold.zoo.layout.size * len(methods.weights)
    most = max(1, SHOWN_BYTES // row_bytes)
    return {
        name: methods.targets(torch.stack([rows[len(rows) * number // count] for number in range(count)]))
        for name, rows in methods.weights.items()
        for count in [min(most, len(rows))]
    }


@torch.no_grad()
def _encoded(methods: ComparedMethods, targets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Posterior means ``(n, latents)`` of real checkpoints, their KL, and the prior's mean of every task."""
    generator, way, outputs = methods.fold.generator, methods.first_way, []
    for name, rows in targets.items():
        vector = methods.condition(way, name, methods.seeds[0])
        coordinates = generator.standardiser.all({way: vector.expand(len(rows), -1)})
        posterior = generator.network.posterior(rows, coordinates)
        prior = generator.network.prior(coordinates, len(rows))
        outputs.append({"mean": posterior.mean, "kl": posterior.kl(prior), "prior": prior.mean[:1]})
    return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}


def _principal(rows: torch.Tensor, labels: list[str], kinds: list[str], size: int) -> dict[str, list[Any]]:
    """Rows ``(n, D)`` in their first principal components, at most ``size`` of them, as JSON."""
    centered = (rows - rows.mean(0)).double()
    values, basis = torch.linalg.eigh(centered @ centered.T)
    coordinates = (basis * values.clamp_min(0).sqrt()).flip(-1)[:, :size]
    return {
        "rows": [[round(value, 5) for value in row] for row in coordinates.tolist()],
        "labels": labels,
        "kinds": kinds,
    }
