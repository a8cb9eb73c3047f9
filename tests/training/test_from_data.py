"""Several adapters in one forward pass, the loss of tasks' examples, and stage 2 on several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.stage_2 import NAMES, SETTINGS, make_tasks, prepared
from peft import get_peft_model_state_dict
from torch import nn
from transformers import LlamaForCausalLM

from lora_factory.adapters.attach import AdapterSlot, adapters_in_batch, wrap_base
from lora_factory.arguments import TrainArguments
from lora_factory.collection.collect import collect_adapters
from lora_factory.collection.trainer import AdapterFactory
from lora_factory.errors import LoraFactoryError
from lora_factory.models.loading import load_base_model
from lora_factory.models.losses import query_loss
from lora_factory.training.specialists import train_specialists
from lora_factory.training.train import zoo_factory
from lora_factory.utils.cache import TensorCache
from lora_factory.zoo.store import AdapterZoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, pico_model_folder: Path) -> AdapterZoo:
    return collect_adapters(make_tasks(), pico_model_folder, tmp_path_factory.mktemp("stage2") / "zoo", SETTINGS)


@pytest.fixture
def factory(pico_model_folder: Path, zoo: AdapterZoo) -> AdapterFactory:
    model, tokenizer = load_base_model(pico_model_folder)
    return AdapterFactory.attach(model, tokenizer, SETTINGS, zoo.layout.base_model, Accelerator(cpu=True))


@pytest.fixture
def arguments(pico_encoder_folder: Path) -> TrainArguments:
    return TrainArguments(
        text_encoder=str(pico_encoder_folder),
        width=32,
        depth=1,
        steps=2,
        specialist_steps=3,
    )


def test_gradient_checkpointing_computes_twice_and_changes_nothing(
    zoo: AdapterZoo, arguments: TrainArguments, pico_model_folder: Path, tmp_path: Path
) -> None:
    trained, passes = [], []
    for checkpointing in (False, True):
        factory = zoo_factory(
            zoo, pico_model_folder, Accelerator(cpu=True), zoo.layout, gradient_checkpointing=checkpointing
        )
        generator, data = prepared(zoo, factory, arguments)
        features = {
            "text": {name: rows.texts for name, rows in data.items()},
            "hidden": {name: rows.hidden for name, rows in data.items()},
        }
        count = [0]
        layer = factory.model.get_base_model().model.layers[0].mlp
        layer.register_forward_pre_hook(
            lambda *_, count=count: count.__setitem__(0, count[0] + torch.is_grad_enabled())
        )
        cache = TensorCache(tmp_path / str(checkpointing))
        weights, _, _ = train_specialists(generator, factory, make_tasks(), features, arguments, cache)
        trained.append(torch.stack(list(weights.values())))
        passes.append(count[0])
    assert passes == [3 * 3, 2 * 3 * 3]
    torch.testing.assert_close(trained[0], trained[1], rtol=0, atol=1e-5)


def test_adapters_in_a_batch_give_what_the_slot_gives(zoo: AdapterZoo, factory: AdapterFactory) -> None:
    adapters = torch.stack([zoo.final(name, "seed-0") for name in zoo.tasks])
    ids = torch.randint(3, 300, (6, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with factory.slot.disabled(), adapters_in_batch(factory.model, factory.layout, adapters):
            together = factory.model(ids).logits
        for index, adapter in enumerate(adapters):
            factory.slot.load(adapter)
            alone = factory.model(ids[2 * index : 2 * index + 2]).logits
            torch.testing.assert_close(together[2 * index : 2 * index + 2], alone, atol=1e-4, rtol=1e-4)
        with factory.slot.disabled():
            assert not torch.allclose(factory.model(ids).logits, together)  # and the hooks are gone


class Convolutional(nn.Module):
    """Embedding, 2-D convolution and a linear layer: every kind of module that carries LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 9)
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(4, 5)
        self.config = type("Config", (), {"model_type": "none", "to_dict": dict})()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(self.embed(ids)[:, None]).mean((2, 3)))


def test_embeddings_and_convolutions_take_adapters_in_a_batch() -> None:
    from peft import LoraConfig, get_peft_model

    from lora_factory.adapters.layout import AdapterLayout

    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["embed", "conv", "head"], init_lora_weights=False)
    model = get_peft_model(Convolutional(), config)
    state_dict = get_peft_model_state_dict(model, save_embedding_layers=False)
    layout = AdapterLayout.from_state_dict(state_dict, config, base_model="none")
    adapters = torch.randn(2, layout.size)
    ids = torch.randint(20, (4, 7))
    slot = AdapterSlot(model, layout)
    with torch.no_grad():
        with slot.disabled(), adapters_in_batch(model, layout, adapters):
            together = model(ids)
        for index in (0, 1):
            slot.load(adapters[index])
            part = slice(2 * index, 2 * index + 2)
            torch.testing.assert_close(together[part], model(ids[part]), atol=1e-4, rtol=1e-4)


