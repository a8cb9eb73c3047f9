"""Stage 2: several adapters in one forward pass, and a generator trained on the tasks' own loss."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.stage_2 import SETTINGS, CutOff, make_tasks, prepared
from peft import get_peft_model_state_dict
from torch import nn
from transformers import LlamaForCausalLM

from lora_factory.adapters.attach import AdapterSlot, adapters_in_batch, wrap_base
from lora_factory.arguments import TrainArguments
from lora_factory.collection.collect import collect_adapters
from lora_factory.collection.trainer import LoRATrainer
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.models.loading import load_base_model
from lora_factory.models.losses import query_loss
from lora_factory.tasks.task import Task
from lora_factory.training import from_data as through_base
from lora_factory.training.from_data import TaskData, train_through_base
from lora_factory.training.train import train_generator
from lora_factory.utils.checkpoint import TrainingCheckpoint
from lora_factory.zoo.store import AdapterZoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, pico_model_folder: Path) -> AdapterZoo:
    return collect_adapters(make_tasks(), pico_model_folder, tmp_path_factory.mktemp("stage2") / "zoo", SETTINGS)


@pytest.fixture
def trainer(pico_model_folder: Path, zoo: AdapterZoo) -> LoRATrainer:
    model, tokenizer = load_base_model(pico_model_folder)
    return LoRATrainer.attach(model, tokenizer, SETTINGS, zoo.layout.base_model, Accelerator(cpu=True))


@pytest.fixture
def arguments(pico_encoder_folder: Path) -> TrainArguments:
    return TrainArguments(
        text_encoder=str(pico_encoder_folder),
        width=32,
        base_steps=60,
        base_tasks=3,
        base_learning_rate=5e-3,
        base_bias_learning_rate=2e-2,
    )


def test_a_start_that_no_step_improves_on_is_kept(
    zoo: AdapterZoo, trainer: LoRATrainer, arguments: TrainArguments
) -> None:
    generator, data = prepared(zoo, trainer, arguments)
    train_through_base(generator, trainer, data, arguments)
    before = generator.bias.detach().clone()
    rates = {"base_steps": 3, "base_learning_rate": 3.0, "base_bias_learning_rate": 3.0}
    history = train_through_base(generator, trainer, data, replace(arguments, **rates))
    assert torch.equal(generator.bias, before)
    assert [row["step"] for row in history] == [1, 2, 3]


def test_adapters_in_a_batch_give_what_the_slot_gives(zoo: AdapterZoo, trainer: LoRATrainer) -> None:
    adapters = torch.stack([zoo.final(name, "seed-0") for name in zoo.tasks])
    ids = torch.randint(3, 300, (6, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with trainer.slot.disabled(), adapters_in_batch(trainer.model, trainer.layout, adapters):
            together = trainer.model(ids).logits
        for index, adapter in enumerate(adapters):
            trainer.slot.load(adapter)
            alone = trainer.model(ids[2 * index : 2 * index + 2]).logits
            torch.testing.assert_close(together[2 * index : 2 * index + 2], alone, atol=1e-4, rtol=1e-4)
        with trainer.slot.disabled():
            assert not torch.allclose(trainer.model(ids).logits, together)  # and the hooks are gone


def test_label_smoothing_is_that_of_the_cross_entropy(zoo: AdapterZoo, trainer: LoRATrainer) -> None:
    adapters, rows = zoo.final("code", "seed-0")[None], trainer.encode(make_tasks()[1].examples("train"))[:3]
    with torch.no_grad(), trainer.slot.disabled():
        plain, smooth, all_smooth = (
            query_loss(trainer, adapters, [rows], label_smoothing=share) for share in (0.0, 0.25, 1.0)
        )
    assert all_smooth > plain
    torch.testing.assert_close(smooth, 0.75 * plain + 0.25 * all_smooth)
    with pytest.raises(LoraFactoryError, match=r"base_label_smoothing=1\.5 must be at least 0 and below 1"):
        TrainArguments(base_label_smoothing=1.5)


def test_gradient_checkpointing_computes_twice_and_changes_nothing(
    zoo: AdapterZoo, arguments: TrainArguments, pico_model_folder: Path
) -> None:
    trained, passes = [], []
    for checkpointing in (False, True):
        model, tokenizer = load_base_model(pico_model_folder)
        settings = replace(SETTINGS, gradient_checkpointing=checkpointing)
        trainer = LoRATrainer.attach(model, tokenizer, settings, zoo.layout.base_model, Accelerator(cpu=True))
        generator, data = prepared(zoo, trainer, arguments)
        count = [0]
        layer = trainer.model.get_base_model().model.layers[0].mlp
        layer.register_forward_pre_hook(
            lambda *_, count=count: count.__setitem__(0, count[0] + torch.is_grad_enabled())
        )
        train_through_base(generator, trainer, data, replace(arguments, base_steps=5))
        trained.append(generator.bias.detach().clone())
        passes.append(count[0])
    assert passes == [5, 10]
    torch.testing.assert_close(trained[0], trained[1], rtol=0, atol=1e-5)


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


def test_a_batch_that_cannot_be_shared_is_refused(zoo: AdapterZoo, trainer: LoRATrainer) -> None:
    adapters = torch.zeros(2, trainer.layout.size)
    with adapters_in_batch(trainer.model, trainer.layout, adapters), pytest.raises(LoraFactoryError, match="3 rows"):
        trainer.model(torch.ones(3, 4, dtype=torch.long))
    other = LlamaForCausalLM(trainer.model.config.__class__(num_hidden_layers=1, hidden_size=32, vocab_size=300))
    with pytest.raises(LoraFactoryError, match="has no module"), adapters_in_batch(other, trainer.layout, adapters):
        pass
    assert not any(module._forward_hooks for module in other.modules())


def test_query_loss_is_the_models_own_and_reaches_the_adapter(zoo: AdapterZoo, trainer: LoRATrainer) -> None:
    sequences = trainer.validation(make_tasks()[0])
    adapter = zoo.final(zoo.tasks[0], "seed-0").requires_grad_(True)
    with trainer.slot.disabled():
        loss = query_loss(trainer, adapter[None], [sequences])
    loss.backward()
    assert adapter.grad is not None and torch.isfinite(adapter.grad).all() and adapter.grad.abs().max() > 0
    trainer.slot.load(adapter.detach())
    assert float(loss.detach()) == pytest.approx(trainer.loss(sequences), rel=1e-4)
    assert all(parameter.grad is None for parameter in trainer.model.get_base_model().parameters())


def test_support_and_queries_share_no_example(zoo: AdapterZoo, trainer: LoRATrainer) -> None:
    task = Task.from_examples("letters", ["Letters."], list("abcdefgh"), ["x"], ["y"])
    hidden = torch.arange(8.0)[:, None]
    data = TaskData.read(task, trainer, torch.zeros(1, 4), hidden)
    texts = ["".join(trainer.tokenizer.decode(row.tokens) for row in half.sequences) for half in data.halves]
    assert [half.hidden.flatten().tolist() for half in data.halves] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert all(letter in texts[0] and letter not in texts[1] for letter in "aceg")
    assert all(letter in texts[1] and letter not in texts[0] for letter in "bdfh")


def test_a_stretch_is_of_the_sequences_of_its_examples(trainer: LoRATrainer) -> None:
    letters = [letter * 40 for letter in "abcdefghijkl"]  # more than one sequence each
    task = Task.from_examples("letters", ["Letters."], letters, ["x"], ["y"])
    half = TaskData.read(task, trainer, torch.zeros(1, 4), torch.zeros(12, 1)).halves[1]
    assert half.owners == sorted(half.owners) and set(half.owners) <= set(range(6))
    for example, letter in enumerate("bdfhjl"):
        begun = [half.sequences[index] for index in half.window(example, example + 1)]
        assert all(letter in trainer.tokenizer.decode(sequence.tokens) for sequence in begun)
    assert list(half.window(0, 6)) == list(range(len(half.sequences)))


def test_training_through_the_base_learns_the_tasks_and_listens(
    zoo: AdapterZoo, trainer: LoRATrainer, arguments: TrainArguments
) -> None:
    generator, data = prepared(zoo, trainer, arguments)
    before = through_base.validate(generator, trainer, data)
    history = train_through_base(generator, trainer, data, replace(arguments, base_steps=150, base_mixtures=0.2))
    assert history[-1]["step"] == 150 and history[-1]["tokens"] > 150 * 3 * 2 * 10
    after = through_base.validate(generator, trainer, data)
    assert after < before - 0.5 and after == pytest.approx(min(row["validation"] for row in history), abs=1e-3)
    assert not generator.bias.requires_grad
    losses = {}
    for asked in data:
        vector = generator.generate_vector({"hidden": data[asked].halves[0].hidden.mean(0, keepdim=True)}).detach()
        with torch.no_grad(), trainer.slot.disabled():
            for task in data:
                losses[asked, task] = float(query_loss(trainer, vector, [data[task].validation]))
    for task in data:
        assert losses[task, task] == min(losses[asked, task] for asked in data), losses


def test_the_same_seed_gives_the_same_generator(
    zoo: AdapterZoo, trainer: LoRATrainer, arguments: TrainArguments
) -> None:
    trained = []
    for seed in (0, 0, 1):
        generator, data = prepared(zoo, trainer, arguments)
        train_through_base(generator, trainer, data, replace(arguments, base_steps=5, seed=seed))
        trained.append(generator.bias.detach().clone())
    assert torch.equal(trained[0], trained[1]) and not torch.equal(trained[0], trained[2])


def test_a_loss_that_is_not_finite_stops(zoo: AdapterZoo, trainer: LoRATrainer, arguments: TrainArguments) -> None:
    generator, data = prepared(zoo, trainer, arguments)
    with torch.no_grad():
        generator.bias.fill_(torch.inf)
    with pytest.raises(LoraFactoryError, match="lower base_learning_rate"):
        train_through_base(generator, trainer, data, arguments)


def test_train_generator_runs_stage_2_and_says_what_it_lacks(
    zoo: AdapterZoo, arguments: TrainArguments, tmp_path: Path, pico_model_folder: Path
) -> None:
    few = replace(arguments, base_steps=4)
    with pytest.raises(LoraFactoryError, match="needs the tasks' examples"):
        train_generator(zoo, tmp_path / "generator", few)
    train_generator(zoo, tmp_path / "generator", few, tasks=make_tasks(), base_model=pico_model_folder)
    generator = CVAELoRAGenerator.from_pretrained(tmp_path / "generator")
    assert set(generator.config.modalities) == {"text", "hidden"}
    zoo.layout.check(generator.generate_state_dict("Write prose."))
    sampled = [generator.generate_state_dict("Write prose.", temperature=1.0, seed=seed) for seed in (0, 1)]
    assert any(not torch.equal(sampled[0][key], sampled[1][key]) for key in sampled[0])


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


def test_a_training_that_was_cut_off_ends_as_if_it_had_not_been(
    zoo: AdapterZoo,
    trainer: LoRATrainer,
    arguments: TrainArguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = replace(arguments, base_steps=20)
    generator, data = prepared(zoo, trainer, short)
    whole = train_through_base(generator, trainer, data, short)
    expected = {name: value.clone() for name, value in generator.state_dict().items()}

    def checkpoint(key: str = "this") -> TrainingCheckpoint:
        return TrainingCheckpoint(tmp_path / "state", key, every_seconds=0)

    query, calls = through_base.query_loss, []

    def cut_off(*words: Any, **options: Any) -> torch.Tensor:
        calls.append(words)
        if len(calls) == 40:
            raise CutOff
        return query(*words, **options)

    generator, data = prepared(zoo, trainer, short)
    monkeypatch.setattr(through_base, "query_loss", cut_off)
    with pytest.raises(CutOff):
        train_through_base(generator, trainer, data, short, checkpoint=checkpoint())
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    before = len(calls)
    generator, data = prepared(zoo, trainer, short)
    history = train_through_base(generator, trainer, data, short, checkpoint=checkpoint())
    again = len(calls) - before
    assert history == whole and 0 < again < 60
    assert all(torch.equal(value, expected[name]) for name, value in generator.state_dict().items())
    generator, data = prepared(zoo, trainer, short)  # the state of another training is left alone
    train_through_base(generator, trainer, data, replace(short, base_steps=2), checkpoint=checkpoint("other"))


TWO_PROCESSES = """
import sys, torch
import os
import subprocess
import sys
from dataclasses import replace
from accelerate import Accelerator
from lora_factory.arguments import TrainArguments
from lora_factory.models.loading import load_base_model
from lora_factory.collection.trainer import LoRATrainer
from lora_factory.training.specialists import specialise
from lora_factory.utils.cache import TensorCache
from lora_factory.training.from_data import train_through_base
from lora_factory.zoo.store import AdapterZoo
from helpers.stage_2 import SETTINGS, make_tasks, prepared

