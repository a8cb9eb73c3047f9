"""The networks of the conditional VAE: Gaussians, conditions, and the two decoders alike."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.models import attach
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.generator.configuration import PAPER_CHANNELS, paper_channels
from lora_factory.generator.networks import ConditionStandardiser, ConvCVAE, Gaussian, TokenCVAE

WIDTHS = {"text": 5, "hidden": 3}
NUMBERS = st.floats(-8, 8, allow_nan=False, width=32)
GAUSSIANS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=3, max_size=3).map(
    lambda rows: Gaussian(*torch.tensor(rows, dtype=torch.float64).T[:, None])
)


@pytest.fixture(scope="module")
def layout(pico_model_folder: Path) -> AdapterLayout:
    return attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]


@pytest.fixture(params=["token", "conv1d"])
def network(request: pytest.FixtureRequest, layout: AdapterLayout) -> TokenCVAE | ConvCVAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "token":
            network: TokenCVAE | ConvCVAE = TokenCVAE(layout, WIDTHS, width=16, depth=2, latent_size=4)
        else:
            network = ConvCVAE(layout, WIDTHS, channels=(2, 3, 2), latent_size=4)
        with torch.no_grad():
            for parameter in network.parameters():  # as if trained: no layer is left at zero
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return network


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conditions(batch: int) -> dict[str, torch.Tensor]:
    return {name: normal(batch, width, seed=width) for name, width in WIDTHS.items()}


@given(GAUSSIANS)
@settings(max_examples=50, deadline=None)
def test_kl_of_a_gaussian_with_itself_is_zero(gaussian: Gaussian) -> None:
    assert gaussian.kl(gaussian).abs().max() == 0


@given(GAUSSIANS, GAUSSIANS)
@settings(max_examples=50, deadline=None)
def test_kl_is_the_textbook_one_and_not_negative(left: Gaussian, right: Gaussian) -> None:
    kl = left.kl(right)
    normals = [torch.distributions.Normal(g.mean, torch.exp(0.5 * g.log_variance)) for g in (left, right)]
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(*normals), rtol=1e-6, atol=1e-9)
    assert kl.min() >= -1e-12


def test_samples_have_the_mean_and_spread_asked_for() -> None:
    gaussian = Gaussian(torch.full((2000, 2), 3.0), torch.full((2000, 2), math.log(4)))
    for temperature in (0.5, 1.0):
        sample = gaussian.sample(temperature, torch.Generator().manual_seed(0))
        assert abs(sample.mean() - 3) < 0.1 * temperature
        assert abs(sample.std() - 2 * temperature) < 0.1 * temperature
    assert torch.equal(gaussian.sample(0), gaussian.mean)
    assert torch.equal(gaussian.sample(1.0, torch.Generator().manual_seed(0)), sample)


def test_task_vectors_become_coordinates_in_what_tells_tasks_apart() -> None:
    standardiser = ConditionStandardiser({"text": 50, "hidden": 3, "constant": 2}, {"text": 6})
    assert standardiser.widths == {"text": 6, "hidden": 3, "constant": 2}
    rows = {"text": 100 + 7 * normal(6, 50), "hidden": 1e-3 * normal(6, 3), "constant": torch.ones(6, 2)}
    standardiser.fit(rows)
    for name, spanned in (("text", 5), ("hidden", 3)):
        standard = standardiser(name, rows[name])
        torch.testing.assert_close(standard.mean(0), torch.zeros(standardiser.widths[name]), rtol=0, atol=1e-4)
        assert float(standard.square().sum(1).mean()) == pytest.approx(spanned, rel=1e-3)
        centred = rows[name] - rows[name].mean(0)  # distances between tasks stay what they were, but for the unit
        ratio = torch.pdist(standard) / torch.pdist(centred)
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0)
        assert float(centred.norm(dim=1).square().mean().sqrt()) == pytest.approx(standardiser.length(name), rel=1e-3)
    assert torch.equal(standardiser("constant", rows["constant"]), torch.zeros(6, 2))


def test_what_no_task_differs_in_is_not_listened_to() -> None:
    standardiser = ConditionStandardiser({"text": 50}, {"text": 6})
    rows = normal(6, 50)
    standardiser.fit({"text": rows})
    foreign = normal(1, 50, seed=1)[0]
    centred = rows - rows.mean(0)
    foreign -= centred.T @ torch.linalg.lstsq(centred.T, foreign[:, None]).solution[:, 0]
    torch.testing.assert_close(
        standardiser("text", rows[:1] + 10 * foreign), standardiser("text", rows[:1]), rtol=0, atol=1e-3
    )


def test_what_examples_of_one_task_differ_in_is_listened_to_less() -> None:
    tasks, nuisance = 4 * normal(5, 30), 20 * torch.nn.functional.normalize(normal(1, 30, seed=1))
    scatter = normal(400, 1, seed=2) * nuisance + normal(400, 30, seed=3)
    plain, white = (ConditionStandardiser({"hidden": 30}, {}) for _ in range(2))
    plain.fit({"hidden": tasks})
    white.fit({"hidden": tasks}, {"hidden": scatter})
    assert white.spanned("hidden") == 4
    moved = {}
    for name, standardiser in (("plain", plain), ("white", white)):
        known = standardiser("hidden", tasks)
        moved[name] = (standardiser("hidden", tasks + nuisance) - known).norm(dim=1).mean() / torch.pdist(known).mean()
    assert moved["white"] < 0.2 * moved["plain"]
    zero = ConditionStandardiser({"hidden": 30}, {})
    zero.fit({"hidden": tasks}, {"hidden": torch.zeros(7, 30)})  # examples that do not differ change nothing
    torch.testing.assert_close(zero("hidden", tasks), plain("hidden", tasks))


def test_shapes_and_gradients(network: TokenCVAE | ConvCVAE, layout: AdapterLayout) -> None:
    network.train()
    loss = torch.zeros(())
    for given_conditions in (conditions(4), {}):  # without a condition, learned stand-ins are used
        weights = normal(4, layout.size).requires_grad_()
        condition = network.embed_condition(given_conditions, 4)
        posterior, prior = network.posterior(weights, condition), network.prior(condition)
        mean, log_std = network.decode(posterior.sample(generator=torch.Generator().manual_seed(0)), condition)
        assert posterior.mean.shape == posterior.log_variance.shape == prior.mean.shape == (4, 4)
        assert mean.shape == log_std.shape == (4, layout.size)
        reconstructed = (mean - weights.detach()).square().mean() + torch.exp(log_std).mean()
        loss = loss + reconstructed + posterior.kl(prior).mean()
        assert torch.autograd.grad(mean.square().sum(), weights, retain_graph=True)[0].abs().sum() > 0
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert sum(bool(gradient.any()) for gradient in gradients.values()) > 0.8 * len(gradients)


def test_every_condition_counts(network: TokenCVAE | ConvCVAE) -> None:
    network.eval()
    both = conditions(2)
    latent = normal(2, 4)

    def decoded(vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        return network.decode(latent, network.embed_condition(vectors, 2))[0]

    results = [decoded(both), decoded({"text": both["text"]}), decoded({"hidden": both["hidden"]}), decoded({})]
    for index, result in enumerate(results):
        assert result.isfinite().all()
        assert not any(torch.allclose(result, other) for other in results[:index])


def test_rows_of_a_batch_do_not_mix(network: TokenCVAE | ConvCVAE, layout: AdapterLayout) -> None:
    network.eval()
    weights, both = normal(3, layout.size), conditions(3)
    condition = network.embed_condition(both, 3)
    posterior = network.posterior(weights, condition)
    mean, _ = network.decode(posterior.mean, condition)
    for row in range(3):
        alone = network.embed_condition({name: vectors[row : row + 1] for name, vectors in both.items()}, 1)
        torch.testing.assert_close(network.posterior(weights[row : row + 1], alone).mean[0], posterior.mean[row])
        torch.testing.assert_close(network.decode(posterior.mean[row : row + 1], alone)[0][0], mean[row])


def test_absurd_weights_give_finite_divergences(network: TokenCVAE | ConvCVAE, layout: AdapterLayout) -> None:
    network.eval()
    condition = network.embed_condition(conditions(2), 2)
    posterior = network.posterior(1e6 * normal(2, layout.size), condition)
    assert posterior.log_variance.abs().max() <= 10
    assert posterior.kl(network.prior(condition)).isfinite().all()


def test_prior_listens_to_the_condition_in_the_token_network_alone(network: TokenCVAE | ConvCVAE) -> None:
    prior = network.prior(network.embed_condition(conditions(2), 2))
    if isinstance(network, TokenCVAE):
        assert not torch.allclose(prior.mean[0], prior.mean[1])
    else:
        assert not prior.mean.any() and not prior.log_variance.any()


@pytest.mark.parametrize("channels", [(2,), (2, 3), (1, 2, 3, 4, 2), (2,) * 9])
def test_convolutions_fit_any_number_of_weights(layout: AdapterLayout, channels: tuple[int, ...]) -> None:
    for widths in ({"text": 1}, {"text": 6}):
        network = ConvCVAE(layout, widths, channels=channels, latent_size=2).eval()
        condition = network.embed_condition({"text": normal(2, widths["text"])}, 2)
        latent = network.posterior(normal(2, layout.size), condition).mean
        assert network.decode(latent, condition)[0].shape == (2, layout.size)


def test_a_deep_convolutional_network_stays_as_long_as_its_input(layout: AdapterLayout) -> None:
    network = ConvCVAE(layout, {"text": 3}, channels=paper_channels(20), latent_size=4).eval()
    lengths = []
    for layer in network.decoder:
        layer.register_forward_hook(lambda _module, _inputs, output: lengths.append(output.shape[-1]))
    condition = network.embed_condition({"text": normal(1, 3)}, 1)
    mean, _ = network.decode(normal(1, 4), condition)
    assert mean.shape == (1, layout.size) and max(lengths) < 2 * (layout.size + 3)
    assert network.posterior(normal(1, layout.size), condition).mean.shape == (1, 4)
    assert len(network.encoder) == len(network.decoder) == 20


@pytest.mark.parametrize(("depth", "middle"), [(10, (128, 128)), (11, (128, 256, 128)), (12, PAPER_CHANNELS[4:8])])
def test_channels_double_and_halve(depth: int, middle: tuple[int, ...]) -> None:
    channels = paper_channels(depth)
    assert len(channels) == depth and channels == channels[::-1] and channels[0] == 8
    start = (depth - len(middle)) // 2
    assert channels[start : start + len(middle)] == middle
    assert paper_channels(12) == PAPER_CHANNELS and max(paper_channels(20)) == 256