def test_a_batch_that_cannot_be_shared_is_refused(zoo: AdapterZoo, factory: AdapterFactory) -> None:
    adapters = torch.zeros(2, factory.layout.size)
    with adapters_in_batch(factory.model, factory.layout, adapters), pytest.raises(LoraFactoryError, match="3 rows"):
        factory.model(torch.ones(3, 4, dtype=torch.long))
    other = LlamaForCausalLM(factory.model.config.__class__(num_hidden_layers=1, hidden_size=32, vocab_size=300))
    with pytest.raises(LoraFactoryError, match="has no module"), adapters_in_batch(other, factory.layout, adapters):
        pass
    assert not any(module._forward_hooks for module in other.modules())


def test_query_loss_is_the_models_own_and_reaches_the_adapter(zoo: AdapterZoo, factory: AdapterFactory) -> None:
    sequences = factory.validation(make_tasks()[0])
    adapter = zoo.final(zoo.tasks[0], "seed-0").requires_grad_(True)
    with factory.slot.disabled():
        loss = query_loss(factory, adapter[None], [sequences])
    loss.backward()
    assert adapter.grad is not None and torch.isfinite(adapter.grad).all() and adapter.grad.abs().max() > 0
    factory.slot.load(adapter.detach())
    assert float(loss.detach()) == pytest.approx(factory.loss(sequences), rel=1e-4)
    assert all(parameter.grad is None for parameter in factory.model.get_base_model().parameters())


def test_the_base_model_may_have_no_slot(zoo: AdapterZoo, pico_model_folder: Path) -> None:
    model, _ = load_base_model(pico_model_folder)
    ids = torch.ones(2, 5, dtype=torch.long)
    adapter = zoo.final(zoo.tasks[0], "seed-0")
    with torch.no_grad():
        with adapters_in_batch(model, zoo.layout, adapter[None]):
            plain = model(ids).logits
        wrapped = wrap_base(model, zoo.layout.peft_config())
        AdapterSlot(wrapped, zoo.layout).load(adapter)
        torch.testing.assert_close(plain, wrapped(ids).logits, atol=1e-4, rtol=1e-4)


TWO_PROCESSES = """
import sys, torch
from accelerate import Accelerator
from lora_factory.arguments import TrainArguments
from lora_factory.models.loading import load_base_model
from lora_factory.collection.trainer import AdapterFactory
from lora_factory.training.specialists import specialise
from lora_factory.utils.cache import TensorCache
from lora_factory.zoo.store import AdapterZoo
from helpers.stage_2 import SETTINGS, make_tasks, prepared

zoo, accelerator = AdapterZoo(sys.argv[1]), Accelerator(cpu=True)
model, tokenizer = load_base_model(sys.argv[2])
factory = AdapterFactory.attach(model, tokenizer, SETTINGS, zoo.layout.base_model, accelerator)
arguments = TrainArguments(text_encoder=sys.argv[3], width=16, steps=2, depth=1, specialist_steps=2)
generator, data = prepared(zoo, factory, arguments)
features = {"text": {name: rows.texts for name, rows in data.items()}}
features["hidden"] = {name: rows.hidden for name, rows in data.items()}
last = specialise(generator, factory, make_tasks(), data, features, arguments, TensorCache(sys.argv[4]))
weights = torch.cat([value.flatten() for value in generator.state_dict().values()])
both = accelerator.gather(weights[None])
assert accelerator.num_processes == 2 and torch.equal(both[0], both[1])
if accelerator.is_main_process:
    print("tokens", last["tokens"])
accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_one_generator(
    zoo: AdapterZoo, pico_model_folder: Path, pico_encoder_folder: Path, tmp_path: Path, factory: AdapterFactory
) -> None:
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [
        str(script),
        str(zoo.folder),
        str(pico_model_folder),
        str(pico_encoder_folder),
        str(tmp_path / "cache"),
    ]
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-9000:]
    assert int(done.stdout.split("tokens")[1]) > len(NAMES) * 2 * 24  # of the tasks of both processes
