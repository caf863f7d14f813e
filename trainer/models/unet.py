"""The estimator of stage 2: a U-Net over time that sees the noisy latent, the anchor's latent and the flow time.

The decoder of Matcha-TTS (arXiv 2309.03199): at each level a ResNet block with the time embedding, attention blocks
(Conformer, arXiv 2005.08100, with Shaw's relative positions; or Transformer with SnakeBeta), and a change of length.

What is ours: a padded sequence gives exactly what the unpadded one gives. Attention takes only valid positions as
keys, convolutions see zeros beyond the last one, and normalisation counts valid positions only. The published code
normalises over padding, has a BatchNorm over the whole batch and a mask that attention only half honours;
`published=True` computes that, for published weights. Dropout is keyed, and a vector may be added to the time embedding
(which subject it is).

Shapes: N items, C channels, T positions. Convolutions run on (N, C, T), attention on (N, T, C), the mask is (N, 1, T)
float with 1 at valid positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import InputError
from trainer.models.depthwise import convolve_depthwise
from trainer.models.randomness import KeyedDropout, number_sites

GROUPS = 8
CONFORMER_KERNEL_SIZE = 31
MAX_DISTANCE = 512
"""Relative positions further apart than this share one embedding."""
ATTENTION_ROWS = 1024
"""Longer sequences are attended to in blocks of queries, so that no table of all pairs stands in memory."""


def time_features(t: Tensor, dim: int, scale: float = 1000.0) -> Tensor:
    """Sines and cosines of t (N,) at dim / 2 frequencies from `scale` down to scale / 10000: (N, dim) float32."""
    half = dim // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000.0) / (half - 1))
    angles = scale * t.float()[:, None] * exponents.exp()
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class GroupNorm(nn.GroupNorm):
    """GroupNorm whose mean and variance count valid positions only; over all of them where `published`."""

    def __init__(self, channels: int, published: bool) -> None:
        super().__init__(GROUPS, channels)
        self.published = published

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """(N, C, T), (N, 1, T) -> (N, C, T)."""
        if self.published:
            return super().forward(x)
        grouped = x.float().unflatten(1, (self.num_groups, -1))  # (N, G, C / G, T)
        valid = mask.float()[:, :, None, :]
        count = (valid.sum((2, 3), keepdim=True) * grouped.shape[2]).clamp(min=1.0)
        centred = grouped - (grouped * valid).sum((2, 3), keepdim=True) / count
        variance = ((centred * valid).square()).sum((2, 3), keepdim=True) / count
        normed = (centred * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        return (normed * self.weight[:, None] + self.bias[:, None]).to(x.dtype)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm whose training statistics count valid positions only; over all of them where `published`.

    Its result depends on who shares a batch, so it is here for published weights alone.
    """

    def __init__(self, channels: int, published: bool) -> None:
        super().__init__(channels)
        self.published = published

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """(N, C, T), (N, 1, T) -> (N, C, T)."""
        if self.published or not self.training:
            return super().forward(x)
        valid = mask[:, 0] > 0
        rows = super().forward(x.transpose(1, 2)[valid])
        return x.new_zeros(x.shape[0], x.shape[2], x.shape[1]).masked_scatter(valid[:, :, None], rows).transpose(1, 2)


class ConvBlock(nn.Module):
    """Convolution of 3 taps, GroupNorm, Mish, with masked positions zeroed before and after."""

    def __init__(self, channels_in: int, channels_out: int, published: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels_in, channels_out, 3, padding=1)
        self.norm = GroupNorm(channels_out, published)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return F.mish(self.norm(self.conv(x * mask), mask)) * mask


class ResNetBlock(nn.Module):
    """Two `ConvBlock`s with the time embedding added between them, and a 1x1 convolution as the residual path."""

    def __init__(self, channels_in: int, channels_out: int, time_dim: int, published: bool) -> None:
        super().__init__()
        self.time = nn.Linear(time_dim, channels_out)
        self.block1 = ConvBlock(channels_in, channels_out, published)
        self.block2 = ConvBlock(channels_out, channels_out, published)
        self.residual = nn.Conv1d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        h = self.block1(x, mask) + self.time(F.mish(time))[:, :, None]
        return self.block2(h, mask) + self.residual(x * mask)


