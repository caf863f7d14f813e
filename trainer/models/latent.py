"""What stage 2's flow runs in: a few dimensions of BOLD, and what lies outside of them.

By default principal components of the training BOLD, standardised and frozen, because a projection that is trained by
the flow loss collapses (the loss is least where the latent is 0). Outside of them the prediction is the anchor's.

Shapes: N items, T TRs, V parcels, d latent dimensions, S subjects; BOLD and anchors are (N, T, V), latents (N, T, d).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.errors import InputError


class Latent(nn.Module):
    """Standardised principal components of BOLD: z = P (x - m) / s, frozen.

    Buffers: mean m (S, V), each subject's; basis P (d, V), orthonormal rows; scale s (d,), the training standard
    deviations; residual_std (S, V), of what a sample adds outside of the latent (held-out residuals of the anchor, 0
    until set). The others are NaN until fitted or loaded, so that a latent which was forgotten cannot pass for one.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor
    residual_std: Tensor

    def __init__(self, n_subjects: int, n_parcels: int, latent_dim: int) -> None:
        super().__init__()
        _check_latent_dim(latent_dim, n_parcels)
        self.register_buffer("mean", torch.full((n_subjects, n_parcels), torch.nan))
        self.register_buffer("basis", torch.full((latent_dim, n_parcels), torch.nan))
        self.register_buffer("scale", torch.full((latent_dim,), torch.nan))
        self.register_buffer("residual_std", torch.zeros(n_subjects, n_parcels))

    def encode(self, x: Tensor, subject: Tensor) -> Tensor:
        """(N, T, V), (N,) -> (N, T, d). In full precision also under autocast: the signal is small."""
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() - self.mean[subject][:, None]) @ self.basis.T / self.scale

    def decode(self, z: Tensor, anchor: Tensor, subject: Tensor, noise: Tensor | None = None) -> Tensor:
        """x = m + P^T (s z) + (I - P^T P)(mu - m + e), with e = `noise` (N, T, V).

        Computed as mu + e + P^T (s (z - encode(mu)) - P e), which is the same and returns the anchor itself, to the
        bit, where z is its encoding. z (N, T, d), anchor mu (N, T, V) -> (N, T, V).
        """
        with torch.autocast(anchor.device.type, enabled=False):
            anchor = anchor.float()
            change = (z.float() - self.encode(anchor, subject)) * self.scale
            if noise is None:
                return anchor + change @ self.basis
            return anchor + noise + (change - noise @ self.basis.T) @ self.basis

    def stand_in(self, trained: Tensor) -> None:
        """Give subjects that are not trained, of `trained` (S,) bool, the mean and residual variance of the others."""
        if not trained.all():
            self.mean[~trained] = self.mean[trained].mean(0)
            self.residual_std[~trained] = self.residual_std[trained].square().mean(0).sqrt()

    def subspace(self, x: Tensor, subject: Tensor) -> Tensor:
        """The part of x that the latent holds, P^T P (x - m). (N, T, V) -> (N, T, V)."""
        return (self.encode(x, subject) * self.scale) @ self.basis


class LinearLatent(nn.Module):
    """The published projection: a trainable linear layer V -> d and another one back, with no complement.

    It collapses under the flow loss; the standard deviation of its latents is worth watching.
    """

    def __init__(self, n_parcels: int, latent_dim: int) -> None:
        super().__init__()
        _check_latent_dim(latent_dim, n_parcels)
        self.forth = nn.Linear(n_parcels, latent_dim)
        self.back = nn.Linear(latent_dim, n_parcels)

    def encode(self, x: Tensor, subject: Tensor) -> Tensor:
        """(N, T, V) -> (N, T, d); subjects share the projection."""
        return self.forth(x)

    def decode(self, z: Tensor, anchor: Tensor, subject: Tensor, noise: Tensor | None = None) -> Tensor:
        """(N, T, d) -> (N, T, V)."""
        return self.back(z).float()

    def subspace(self, x: Tensor, subject: Tensor) -> Tensor:
        """x as the latent reproduces it. (N, T, V) -> (N, T, V)."""
        return self.back(self.forth(x))


class CovarianceAccumulator:
    """The pooled within-subject covariance of BOLD, in one pass and float64.

    Each run is centred on its own mean before its scatter is added, and the means are combined by Chan's update
    (Chan, Golub and LeVeque 1983), so that a large mean costs no digits.
    """

    def __init__(self, n_subjects: int, n_parcels: int) -> None:
        self.count = torch.zeros(n_subjects, dtype=torch.float64)
        self.mean = torch.zeros(n_subjects, n_parcels, dtype=torch.float64)
        self.scatter = torch.zeros(n_parcels, n_parcels, dtype=torch.float64)

    def update(self, bold: Tensor, subject: int) -> None:
        """Add TRs (T, V) of the subject with this index. Give valid TRs only."""
        if bold.shape[0] == 0:
            return
        bold = bold.to("cpu", torch.float64)
        old, new = self.count[subject].item(), bold.shape[0]
        mean = bold.mean(0)
        centred = bold - mean
        shift = mean - self.mean[subject]
        self.scatter += centred.T @ centred + torch.outer(shift, shift) * (old * new / (old + new))
        self.mean[subject] += shift * (new / (old + new))
        self.count[subject] += new

    def covariance(self) -> Tensor:
        """(V, V) float64: the scatter about each subject's own mean / the number of TRs."""
        return self.scatter / self.count.sum().clamp(min=1)

    def fit(self, latent_dim: int) -> Latent:
        """The latent of the `latent_dim` directions of largest variance.

        Raises:
            InputError: where latent_dim is larger than the number of parcels, or BOLD does not vary at all.
        """
        _check_latent_dim(latent_dim, self.mean.shape[1])
        values, vectors = torch.linalg.eigh(self.covariance())
        values, basis = values.flip(0)[:latent_dim], vectors.flip(1)[:, :latent_dim].T
        return principal_latent(self.mean, values, basis, int(self.count.sum()))


def principal_latent(mean: Tensor, values: Tensor, basis: Tensor, n_trs: int) -> Latent:
    """The latent of principal components: each subject's mean (S, V), variances (d,) descending, directions (d, V).

    The sign of each is fixed (its largest entry is positive), so that the same data give the same latent.

    Raises:
        InputError: BOLD does not vary at all.
    """
    subjects, parcels = mean.shape
    latent = Latent(subjects, parcels, len(basis))
    if not values[0] > 0:
        raise InputError("training BOLD", "it does not vary", found=f"{n_trs} TRs")
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    latent.mean.copy_(mean)
    latent.basis.copy_(basis * largest.sign())
    # a direction in which BOLD never moved (a constant parcel) has no scale; any small one keeps its z near 0
    latent.scale.copy_(values.clamp(min=1e-10 * values[0].item()).sqrt())
    return latent


def _check_latent_dim(latent_dim: int, n_parcels: int) -> None:
    if latent_dim > n_parcels:
        expected = f"at most {n_parcels}, the number of parcels"
        raise InputError("stage2.latent_dim", "wider than BOLD", found=latent_dim, expected=expected)