zoo, accelerator = AdapterZoo(sys.argv[1]), Accelerator(cpu=True)
model, tokenizer = load_base_model(sys.argv[2])
trainer = LoRATrainer.attach(model, tokenizer, SETTINGS, zoo.layout.base_model, accelerator)
arguments = TrainArguments(text_encoder=sys.argv[3], width=16, steps=2, base_steps=3, specialist_steps=2)
generator, data = prepared(zoo, trainer, arguments)
history = train_through_base(generator, trainer, data, arguments)
features = {"text": {name: rows.texts for name, rows in data.items()}}
features["hidden"] = {name: rows.halves[0].hidden for name, rows in data.items()}
last = specialise(generator, trainer, make_tasks(), data, features, arguments, TensorCache(sys.argv[4]))
assert last["tokens"] > 3 * 24
weights = torch.cat([value.flatten() for value in generator.state_dict().values()])
both = accelerator.gather(weights[None])
assert accelerator.num_processes == 2 and torch.equal(both[0], both[1])
if accelerator.is_main_process:
    print("tokens", history[-1]["tokens"])
accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_one_generator(
    zoo: AdapterZoo, pico_model_folder: Path, pico_encoder_folder: Path, tmp_path: Path, trainer: LoRATrainer
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
    alone = TrainArguments(text_encoder=str(pico_encoder_folder), width=16, base_steps=3)
    generator, data = prepared(zoo, trainer, alone)
    tokens = train_through_base(generator, trainer, data, alone)[-1]["tokens"]
    assert int(done.stdout.split("tokens")[1]) > 1.5 * tokens
