"""The networks of the conditional VAE: Gaussians, conditions, the network over cores and the paper's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_factory.generator.configuration import PAPER_CHANNELS, paper_channels
from lora_factory.generator.conv1d import ConvCVAE
from lora_factory.generator.networks import ConditionStandardiser, CoreCVAE, Gaussian

WIDTHS = {"text": 5, "hidden": 3}
SIZE = 61
NUMBERS = st.floats(-8, 8, allow_nan=False, width=32)
GAUSSIANS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=3, max_size=3).map(
    lambda rows: Gaussian(*torch.tensor(rows, dtype=torch.float64).T[:, None])
)


@pytest.fixture(params=["core", "conv1d"])
def network(request: pytest.FixtureRequest) -> CoreCVAE | ConvCVAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "core":
            network: CoreCVAE | ConvCVAE = CoreCVAE(SIZE, WIDTHS, latents=4, width=16, depth=2)
        else:
            network = ConvCVAE(SIZE, WIDTHS, channels=(2, 3, 2), latent_size=4)
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
    standardiser = ConditionStandardiser(
        {"image": 50, "hidden": 3, "text": 4, "constant": 2}, {"image": 50, "hidden": 3, "constant": 2}
    )
    rows = {"image": 100 + 7 * normal(6, 50), "hidden": 1e-3 * normal(6, 3), "constant": torch.ones(6, 2)}
    rows["text"] = 3 + normal(6, 4)
    standardiser.fit(rows)
    for name, spanned in (("image", 5), ("hidden", 3), ("text", 4)):
        standard = standardiser(name, rows[name])
        torch.testing.assert_close(standard.mean(0), torch.zeros(standardiser.coordinates[name]), rtol=0, atol=1e-4)
        assert float(standard.square().sum(1).mean()) == pytest.approx(spanned, rel=1e-3)
        centred = rows[name] - rows[name].mean(0)  # distances between tasks stay what they were, but for the unit
        ratio = torch.pdist(standard) / torch.pdist(centred)
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0)
        assert float(centred.norm(dim=1).square().mean().sqrt()) == pytest.approx(standardiser.length(name), rel=1e-3)
    assert torch.equal(standardiser("constant", rows["constant"]), torch.zeros(6, 2))


def test_what_no_task_differs_in_is_not_listened_to_but_in_texts() -> None:
    standardiser = ConditionStandardiser({"image": 50, "text": 50}, {"image": 50})
    rows = normal(6, 50)
    standardiser.fit({"image": rows, "text": rows})
    foreign = normal(1, 50, seed=1)[0]
    centred = rows - rows.mean(0)
    foreign -= centred.T @ torch.linalg.lstsq(centred.T, foreign[:, None]).solution[:, 0]
    strange = rows[:1] + 10 * foreign
    torch.testing.assert_close(standardiser("image", strange), standardiser("image", rows[:1]), rtol=0, atol=1e-3)
    assert (standardiser("text", strange) - standardiser("text", rows[:1])).norm() > 10  # that is how it is told


def test_what_examples_of_one_task_differ_in_is_listened_to_less() -> None:
    tasks, nuisance = 4 * normal(5, 30), 20 * torch.nn.functional.normalize(normal(1, 30, seed=1))
    scatter = normal(400, 1, seed=2) * nuisance + normal(400, 30, seed=3)
    plain, white = (ConditionStandardiser({"hidden": 30}, {"hidden": 30}) for _ in range(2))
    plain.fit({"hidden": tasks})
    white.fit({"hidden": tasks}, {"hidden": scatter})
    assert white.spanned("hidden") == 4
    moved = {}
    for name, standardiser in (("plain", plain), ("white", white)):
        known = standardiser("hidden", tasks)
        moved[name] = (standardiser("hidden", tasks + nuisance) - known).norm(dim=1).mean() / torch.pdist(known).mean()
    assert moved["white"] < 0.2 * moved["plain"]
    units = torch.logspace(-2, 2, 30)  # the units of the columns do not matter
    other = ConditionStandardiser({"hidden": 30}, {"hidden": 4})
    other.fit({"hidden": tasks * units}, {"hidden": scatter * units})
    torch.testing.assert_close(
        other("hidden", tasks * units).abs(), white("hidden", tasks)[:, :4].abs(), rtol=1e-2, atol=1e-2
    )
    zero = ConditionStandardiser({"hidden": 30}, {"hidden": 30})
    zero.fit({"hidden": tasks}, {"hidden": torch.zeros(7, 30)})  # examples that do not differ change nothing
    torch.testing.assert_close(zero("hidden", tasks), plain("hidden", tasks))


def test_a_few_examples_are_read_as_no_more_than_they_say() -> None:
    width, known, counts = 20, 50, [1, 4, 16, 400]
    tasks = normal(known + 200, width) * torch.logspace(1, -1, width)  # they differ a lot in some directions
    examples = tasks[:, None] + normal(len(tasks) * max(counts), width, seed=1).view(len(tasks), -1, width)
    standardiser = ConditionStandardiser({"hidden": width}, {"hidden": width}, ["hidden"])
    within = (examples[:known] - examples[:known].mean(1, keepdim=True)).flatten(0, 1)
    standardiser.fit({"hidden": tasks[:known]}, {"hidden": within})
    lost = []
    for count in counts:
        means = examples[known:, :count].mean(1)
        found = standardiser.expected("hidden", means, [count] * len(means))
        lost.append(float((found - tasks[known:]).square().sum() / (means - tasks[known:]).square().sum()))
    assert lost[0] < 0.7 and lost == sorted(lost) and lost[-1] == pytest.approx(1, abs=0.05)
    mixed = standardiser.expected("hidden", examples[known : known + 2, 0], [1, 10_000])
    torch.testing.assert_close(mixed[1], examples[known + 1, 0], rtol=1e-2, atol=1e-2)
    plain = ConditionStandardiser({"hidden": width}, {"hidden": width})
    plain.fit({"hidden": tasks[:known]}, {"hidden": within})
    assert torch.equal(plain.expected("hidden", mixed, [1, 2]), mixed)


def test_what_tells_no_task_apart_stays_in_a_task_vector() -> None:
    tasks, foreign = torch.cat([normal(5, 6), torch.zeros(5, 4)], 1), torch.cat([torch.zeros(6), torch.ones(4)])
    standardiser = ConditionStandardiser({"hidden": 10}, {"hidden": 4}, ["hidden"])
    standardiser.fit({"hidden": tasks}, {"hidden": normal(60, 10, seed=1) * torch.tensor([1.0] * 6 + [0.0] * 4)})
    found, moved = (standardiser.expected("hidden", rows, [2]) for rows in (tasks[:1], tasks[:1] + foreign))
    torch.testing.assert_close(moved - found, foreign[None], rtol=0, atol=1e-4)
    coordinates, mean = standardiser("hidden", found), standardiser("hidden", tasks[:1])
    assert (coordinates.abs() < mean.abs()).all() and (coordinates * mean > 0).all()


def test_what_wordings_of_one_task_differ_in_is_read_less() -> None:
    width, tasks = 30, 60
    apart = torch.cat([3 * normal(tasks, 10), torch.zeros(tasks, width - 10)], 1)  # tasks differ in ten directions,
    wordings = apart[:, None] + torch.cat([torch.zeros(8), torch.full((12,), 2.0), torch.zeros(10)]) * normal(
        tasks * 40, width, seed=1
    ).view(tasks, 40, width)  # wordings in twelve others and two of these
    known, new = wordings[:, :-1], wordings[:, -1]
    moved, foreign = {}, torch.cat([torch.zeros(20), torch.ones(10)])
    within = (known - known.mean(1, keepdim=True)).flatten(0, 1)
    for noisy in ((), ("text",)):
        standardiser = ConditionStandardiser({"text": width}, {}, noisy)
        standardiser.fit({"text": known.mean(1)}, {"text": within})
        places, found = standardiser("text", known.mean(1)), standardiser("text", new)
        moved[noisy] = float((found - places).square().sum() / places.square().sum())
        assert float(places.square().mean()) == pytest.approx(1, rel=1e-3)
        strange = standardiser("text", new + foreign) - found  # what nothing is known about is still heard
        left = strange * standardiser.get_buffer("text_scale")
        share = float(left[0, -1])
        torch.testing.assert_close(left, share * foreign.expand_as(left), rtol=1e-3, atol=1e-3)
        assert share == pytest.approx(1, abs=1e-3) if not noisy else 0.2 < share < 1
    assert moved[("text",)] < 0.3 * moved[()]
    one = ConditionStandardiser({"text": width}, {}, ["text"])
    one.fit({"text": new}, {"text": torch.zeros_like(new)})  # one wording each: nothing is known of how they differ
    torch.testing.assert_close(one.get_buffer("text_filter"), torch.eye(width), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rounding", [0.0, 1e-7])
def test_tasks_that_do_not_differ_say_nothing(rounding: float) -> None:
    same = normal(1, 30).expand(5, 30) * (1 + rounding * normal(5, 30, seed=1))
    within = {name: rounding * normal(40, 30, seed=2) for name in ("text", "hidden")}
    standardiser = ConditionStandardiser({"text": 30, "hidden": 30}, {"hidden": 4}, ["text", "hidden"])
    standardiser.fit({"text": same, "hidden": same}, within)
    foreign = normal(3, 30, seed=3)
    assert not standardiser("hidden", foreign).any() and standardiser.length("hidden") == 0
    assert torch.equal(standardiser.expected("hidden", foreign, [1, 2, 3]), foreign)
    assert standardiser("text", foreign).abs().max() < 10
    assert standardiser("text", same).abs().max() < 1e-4
    standardiser.fit({"hidden": normal(5, 30)}, within)  # examples of a task that do not differ whiten nothing
    assert 0.1 < standardiser("hidden", foreign).square().mean().sqrt() < 10


def test_shapes_and_gradients(network: CoreCVAE | ConvCVAE) -> None:
    network.train()
    loss = torch.zeros(())
    for vectors in (conditions(4), {"text": normal(4, 5)}, {}):
        targets = normal(4, SIZE).requires_grad_()
        posterior, prior = network.posterior(targets, vectors), network.prior(vectors, 4)
        made = network.decode(posterior.sample(generator=torch.Generator().manual_seed(0)), vectors)
        assert posterior.mean.shape == posterior.log_variance.shape == prior.mean.shape == (4, 4)
        assert made.shape == (4, SIZE)
        assert torch.autograd.grad(made.square().sum(), targets, retain_graph=True)[0].abs().sum() > 0
        output = network.loss(targets.detach(), vectors, 1.0, torch.Generator().manual_seed(0))
        assert output.kl > 0 and 0 <= output.active_latents <= 4
        loss = loss + output.loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert sum(bool(gradient.any()) for gradient in gradients.values()) > 0.8 * len(gradients)


def test_every_condition_counts(network: CoreCVAE | ConvCVAE) -> None:
    network.eval()
    both = conditions(2)

    def made(vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        return network.decode(network.prior(vectors, 2).mean, vectors)

    results = [made(both), made({"text": both["text"]}), made({"hidden": both["hidden"]}), made({})]
    for index, result in enumerate(results):
        assert result.isfinite().all()
        assert not any(torch.allclose(result, other) for other in results[:index])


@pytest.mark.parametrize("depth", [1, 3])
def test_codes_of_a_text_and_of_examples_add_and_examples_count_three_times(depth: int) -> None:
    network = CoreCVAE(SIZE, WIDTHS, latents=4, width=16, depth=depth).eval()
    torch.nn.init.normal_(network.prior_mean.weight)
    torch.nn.init.normal_(network.prior_mean.bias)
    given = conditions(3)
    text, hidden = (network.prior({name: given[name]}, 3).mean for name in ("text", "hidden"))
    torch.testing.assert_close(network.prior(given, 3).mean, (text + 3 * hidden) / 4)
    present = {"text": torch.tensor([[True], [True], [False]]), "hidden": torch.tensor([[True], [False], [False]])}
    expected = torch.stack([(text[0] + 3 * hidden[0]) / 4, text[1], torch.zeros(4)])
    torch.testing.assert_close(network.prior(given, 3, present).mean, expected)


def test_no_condition_is_the_centre_whatever_was_trained(network: CoreCVAE | ConvCVAE) -> None:
    if isinstance(network, CoreCVAE):
        assert not network.decode(network.prior({}, 3).mean).any()
        fresh = CoreCVAE(SIZE, WIDTHS, latents=4, width=16, depth=2)
        assert not fresh.decode(fresh.prior(conditions(3), 3).mean).any(), "at first no condition is listened to"
    else:
        assert network.prior({}, 3).mean.shape == (3, 4)


def test_rows_of_a_batch_do_not_mix(network: CoreCVAE | ConvCVAE) -> None:
    network.eval()
    targets, both = normal(3, SIZE), conditions(3)
    posterior = network.posterior(targets, both)
    made = network.decode(posterior.mean, both)
    for row in range(3):
        alone = {name: vectors[row : row + 1] for name, vectors in both.items()}
        torch.testing.assert_close(network.posterior(targets[row : row + 1], alone).mean[0], posterior.mean[row])
        torch.testing.assert_close(network.decode(posterior.mean[row : row + 1], alone)[0], made[row])


def test_absurd_targets_give_finite_divergences(network: CoreCVAE | ConvCVAE) -> None:
    network.eval()
    posterior = network.posterior(1e6 * normal(2, SIZE), conditions(2))
    assert posterior.log_variance.abs().max() <= 10
    assert posterior.kl(network.prior(conditions(2), 2)).isfinite().all()


def test_prior_listens_to_the_condition_in_the_core_network_alone(network: CoreCVAE | ConvCVAE) -> None:
    prior = network.prior(conditions(2), 2)
    if isinstance(network, CoreCVAE):
        assert not torch.allclose(prior.mean[0], prior.mean[1])
    else:
        assert not prior.mean.any() and not prior.log_variance.any()


def test_kl_weight_weighs_the_divergence(network: CoreCVAE | ConvCVAE) -> None:
    targets, vectors = normal(4, SIZE), conditions(4)

    def output(kl_weight: float) -> tuple[float, float]:
        found = network.eval().loss(targets, vectors, kl_weight, torch.Generator().manual_seed(0))
        return float(found.loss), float(found.kl)

    (zero, kl), (one, _), (many, _) = output(0.0), output(1.0), output(100.0)
    per_adapter = kl / SIZE if isinstance(network, CoreCVAE) else kl
    assert one - zero == pytest.approx(per_adapter, rel=1e-3)
    assert many - zero == pytest.approx(100 * per_adapter, rel=1e-3)


def test_codes_are_the_nearest_and_their_loss_that_of_the_cores() -> None:
    network = CoreCVAE(SIZE, WIDTHS, latents=4, width=16, depth=1)
    targets, vectors = normal(6, SIZE), conditions(6)
    with torch.no_grad():
        network.prior_mean.weight.normal_()
        codes = network.code(targets)
        lost = (network.decode(codes) - targets).square().sum(1)
        for seed in range(5):
            other = network.decode(codes + 0.1 * normal(6, 4, seed=seed))
            assert ((other - targets).square().sum(1) > lost).all()
        exact = network.decode(normal(6, 4))
        torch.testing.assert_close(network.decode(network.code(exact)), exact, rtol=1e-4, atol=1e-5)
        output = network.loss(targets, vectors, 1.0, torch.Generator().manual_seed(0))
        made = network.decode(network.prior(vectors, 6).mean)
        assert float(output.reconstruction) == pytest.approx(float((made - targets)[::2].square().mean()), rel=1e-4)


@pytest.mark.parametrize("channels", [(2,), (2, 3), (1, 2, 3, 4, 2), (2,) * 9])
def test_convolutions_fit_any_number_of_weights(channels: tuple[int, ...]) -> None:
    for width in (1, 6):
        network = ConvCVAE(SIZE, {"text": width}, channels=channels, latent_size=2).eval()
        vectors = {"text": normal(2, width)}
        latent = network.posterior(normal(2, SIZE), vectors).mean
        assert network.decode(latent, vectors).shape == (2, SIZE)


def test_a_deep_convolutional_network_stays_as_long_as_its_input() -> None:
    network = ConvCVAE(700, {"text": 3}, channels=paper_channels(20), latent_size=4).eval()
    lengths = []
    for layer in network.decoder:
        layer.register_forward_hook(lambda _module, _inputs, output: lengths.append(output.shape[-1]))
    vectors = {"text": normal(1, 3)}
    assert network.decode(normal(1, 4), vectors).shape == (1, 700) and max(lengths) < 2 * 703
    assert network.posterior(normal(1, 700), vectors).mean.shape == (1, 4)
    assert len(network.encoder) == len(network.decoder) == 20


@pytest.mark.parametrize(("depth", "middle"), [(10, (128, 128)), (11, (128, 256, 128)), (12, PAPER_CHANNELS[4:8])])
def test_channels_double_and_halve(depth: int, middle: tuple[int, ...]) -> None:
    channels = paper_channels(depth)
    assert len(channels) == depth and channels == channels[::-1] and channels[0] == 8
    start = (depth - len(middle)) // 2
    assert channels[start : start + len(middle)] == middle
    assert paper_channels(12) == PAPER_CHANNELS and max(paper_channels(20)) == 256
