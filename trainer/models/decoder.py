"""From the anchor's embedding to BOLD: a decoder that all subjects share plus one of each subject's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Decoder(nn.Module):
    """d -> V by a decoder that all subjects share plus one of each subject's own, in one product.

    The own decoders are one parameter (S, V, d); the shared one is added to it first, so that S subjects cost one
    matrix product. With a decoder convolution (kernel_size > 1) each subject convolves the embedding over time
    (depthwise) before its own decoder; the shared decoder sees it as it is.

    A subject that is not trained has an own decoder of zeros (`leave_out`), which no gradient and no weight decay
    changes: the shared decoder alone predicts that subject, from any copy of the weights.
    """

    def __init__(self, dim: int, n_subjects: int, n_parcels: int, shared: bool, own: bool, kernel_size: int) -> None:
        super().__init__()
        assert shared or own
        self.n_subjects = n_subjects
        self.shared = nn.Linear(dim, n_parcels) if shared else None
        self.own_weight = nn.Parameter(torch.empty(n_subjects, n_parcels, dim)) if own else None
        self.own_bias = nn.Parameter(torch.zeros(n_subjects, n_parcels)) if own else None
        convolves = own and kernel_size > 1
        self.conv_weight = nn.Parameter(torch.empty(n_subjects, dim, kernel_size)) if convolves else None
        self.conv_bias = nn.Parameter(torch.zeros(n_subjects, dim)) if convolves else None
        if self.own_weight is not None:
            nn.init.trunc_normal_(self.own_weight, std=0.02)
        if self.conv_weight is not None:
            nn.init.trunc_normal_(self.conv_weight, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, d) -> (B, S, T, V)."""
        if self.own_weight is None or self.own_bias is None:
            assert self.shared is not None
            return _affine(x, self.shared.weight, self.shared.bias)[:, None].expand(-1, self.n_subjects, -1, -1)
        if self.conv_weight is None:
            weight: Tensor = self.own_weight
            bias: Tensor = self.own_bias
            if self.shared is not None:
                weight, bias = weight + self.shared.weight, bias + self.shared.bias
            return _affine(x, weight.flatten(0, 1), bias.flatten()).unflatten(2, bias.shape).transpose(1, 2)
        own = self._convolve(zero_masked(x, mask))
        out = torch.einsum("btds,svd->bstv", own, self.own_weight) + self.own_bias[:, None, :]
        return out if self.shared is None else out + _affine(x, self.shared.weight, self.shared.bias)[:, None]

    @torch.no_grad()
    def leave_out(self, untrained: Tensor) -> None:
        """Set the own decoders of the subjects of `untrained` (S,) bool to zero."""
        if self.own_weight is not None and self.own_bias is not None:
            self.own_weight[untrained] = 0.0
            self.own_bias[untrained] = 0.0

    def silent(self) -> Tensor:
        """(S,) bool: the subjects of whom this decoder says nothing: not trained, and no decoder is shared."""
        if self.shared is not None or self.own_weight is None:
            return torch.zeros(self.n_subjects, dtype=torch.bool)
        return (self.own_weight == 0).flatten(1).all(1).cpu()

    @torch.no_grad()
    def start_at(self, level: Tensor, weight: Tensor) -> None:
        """Let the biases start at a level of each subject and parcel, (S, V).

        The shared bias takes the mean over subjects, each counted with its `weight` (S,), which is 0 for one that is
        not trained; the own biases take what remains.
        """
        shared = (level * weight[:, None]).sum(0) / weight.sum().clamp(min=1)
        if self.shared is not None:
            self.shared.bias.copy_(shared)
            level = level - shared
        if self.own_bias is not None:
            self.own_bias.copy_(level.masked_fill((weight == 0)[:, None], 0.0))

    def _convolve(self, x: Tensor) -> Tensor:
        """Each subject's depthwise convolution over time: (B, T, d) -> (B, T, d, S)."""
        assert self.conv_weight is not None and self.conv_bias is not None
        subjects, dim, kernel_size = self.conv_weight.shape
        # grouped by channel, S kernels in each group, so that one call serves all subjects
        kernel = self.conv_weight.transpose(0, 1).reshape(dim * subjects, 1, kernel_size)
        out = F.conv1d(x.transpose(1, 2), kernel, self.conv_bias.T.reshape(-1), padding="same", groups=dim)
        return out.transpose(1, 2).unflatten(2, (dim, subjects))


def zero_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, T, d) with zeros at masked TRs."""
    return x if mask is None else x.masked_fill(~mask[:, :, None], 0.0)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b. Under autocast b is added in float32: the level of BOLD in scanner units would take all digits."""
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight).float() + bias
    return F.linear(x, weight, bias)
