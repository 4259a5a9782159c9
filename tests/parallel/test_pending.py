"""Results that are not there yet: what a pipeline may do with them, and that everything else waits for them."""

import pytest
import torch

from omni_runtime.parallel.pending import Batch, Pending

REAL = torch.arange(12.0).reshape(3, 4)
OTHER = torch.linspace(-1, 1, 12).reshape(3, 4)


class Exchange:
    """Fills the results when they are used."""

    def __init__(self):
        self.uses = []
        self.batch = Batch(self)
        self.result = torch.full_like(REAL, float("nan"))

    @property
    def missing(self):
        return not self.uses

    def used(self, what):
        self.uses.append(what)
        self.result.copy_(REAL)
        self.batch.filled()


@pytest.fixture
def exchange():
    return Exchange()


@pytest.fixture
def pending(exchange):
    (one,) = exchange.batch.wrap((exchange.result,), empty=True)
    return one


def test_the_form_of_a_pending_result_is_known(exchange, pending):
    assert pending.shape == (3, 4)
    assert pending.dtype == torch.float32
    assert (len(pending), pending.numel(), pending.dim()) == (3, 12, 2)
    assert pending.is_floating_point()
    assert isinstance(pending, torch.Tensor)
    assert not exchange.uses


LATER = {
    "a view": lambda x: x[:, :2],
    "two views": lambda x: x.chunk(2, dim=1)[1],
    "transposed": lambda x: x.mT,
    "a cast": lambda x: x.half(),
    "no cast": lambda x: x.to(torch.float32),
    "a copy": lambda x: x[:, torch.tensor([2, 0])],
    "arithmetic": lambda x: 0.5 * OTHER - x.float() / 3 + 1,
    "joined": lambda x: torch.cat([x, OTHER]),
    "reshaped": lambda x: x.mT.reshape(-1),
}


@pytest.mark.parametrize("name", LATER)
def test_what_is_computed_before_a_result_is_there_gets_its_values(exchange, pending, name):
    made = LATER[name](pending)
    assert not exchange.uses
    assert torch.equal(made.sum(), LATER[name](REAL).sum())
    assert len(exchange.uses) == 1
    assert torch.equal(made, LATER[name](REAL))
    assert type(made) is type(pending) is torch.Tensor


def in_place(x):
    x *= 2
    return x


def assigned(x):
    target = torch.zeros(3, 4)
    target[0] = x[0]
    return target


USES = {
    "a norm": lambda x: x / x.norm(),
    "a number": lambda x: x[0, 1].item(),
    "a condition": lambda x: bool((x > 1).any()),
    "an array": lambda x: x.numpy().sum(),
    "in place": in_place,
    "added in place": lambda x: OTHER.clone().add_(x),
    "assigned": assigned,
    "printed": str,
    "random": lambda x: torch.nn.functional.dropout(x, 0.0),
    "written to": lambda x: torch.add(x, x, out=torch.zeros(3, 4)),
}


@pytest.mark.parametrize("name", USES)
def test_everything_else_waits_for_the_values_and_says_where(exchange, pending, name):
    found, expected = USES[name](pending), USES[name](REAL.clone())
    assert len(exchange.uses) == 1
    assert "test_pending" in exchange.uses[0]
    assert torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected


def test_a_tensor_that_is_changed_after_it_was_used_is_found_out(exchange, pending):
    other = OTHER.clone()
    made = pending + other
    other.mul_(2)
    with pytest.raises(RuntimeError, match="add was given together with the result"):
        made.sum()


def test_when_all_results_are_there_a_use_is_remembered_once(exchange, pending):
    exchange.used("the second call")
    assert isinstance(pending[:2], Pending)
    made = pending + OTHER
    assert len(exchange.uses) == 2
    assert type(made) is type(pending) is torch.Tensor
    assert torch.equal(made, REAL + OTHER)
    pending.sum()
    assert len(exchange.uses) == 2
