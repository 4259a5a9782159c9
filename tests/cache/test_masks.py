"""Steps computation masks: the published ones as the library gives them, and what other step counts get."""

import cache_dit
import pytest

from omni_runtime.cache.masks import POLICIES, parse_mask, steps_mask


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("steps", [4, 6, 8, 9, 28, 50])
def test_published_masks_are_the_librarys(policy, steps):
    assert list(steps_mask(policy, steps)) == cache_dit.steps_mask(total_steps=steps, mask_policy=policy)


def test_fifty_steps_compute_as_many_as_published():
    assert [sum(steps_mask(policy, 50)) for policy in POLICIES] == [38, 29, 20, 14]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 13, 20, 29, 40, 100])
def test_other_step_counts_keep_the_policys_share_and_its_ends(steps):
    shares = []
    for policy in POLICIES:
        mask = steps_mask(policy, steps)
        assert len(mask) == steps
        assert mask[0] == mask[-1] == 1
        shares.append(sum(mask) / steps)
    assert shares == sorted(shares, reverse=True)
    if steps >= 20:
        published = [18 / 28, 15 / 28, 11 / 28, 8 / 28] if steps < 38 else [0.76, 0.58, 0.40, 0.28]
        assert shares == pytest.approx(published, abs=0.11)


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
