"""Gates: the order of the limits, the thresholds at their edges, and distances that are no numbers."""

import math

import pytest

from omni_runtime.cache.gates import AccumulatedPolynomialGate, Limits, Plan, ThresholdGate, by_image


def run(gate, steps, distance=0.1):
    """Which of `steps` steps are computed, when every measured distance is the same and step 0 has filled the cache."""
    computed = []
    for step in range(steps):
        plan, _ = gate.plan(step)
        compute = plan is Plan.COMPUTE or (plan is Plan.MEASURE and gate.judge([(distance, 1.0)], 1).computed)
        gate.settle(compute)
        if compute:
            computed.append(step)
    return computed


def test_warmup_computes_its_steps():
    assert run(ThresholdGate(Limits(warmup=3), 0.2), 6) == [0, 1, 2]


def test_warmup_interval_computes_every_so_many():
    assert run(ThresholdGate(Limits(warmup=5, warmup_interval=2), 0.2), 8) == [0, 2, 4]


def test_warmup_is_no_longer_than_the_masks_first_run():
    assert run(ThresholdGate(Limits(warmup=4, mask=(1, 1, 0, 0, 1)), 0.2), 5) == [0, 1, 4]


def test_dynamic_mask_asks_the_distance_at_its_zeros():
    assert run(ThresholdGate(Limits(mask=(1, 0, 0, 1)), 0.05), 4) == [0, 1, 2, 3]
    assert run(ThresholdGate(Limits(mask=(1, 0, 0, 1)), 0.2), 4) == [0, 3]


def test_static_mask_skips_its_zeros_before_any_other_limit():
    limits = Limits(mask=(1, 0, 0, 0, 1), static=True, most_skips=1, longest_run=1)
    assert run(ThresholdGate(limits, 0.0), 5) == [0, 4]


def test_most_skips_and_longest_run():
    assert run(ThresholdGate(Limits(most_skips=2), 0.2), 5) == [2, 3, 4]
    assert run(ThresholdGate(Limits(longest_run=2), 0.2), 7) == [2, 5]
    assert run(ThresholdGate(Limits(longest_run=0), 0.2), 3) == [0, 1, 2]


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_threshold_of_zero_or_less_never_skips(threshold):
    assert run(ThresholdGate(Limits(), threshold), 3, distance=0.0) == [0, 1, 2]


def test_threshold_of_one_always_skips_without_measuring():
    assert ThresholdGate(Limits(), 1.0).plan(1)[0] is Plan.SKIP


def test_distance_at_the_threshold_computes():
    gate = ThresholdGate(Limits(), 0.25)
    assert gate.judge([(0.25, 1.0)], 1).computed
    assert not gate.judge([(0.2499, 1.0)], 1).computed


def test_sum_at_the_threshold_computes():
    gate = AccumulatedPolynomialGate(Limits(), 0.5, (0.25,))  # a quarter whatever the distance, without rounding
    first, second = gate.judge([(0.1, 1.0)], 1), gate.judge([(0.1, 1.0)], 1)
    assert (first.accumulated, first.computed) == (0.25, False)
    assert (second.accumulated, second.computed) == (0.5, True)


@pytest.mark.parametrize("gate", [ThresholdGate(Limits(), 0.9), AccumulatedPolynomialGate(Limits(), 0.9, (1, 0))])
@pytest.mark.parametrize("numerators", [(0.1, math.nan), (math.nan, 0.1), (math.inf, 0.1)])
def test_distances_that_are_no_numbers_compute(gate, numerators):
    assert gate.judge([(numerator, 1.0) for numerator in numerators], 1).computed


def test_nothing_to_divide_by_computes():
    assert ThresholdGate(Limits(), 0.5).judge([(0.0, 0.0)], 1).computed


def test_worst_sample_decides():
    gate = ThresholdGate(Limits(), 0.3)
    verdict = gate.judge([(0.1, 1.0), (0.4, 1.0), (0.2, 1.0)], 1)
    assert verdict.computed
    assert verdict.distance == 0.4


def test_polynomial_sums_are_kept_per_sample_and_cleared_by_a_computed_step():
    gate = AccumulatedPolynomialGate(Limits(), 1.0, (2.0, 0.0))  # |2 r|
    assert gate.judge([(0.2, 1.0), (0.1, 1.0)], 1).accumulated == pytest.approx(0.4)
    gate.settle(False)
    assert gate.judge([(0.1, 1.0), (0.3, 1.0)], 1).accumulated == pytest.approx(0.8)
    gate.settle(False)
    assert gate.judge([(0.2, 1.0), (0.2, 1.0)], 1).computed
    gate.settle(True)
    assert gate.judge([(0.2, 1.0), (0.1, 1.0)], 1).accumulated == pytest.approx(0.4)


def test_negative_polynomial_values_count_as_positive():
    gate = AccumulatedPolynomialGate(Limits(), 1.0, (-3.0, 0.0))
    assert gate.judge([(0.2, 1.0)], 1).accumulated == pytest.approx(0.6)


def test_of_several_samples_an_image_those_of_one_image_count_together():
    sums = [[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]]
    assert by_image(sums, 2) == [[4.0, 40.0], [6.0, 60.0]]
    assert by_image(sums, 4) == sums
    assert by_image(sums, 0) == sums, "how many images there are is not known"
    assert by_image(sums, 3) == sums, "they are no whole number of times as many"
