"""What an adapter costs here, beside what else would give one: time, peak memory, and growth with size.

    python benchmarks/performance.py --folder /tmp/performance --json performance.json --plot performance.svg

From process start, each way in processes of its own that take turns: the command ``generate``; the same with the
paper's network (``conv1d``); a Text-to-LoRA-style path, in which base and language-model encoder are loaded to emit
one adapter (our own minimal re-creation: the embedded SmolLM2-135M is both, and a hypernetwork of one hidden layer
writes A and B module by module); and fine-tuning the LoRA itself, a few measured steps with the demo's settings,
extrapolated to the steps of a demo run. The latter two need the embedded base model.

In a warm process: weights and folders for adapters of three sizes, beside the limits of the machine: a copy of the
weights in memory, and writing and syncing as many bytes. Then growth with the number of weights, tasks and layers,
with the slope between the logarithms of size and time: 1 is linear. The peak of memory while the largest adapter is
written is that of a process of its own, less its peak before that. Last, a training step through the embedded base
model with a core for each of eight tasks, beside one of a plain PEFT LoRA of the same modules and rank on as many
tokens, each in a process of its own.

Generators have random weights, which cost what trained ones do. Seconds are medians; memory is the peak of the
resident set.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lora_factory import CVAELoRAConfig, CVAELoRAGenerator, LoraFactoryError
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.adapters.modules import AdaptedModule
from lora_factory.generator.writer import AdapterWriter
from lora_factory.models.text_encoders import MINILM
from lora_factory.utils.files import write_json, write_text
from lora_factory.utils.quiet import quiet_transformers
from lora_factory.utils.versions import versions

TEXT = "Legal notices of software."
SMOLLM2 = {"q_proj": (576, 576), "v_proj": (576, 192)}  # inputs and outputs, of each of 30 layers
LLAMA3 = {"q_proj": (4096, 4096), "v_proj": (4096, 1024)}
LLAMA3_ALL = {
    **LLAMA3,
    "k_proj": (4096, 1024),
    "o_proj": (4096, 4096),
    "gate_proj": (4096, 14336),
    "up_proj": (4096, 14336),
    "down_proj": (14336, 4096),
}
FINE_TUNING_STEPS, WARM_UP = 5, 2  # measured
TRAINED_RANK, TRAINED_TASKS, TRAINED_LENGTH = 16, 8, 64  # of a step through the base; two sequences per task
ROLES = ("text-to-lora", "fine-tuning", "memory", "plain-step", "core-step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("performance"), help="where generators are made")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each figure (default: 5)")
    parser.add_argument("--json", type=Path, help="file of all figures (default: none)")
    parser.add_argument("--plot", type=Path, help="SVG file of cost against size (default: none)")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.role:
        ways = {"text-to-lora": text_to_lora, "fine-tuning": fine_tuning, "memory": lambda: memory(options.folder)}
        ways |= {"plain-step": plain_step, "core-step": core_step}
        print(json.dumps(ways[options.role]()))
        return
    results: dict[str, Any] = {
        "versions": versions(),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version()},
        "repeats": options.repeats,
        "cold": cold(options.folder, options.repeats),
        "warm": [
            warm(make_layout(30, SMOLLM2, 2), "SmolLM2-135M q,v r=2", options.repeats),
            warm(make_layout(30, SMOLLM2, 2), "the same, conv1d", options.repeats, decoder="conv1d"),
            warm(make_layout(32, LLAMA3, 2), "Llama-3-8B q,v r=2", options.repeats),
            warm(make_layout(32, LLAMA3_ALL, 16), "Llama-3-8B all linear r=16", options.repeats),
        ],
        "growth": growth(options.repeats),
    }
    with quiet_transformers():
        make_generator(make_layout(32, LLAMA3_ALL, 16)).save_pretrained(options.folder / "large")
    command = [sys.executable, __file__, "--folder", str(options.folder), "--role", "memory"]
    results["memory"] = timed_process(command)
    if has_base():
        rounds = [
            {role: timed_process([sys.executable, __file__, "--role", role]) for role in ROLES[3:]} for _ in range(3)
        ]
        results["steps"] = {
            role: {key: median(taken[role][key] for taken in rounds) for key in ("step_seconds", "peak_mb")}
            for role in ROLES[3:]
        }
    show(results)
    if options.json:
        write_json(options.json, results)
    if options.plot:
        draw(results["growth"], options.plot)


def make_layout(layers: int, modules: dict[str, tuple[int, int]], rank: int) -> AdapterLayout:
    """A LoRA of one rank on some projections of every layer."""
    adapted = [
        AdaptedModule(
            path=(path := f"model.layers.{layer}.self_attn.{name}"),
            key_a=f"base_model.model.{path}.lora_A.weight",
            key_b=f"base_model.model.{path}.lora_B.weight",
            shape_a=(rank, inputs),
            shape_b=(outputs, rank),
            scaling=2.0,
        )
        for layer in range(layers)
        for name, (inputs, outputs) in sorted(modules.items())
    ]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(modules)}
    return AdapterLayout("someone/base", None, tuple(adapted), {**config, "task_type": "CAUSAL_LM"})


def make_generator(layout: AdapterLayout, tasks: int = 6, decoder: str = "core") -> CVAELoRAGenerator:
    """A generator of random weights for some tasks."""
    torch.manual_seed(0)
    known = [{"name": f"t{n}", "descriptions": [f"task {n}"], "license": None, "dataset": None} for n in range(tasks)]
    config = {"modalities": {"text": 384}, "text_encoder": MINILM, "tasks": known, "decoder": decoder}
    generator = CVAELoRAGenerator(CVAELoRAConfig(layout=layout.to_dict(), **config)).eval()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        generator.scale.fill_(0.1)
    generator.fit_conditions({"text": {task["name"]: torch.randn(2, 384) for task in known}})
    return generator


def cold(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """From process start to an adapter, each way in turns."""
    layout = make_layout(30, SMOLLM2, 2)
    commands: dict[str, list[str]] = {}
    for decoder in ("core", "conv1d"):
        with quiet_transformers():
            make_generator(layout, decoder=decoder).save_pretrained(folder / decoder)
        command = [sys.executable, "-m", "lora_factory.cli", "generate", "--generator", str(folder / decoder)]
        command += ["--text", TEXT, "--output-dir", str(folder / f"adapter-{decoder}"), "--overwrite"]
        commands["generate" if decoder == "core" else "generate, the paper's conv1d"] = command
    if has_base():
        commands["Text-to-LoRA-style: base and encoder loaded"] = [sys.executable, __file__, "--role", "text-to-lora"]
        commands["fine-tuning the LoRA"] = [sys.executable, __file__, "--role", "fine-tuning"]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            runs[name].append(timed_process(command))
    rows = []
    for name, taken in runs.items():
        row = {"way": name, **{key: median(run[key] for run in taken) for key in taken[0]}}
        rows.append(row)
    return rows


def has_base() -> bool:
    """Whether the embedded base model is on this machine; the first time it is unpacked, outside of what is timed."""
    from lora_factory.models.embedded import embedded_base_model

    try:
        return embedded_base_model().is_dir()
    except LoraFactoryError:
        return False


def timed_process(command: Sequence[str]) -> dict[str, float]:
    """Seconds, seconds of processor time and peak memory of a process, and what it prints as JSON in its last line."""
    with TemporaryDirectory() as scratch:
        output = Path(scratch, "output")
        start = time.perf_counter()
        with output.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL)
            peak, ended = 0.0, 0
            # The memory that wait4 tells of is this process's, if that is more: the other is a copy of it at first.
            while not ended:
                peak = max(peak, peak_mb(process.pid))
                time.sleep(0.01)
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - start
        lines = output.read_text().splitlines()
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    more = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    used = usage.ru_utime + usage.ru_stime
    figures = {"seconds": seconds + more.pop("rest", 0.0), "processor_seconds": used, "peak_mb": peak}
    return figures | more


def peak_mb(process: int | str) -> float:
    """The peak of the resident set of a process up to now; 0 when it has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")), 0.0)