class RelativeAttention(nn.Module):
    """Self-attention with an embedding of the distance i - j in the scores: q_i . (k_j + r_(i-j)) / sqrt(head).

    Shaw, Uszkoreit and Vaswani 2018 (arXiv 1803.02155), distances clipped at `MAX_DISTANCE`.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float, published: bool) -> None:
        super().__init__()
        self.heads, self.published = heads, published
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim)
        self.distance = nn.Embedding(2 * MAX_DISTANCE + 1, head_dim)
        self.dropout = KeyedDropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, T, C), (N, 1, T) -> (N, T, C)."""
        query = _split_heads(self.query(x), self.heads)
        key, value = (_split_heads(half, self.heads) for half in self.key_value(x).chunk(2, dim=-1))
        length = x.shape[1]
        if length <= ATTENTION_ROWS or self.training:  # in training dropout is drawn for all pairs at once
            attended = self._attend(query, key, value, mask, 0)
        else:
            starts = range(0, length, ATTENTION_ROWS)
            blocks = [self._attend(query[:, :, i : i + ATTENTION_ROWS], key, value, mask, i) for i in starts]
            attended = torch.cat(blocks, dim=2)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, first: int) -> Tensor:
        """What the queries (N, heads, Q, head) of positions `first`, `first` + 1, ... take from the values.

        key, value: (N, heads, T, head); mask: (N, 1, T). Returns (N, heads, Q, head).
        """
        distance_scores = self._distance_scores(query, key.shape[2], first)
        scores = (query @ key.transpose(-1, -2) + distance_scores) * query.shape[-1] ** -0.5
        allowed = mask[:, :, None, :] > 0
        if self.published:  # masked queries attend to everything there, and later convolutions read the result
            allowed = allowed & (mask[:, :, first : first + query.shape[2], None] > 0)
        scores = scores.float().masked_fill(~allowed, torch.finfo(torch.float32).min)
        attention = self.dropout(scores.softmax(dim=-1).to(value.dtype))
        return attention @ value

    def _distance_scores(self, query: Tensor, length: int, first: int) -> Tensor:
        """q_i . r_(i-j) for Q queries i = first, ..., and all T = `length` positions j.

        (N, heads, Q, head) -> (N, heads, Q, T), without a (Q, T, head) table: row i of the product with the embeddings
        of the distances from the largest down, first + Q - 1, ..., first - (T - 1), holds its scores from column
        Q - 1 - (i - first) on; cut the first Q - 1 numbers of the flattened rows off, and rows that are one number
        shorter begin there.
        """
        rows = query.shape[2]
        furthest = first + rows - 1
        distances = torch.arange(furthest, first - length, -1, device=query.device).clamp(-MAX_DISTANCE, MAX_DISTANCE)
        table = self.distance.weight[distances + MAX_DISTANCE].to(query.dtype)
        scores = query @ table.T  # (N, heads, Q, T + Q - 1)
        if rows == 1:
            return scores
        width = length + rows - 2
        flat = scores.flatten(2)[:, :, rows - 1 : rows - 1 + rows * width]
        return flat.unflatten(2, (rows, width))[..., :length]


