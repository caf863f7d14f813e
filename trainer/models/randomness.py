"""Random numbers that depend on what they are for, not on who draws them.

Whatever is random in training (flow noise, flow time, dropout) is a pure function of a key, made from
(seed, epoch, window, subject), a site (which use of randomness) and an element's index. A rank's generator is never
asked, so the number of processes, the micro-batches and the order of a batch change nothing.

The generator is a counter-based hash: 32-bit integers held in int64 tensors, mixed by two multiply-xorshift rounds
(constants of the `splitmix32` variant of lowbias32, https://github.com/skeeto/hash-prospector). Both constants are
below 2^31, so that a product with a 32-bit integer never overflows int64: the bits are the same on every device.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

FIRST_DROPOUT_SITE = 1000
"""Sites from 0 to below this belong to named uses (flow noise, flow time, ...); `number_sites` starts here."""

_LOW32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads small consecutive integers over 32 bits

_BLOCK = 2**20
"""Normal numbers that are made at once: each takes some 50 bytes on its way."""

_current_keys: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("dropout_keys", default=None)


def make_keys(seed: int, epoch: int, windows: Tensor, subjects: Tensor | None = None) -> Tensor:
    """One key for each item.

    Args:
        seed: the run's seed; 64 bits of it count.
        epoch: the epoch, so that the same window draws afresh in each.
        windows: (N,) int64, the windows' indices in their epoch.
        subjects: (N,) int64, or None where an item is a window of all subjects. Anything that broadcasts with
            `windows` works.

    Returns:
        (N,) int64 keys, not negative, 63 bits of hash each.
    """
    subject_words = torch.full_like(windows, -1) if subjects is None else subjects
    words: tuple[int | Tensor, ...] = (seed, seed >> 32, epoch, windows, windows >> 32, subject_words)
    halves = []
    for start in (1, 2):
        state = _mix(torch.full_like(windows, start * _GOLDEN & _LOW32))
        for word in words:
            state = _mix((state + _GOLDEN & _LOW32) ^ (word & _LOW32))
        halves.append(state)
    low, high = halves
    return (high >> 1 << 32) | low


def fold_in(keys: Tensor, number: int) -> Tensor:
    """Derive new keys: for the `number`-th of several draws of the same items. Shapes (N,) -> (N,)."""
    low, high = _site_words(keys, -1 - number)
    return (high >> 1 << 32) | low


def uniform(keys: Tensor, site: int, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform numbers strictly between 0 and 1, with 23 random bits each.

    Element i of an item (in row-major order of `shape`) depends on (key, site, i) alone: a longer first dimension
    leaves the numbers before it as they are.

    Args:
        keys: (N,) int64 from `make_keys`.
        site: which use of randomness; two uses with the same site and key draw the same numbers.
        shape: of one item.

    Returns:
        (N, *shape) float32 on the keys' device; identical on all devices.
    """
    return _uniform(keys, site, math.prod(shape)).view(keys.shape[0], *shape)


def normal(keys: Tensor, site: int, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal numbers by Box and Muller's transform of `uniform`'s.

    Elements 2k and 2k + 1 share one pair of uniforms, so the same prefix rule holds. The logarithm and the cosine are
    taken in float64, so that a last-place difference between devices or vector widths rounds away. Memory beside the
    result does not grow with it.

    Returns:
        (N, *shape) float32.
    """
    size = math.prod(shape)
    out = torch.empty(keys.shape[0], size, dtype=torch.float32, device=keys.device)
    block = max(2, _BLOCK // max(keys.shape[0], 1) // 2 * 2)
    for start in range(0, size, block):
        width = min(block, size - start)
        pairs = _uniform(keys, site, width + width % 2, start).unflatten(1, (-1, 2)).double()
        radius = torch.sqrt(-2.0 * torch.log(pairs[..., 0].contiguous()))
        angle = 2.0 * math.pi * pairs[..., 1].contiguous()
        both = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
        out[:, start : start + width] = both.flatten(1)[:, :width]
    return out.view(keys.shape[0], *shape)


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of the item's key and of this module's site.

    In training the input's first dimension must be that of the keys which `keyed` has set. In evaluation, and with
    p = 0, it does nothing.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.site = FIRST_DROPOUT_SITE

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of x (N, ...), and scale the rest by 1 / (1 - p)."""
        if not self.training or self.p == 0.0:
            return x
        keys = _current_keys.get()
        if keys is None:
            raise RuntimeError("dropout in training mode needs keys: call the model inside `with keyed(keys):`")
        if keys.shape[0] != x.shape[0]:
            raise RuntimeError(f"dropout has {keys.shape[0]} keys for {x.shape[0]} items: give one key an item")
        # p as a threshold on the same 23 bits that `uniform` uses
        kept = _bits(keys, self.site, math.prod(x.shape[1:])) >> 9 >= round(self.p * 2**23)
        return x * kept.view(x.shape).to(x.dtype) * (1.0 / (1.0 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}, site={self.site}"


@contextlib.contextmanager
def keyed(keys: Tensor) -> Iterator[None]:
    """Set the keys (N,) of every `KeyedDropout` that is called inside the `with` block."""
    token = _current_keys.set(keys)
    try:
        yield
    finally:
        _current_keys.reset(token)


def number_sites(model: nn.Module) -> int:
    """Give each `KeyedDropout` in `model` a site of its own, in the order of `modules()`; return how many."""
    layers = [module for module in model.modules() if isinstance(module, KeyedDropout)]
    for index, layer in enumerate(layers):
        layer.site = FIRST_DROPOUT_SITE + index
    return len(layers)


def _uniform(keys: Tensor, site: int, size: int, start: int = 0) -> Tensor:
    """(N, size) float32: the uniform numbers of indices start, start + 1, ..."""
    bits = _bits(keys, site, size, start)
    # 23 bits plus a half fit float32's 24 exactly, so neither 0 nor 1 can come out.
    return ((bits >> 9).to(torch.float32) + 0.5).mul_(2.0**-23)


def _bits(keys: Tensor, site: int, size: int, start: int = 0) -> Tensor:
    """(N, size) int64 in [0, 2^32): the hash of (key, site, index), for indices start, start + 1, ...

    The index is mixed once for all items; the item's two words then move it before the second mix, which makes one
    mix an element.
    """
    low, high = _site_words(keys, site)
    counter = _mix(torch.arange(start, start + size, dtype=torch.int64, device=keys.device))
    return _mix_(((counter ^ high[:, None]) + low[:, None]).bitwise_and_(_LOW32))


def _site_words(keys: Tensor, site: int) -> tuple[Tensor, Tensor]:
    """Two 32-bit words (N,) for each item, made from both halves of its key and from the site."""
    stride = site * _GOLDEN & _LOW32
    first = _mix((keys & _LOW32) + stride & _LOW32)
    second = _mix((keys >> 32) ^ first)
    return _mix(first + second & _LOW32), second


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers, in which every input bit moves every output bit."""
    return _mix_(x.clone())


def _mix_(x: Tensor) -> Tensor:
    """`_mix` in place: the tensors are large, and temporaries would cost more than the arithmetic."""
    x.bitwise_xor_(x >> 16).mul_(0x21F0AAAD).bitwise_and_(_LOW32)
    x.bitwise_xor_(x >> 15).mul_(0x735A2D97).bitwise_and_(_LOW32)
    return x.bitwise_xor_(x >> 15)
