"""Depthwise convolution over time, as both stages need it: one kernel a channel, 'same' zero padding."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def convolve_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, C, T), weight (C, 1, K), bias (C,) -> (N, C, T).

    On a CPU as one over (T, 1): torch has a fast depthwise kernel for two dimensions there, and none for one (four to
    six times as slow at the published widths); with gradients it is fastest on what lies channel by channel. The zeros
    are put there before, since that kernel's own padding gives wrong gradients of the weights from 16 zeros a side on
    (torch 2.13 with AVX2; 45 taps over 64 TRs, for one).
    """
    groups, taps = x.shape[1], weight.shape[2]
    if x.device.type != "cpu":
        return F.conv1d(x, weight, bias, padding="same", groups=groups)
    padded = F.pad(x.contiguous(), ((taps - 1) // 2, taps // 2))
    return F.conv2d(padded[..., None], weight[..., None], bias, groups=groups)[..., 0]
