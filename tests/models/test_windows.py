"""Windows over a long run: where they start, what they weigh, and that the run is one differential equation still."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.models.flow import FlowMatching
from trainer.models.randomness import make_keys
from trainer.models.unet import ATTENTION_ROWS, RelativeAttention
from trainer.models.windows import by_windows, cover

LATENT, PARCELS = 4, 10
DECODER = {"channels": [8, 8], "attention_head_dim": 4, "num_mid_blocks": 1}


def nothing() -> None:
    """The tick of a test."""


@given(units=st.integers(1, 400), window=st.integers(1, 300), factor=st.sampled_from([1, 2, 4, 8]))
@settings(deadline=None)
def test_windows_cover_the_run_at_multiples_of_the_factor_with_weights_that_add_up_to_1(
    units: int, window: int, factor: int
) -> None:
    length = units * factor
    found = cover(length, window, factor)
    if found is None:
        assert length <= -(-window // factor) * factor
        return
    assert found.size < length and found.size % factor == 0 and window <= found.size < window + factor
    assert found.starts[0] == 0 and found.starts[-1] + found.size == length
    assert all(start % factor == 0 for start in found.starts)
    assert all(
        0 < b - a <= max(found.size * 3 // 4, factor) for a, b in zip(found.starts, found.starts[1:], strict=False)
    )
    total = torch.zeros(length)
    for start, weight in zip(found.starts, found.weights, strict=True):
        total[start : start + found.size] += weight
    assert torch.allclose(total, torch.ones(length), atol=1e-6)
    assert (found.weights >= 0).all()


def test_a_run_that_fits_is_one_pass() -> None:
    assert cover(256, 256, 2) is None
    assert cover(4, 3, 4) is None
    assert cover(1000, None, 2) is None


@pytest.mark.parametrize("length", [258, 500, 1000])
def test_a_network_that_looks_less_far_than_the_margin_gives_what_it_gives_in_one_pass(length: int) -> None:
    """A convolution of 2 x 16 + 1 taps, zeros beyond the ends of what it is given."""
    x, kernel = torch.randn(2, 3, length), torch.randn(3, 1, 33)
    found = cover(length, 256, 2)
    assert found is not None

    def network(here: slice) -> Tensor:
        return torch.nn.functional.conv1d(x[:, :, here], kernel, padding=16, groups=3)

    whole = network(slice(None))
    ticks: list[int] = []
    parts = by_windows(network, found, torch.zeros_like(x), lambda: ticks.append(1))
    assert torch.allclose(parts, whole, rtol=1e-6, atol=1e-5)
    assert len(ticks) == len(found.starts)


def _flow(window_trs: int | None, **options: Any) -> FlowMatching:
    torch.manual_seed(0)
    flow = FlowMatching(2, PARCELS, LATENT, DECODER, window_trs=window_trs, n_timesteps=4, **options)
    state = flow.latent.state_dict()
    state["mean"], state["scale"] = torch.zeros(2, PARCELS), torch.ones(LATENT)
    state["basis"] = torch.linalg.qr(torch.randn(PARCELS, LATENT))[0].T.contiguous()
    flow.latent.load_state_dict(state)
    for estimator in flow.estimators:
        torch.nn.init.normal_(estimator.project.weight, std=0.3)
    return flow.eval()


def _items(length: int, items: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """anchor, mask (the second item is shorter), subject, keys"""
    generator = torch.Generator().manual_seed(1)
    anchor = torch.randn(items, length, PARCELS, generator=generator)
    mask = torch.arange(length)[None] < torch.tensor([length, length // 3, length])[:items, None]
    subject = torch.tensor([0, 1, 1])[:items]
    return anchor, mask, subject, make_keys(1, 2, torch.arange(items), subject)


@pytest.mark.parametrize("options", [{}, {"subjects": "separate"}, {"parametrisation": "velocity"}])
def test_up_to_the_window_the_bits_are_those_of_one_pass(options: dict[str, Any]) -> None:
    windowed, whole = _flow(40, **options), _flow(None, **options)
    anchor, mask, subject, keys = _items(40)
    assert torch.equal(windowed.sample(anchor, mask, subject, keys), whole.sample(anchor, mask, subject, keys))
    arguments = (anchor, mask, subject, keys)
    assert torch.equal(windowed.posterior_mean(*arguments), whole.posterior_mean(*arguments))
    assert torch.equal(windowed.loss(anchor, *arguments), whole.loss(anchor, *arguments))


@pytest.mark.parametrize("options", [{}, {"subjects": "separate"}])
def test_a_long_run_is_one_equation_whose_velocity_is_cross_faded(options: dict[str, Any]) -> None:
    """Items of other lengths beside it change nothing, and every TR that is valid gets a velocity."""
    flow = _flow(32, **options)
    anchor, mask, subject, keys = _items(101)
    sample = flow.sample(anchor, mask, subject, keys)
    assert sample.isfinite().all()
    alone = flow.sample(anchor[:1], mask[:1], subject[:1], keys[:1])
    assert torch.allclose(sample[:1], alone, atol=1e-5)
    assert not torch.allclose(alone, _flow(None, **options).sample(anchor[:1], mask[:1], subject[:1], keys[:1]))


def test_a_pointwise_field_gives_its_one_pass_velocity(monkeypatch: pytest.MonkeyPatch) -> None:
    def pointwise(self: FlowMatching, y: Tensor, valid: Tensor, mu: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return torch.sin(3 * y + mu) * (1 + t[:, None, None]) * valid

    monkeypatch.setattr(FlowMatching, "_one_pass", pointwise)
    anchor, mask, subject, keys = _items(333)
    windowed, whole = (flow.sample(anchor, mask, subject, keys) for flow in (_flow(32), _flow(None)))
    assert torch.allclose(windowed[mask], whole[mask], rtol=1e-6, atol=1e-5)


def test_the_window_is_the_networks_longest_input_and_work_shows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, lengths, ticks = _flow(32), [], []
    one_pass = flow._one_pass

    def recorded(y: Tensor, *arguments: Tensor) -> Tensor:
        lengths.append(y.shape[2])
        return one_pass(y, *arguments)

    monkeypatch.setattr(flow, "_one_pass", recorded)
    anchor, mask, subject, keys = _items(301)
    found = cover(302, 32, 2)
    assert found is not None
    flow.sample(anchor, mask, subject, keys, tick=lambda: ticks.append(1))
    assert set(lengths) == {32}
    assert len(ticks) == len(lengths) == 4 * len(found.starts)
    flow.posterior_mean(anchor, mask, subject, keys, n_draws=3, tick=lambda: ticks.append(1))
    flow.loss(anchor, anchor, mask, subject, keys, tick=lambda: ticks.append(1))
    assert len(ticks) == 8 * len(found.starts)


@pytest.mark.parametrize("published", [False, True])
def test_attention_in_blocks_of_queries_is_attention(monkeypatch: pytest.MonkeyPatch, published: bool) -> None:
    """Distances beyond the largest one that has an embedding of its own included."""
    torch.manual_seed(0)
    attention = RelativeAttention(8, 2, 4, 0.0, published).eval()
    x, mask = torch.randn(2, 700, 8), (torch.arange(700) < torch.tensor([[700], [77]])).float()[:, None]
    with torch.no_grad():
        whole = attention(x, mask)
        for rows in (1, 64, 699):
            monkeypatch.setattr("trainer.models.unet.ATTENTION_ROWS", rows)
            blocks = attention(x, mask)
            assert torch.allclose(blocks[mask[:, 0] > 0], whole[mask[:, 0] > 0], atol=1e-6)
    assert ATTENTION_ROWS >= 256  # a window's attention is today's arithmetic


PEAK = """
import resource, sys, torch
from trainer.models.flow import FlowMatching
from trainer.models.randomness import make_keys
torch.set_num_threads(1)
flow = FlowMatching(1, 2, 2, {"channels": [32, 32], "attention_head_dim": 16}, window_trs=256).eval()
def velocity(length):
    y, valid = torch.zeros(4, 2, length), torch.ones(4, 1, length)
    subject = torch.zeros(4, dtype=torch.int64)
    with torch.no_grad():
        flow.velocity(y, valid, y, torch.zeros(4), subject, make_keys(0, 0, torch.arange(4)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(velocity(512), velocity(16384))
"""


def test_peak_memory_does_not_grow_with_the_run_beyond_a_window() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    short, long = map(int, done.stdout.split())
    assert long - short < 20_000  # kB; the attention scores alone of one pass would take 17 GB