def text_to_lora() -> dict[str, float]:
    """Load base and language-model encoder, encode a text, write A and B with a hypernetwork, attach them."""
    from peft import LoraConfig, get_peft_model

    from lora_factory.models.embedded import EMBEDDED_BASE_MODEL
    from lora_factory.models.loading import load_base_model

    base, _ = load_base_model(EMBEDDED_BASE_MODEL)
    encoder, tokenizer = load_base_model(EMBEDDED_BASE_MODEL)
    layout = make_layout(30, SMOLLM2, 2)
    places = torch.nn.Embedding(len(layout.modules), 64)
    hidden = torch.nn.Linear(576 + 64, 512)
    heads = {m.sizes: torch.nn.Linear(512, 2 * sum(size[0] for size in m.sizes)) for m in layout.modules}
    with torch.no_grad():
        tokens = tokenizer(TEXT, return_tensors="pt")
        state = encoder.model(**tokens).last_hidden_state.float().mean(1)
        inputs = torch.cat([state.expand(len(layout.modules), -1), places.weight], dim=1)
        codes, weights = torch.nn.functional.silu(hidden(inputs)), {}
        for module, code in zip(layout.modules, codes, strict=True):
            a, b = heads[module.sizes](code).split([2 * module.sizes[0][0], 2 * module.sizes[1][0]])
            weights[module.path] = a.view(module.shape_a), b.view(module.shape_b)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    for path, (a, b) in weights.items():
        layer = model.base_model.model.get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    return {"rest": 0.0}


