"""Questions to the test server of the Hub, and a base model on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hub_server.local import LocalHub
from transformers import LlamaForCausalLM

from helpers.generators import make_generator
from helpers.models import attach, random_adapter
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.zoo.run_record import RunRecord
from lora_factory.zoo.store import AdapterZoo

TEXT = "Legal notices and\nlicence `terms` <b>of</b> software"
HAND_WRITTEN = """---
license: apache-2.0
thumbnail: picture.png
tags: [mine]
---
# My page

Written by hand.

## Limits

Old words of the generator's card.

## Thanks

```
## no heading
```
To the caterpillar.
"""
HEAD = f"""
import hashlib, json, sys, time
from pathlib import Path
import torch
from lora_factory import CVAELoRAGenerator, LoraFactoryError

TEXT = {TEXT!r}
TOKENS = torch.arange(3, 19)[None]

def attempt(function, *arguments, **keywords):
    try:
        return function(*arguments, **keywords)
    except LoraFactoryError as error:
        return str(error)

@torch.no_grad()
def fingerprint(model):
    return hashlib.sha256(model(TOKENS).logits.numpy().tobytes()).hexdigest()
"""


def ask(hub: LocalHub, code: str, **how: Any) -> Any:
    """Run a test's code after `HEAD`."""
    return hub.evaluate(HEAD + code, timeout=300.0, **how)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def publish_base(
    hub: LocalHub, pico_model_folder: Path, pico_encoder_folder: Path, folder: Path, base: str = "alice/base"
) -> Path:
    """Put a base model and an encoder on the hub, and a generator that names them into a folder."""
    card = "---\nlicense: mit\n---\n"
    hub.add_repo("alice/encoder", contents(pico_encoder_folder))
    hub.add_repo(base, {**contents(pico_model_folder), "README.md": card})
    commit = hub.repos["model", base].find().oid
    layout = attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]
    config = {**layout.lora_config, "task_type": "CAUSAL_LM"}
    layout = replace(layout, base_model=base, base_revision=commit, lora_config=config)
    generator = make_generator(layout, Path("alice/encoder"), "core")
    generator.save_pretrained(folder)
    return folder


def make_zoo(layout: AdapterLayout, folder: Path) -> None:
    """A zoo of one run with two snapshots."""
    record = RunRecord(
        task="poems",
        run="seed-0",
        descriptions=("Continue a poem",),
        seed=0,
        base_model=layout.base_model,
        base_revision=layout.base_revision,
        steps=2,
        snapshot_steps=(1, 2),
        validation_losses=(),
        train_tokens=1,
        data_fingerprint="f",
        versions={},
        license="mit",
    )
    snapshots = torch.stack([random_adapter(layout, seed) for seed in range(2)])
    AdapterZoo.create(folder, layout).add_run(record, snapshots)
