"""Subjects who are left out, and biases that start at the level of BOLD."""

from __future__ import annotations

import pytest
import torch

from trainer.models.decoder import Decoder

SUBJECTS, PARCELS, DIM = 3, 5, 4
UNTRAINED = torch.tensor([False, True, False])


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_subject_who_is_left_out_is_predicted_by_the_shared_decoder_through_training(kernel_size: int) -> None:
    torch.manual_seed(0)
    decoder = Decoder(DIM, SUBJECTS, PARCELS, True, True, kernel_size)
    decoder.leave_out(UNTRAINED)
    x, optimizer = torch.randn(2, 6, DIM), torch.optim.AdamW(decoder.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        decoder(x, None)[:, ~UNTRAINED].sub(1.0).square().sum().backward()
        optimizer.step()
    found = decoder(x, None)
    assert decoder.shared is not None
    assert torch.allclose(found[:, 1], decoder.shared(x), atol=1e-6)
    assert not torch.allclose(found[:, 0], decoder.shared(x), atol=1e-2)
    assert decoder.silent().tolist() == [False, False, False]


def test_without_a_shared_decoder_a_subject_who_is_left_out_is_silent() -> None:
    torch.manual_seed(0)
    decoder = Decoder(DIM, SUBJECTS, PARCELS, False, True, 1)
    assert not decoder.silent().any()
    decoder.leave_out(UNTRAINED)
    assert torch.equal(decoder.silent(), UNTRAINED)
    assert not decoder(torch.randn(1, 2, DIM), None)[:, 1].any()


def test_the_shared_bias_starts_at_the_mean_of_the_trained_subjects() -> None:
    decoder = Decoder(DIM, SUBJECTS, PARCELS, True, True, 1)
    decoder.leave_out(UNTRAINED)
    level = torch.tensor([[100.0], [0.0], [400.0]], dtype=torch.float64).expand(-1, PARCELS)
    decoder.start_at(level, torch.tensor([20, 0, 10]))
    found = decoder(torch.zeros(1, 1, DIM), None)[0, :, 0]
    assert found[:, 0].tolist() == [100.0, 200.0, 400.0]


@pytest.mark.parametrize("options", [(True, True, 1), (True, True, 3), (True, False, 1), (False, True, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_level_of_100_000_takes_no_digits_of_the_signal_under_autocast(
    options: tuple[bool, bool, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    decoder, x = Decoder(DIM, SUBJECTS, PARCELS, *options), 20 * torch.randn(1, 50, DIM)
    signal = decoder(x, None)
    decoder.start_at(torch.full((SUBJECTS, PARCELS), 1e5, dtype=torch.float64), torch.ones(SUBJECTS))
    with torch.autocast("cpu", dtype):
        found = decoder(x, None) - 1e5
    assert (found - signal).abs().max() < 0.05 * signal.abs().max() + 0.02
