"""The searched components are the exact ones where they can be, and have nearly their variance elsewhere."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.models.components import LEAST_PASSES, MOST_PASSES, ComponentSearch, sketch_width


def search(x: Tensor, latent_dim: int, seed: int = 0) -> ComponentSearch:
    """The components of centred TRs (N, V)."""
    generator = torch.Generator().manual_seed(seed)
    width = sketch_width(latent_dim, x.shape[1])
    found = ComponentSearch(x.T @ torch.randn(len(x), width, generator=generator, dtype=x.dtype), latent_dim)
    block = found.block
    while block is not None:
        assert torch.allclose(block.T @ block, torch.eye(block.shape[1]).double(), atol=1e-10)
        block = found.take(x.T @ (x @ block) / len(x))
    return found


def noise(n_trs: int, parcels: int, seed: int = 1) -> Tensor:
    x = torch.randn(n_trs, parcels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x - x.mean(0)


@pytest.mark.parametrize("spectrum", ["flat", "1/sqrt(k)"])
@pytest.mark.parametrize(("n_trs", "latent_dim"), [(400, 4), (400, 128), (1200, 32)])
def test_noise_of_6000_parcels_keeps_999_per_mille_of_the_variance(spectrum: str, n_trs: int, latent_dim: int) -> None:
    x = noise(n_trs, 6000)
    if spectrum != "flat":
        x *= torch.arange(1, 6001) ** -0.25
    exact = torch.linalg.eigvalsh(x @ x.T).flip(0)[:latent_dim] / n_trs
    found = search(x, latent_dim)
    values, basis = found.components()
    assert float(values.sum() / exact.sum()) > 0.999
    assert torch.allclose((x @ basis.T).square().mean(0), values, rtol=1e-9)
    assert torch.allclose(basis @ basis.T, torch.eye(latent_dim).double(), atol=1e-10)
    assert LEAST_PASSES <= len(found.held) <= MOST_PASSES
    assert all(later >= before * (1 - 1e-9) for before, later in pairwise(found.held))


def test_many_trs_of_noise_keep_999_per_mille_of_the_variance() -> None:
    x = noise(6000, 1000)
    exact = torch.linalg.eigvalsh(x.T @ x).flip(0)[:16] / 6000
    values, _ = search(x, 16).components()
    assert float(values.sum() / exact.sum()) > 0.999


@settings(deadline=None, max_examples=25)
@given(n_trs=st.integers(2, 40), parcels=st.integers(1, 150), data=st.data())
def test_the_components_are_exact_where_the_vectors_span_all_that_varies(
    n_trs: int, parcels: int, data: st.DataObject
) -> None:
    latent_dim = data.draw(st.integers(1, min(parcels, 60)))
    x = noise(n_trs, parcels)
    values, basis = search(x, latent_dim).components()
    exact = torch.linalg.eigvalsh(x.T @ x / n_trs).flip(0)[:latent_dim]
    assert torch.allclose(values, exact, atol=1e-9)
    assert torch.allclose(basis @ basis.T, torch.eye(latent_dim).double(), atol=1e-9)
    assert torch.allclose((x @ basis.T).square().mean(0), exact, atol=1e-9)


def test_the_first_passes_are_two_power_iterations_at_least() -> None:
    x = noise(100, 2000)
    x[:, 0] *= 1e4  # one direction is found at once
    assert len(search(x, 1).held) >= 3
