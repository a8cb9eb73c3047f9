"""Known tasks keep their own adapters; the network writes what is not recognised as one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.conditions import TASKS, WIDTH, normal
from helpers.training import make_zoo, prepared
from huggingface_hub.errors import StrictDataclassError
from lora_factory.generator.familiarity import measure_reach
from lora_factory.generator.recall import measure_recall, task_posterior

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.arguments import TrainArguments
from lora_factory.generator.configuration import CVAELoRAConfig
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.generator.networks import ConditionStandardiser
from lora_factory.training import from_zoo as reconstruction
from lora_factory.training.from_zoo import fit, remember
from lora_factory.zoo.store import AdapterZoo


@pytest.fixture(scope="module")
def layout(pico_model_folder: Path) -> AdapterLayout:
    from helpers.models import attach
    from transformers import LlamaForCausalLM

    return attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, layout: AdapterLayout) -> AdapterZoo:
    return make_zoo(tmp_path_factory.mktemp("recall") / "zoo", layout)


@pytest.fixture
def arguments(pico_encoder_folder: Path) -> TrainArguments:
    return TrainArguments(steps=1, batch_size=4, width=16, depth=1, text_encoder=str(pico_encoder_folder))


def make_features(apart: float, rows: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    centres = apart * normal(TASKS, WIDTH)
    return {"text": {f"task {n}": centres[n] + 0.3 * normal(rows, WIDTH, seed=n + 1) for n in range(TASKS)}}


def make_centres(features: dict[str, dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.stack([rows.mean(0) for rows in features["text"].values()])


def fitted(features: dict[str, dict[str, torch.Tensor]]) -> ConditionStandardiser:
    standardiser = ConditionStandardiser({"text": WIDTH}, {"text": TASKS})
    standardiser.fit({"text": make_centres(features)})
    return standardiser


def distinct(zoo: AdapterZoo, arguments: TrainArguments) -> tuple:
    """A generator and its zoo, with three descriptions a task that no other task's are like."""
    generator, weights, features = prepared(zoo, arguments)
    width = generator.config.modalities["text"]
    for number, task in enumerate(features["text"]):
        features["text"][task] = 3 * normal(1, width, seed=number) + 0.2 * normal(3, width, seed=99 + number)
    generator.fit_statistics(weights, features)
    return generator, weights, features


def test_a_known_tasks_adapter_is_exact_whatever_the_network_has_learned(
    zoo: AdapterZoo, arguments: TrainArguments
) -> None:
    generator, weights, features = distinct(zoo, arguments)
    fit(generator, weights, features, arguments, Accelerator(cpu=True))
    generator.eval()
    for task, rows in weights.items():
        written = generator.generate_vector({"text": features["text"][task].mean(0, keepdim=True)})[0]
        torch.testing.assert_close(written, rows.mean(0), rtol=0, atol=1e-3)


def test_far_from_all_tasks_the_network_writes_alone(zoo: AdapterZoo, arguments: TrainArguments) -> None:
    generator, weights, features = distinct(zoo, arguments)
    unrelated = {"text": torch.stack([rows.mean(0) for rows in features["text"].values()]).mean(0, keepdim=True)}
    alone = generator.eval().generate_vector(unrelated)
    remember(generator, weights, features)
    assert torch.equal(generator.generate_vector(unrelated), alone)
    near = {"text": features["text"]["code"].mean(0, keepdim=True)}
    assert not torch.allclose(generator.generate_vector(near), alone, atol=1e-3)
    assert torch.isfinite(generator.standard_vector({}, 1)).all()  # no condition: nothing to recognise


def test_what_is_remembered_is_saved_and_loaded(zoo: AdapterZoo, arguments: TrainArguments, tmp_path: Path) -> None:
    generator, weights, features = distinct(zoo, arguments)
    remember(generator, weights, features)
    generator.eval().save_pretrained(tmp_path / "generator")
    loaded = CVAELoRAGenerator.from_pretrained(tmp_path / "generator")
    condition = {"text": features["text"]["law"][:1]}
    assert loaded.config.recall == generator.config.recall
    torch.testing.assert_close(loaded.generate_vector(condition), generator.generate_vector(condition))
    generator.config.reach = {"text": generator.config.recall["text"][1:]}
    generator.save_pretrained(tmp_path / "generator")
    half = CVAELoRAGenerator.from_pretrained(tmp_path / "generator", dtype=torch.bfloat16)
    written = half.generate_vector({"text": condition["text"].bfloat16()}).float()
    torch.testing.assert_close(written, generator.generate_vector(condition), rtol=0, atol=0.02)


def test_a_zoo_too_large_to_remember_is_not(
    zoo: AdapterZoo, arguments: TrainArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconstruction, "RECALL_BYTES", 1000)
    generator, weights, features = prepared(zoo, arguments)
    fit(generator, weights, features, arguments, Accelerator(cpu=True))
    assert generator.config.recall is None
    assert "known_adapters" not in generator.state_dict()