def fine_tuning() -> dict[str, float]:
    """A few steps of a demo run's LoRA; "rest" is the seconds that the steps which are left out would take."""
    from peft import LoraConfig, get_peft_model

    from lora_factory.demo.run import FULL
    from lora_factory.models.embedded import EMBEDDED_BASE_MODEL
    from lora_factory.models.loading import load_base_model

    base, _ = load_base_model(EMBEDDED_BASE_MODEL)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    rows, length, steps = FULL.collect.batch_size, FULL.collect.sequence_length, FULL.collect.steps
    seconds = []
    for _ in range(WARM_UP + FINE_TUNING_STEPS):
        start = time.perf_counter()
        tokens = torch.randint(100, 40_000, (rows, length))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(time.perf_counter() - start)
    step = median(seconds[WARM_UP:])
    return {"rest": step * (steps - len(seconds)), "step_seconds": step, "steps": steps}


def plain_step() -> dict[str, float]:
    """Steps of one LoRA for all tasks, in plain PEFT."""
    from peft import LoraConfig, get_peft_model

    from lora_factory.models.embedded import EMBEDDED_BASE_MODEL
    from lora_factory.models.loading import load_base_model

    base, _ = load_base_model(EMBEDDED_BASE_MODEL)
    config = LoraConfig(r=TRAINED_RANK, lora_alpha=TRAINED_RANK, target_modules="all-linear")
    model = get_peft_model(base, config).train()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    times = [time.perf_counter()]
    for _ in range(WARM_UP + FINE_TUNING_STEPS):
        tokens = torch.randint(100, 40_000, (2 * TRAINED_TASKS, TRAINED_LENGTH))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        times.append(time.perf_counter())
    return {"step_seconds": median(end - start for start, end in pairwise(times[WARM_UP:]))}