class FeedForward(nn.Module):
    """The Conformer's: LayerNorm, Linear, Swish, Linear, with dropout; ff_mult 1."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.inner, self.outer = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout_inner, self.dropout_outer = KeyedDropout(dropout), KeyedDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout_outer(self.outer(self.dropout_inner(F.silu(self.inner(self.norm(x))))))


class ConvModule(nn.Module):
    """The Conformer's: LayerNorm, 1x1 to twice the inner width, GLU, depthwise 31 taps, norm, Swish, 1x1, dropout."""

    def __init__(self, dim: int, dropout: float, norm: str, published: bool) -> None:
        super().__init__()
        inner = 2 * dim
        self.published = published
        self.norm_in = nn.LayerNorm(dim)
        self.expand = nn.Conv1d(dim, 2 * inner, 1)
        padding = CONFORMER_KERNEL_SIZE // 2
        self.depthwise = nn.Conv1d(inner, inner, CONFORMER_KERNEL_SIZE, padding=padding, groups=inner)
        self.norm = BatchNorm(inner, published) if norm == "batch" else GroupNorm(inner, published)
        self.contract = nn.Conv1d(inner, dim, 1)
        self.dropout = KeyedDropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, T, C), (N, 1, T) -> (N, T, C)."""
        h = F.glu(self.expand(self.norm_in(x).transpose(1, 2)), dim=1)
        if not self.published:
            h = h * mask
        h = F.silu(self.norm(convolve_depthwise(h, self.depthwise.weight, self.depthwise.bias), mask))
        return self.dropout(self.contract(h).transpose(1, 2))


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, LayerNorm; all but the last residual."""

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float, norm: str, published: bool) -> None:
        super().__init__()
        self.ff1, self.ff2 = FeedForward(dim, dropout), FeedForward(dim, dropout)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = RelativeAttention(dim, heads, head_dim, dropout, published)
        self.conv = ConvModule(dim, dropout, norm, published)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + 0.5 * self.ff1(x)
        x = x + self.attention(self.attention_norm(x), mask)
        x = x + self.conv(x, mask)
        return self.norm_out(x + 0.5 * self.ff2(x))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention without positions, then a feed-forward of 4 x width with SnakeBeta.

    SnakeBeta: x + sin^2(exp(alpha) x) / exp(beta), alpha and beta learned for each channel (arXiv 2006.08195).
    """

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float, published: bool) -> None:
        super().__init__()
        self.heads, self.published = heads, published
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, heads * head_dim, bias=False) for _ in range(3))
        self.out = nn.Linear(heads * head_dim, dim)
        self.inner, self.outer = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.alpha, self.beta = nn.Parameter(torch.zeros(4 * dim)), nn.Parameter(torch.zeros(4 * dim))
        self.dropout_attention, self.dropout_inner = KeyedDropout(dropout), KeyedDropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, T, C), (N, 1, T) -> (N, T, C)."""
        h = self.norm1(x)
        query, key, value = (_split_heads(f(h), self.heads) for f in (self.query, self.key, self.value))
        # The published code adds its 0/1 mask to the scores, which only favours valid keys. Ours shuts the others out,
        # by a large number rather than -inf, so that an item without any valid position does not become NaN.
        bias = mask if self.published else (mask - 1.0) * 1e4
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[:, :, None, :].to(query.dtype))
        x = x + self.dropout_attention(self.out(attended.transpose(1, 2).flatten(2)))
        h = self.inner(self.norm2(x))
        h = h + torch.sin(h * self.alpha.exp()).square() / (self.beta.exp() + 1e-9)
        return x + self.outer(self.dropout_inner(h))