def test_own_conditions_mean_their_task_and_modalities_add_up() -> None:
    features = make_features(3.0)
    standardiser = fitted(features)
    recall = measure_recall(standardiser, features)
    known = {"text": standardiser("text", make_centres(features))}
    conditions = {"text": standardiser("text", torch.stack([rows[2] for rows in features["text"].values()]))}
    posterior = task_posterior(recall, known, conditions)
    assert posterior.sum(1) == pytest.approx([1.0] * TASKS)
    assert torch.equal(posterior.argmax(1), torch.arange(TASKS))
    assert posterior.max(1).values.min() > 0.9
    twice = task_posterior(
        recall | {"image": recall["text"]},
        known | {"image": known["text"]},
        conditions | {"image": conditions["text"]},
    )
    expected = posterior.square() / posterior.square().sum(1, keepdim=True)
    torch.testing.assert_close(twice, expected, rtol=1e-3, atol=1e-5)


def test_descriptions_that_do_not_tell_the_tasks_apart_are_not_relied_upon(
    zoo: AdapterZoo, arguments: TrainArguments
) -> None:
    generator, weights, features = prepared(zoo, arguments)
    width = generator.config.modalities["text"]
    features = {"text": {task: normal(6, width, seed=number) for number, task in enumerate(weights)}}
    generator.fit_statistics(weights, features)
    assert not measure_recall(generator.standardiser, features)
    remember(generator, weights, features)
    assert generator.config.recall is None


def test_a_posterior_that_cannot_tell_leaves_the_network_alone(zoo: AdapterZoo, arguments: TrainArguments) -> None:
    generator, weights, features = distinct(zoo, arguments)
    condition = {"text": features["text"]["code"].mean(0, keepdim=True)}
    alone = generator.eval().generate_vector(condition)
    remember(generator, weights, features)
    generator.config.recall = {"text": [1e-9, *generator.config.recall["text"][1:]]}
    torch.testing.assert_close(generator.generate_vector(condition), alone, rtol=0, atol=1e-6)


def test_tasks_that_have_a_sibling_are_recognised_from_close_by_only() -> None:
    lone = make_features(3.0)["text"]
    siblings = {f"{name} b": rows + 0.4 * normal(1, WIDTH, seed=77) for name, rows in lone.items()}
    for features, limited in (({"text": lone}, False), ({"text": lone | siblings}, True)):
        standardiser = ConditionStandardiser({"text": WIDTH}, {"text": WIDTH})
        standardiser.fit({"text": make_centres(features)})
        ((_, near, far),) = measure_recall(standardiser, features).values()
        ((_, strict_near, strict_far),) = measure_recall(standardiser, features, strict=True).values()
        ((usual, believed),) = measure_reach(standardiser, features).values()
        assert near < far
        assert near == strict_near
        assert (near < usual) == limited
        assert (far < believed) == limited
        assert strict_far < believed


def test_a_condition_in_doubt_is_recognised_by_half_and_among_specialists_not_at_all(
    zoo: AdapterZoo, arguments: TrainArguments
) -> None:
    generator, weights, features = distinct(zoo, arguments)
    remember(generator, weights, features)
    centre = generator.known_coordinates("text")[:1]
    _, near, far = generator.config.recall["text"]
    nothing = torch.zeros(1, generator.layout.size)
    own = generator.recall(nothing, {"text": centre}).norm()

    def share(nearness: float) -> float:
        """Of its own adapter, for a condition so near to the first task, away from the others."""
        away = (near + (1 - nearness) * (far - near)) * torch.nn.functional.normalize(centre, dim=1)
        return float(generator.recall(nothing, {"text": centre + away}).norm() / own)

    expected = {1.0: 1.0, 0.95: 0.6, 0.8: 0.4, 0.4: 0.2, 0.0: 0.0}
    assert {nearness: share(nearness) for nearness in expected} == pytest.approx(expected, abs=0.02)
    generator.config.reach = measure_reach(generator.standardiser, features)
    strict = measure_recall(generator.standardiser, features, strict=True)
    assert strict["text"][2] < near + 0.2 * (far - near)
    generator.config.recall = strict
    assert share(0.6) == 0
    assert share(1.0) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("recall", [{"text": [1.0, 2.0]}, {"text": [1.0, 3.0, 2.0]}, {"image": [1.0, 2.0, 3.0]}, {}])
def test_a_recall_that_makes_no_sense_is_refused(recall: dict, layout: AdapterLayout) -> None:
    with pytest.raises(StrictDataclassError, match="recall"):
        CVAELoRAConfig(layout=layout.to_dict(), modalities={"text": 8}, recall=recall)


def test_large_batches_go_in_parts_with_nearly_the_same_result(
    zoo: AdapterZoo, arguments: TrainArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for size in (reconstruction.CHUNK_BYTES, 4 * 2 * zoo.layout.size):
        monkeypatch.setattr(reconstruction, "CHUNK_BYTES", size)
        generator, weights, features = prepared(zoo, arguments)
        parts = reconstruction.parts_of(generator, 7)
        assert [row for part in parts for row in range(7)[part]] == list(range(7))
        history = fit(generator, weights, features, arguments, Accelerator(cpu=True))
        losses.append(history[-1]["reconstruction"])
    assert len(parts) == 4
    assert losses[1] == pytest.approx(losses[0], rel=0.3)
