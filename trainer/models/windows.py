"""A long run as overlapping windows whose results are cross-faded, so that its cost grows with its length only.

The network of stage 2 attends over all the TRs that it is given, which costs the square of their number. Given a window
at a time it costs as much as there are TRs. What the windows give is averaged with weights that add up to 1 at each TR
and are 0 near a window's inner edges, where the network has not seen the neighbours. Used at each call of the velocity
field, this leaves one differential equation for the whole run (the averaging of overlapping windows at each step is
that of MultiDiffusion, arXiv 2302.08113).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cover:
    """Windows of equal size over a run.

    Attributes:
        size: TRs of each window.
        starts: first TR of each, rising; multiples of the factor.
        weights: (windows, size) float32; for each TR of the run the weights of its windows add up to 1.
    """

    size: int
    starts: tuple[int, ...]
    weights: Tensor


@lru_cache(maxsize=64)
def cover(length: int, window: int | None, factor: int) -> Cover | None:
    """Cover a run with overlapping windows.

    Neighbours overlap by a quarter of a window or more. A quarter of that overlap at either end has weight 0 in the
    window that ends there, and the weights change linearly in between.

    Args:
        length: TRs of the run, a multiple of `factor`.
        window: TRs of a window, rounded up to a multiple of `factor`; None for the whole run.
        factor: starts are multiples of it.

    Returns: None where one window holds the run.
    """
    if window is None or length <= window:
        return None
    size = -(-window // factor) * factor
    if length <= size:
        return None
    steps = (length - size) // factor
    longest_step = max(size * 3 // 4 // factor, 1)
    n_steps = -(-steps // longest_step)
    starts = tuple(k * steps // n_steps * factor for k in range(n_steps + 1))
    overlap = size - longest_step * factor
    raw = torch.stack([_ramps(start, size, length, overlap) for start in starts])
    total = torch.zeros(length, dtype=torch.float64)
    for start, weight in zip(starts, raw, strict=True):
        total[start : start + size] += weight
    weights = torch.stack([w / total[s : s + size] for s, w in zip(starts, raw, strict=True)])
    return Cover(size, starts, weights.float())


def _ramps(start: int, size: int, length: int, overlap: int) -> Tensor:
    """(size,) float64 weights of one window, before they are made to add up to 1; no ramp at an end of the run."""
    margin, ramp = overlap / 4, max(overlap / 2, 0.5)
    place = torch.arange(size, dtype=torch.float64) + 0.5
    weights = torch.ones(size, dtype=torch.float64)
    if start > 0:
        weights = torch.minimum(weights, ((place - margin) / ramp).clamp(0, 1))
    if start + size < length:
        weights = torch.minimum(weights, ((size - place - margin) / ramp).clamp(0, 1))
    return weights


def by_windows(network: Callable[[slice], Tensor], found: Cover, out: Tensor, tick: Callable[[], None]) -> Tensor:
    """Add up what `network` gives for the TRs of each window, (N, d, size), weighted, into `out` (N, d, T) of zeros.

    One window is in work at a time, so that the memory of the network does not grow with the run. `tick` is called
    after each window.
    """
    weights = found.weights.to(out.device)
    for start, weight in zip(found.starts, weights, strict=True):
        here = slice(start, start + found.size)
        out[:, :, here] += weight * network(here)
        tick()
    return out
