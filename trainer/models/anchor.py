"""Stage 1, the mean anchor: features of a film in, the expected BOLD of every subject out.

The published encoder (MedARC's MultiSubjectConvLinearEncoder, arXiv 2507.19956): each feature stream is projected to a
common width and smoothed over time by a depthwise convolution, which learns the haemodynamic response; the streams are
pooled, optionally passed through a hidden model, and decoded to parcels by a decoder that all subjects share plus one
of each subject's own. With `avg` pooling and no hidden model all of it is linear.

Two things are ours. The streams are standardised inside the first projection (W / s, b - W m / s), so that nothing ever
makes a standardised copy of the features; a column with s = inf has the weight 0. And a mask says which TRs are real:
the others are zeroed after the projection, like what lies beyond a window's edge, so a padded window gives what the
unpadded one gives.

Shapes: B windows, S subjects, T TRs, V parcels, D_i width and L_i layers of stream i, d = embed_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import InputError
from trainer.models.decoder import Decoder, zero_masked
from trainer.models.depthwise import convolve_depthwise
from trainer.models.randomness import KeyedDropout, number_sites

POOL_HEADS = 4  # of the `attn` pooling, as published


def has_few_digits(device: torch.device) -> bool:
    """Whether products on this device are formed of fewer digits than float32 has: under autocast, or with TF32."""
    tf32 = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return tf32 or torch.is_autocast_enabled(device.type)


class DepthwiseConv(nn.Module):
    """A convolution over time with one kernel a channel, 'same' zero padding and a bias.

    Args:
        causal: the taps after the centre are zero, so that no TR sees features of later ones. Needs an odd kernel.
        positive: the kernel is |w|.
        blockwise: one kernel for all channels.
    """

    def __init__(
        self, channels: int, kernel_size: int, causal: bool = False, positive: bool = False, blockwise: bool = False
    ) -> None:
        super().__init__()
        self.kernel_size, self.causal, self.positive = kernel_size, causal, positive
        self.weight = nn.Parameter(torch.empty(1 if blockwise else channels, 1, kernel_size))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def kernel(self) -> Tensor:
        """The kernels in use, (C, 1, K)."""
        weight: Tensor = self.weight
        if self.causal:
            weight = weight * (torch.arange(self.kernel_size, device=weight.device) <= self.kernel_size // 2)
        if self.positive:
            weight = weight.abs()
        return weight.expand(self.bias.shape[0], 1, self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return convolve_depthwise(x.transpose(1, 2), self.kernel(), self.bias).transpose(1, 2)


class StreamEncoder(nn.Module):
    """One stream: standardise and project D -> d in one product, zero the masked TRs, convolve over time."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, embed_dim: int, conv: DepthwiseConv | None) -> None:
        super().__init__()
        self.linear = nn.Linear(width, embed_dim)
        self.conv = conv
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, L, D) -> (B, T, L, d); mask (B, T), True at the TRs that exist."""
        if has_few_digits(x.device):
            # digits must not go to the mean of a feature that hardly varies around it, and W / s may overflow float16
            h = F.linear((x.float() - self.mean) / self.scale, self.linear.weight, self.linear.bias)
        else:
            weight = self.linear.weight / self.scale
            h = F.linear(x.to(weight.dtype), weight, self.linear.bias - weight @ self.mean)
        if mask is not None:
            h = h.masked_fill(~mask[:, :, None, None], 0.0)
        if self.conv is None:
            return h
        batch, length, layers, channels = h.shape
        h = self.conv(h.transpose(1, 2).reshape(batch * layers, length, channels))
        return h.view(batch, layers, length, channels).transpose(1, 2)


class LinearPool(nn.Module):
    """A learned weight for each layer and channel, then the sum over layers: (B, T, L, d) -> (B, T, d)."""

    def __init__(self, layers: int, embed_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, embed_dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(2)


class AttentionPool(nn.Module):
    """One learned query attends over each TR's layers, to which embeddings are added: (B, T, L, d) -> (B, T, d)."""

    def __init__(self, layers: int, embed_dim: int) -> None:
        super().__init__()
        self.layer_embedding = nn.Parameter(torch.empty(layers, embed_dim))
        self.query = nn.Parameter(torch.empty(embed_dim))
        self.key = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)
        nn.init.trunc_normal_(self.layer_embedding, std=0.02)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, layers, channels = x.shape
        x = x + self.layer_embedding
        shape = (batch, length, layers, POOL_HEADS, channels // POOL_HEADS)
        query = self.query.view(POOL_HEADS, -1)
        scores = (self.key(x).view(shape) * query).sum(-1) * shape[-1] ** -0.5
        attention = scores.softmax(dim=2)
        pooled = (attention[..., None] * self.value(x).view(shape)).sum(2)
        return self.out(pooled.flatten(2))


class MLP(nn.Module):
    """Linear, GELU, Linear; dropout after each."""

    def __init__(self, dim: int, ratio: float, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, int(dim * ratio))
        self.outer = nn.Linear(int(dim * ratio), dim)
        self.dropout_inner, self.dropout_outer = KeyedDropout(dropout), KeyedDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout_outer(self.outer(self.dropout_inner(F.gelu(self.inner(x)))))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention over time, then an MLP: (B, T, d) -> (B, T, d). Masked TRs are no keys.

    There are no positions, because the published model has none in effect: its rotary embedding is applied along the
    axis of the heads, and a rotation that is the same for a query and a key cancels in their product.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.dropout = KeyedDropout(dropout)
        self.mlp = MLP(dim, mlp_ratio, dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.dropout(self._attend(self.norm1(x), mask))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        projected = (layer(x).unflatten(2, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        query, key, value = (part.transpose(1, 2) for part in projected)
        bias = None
        if mask is not None:
            # a large negative number, not -inf: a window without any TR must not make NaN
            bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -1e4)[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out(attended.transpose(1, 2).flatten(2))


class ConvNextBlock(nn.Module):
    """Depthwise convolution over time of unmasked TRs, LayerNorm, MLP, residual: (B, T, d) -> (B, T, d)."""

    def __init__(self, dim: int, kernel_size: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.conv = DepthwiseConv(dim, kernel_size)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, mlp_ratio, dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x + self.mlp(self.norm(self.conv(zero_masked(x, mask))))


class Anchor(nn.Module):
    """The whole of stage 1.

    Args:
        streams: (layers L_i, width D_i) of each feature stream; L_i = 1 for features (T, D_i).
        encoder_kernel_size: taps of the convolution over time; 1 or less for none.
        pool: `avg`: the sum over streams of the mean over a stream's layers; `linear`: learned weights; `attn`: one
            learned query over all layers.
        hidden_model: what runs on the pooled embedding.
        decoder_kernel_size: taps of the convolution before each own decoder; 1 or less for none.
        dropout: inside the hidden model; keyed by window (`randomness.keyed`).
    """

    def __init__(
        self,
        streams: Sequence[tuple[int, int]],
        n_subjects: int,
        n_parcels: int,
        *,
        embed_dim: int = 192,
        encoder_kernel_size: int = 45,
        encoder_causal: bool = False,
        encoder_positive: bool = False,
        encoder_blockwise: bool = False,
        pool: str = "avg",
        hidden_model: str | None = None,
        hidden_depth: int = 6,
        hidden_heads: int = 3,
        hidden_mlp_ratio: float = 4,
        hidden_kernel_size: int = 11,
        dropout: float = 0.0,
        shared_decoder: bool = True,
        subject_decoders: bool = True,
        decoder_kernel_size: int = 1,
    ) -> None:
        super().__init__()
        if encoder_causal and encoder_kernel_size % 2 == 0:
            where = "stage1.model.encoder_kernel_size"
            raise InputError(
                where, "a causal kernel needs a centre", found=encoder_kernel_size, expected="an odd number"
            )
        self.layers = [layers for layers, _ in streams]
        self.streams = nn.ModuleList()
        shape = {"causal": encoder_causal, "positive": encoder_positive, "blockwise": encoder_blockwise}
        for _, width in streams:
            conv = DepthwiseConv(embed_dim, encoder_kernel_size, **shape) if encoder_kernel_size > 1 else None
            self.streams.append(StreamEncoder(width, embed_dim, conv))
        self.pool = _build_pool(pool, sum(self.layers), embed_dim)
        self.hidden = nn.ModuleList(
            _build_block(hidden_model, embed_dim, hidden_heads, hidden_mlp_ratio, hidden_kernel_size, dropout)
            for _ in range(0 if hidden_model is None else hidden_depth)
        )
        self.decoder = Decoder(embed_dim, n_subjects, n_parcels, shared_decoder, subject_decoders, decoder_kernel_size)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        number_sites(self)

    def set_standardising(self, means: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
        """Standardise stream i as (x - means[i]) / scales[i], both (D_i,), from now on, inside its projection.

        A scale of inf leaves a feature out: its weight and the gradient of its weight are 0. One of 0 is taken as 1.
        """
        for index, (stream, mean, scale) in enumerate(zip(self.streams, means, scales, strict=True)):
            assert isinstance(stream, StreamEncoder)
            shapes = tuple(mean.shape), tuple(scale.shape)
            if shapes != (stream.mean.shape, stream.scale.shape):
                raise ValueError(f"stream {index}: mean and scale are {shapes}, expected {tuple(stream.mean.shape)}")
            if not (mean.isfinite().all() and (scale >= 0).all()):
                raise ValueError(f"stream {index}: a mean is not finite, or a scale is negative or not a number")
            stream.mean.copy_(mean)
            stream.scale.copy_(torch.where(scale > 0, scale, torch.ones_like(scale)))

    def start_at(self, level: Tensor, count: Tensor) -> None:
        """Prepare the decoders for a training of subjects with `count` (S,) TRs, whose BOLD has a level (S, V).

        Subjects of 0 TRs are left out, see `Decoder.leave_out`. The biases start at the level, see `Decoder.start_at`;
        where it is 0 everywhere, they stay as they are.
        """
        self.decoder.leave_out(count == 0)
        if level.any():
            self.decoder.start_at(level, count)

    def forward(self, features: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """The expected BOLD.

        Args:
            features: one tensor a stream, (B, T, D_i) or (B, T, L_i, D_i), float16 or the weights' dtype.
            mask: (B, T) bool, True at the TRs that exist; None for all.

        Returns:
            (B, S, T, V). What stands at masked TRs means nothing.
        """
        if len(features) != len(self.streams):
            raise ValueError(f"the anchor reads {len(self.streams)} streams, got {len(features)}")
        embedded = []
        for x, stream, layers in zip(features, self.streams, self.layers, strict=True):
            assert isinstance(stream, StreamEncoder)
            x = x[:, :, None] if x.ndim == 3 else x
            if x.shape[2] != layers:
                raise ValueError(f"a stream of {layers} layers came with {x.shape[2]}")
            if self.pool is None and layers > 1:
                # projection and convolution are linear: the mean over layers may come first, for L times less work
                x = x.mean(dim=2, keepdim=True, dtype=stream.scale.dtype)
            embedded.append(stream(x, mask))
        layered = torch.cat(embedded, dim=2)
        pooled = layered.sum(2) if self.pool is None else self.pool(layered)
        for block in self.hidden:
            pooled = block(pooled, mask)
        return self.decoder(pooled, mask)


def anchor_loss(
    prediction: Tensor, bold: Tensor, mask: Tensor, subject_mask: Tensor, count: int | None = None
) -> Tensor:
    """Mean squared error over what was measured.

    Args:
        prediction, bold: (B, S, T, V). What stands where a subject or a TR is absent is never read.
        mask: (B, T) bool; subject_mask: (B, S) bool.
        count: the number of valid (window, subject, TR) triples of the global batch (all ranks, all micro-batches), a
            Python number, for which no device has to be waited for; None for this batch's. The losses of a batch's
            parts then add up to the loss of the whole.

    Returns:
        The sum of the squared errors of valid entries / (count x V); a scalar.
    """
    valid = mask[:, None, :] & subject_mask[:, :, None]
    error = (prediction.float() - bold.float()).masked_fill(~valid[..., None], 0.0)
    total = valid.sum().clamp(min=1) if count is None else max(count, 1)
    return error.square().sum() / (total * bold.shape[-1])


def _build_pool(pool: str, layers: int, embed_dim: int) -> nn.Module | None:
    """The pooling module; None for `avg`, which has no weights."""
    if pool == "avg":
        return None
    if pool == "linear":
        return LinearPool(layers, embed_dim)
    if pool == "attn":
        if embed_dim % POOL_HEADS:
            expected = f"a multiple of {POOL_HEADS}"
            raise InputError("stage1.model.embed_dim", "unfit for attn pooling", found=embed_dim, expected=expected)
        return AttentionPool(layers, embed_dim)
    raise InputError("stage1.model.global_pool", "unknown pooling", found=pool, expected="avg, linear or attn")


def _build_block(name: str | None, dim: int, heads: int, ratio: float, kernel_size: int, dropout: float) -> nn.Module:
    if name == "transformer":
        return TransformerBlock(dim, heads, ratio, dropout)
    if name == "conv1dnext":
        return ConvNextBlock(dim, kernel_size, ratio, dropout)
    raise InputError("stage1.model.hidden_model", "unknown model", found=name, expected="transformer or conv1dnext")
