"""Depthwise convolution over time, as both stages need it: one kernel a channel, 'same' zero padding."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

MOST_PADDING = 15
"""Zeros a side that torch's two-dimensional kernel may add itself: with more of them its gradients of the weights are
wrong (torch 2.13 with AVX2; 45 taps over 64 TRs, for one). Put there before they cost a copy, a third of the time."""


def convolve_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, C, T), weight (C, 1, K), bias (C,) -> (N, C, T).

    On a CPU as one over (T, 1): torch has a fast depthwise kernel for two dimensions there, and none for one (four to
    six times as slow at the published widths); with gradients it is fastest on what lies channel by channel.
    """
    groups, before, after = x.shape[1], (weight.shape[2] - 1) // 2, weight.shape[2] // 2
    if x.device.type != "cpu":
        return F.conv1d(x, weight, bias, padding="same", groups=groups)
    x, inside = x.contiguous(), before
    if before != after or before > MOST_PADDING:
        x, inside = F.pad(x, (before, after)), 0
    return F.conv2d(x[..., None], weight[..., None], bias, padding=(inside, 0), groups=groups)[..., 0]
