"""Keyed random numbers: the same whoever draws them, and random enough."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trainer.models import randomness
from trainer.models.randomness import KeyedDropout, fold_in, keyed, make_keys, normal, number_sites, uniform


def _keys(n: int, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    return make_keys(seed, epoch, torch.arange(n), torch.arange(n) % 4)


def _drop(p: float, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    with keyed(keys):
        return KeyedDropout(p)(x)


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(6)), cut=st.integers(0, 6), size=st.integers(1, 9), site=st.integers(0, 5000))
def test_an_items_numbers_do_not_depend_on_its_batch(order: list[int], cut: int, size: int, site: int) -> None:
    keys, items = _keys(6), torch.tensor(order)
    parts = [part for part in (items[:cut], items[cut:]) if len(part)]
    for draw in (uniform, normal):
        whole = draw(keys, site, (size, 3))
        assert torch.equal(torch.cat([draw(keys[part], site, (size, 3)) for part in parts]), whole[items])


@settings(deadline=None, max_examples=20)
@given(short=st.integers(1, 40), more=st.integers(0, 40), width=st.integers(1, 5))
def test_a_longer_first_dimension_keeps_the_numbers_before_it(short: int, more: int, width: int) -> None:
    keys = _keys(3)
    for draw in (uniform, normal):
        assert torch.equal(draw(keys, 7, (short + more, width))[:, :short], draw(keys, 7, (short, width)))


@settings(deadline=None, max_examples=25)
@given(block=st.integers(1, 70), items=st.integers(0, 4), length=st.integers(0, 20), width=st.integers(0, 7))
def test_normal_numbers_do_not_depend_on_how_many_are_made_at_once(
    block: int, items: int, length: int, width: int
) -> None:
    keys, shape = _keys(items), (length, width)
    whole = normal(keys, 7, shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randomness, "_BLOCK", block)
        assert torch.equal(normal(keys, 7, shape), whole)
    assert whole.shape == (items, length, width)


def test_every_part_of_a_key_counts() -> None:
    window, subject = torch.tensor([5]), torch.tensor([2])
    base = make_keys(1, 2, window, subject)
    others = [
        make_keys(2, 2, window, subject),
        make_keys(1 + 2**32, 2, window, subject),
        make_keys(1, 3, window, subject),
        make_keys(1, 2, window + 1, subject),
        make_keys(1, 2, window + 2**32, subject),
        make_keys(1, 2, window, subject + 1),
        make_keys(1, 2, window),
        make_keys(2, 1, window, subject),
        make_keys(1, 2, subject, window),
        fold_in(base, 0),
        fold_in(base, 1),
    ]
    everything = torch.cat([base, *others])
    assert len(everything.unique()) == 12
    assert len(uniform(everything, 0).unique()) == 12
    assert (everything >= 0).all()


def test_many_keys_are_all_different() -> None:
    keys = make_keys(3315, 4, torch.arange(50_000)[:, None], torch.arange(4)[None])
    assert keys.shape == (50_000, 4)
    assert len(keys.unique()) == 200_000


@pytest.mark.parametrize("along", ["elements", "items", "epochs", "sites"])
def test_uniform_is_uniform_along_every_axis(along: str) -> None:
    n = 50_000
    draws = {
        "elements": lambda: uniform(_keys(1), 0, (n,)),
        "items": lambda: uniform(_keys(n), 0),
        "epochs": lambda: torch.cat([uniform(_keys(100, epoch=epoch), 0) for epoch in range(n // 100)]),
        "sites": lambda: torch.cat([uniform(_keys(100), site) for site in range(n // 100)]),
    }
    u = draws[along]().flatten().double()
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    # neighbours are independent, near and far in the order of drawing
    for lag in (1, 2, 64, 1000):
        r = torch.corrcoef(torch.stack((u[:-lag], u[lag:])))[0, 1]
        assert abs(r) < 5 / n**0.5
    cells = torch.histogramdd(u.view(-1, 2).float(), [16, 16], range=[0.0, 1.0, 0.0, 1.0]).hist.flatten()
    assert stats.chisquare(cells.numpy()).pvalue > 1e-3


def test_uniform_stays_inside_the_open_interval_with_all_its_bits() -> None:
    u = uniform(_keys(20), 3, (100_000,))
    assert u.dtype == torch.float32 and u.shape == (20, 100_000)
    assert 0 < u.min() < 1e-5 and 1 - 1e-5 < u.max() < 1
    bits = (u.double() * 2**23 - 0.5).long()
    assert (bits.double() == u.double() * 2**23 - 0.5).all()
    for bit in range(23):
        assert abs((bits >> bit & 1).double().mean() - 0.5) < 5 * 0.5 / 2e6**0.5


def test_normal_has_the_moments_and_the_shape_of_a_normal() -> None:
    x = normal(_keys(400), 0, (500,)).double().flatten()
    n = len(x)
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-3
    pairs = x.view(-1, 2).T  # the two halves of a Box-Muller pair
    assert abs(torch.corrcoef(pairs)[0, 1]) < 5 / (n / 2) ** 0.5
    assert abs(torch.corrcoef(pairs**2)[0, 1]) < 5 / (n / 2) ** 0.5


def test_sites_and_items_are_independent() -> None:
    keys = _keys(64)
    rows = torch.stack([uniform(keys, site, (400,)).flatten() for site in (0, 1, 2, 3, 1000, 1001)])
    r = torch.corrcoef(rows) - torch.eye(6)
    assert r.abs().max() < 5 / rows.shape[1] ** 0.5
    items = torch.corrcoef(uniform(keys, 0, (4000,))) - torch.eye(64)
    assert items.abs().max() < 6 / 4000**0.5
    same_place = torch.corrcoef(uniform(keys, 0, (4000,))[:, :64].T) - torch.eye(64)
    assert same_place.abs().max() < 6 / 64**0.5


def test_the_bits_are_what_they_were() -> None:
    """A changed generator would change every run that is resumed; this is its fingerprint."""
    keys = make_keys(3315, 1, torch.tensor([0, 1]), torch.tensor([0, 3]))
    assert keys.tolist() == [20827145149169742, 1318038478199122982]
    assert (uniform(keys, 2, (2,)).double() * 2**24).long().tolist() == [[7349511, 16122195], [12747103, 6152387]]


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    y = _drop(0.3, torch.ones(50, 4000), _keys(50))
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    n = y.numel()
    assert abs((y == 0).double().mean() - 0.3) < 5 * (0.21 / n) ** 0.5


def test_dropout_is_the_same_in_any_batch_and_differs_between_items_sites_and_keys() -> None:
    x, keys = torch.ones(4, 200), _keys(4)
    whole = _drop(0.5, x, keys)
    assert torch.equal(_drop(0.5, x[:2], keys[[3, 1]]), whole[[3, 1]])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(_drop(0.5, x, _keys(4, epoch=1)), whole)
    other = KeyedDropout(0.5)
    other.site += 1
    with keyed(keys):
        assert not torch.equal(other(x), whole)


def test_dropout_without_keys_says_what_to_do_and_evaluation_needs_none() -> None:
    x, layer = torch.ones(2, 3), KeyedDropout(0.5)
    with pytest.raises(RuntimeError, match=r"with keyed\(keys\)"):
        layer(x)
    with keyed(_keys(3)), pytest.raises(RuntimeError, match="3 keys for 2 items"):
        layer(x)
    with pytest.raises(RuntimeError):  # the keys are gone after the block
        layer(x)
    assert layer.eval()(x) is x
    assert KeyedDropout(0.0)(x) is x


def test_keys_of_an_inner_block_hide_the_outer_ones_only_inside_it() -> None:
    x, outer, inner = torch.ones(2, 100), _keys(2), _keys(2, epoch=9)
    layer = KeyedDropout(0.5)
    with keyed(outer):
        with keyed(inner):
            assert torch.equal(layer(x), _drop(0.5, x, inner))
        assert torch.equal(layer(x), _drop(0.5, x, outer))


def test_sites_are_numbered_in_module_order() -> None:
    block = torch.nn.Sequential(KeyedDropout(0.1), torch.nn.Linear(2, 2), KeyedDropout(0.1))
    model = torch.nn.ModuleDict({"first": block, "second": KeyedDropout(0.1)})
    assert number_sites(model) == 3
    sites = [layer.site for layer in (block[0], block[2], model["second"])]
    assert sites == [1000, 1001, 1002]