def core_step() -> dict[str, float]:
    """Steps of a generator's training through the base, each task with its own core."""
    from accelerate import Accelerator

    from lora_factory.arguments import CollectArguments, TrainArguments
    from lora_factory.collection.trainer import open_trainer
    from lora_factory.models.embedded import EMBEDDED_BASE_MODEL
    from lora_factory.tasks.task import Task
    from lora_factory.training.from_data import train_through_base
    from lora_factory.training.train import build_generator
    from lora_factory.utils.checkpoint import TrainingCheckpoint

    lora = {"rank": TRAINED_RANK, "lora_alpha": TRAINED_RANK, "sequence_length": TRAINED_LENGTH}
    arguments = TrainArguments(base_steps=WARM_UP + FINE_TUNING_STEPS, base_tasks=TRAINED_TASKS, **lora)
    accelerator, words = Accelerator(cpu=True), ["alpha", "beta", "gamma", "delta"]
    texts = [" ".join(random.Random(n).choices(words, k=400)) for n in range(4 * TRAINED_TASKS)]
    tasks = [Task.from_examples(f"t{n}", [f"task {n}"], texts[n::TRAINED_TASKS]) for n in range(TRAINED_TASKS)]
    trainer = open_trainer(EMBEDDED_BASE_MODEL, CollectArguments(**lora), accelerator, tasks)
    about = [{"name": task.name, "descriptions": list(task.descriptions)} for task in tasks]
    generator = build_generator(None, arguments, {"text": 384}, trainer.layout, about)
    features = {"text": {task.name: generator.text_encoder.encode(list(task.descriptions)) for task in tasks}}
    generator.fit_conditions(features)
    times = []

    class Clock(TrainingCheckpoint):
        """Takes the time where a training would save its state."""

        def save_now_and_then(self, *_: Any) -> None:
            times.append(time.perf_counter())

    with TemporaryDirectory() as folder:
        train_through_base(generator, trainer, tasks, features, arguments, checkpoint=Clock(folder, ""))
    return {"step_seconds": median(end - start for start, end in pairwise(times[WARM_UP - 1 :]))}


def memory(folder: Path) -> dict[str, float]:
    """The peak of memory while the largest adapter is written, beyond that of the opened generator, in its sizes."""
    generator = AdapterWriter.open(folder / "large")
    generator.text_encoder.encode([TEXT])
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = peak_mb("self")
    generator.save_adapter(TEXT, folder / "adapter-large", overwrite=True)
    return {"peak_in_adapters": 1e6 * (peak_mb("self") - before) / (4 * generator.layout.size)}


