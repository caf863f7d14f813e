"""The averaged weights follow the formula, stand in for the model's own for a while, and survive a resume."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.training.ema import MovingAverage


def test_averages_follow_the_formula_with_a_decay_that_warms_up() -> None:
    model = nn.Linear(2, 1).double()
    average = MovingAverage(model, decay=0.8)
    expected = model.weight.detach().clone()
    for step in range(1, 60):
        with torch.no_grad():
            model.weight += step
        average.update(step)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.averages["weight"], expected, rtol=1e-12, atol=0)


def test_the_model_gets_its_own_weights_back_even_after_an_error() -> None:
    model = nn.Linear(2, 1)
    average = MovingAverage(model, decay=0.5)
    own = {name: p.detach().clone() + 1 for name, p in model.named_parameters()}
    model.load_state_dict(own)
    before = average.snapshot()
    with pytest.raises(ZeroDivisionError), average.in_place():
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        _ = 1 / 0
    assert all(torch.equal(p, own[name]) for name, p in model.named_parameters())
    assert all(torch.equal(average.averages[name], before[name]) for name in before)


def test_a_snapshot_is_a_copy_and_comes_back() -> None:
    model = nn.Linear(2, 1)
    average = MovingAverage(model, decay=0.5)
    snapshot = average.snapshot()
    with torch.no_grad():
        model.weight += 1
    average.update(100)
    assert not torch.equal(average.averages["weight"], snapshot["weight"])
    other = MovingAverage(nn.Linear(2, 1), decay=0.5)
    other.restore(snapshot)
    assert all(torch.equal(other.averages[name], snapshot[name]) for name in snapshot)
    other.restore({})
    assert torch.equal(other.averages["weight"], other.parameters["weight"])