class Level(nn.Module):
    """One level of the U: a ResNet block, then attention blocks."""

    def __init__(self, resnet: ResNetBlock, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.resnet = resnet
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        """(N, C_in, T) -> (N, C_out, T)."""
        h = self.resnet(x, mask, time).transpose(1, 2)
        for block in self.blocks:
            h = block(h, mask)
        return h.transpose(1, 2)


class UNet(nn.Module):
    """The vector field's network.

    Args:
        latent_dim: channels d of the latent; the time features are 2 d wide, and the network reads 2 d channels.
        channels: of each level; lengths halve between levels.
        norm: in the Conformer's convolution module, `group`, or `batch` for published weights.
        published: normalise and mask as the published code does (see the module's docstring).

    Raises:
        InputError: for a name that is not known or channels that the groups cannot share.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        channels: Sequence[int] = (256, 256),
        dropout: float = 0.05,
        attention_head_dim: int = 64,
        n_blocks: int = 1,
        num_mid_blocks: int = 2,
        num_heads: int = 2,
        act_fn: str = "snakebeta",
        down_block_type: str = "conformer",
        mid_block_type: str = "conformer",
        up_block_type: str = "conformer",
        norm: str = "group",
        published: bool = False,
    ) -> None:
        super().__init__()
        _check(latent_dim, channels, act_fn, norm)
        self.latent_dim, self.time_dim = latent_dim, 4 * channels[0]
        self.length_factor = 2 ** (len(channels) - 1)
        self.time1 = nn.Linear(2 * latent_dim, self.time_dim)
        self.time2 = nn.Linear(self.time_dim, self.time_dim)

        def level(kind: str, key: str, channels_in: int, channels_out: int) -> Level:
            common = (channels_out, num_heads, attention_head_dim, dropout)
            if kind == "conformer":
                blocks: list[nn.Module] = [ConformerBlock(*common, norm, published) for _ in range(n_blocks)]
            elif kind == "transformer":
                blocks = [TransformerBlock(*common, published) for _ in range(n_blocks)]
            else:
                expected = "conformer or transformer"
                raise InputError(f"stage2.decoder.{key}", "unknown block", found=kind, expected=expected)
            return Level(ResNetBlock(channels_in, channels_out, self.time_dim, published), blocks)

        self.down, self.middle, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.shorten, self.lengthen = nn.ModuleList(), nn.ModuleList()
        for before, width in pairwise([2 * latent_dim, *channels]):
            stride = 1 if len(self.shorten) == len(channels) - 1 else 2
            self.down.append(level(down_block_type, "down_block_type", before, width))
            self.shorten.append(nn.Conv1d(width, width, 3, stride=stride, padding=1))
        for _ in range(num_mid_blocks):
            self.middle.append(level(mid_block_type, "mid_block_type", channels[-1], channels[-1]))
        for before, width in pairwise([*reversed(channels), channels[0]]):
            self.up.append(level(up_block_type, "up_block_type", 2 * before, width))
            last = len(self.lengthen) == len(channels) - 1
            conv = nn.Conv1d(width, width, 3, padding=1) if last else nn.ConvTranspose1d(width, width, 4, 2, 1)
            self.lengthen.append(conv)
        self.final = ConvBlock(channels[0], channels[0], published)
        self.project = nn.Conv1d(channels[0], latent_dim, 1)
        self._initialise()
        number_sites(self)

    def _initialise(self) -> None:
        """He's normal initialisation of linear layers and convolutions, biases 0, as published."""
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def zero_last_layer(self) -> None:
        """Make the network's output 0 until it has learned something."""
        nn.init.zeros_(self.project.weight)
        assert self.project.bias is not None
        nn.init.zeros_(self.project.bias)

    def forward(self, y: Tensor, mask: Tensor, mu: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """One call of the estimator.

        Args:
            y: (N, d, T) state of the flow; T a multiple of `length_factor`.
            mask: (N, 1, T), 1 at valid positions, which come first.
            mu: (N, d, T) the anchor in the latent.
            t: (N,) flow time in [0, 1].
            condition: (N, time_dim), added to the time embedding.

        Returns:
            (N, d, T), 0 at masked positions.
        """
        if y.shape[2] % self.length_factor:
            raise ValueError(f"T is {y.shape[2]}, expected a multiple of {self.length_factor}")
        mask = mask.to(y.dtype)
        time = self.time2(F.silu(self.time1(time_features(t, 2 * self.latent_dim).to(y.dtype))))
        if condition is not None:
            time = time + condition
        x = torch.cat((y, mu), dim=1)
        skips, masks = [], []
        valid = mask
        for index, level in enumerate(self.down):
            masks.append(valid)
            x = level(x, valid, time)
            skips.append(x)
            x = self.shorten[index](x * valid)
            if index < len(self.shorten) - 1:
                valid = valid[:, :, ::2]
        for level in self.middle:
            x = level(x, valid, time)
        for level, lengthen in zip(self.up, self.lengthen, strict=True):
            valid = masks.pop()
            x = lengthen(level(torch.cat((x, skips.pop()), dim=1), valid, time) * valid)
        return self.project(self.final(x, mask)) * mask


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(N, T, heads x head) -> (N, heads, T, head)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _check(latent_dim: int, channels: Sequence[int], act_fn: str, norm: str) -> None:
    if latent_dim < 2:
        raise InputError("stage2.latent_dim", "too small", found=latent_dim, expected="at least 2")
    if not channels or any(width % GROUPS for width in channels):
        expected = f"multiples of {GROUPS}, the norm's groups"
        raise InputError("stage2.decoder.channels", "do not split", found=list(channels), expected=expected)
    if act_fn != "snakebeta":
        raise InputError("stage2.decoder.act_fn", "unknown activation", found=act_fn, expected="snakebeta")
    if norm not in ("group", "batch"):
        raise InputError("norm", "unknown normalisation", found=norm, expected="group or batch")
