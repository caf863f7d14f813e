"""The convolution that both stages share is the plain sum, for any length and kernel, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.models.depthwise import convolve_depthwise


def tensors(length: int, taps: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, length, 3), (3, 1, taps), (3,))
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    return x.transpose(1, 2), weight, bias


@example(length=64, taps=45, seed=0)  # where padding inside torch's kernel gives other gradients
@example(length=64, taps=31, seed=0)
@settings(deadline=None, max_examples=60)
@given(length=st.integers(1, 70), taps=st.integers(1, 64), seed=st.integers(0, 99))
def test_values_and_gradients_are_those_of_the_direct_sum(length: int, taps: int, seed: int) -> None:
    exact = tensors(length, taps, seed, torch.float64)
    padded = F.pad(exact[0], ((taps - 1) // 2, taps // 2))
    expected = torch.stack([(padded[..., t : t + taps] * exact[1][:, 0]).sum(-1) for t in range(length)], -1)
    expected = expected + exact[2][:, None]
    single = tensors(length, taps, seed, torch.float32)
    found = convolve_depthwise(*single)
    bound = 1e-5 * (1 + float(expected.detach().abs().max()))
    assert found.dtype == torch.float32 and float((found - expected).detach().abs().max()) < bound
    weights = torch.arange(found.numel()).reshape(found.shape).cos()
    wanted = torch.autograd.grad((expected * weights).sum(), exact)
    for one, other in zip(torch.autograd.grad((found * weights).sum(), single), wanted, strict=True):
        assert float((one - other).abs().max()) < 1e-4 * (1 + float(other.abs().max()))


def test_a_cpu_never_takes_the_slow_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "conv1d", None)
    assert convolve_depthwise(*tensors(9, 45, 0, torch.float32)).shape == (2, 3, 9)
