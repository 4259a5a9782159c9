"""`benchmarks.alternatives`: the published forecasts and schedules that it measures are those that are described."""

import itertools

import numpy as np
import pytest
import torch

from benchmarks import alternatives
from omni_runtime.cache.forecasters import newton
from omni_runtime.cache.schedules import even


def test_ridge_regression_is_that_of_each_element():
    """Written out: the coefficients minimise |known − polynomial|² + λ |coefficients|², by a search from scratch."""
    steps, found = [0, 3, 9, 20, 30], [torch.randn(2, 3, dtype=torch.float64) for _ in range(5)]
    made = alternatives.by_ridge(35, steps, found, [])
    x = np.array(steps) / 24.5 - 1
    rows = np.stack([np.ones(5), x, 2 * x**2 - 1, 4 * x**3 - 3 * x], 1)
    values = torch.stack(found).flatten(1).numpy()
    stacked = np.concatenate([rows, np.sqrt(0.1) * np.eye(4)])  # ridge as least squares with more rows
    coefficients = np.linalg.lstsq(stacked, np.concatenate([values, np.zeros((4, 6))]), rcond=None)[0]
    at = 35 / 24.5 - 1
    expected = np.array([1, at, 2 * at**2 - 1, 4 * at**3 - 3 * at]) @ coefficients
    assert np.allclose(made.flatten().numpy(), expected)


def test_a_trajectory_that_turns_as_the_others_is_forecast_exactly():
    """The output grows by 2% and turns by a constant share in one plane at each step: both lengths are constant."""
    angle = torch.arange(alternatives.STEPS, dtype=torch.float64)
    one = torch.stack([torch.cos(0.1 * angle), torch.sin(0.1 * angle)], 1) * (1.02**angle)[:, None]
    split = alternatives.Split(one[:, None])
    made = split.predict(12, [10, 11], [one[None, 10], one[None, 11]], [])
    assert torch.allclose(made, one[None, 12], atol=1e-2)
    with_newton = sum(w * one[i] for w, i in zip(newton([11.0, 10.0], 12.0), (11, 10), strict=True))
    assert (made - one[12]).norm() < (with_newton - one[12]).norm()


@pytest.mark.parametrize("budget", [10, 17])
def test_its_schedule_computes_as_many_steps_as_asked(budget):
    split = alternatives.Split(torch.randn(alternatives.STEPS, 3, 20).cumsum(0))
    found = split.schedule(budget)
    assert abs(len(found) - budget) <= 1
    assert (found[0], found[-1]) == (0, alternatives.STEPS - 1)


def test_the_cheapest_schedule_is_that_of_trying_all():
    costs = np.full((8, 8, 8), np.inf)
    random = np.random.default_rng(0)
    for previous, begin, end in itertools.product(range(8), repeat=3):
        if previous < begin < end or previous == begin == 0 < end:
            costs[previous, begin, end] = random.random()

    def cost(found):
        return sum(costs[found[max(i - 1, 0)], found[i], found[i + 1]] for i in range(len(found) - 1))

    every = [(0, *inner, 7) for inner in itertools.combinations(range(1, 7), 3)]
    assert alternatives.cheapest(costs, 5) == min(every, key=cost)


@pytest.mark.parametrize("corrected", [False, True])
def test_a_line_costs_nothing_and_a_bend_costs_where_it_is(corrected):
    sigmas = [1 - i / 10 for i in range(10)] + [0.0]
    line = torch.tensor(sigmas[:-1], dtype=torch.float64)[:, None, None].expand(10, 2, 3)
    costs = alternatives.gap_costs(line, sigmas, 1.0, corrected)
    assert costs[2, 3, 4] == 0
    assert costs[2, 4, 6] < 1e-20
    assert np.isinf(costs[4, 3, 6])
    bent = line.clone()
    bent[6:] += 1.0
    assert alternatives.gap_costs(bent, sigmas, 1.0, corrected)[2, 4, 8] > 1e-3
    assert len(alternatives.cheapest(costs, 5)) == 5


def test_a_replayed_forecast_takes_the_place_of_the_skipped_outputs(qwen_pipe):
    from tiny import generate

    from omni_kernels.patching import Patch

    computed, seen = even(alternatives.STEPS, 10).computed, []

    def predict(step, steps, found, sigmas):
        seen.append((step, steps[-1]))
        return found[-1]

    patch, session = Patch(), alternatives.Forecasting(qwen_pipe, computed, predict)
    session.install(patch)
    made = generate(qwen_pipe, num_inference_steps=alternatives.STEPS, output_type="latent")
    assert [step for step, _ in seen] == [step for step in range(alternatives.STEPS) if step not in computed]
    assert all(max(one for one in computed if one < step) == last for step, last in seen)
    patch.undo()
    plain = generate(qwen_pipe, num_inference_steps=alternatives.STEPS, output_type="latent")
    assert not torch.equal(made, plain)
