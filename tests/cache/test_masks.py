"""Steps computation masks: those of the cache-dit library, and what is refused."""

import cache_dit
import pytest

from omni_runtime.cache.masks import POLICIES, parse_mask, steps_mask


@pytest.mark.parametrize("policy", POLICIES)
def test_masks_are_the_librarys_at_every_step_count(policy):
    for steps in range(1, 121):
        if steps < 8 and steps not in (4, 6):
            with pytest.raises(AssertionError):
                cache_dit.steps_mask(total_steps=steps, mask_policy=policy)
            assert steps_mask(policy, steps) is None
        else:
            expected = cache_dit.steps_mask(total_steps=steps, mask_policy=policy)
            assert list(steps_mask(policy, steps) or ()) == expected, steps


def test_fifty_steps_compute_as_many_as_published():
    assert [sum(steps_mask(policy, 50) or ()) for policy in POLICIES] == [38, 29, 20, 14]


def test_unknown_policies_and_step_counts_are_refused():
    with pytest.raises(ValueError, match="allowed are slow, medium, fast, ultra"):
        steps_mask("sloow", 28)
    with pytest.raises(ValueError, match="at least 1 step"):
        steps_mask("slow", 0)


def test_masks_are_read_from_lists_and_strings():
    assert parse_mask("1101") == parse_mask([1, 1, 0, 1]) == (1, 1, 0, 1)


@pytest.mark.parametrize("bad", ["", [], "1201", [1, 2], [1, None], [True, False]])
def test_other_masks_are_refused(bad):
    with pytest.raises(ValueError, match="only 0 and 1"):
        parse_mask(bad)