def warm(layout: AdapterLayout, name: str, repeats: int, *, tasks: int = 6, decoder: str = "core") -> dict[str, Any]:
    """Milliseconds in a process that has loaded all, and the limits of memory and disk."""
    generator: AdapterWriter = make_generator(layout, tasks, decoder)
    vector = generator.text_encoder.encode([TEXT])[0]
    weights = generator.generate_state_dict(conditions={"text": vector})
    flat = torch.cat([values.flatten() for values in weights.values()])
    content = memoryview(flat.numpy()).cast("B")
    with TemporaryDirectory(dir=".") as scratch:
        count = iter(range(10**6))

        def write() -> None:
            with Path(scratch, f"raw-{next(count)}").open("wb") as file:
                for at in range(0, len(content), 1 << 20):  # in one piece it can take four times as long
                    file.write(content[at : at + (1 << 20)])
                file.flush()
                os.fsync(file.fileno())

        texts = [f"Task {number} of many." for number in range(max(1, min(100, 10**8 // layout.size)))]
        ways: dict[str, tuple[Callable[[], object], int]] = {
            "text vector": (lambda: generator.text_encoder.encode([TEXT]), 1),
            "weights": (lambda: generator.generate_state_dict(conditions={"text": vector}), 1),
            "folder": (lambda: generator.save_adapter(TEXT, Path(scratch, f"adapter-{next(count)}")), 1),
            "weights, each of many": (lambda: [None for _ in generator.generate_adapters(texts)], len(texts)),
            "copy": (flat.clone, 1),
            "write and sync": (write, 1),
        }
        for way, _ in ways.values():
            way()
        taken: dict[str, list[float]] = {key: [] for key in ways}
        for _ in range(repeats):
            for key, (way, number) in ways.items():
                start = time.perf_counter()
                way()
                taken[key].append(1e3 * (time.perf_counter() - start) / number)
    return {
        "name": name,
        "weights_of_an_adapter": layout.size,
        "modules": len(layout.modules),
        "tasks": tasks,
        "ms": {key: median(values) for key, values in taken.items()},
    }


def growth(repeats: int) -> dict[str, Any]:
    """Time against the number of weights, tasks and layers, all else equal, and its slope in logarithms."""
    square = {"q_proj": (512, 512), "v_proj": (512, 512)}
    wide = [make_layout(16, dict.fromkeys(square, (width, width)), 5) for width in (32, 512, 4096, 65536)]
    series: dict[str, list[tuple[int, dict[str, Any]]]] = {
        "weights": [(layout.size, warm(layout, "", repeats)) for layout in wide],
        "tasks": [(count, warm(make_layout(8, square, 2), "", repeats, tasks=count)) for count in (10, 100, 1000)],
        "layers": [(count, warm(make_layout(count, square, 2), "", repeats)) for count in (2, 8, 32, 80)],
    }
    found: dict[str, Any] = {}
    for name, points in series.items():
        sizes = [size for size, _ in points]
        kinds = {kind: [point["ms"][kind] for _, point in points] for kind in ("weights", "folder")}
        slopes = {kind: slope(sizes, times) for kind, times in kinds.items()}
        found[name] = {"sizes": sizes, **kinds, "slopes": slopes}
    return found


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The slope of the line of least squares between the logarithms."""
    x, y = torch.tensor(sizes, dtype=torch.float64).log(), torch.tensor(times, dtype=torch.float64).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(width=118)
    rows = results["cold"]
    table = Table(title="From process start to one adapter of 115,200 weights (median)")
    for column in ("way", "s", "of processor time", "peak memory MB", "times generate"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        way, times = row["way"], row["seconds"] / rows[0]["seconds"]
        if "step_seconds" in row:
            way += f" ({FINE_TUNING_STEPS} steps measured, extrapolated to {row['steps']:.0f})"
        figures = (f"{row['seconds']:.2f}", f"{row['processor_seconds']:.2f}", f"{row['peak_mb']:.0f}", f"{times:.1f}")
        table.add_row(way, *figures)
    console.print(table)
    table = Table(title="In a warm process, milliseconds (median)")
    columns = ("text vector", "weights", "copy", "weights, each of many", "folder", "write and sync")
    for column in ("adapter", "weights of it", *columns):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    for row in results["warm"]:
        ms = row["ms"]
        table.add_row(row["name"], f"{row['weights_of_an_adapter']:,}", *(f"{ms[key]:.2f}" for key in columns))
    console.print(table)
    table = Table(title="Growth: milliseconds by size, and slope of the logarithms")
    for column in ("against", "sizes", "weights", "slope", "folder", "slope"):
        table.add_column(column)
    for name, line in results["growth"].items():
        cells = [", ".join(f"{value:,}" for value in line["sizes"])]
        for kind in ("weights", "folder"):
            cells += [", ".join(f"{value:.1f}" for value in line[kind]), f"{line['slopes'][kind]:.2f}"]
        table.add_row(name, *cells)
    console.print(table)
    console.print(f"peak memory of writing the largest: {results['memory']['peak_in_adapters']:.2f} of its size")
    if steps := results.get("steps"):
        plain, core = steps["plain-step"], steps["core-step"]
        console.print(
            f"a training step through the base, {2 * TRAINED_TASKS} sequences of {TRAINED_LENGTH} tokens: "
            f"{core['step_seconds']:.2f} s and {core['peak_mb']:.0f} MB; plain LoRA "
            f"{plain['step_seconds']:.2f} s and {plain['peak_mb']:.0f} MB; ratio "
            f"{core['step_seconds'] / plain['step_seconds']:.2f}"
        )
    facts = {**results["versions"], **results["machine"]}
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))


def draw(lines: dict[str, Any], path: Path) -> None:
    """Draw cost against size."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (name, line) in zip(figure.subplots(1, len(lines)), lines.items(), strict=True):
        for kind in ("weights", "folder"):
            axes.loglog(line["sizes"], line[kind], marker="o", label=f"{kind} (slope {line['slopes'][kind]:.2f})")
        axes.set(xlabel=name, ylabel="milliseconds")
        axes.legend()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    write_text(path, buffer.getvalue())


if __name__ == "__main__":
    main()
