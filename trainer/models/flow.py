"""Stage 2: the distribution of BOLD around the anchor, by conditional flow matching in a latent space.

The path, the loss and the solver are those of Matcha-TTS (arXiv 2309.03199; OT-CFM, arXiv 2302.00482), as small
pure functions. The flow runs in a few dimensions of BOLD (see `latent`); outside of them the prediction is the
anchor's. The network sees a long run in windows (see `windows`).

An item is one (window, subject) pair: N items, T TRs, V parcels, d latent dimensions, S subjects. BOLD and anchors are
(N, T, V); what the network sees is (N, d, T) with a mask (N, 1, T), padded to a length that its levels divide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import InputError
from trainer.models.latent import CovarianceAccumulator, Latent, LinearLatent
from trainer.models.randomness import fold_in, keyed, normal, number_sites, uniform
from trainer.models.unet import UNet
from trainer.models.windows import by_windows, cover

SITE_NOISE, SITE_TIME, SITE_START, SITE_COMPLEMENT = range(4)
"""What the items' keys are used for: z, t, whether t is 0, and the noise outside the latent."""

START_FRACTION = 0.1
"""The part of training draws with t = 0, where the posterior mean is read off (`skip` only)."""

RECONSTRUCTION_WEIGHT = 0.1
"""Weight of the trainable projection's reconstruction error, as published."""


def nothing() -> None:
    """The tick of work that nobody watches."""


def flow_path(x1: Tensor, z: Tensor, t: Tensor, sigma_min: float) -> tuple[Tensor, Tensor]:
    """The state and the velocity to learn: y = (1 - (1 - sigma_min) t) z + t x1, u = x1 - (1 - sigma_min) z = dy/dt.

    Shapes: x1, z (N, d, T), t (N,) -> y, u (N, d, T).
    """
    t = t[:, None, None]
    return (1 - (1 - sigma_min) * t) * z + t * x1, x1 - (1 - sigma_min) * z


def flow_loss(velocity: Tensor, target: Tensor, mask: Tensor, count: int | None = None) -> Tensor:
    """Sum of the masked squared error / (count x d).

    Args:
        velocity, target: (N, d, T); mask: (N, 1, T), 1 at valid TRs.
        count: valid (item, TR) pairs of the global batch (all ranks, all micro-batches), a Python number, for which no
            device has to be waited for; None for this batch's.
    """
    total = mask.sum().clamp(min=1) if count is None else max(count, 1)
    error = (velocity.float() - target).square() * mask
    return error.sum() / (total * target.shape[1])


def linear_guess(t: Tensor, sigma_min: float) -> Tensor:
    """The factor c(t) of the best linear guess of the velocity. (N,) -> (N,).

    With x1 = mu + r, r and z independent of variance 1 and a = 1 - (1 - sigma_min) t, the state is y = a z + t x1, so
    y - t mu = a z + t r, and the best linear guess of u - mu = r - (1 - sigma_min) z from it is c (y - t mu),

        c(t) = (t - (1 - sigma_min) a) / (a^2 + t^2),     E[u | y, mu] = c y + (1 - t c) mu.

    For sigma_min = 0 this is (t - (1 - t)) / ((1 - t)^2 + t^2). c(0) = -(1 - sigma_min) exactly, so at t = 0 the rest,
    u - c y, is x1 itself.
    """
    a = 1 - (1 - sigma_min) * t
    return (t - (1 - sigma_min) * a) / (a.square() + t.square())


def euler(field: Callable[[Tensor, Tensor], Tensor], z: Tensor, n_timesteps: int) -> Tensor:
    """Follow dy/dt = field(y, t) from y = z at t = 0 to t = 1 in equal steps; field takes t as (N,)."""
    y = z
    for step in range(n_timesteps):
        t = torch.full((z.shape[0],), step / n_timesteps, device=z.device, dtype=z.dtype)
        y = y + field(y, t) / n_timesteps
    return y


class FlowMatching(nn.Module):
    """The whole of stage 2.

    Args:
        decoder: options of the `UNet` (`stage2.decoder`).
        parametrisation: `skip`: v = F(y, mu, t) + c(t) y, F = network + (1 - t c(t)) mu (see `linear_guess`), the
            network's last layer being 0 at the start, so that the untrained model's mean is the anchor; `velocity`:
            v is the network's output (published).
        projection: `pca`, or `linear` (published).
        subjects: `embedding`: one field, told the subject by a vector added to the time embedding; `separate`: one
            field for each subject.
        window_trs: the network sees a longer run in overlapping windows of so many TRs (see `windows`), so that time
            and memory grow with the run's length; None: all of it at once.

    A subject that was not trained (`set_trained`) has the mean of the trained embeddings. With a field for each subject
    its own is 0 in `skip`: its mean is the anchor, its samples vary around it like a training residual.

    Attributes:
        trained: (S,) bool. It is no part of the weights: meta.json says who was trained.

    Raises:
        InputError: for a latent wider than BOLD, or a name that is not known.
    """

    trained: Tensor

    def __init__(
        self,
        n_subjects: int,
        n_parcels: int,
        latent_dim: int,
        decoder: Mapping[str, Any],
        *,
        sigma_min: float = 1e-4,
        n_timesteps: int = 25,
        parametrisation: str = "skip",
        projection: str = "pca",
        subjects: str = "embedding",
        window_trs: int | None = None,
    ) -> None:
        super().__init__()
        _check_choice("stage2.parametrisation", parametrisation, ("skip", "velocity"))
        _check_choice("stage2.projection", projection, ("pca", "linear"))
        _check_choice("stage2.subjects", subjects, ("embedding", "separate"))
        self.latent_dim, self.sigma_min, self.n_timesteps = latent_dim, sigma_min, n_timesteps
        self.window_trs = window_trs
        self.skip = parametrisation == "skip"
        self.latent: Latent | LinearLatent
        if projection == "pca":
            self.latent = Latent(n_subjects, n_parcels, latent_dim)
        else:
            self.latent = LinearLatent(n_parcels, latent_dim)
        copies = n_subjects if subjects == "separate" else 1
        estimators = [UNet(latent_dim, **decoder) for _ in range(copies)]
        self.estimators = nn.ModuleList(estimators)
        self.length_factor, time_dim = estimators[0].length_factor, estimators[0].time_dim
        self.subject_embedding = nn.Embedding(n_subjects, time_dim) if subjects == "embedding" else None
        if self.subject_embedding is not None:
            nn.init.normal_(self.subject_embedding.weight, std=0.02)
        self.register_buffer("trained", torch.ones(n_subjects, dtype=torch.bool), persistent=False)
        self._trains_all = True  # known without waiting for the device
        if self.skip:
            for estimator in estimators:
                estimator.zero_last_layer()
        number_sites(self)

    def set_trained(self, trained: Sequence[bool]) -> None:
        """Say of each subject whether it is trained."""
        self._trains_all = all(trained)
        self.trained.copy_(torch.tensor(trained))

    def fit_latent(self, training_bold: CovarianceAccumulator) -> None:
        """Take the principal components of the training BOLD (`pca` only; the residual std stays as it is)."""
        assert isinstance(self.latent, Latent), "a linear projection is trained, not fitted"
        fitted = training_bold.fit(self.latent_dim)
        fitted.residual_std.copy_(self.latent.residual_std)
        self.latent.load_state_dict(fitted.state_dict())

    def loss(
        self,
        bold: Tensor,
        anchor: Tensor,
        mask: Tensor,
        subject: Tensor,
        keys: Tensor,
        count: int | None = None,
        tick: Callable[[], None] = nothing,
    ) -> Tensor:
        """The flow-matching loss; plus, for the linear projection, 0.1 x its reconstruction error.

        Args:
            bold, anchor: (N, T, V).
            mask: (N, T) bool, True at the TRs that exist; they come first.
            subject: (N,) int64 subject indices.
            keys: (N,) from `randomness.make_keys`: noise, time and dropout follow from them.
            count: valid (item, TR) pairs of the global batch; None for this batch's. The losses of a batch's parts then
                add up to the loss of the whole.
            tick: called after each window of the network.
        """
        x1, valid = self._into_latent(bold, mask, subject)
        mu, _ = self._into_latent(anchor, mask, subject)
        z = self._noise(keys, x1.shape[2])
        t = uniform(keys, SITE_TIME)
        if self.skip:
            t = torch.where(uniform(keys, SITE_START) < START_FRACTION, torch.zeros_like(t), t)
        y, target = flow_path(x1, z, t, self.sigma_min)
        loss = flow_loss(self.velocity(y, valid, mu, t, subject, keys, tick), target, valid, count)
        if isinstance(self.latent, LinearLatent):
            error = (self.latent.subspace(bold, subject).float() - bold).transpose(1, 2)
            loss = loss + RECONSTRUCTION_WEIGHT * flow_loss(error, torch.zeros_like(error), mask[:, None], count)
        return loss

    def velocity(
        self,
        y: Tensor,
        valid: Tensor,
        mu: Tensor,
        t: Tensor,
        subject: Tensor,
        keys: Tensor,
        tick: Callable[[], None] = nothing,
    ) -> Tensor:
        """The field at states y (N, d, T) and times t (N,), given mu (N, d, T): (N, d, T), 0 where not valid."""
        v = self._network(y, valid, mu, t, subject, keys, tick)
        if not self.skip:
            return v
        c = linear_guess(t, self.sigma_min)[:, None, None]
        return (v + (1 - t[:, None, None] * c) * mu + c * y) * valid

    @torch.no_grad()
    def posterior_mean(
        self,
        anchor: Tensor,
        mask: Tensor,
        subject: Tensor,
        keys: Tensor,
        n_draws: int = 4,
        tick: Callable[[], None] = nothing,
    ) -> Tensor:
        """E[x | anchor] from the field at t = 0, where y = z knows nothing of x1: E[x1 | mu] = v + (1 - sigma_min) z.

        The network has learned to cancel z only approximately: a few z are averaged. In `skip` this is
        F = network + mu. Shapes as in `loss`; returns (N, T, V).
        """
        mu, valid = self._into_latent(anchor, mask, subject)
        start = torch.zeros(mu.shape[0], device=mu.device)
        total = torch.zeros_like(mu)
        for draw in range(n_draws):
            draw_keys = fold_in(keys, draw)
            z = self._noise(draw_keys, mu.shape[2])
            total += self._network(z, valid, mu, start, subject, draw_keys, tick)
            if not self.skip:
                total += (1 - self.sigma_min) * z * valid
        mean = total / n_draws + mu if self.skip else total / n_draws
        return self._out_of_latent(mean, anchor, subject)

    @torch.no_grad()
    def sample(
        self,
        anchor: Tensor,
        mask: Tensor,
        subject: Tensor,
        keys: Tensor,
        n_timesteps: int | None = None,
        temperature: float = 1.0,
        tick: Callable[[], None] = nothing,
    ) -> Tensor:
        """One draw of BOLD given the anchor: Euler in the latent, fresh noise of the residuals' size outside of it.

        Args:
            n_timesteps: Euler steps; None for the model's own number.
            temperature: scales all noise, inside and outside of the latent.
            tick: called after each window of each step.

        Returns:
            (N, T, V); other shapes as in `loss`. For several samples give each its own keys (`randomness.fold_in`).
        """
        mu, valid = self._into_latent(anchor, mask, subject)
        z = self._noise(keys, mu.shape[2]) * temperature

        def field(y: Tensor, t: Tensor) -> Tensor:
            return self.velocity(y, valid, mu, t, subject, keys, tick)

        solution = euler(field, z, self.n_timesteps if n_timesteps is None else n_timesteps)
        noise = None
        if isinstance(self.latent, Latent):
            unit = normal(keys, SITE_COMPLEMENT, tuple(anchor.shape[1:]))
            noise = temperature * unit * self.latent.residual_std[subject][:, None]
        return self._out_of_latent(solution, anchor, subject, noise)

    def subspace(self, x: Tensor, subject: Tensor) -> Tensor:
        """The part of x (N, T, V) that the latent can hold, so that scores can be taken inside it."""
        return self.latent.subspace(x, subject)

    def _network(
        self,
        y: Tensor,
        valid: Tensor,
        mu: Tensor,
        t: Tensor,
        subject: Tensor,
        keys: Tensor,
        tick: Callable[[], None] = nothing,
    ) -> Tensor:
        """The network's output (N, d, T) in float32; that of a run longer than a window by windows."""
        found = cover(y.shape[2], self.window_trs, self.length_factor)
        if found is None:
            out = self._one_pass(y, valid, mu, t, subject, keys)
            tick()
            return out

        def network(here: slice) -> Tensor:
            return self._one_pass(y[:, :, here], valid[:, :, here], mu[:, :, here], t, subject, keys)

        return by_windows(network, found, torch.zeros_like(y), tick)

    def _one_pass(self, y: Tensor, valid: Tensor, mu: Tensor, t: Tensor, subject: Tensor, keys: Tensor) -> Tensor:
        """The estimator's output in float32, each item's by its subject's estimator."""
        if self.subject_embedding is not None:
            with keyed(keys):
                return self.estimators[0](y, valid, mu, t, self._embedded(subject, self.subject_embedding)).float()
        out = torch.zeros_like(y)
        for index, estimator in enumerate(self.estimators):
            rows = (subject == index).nonzero()[:, 0]
            if len(rows):
                with keyed(keys[rows]):
                    part = estimator(y[rows], valid[rows], mu[rows], t[rows])
                out = out.index_copy(0, rows, part.float())
            elif self.training:
                # every parameter takes part in every step, on every rank, whichever subjects its items have
                out = out + 0.0 * torch.stack([parameter.sum() for parameter in estimator.parameters()]).sum()
        return out

    def _embedded(self, subject: Tensor, embedding: nn.Embedding) -> Tensor:
        """The embeddings of some subjects, (N,) -> (N, E)."""
        own: Tensor = embedding(subject)
        if self._trains_all:
            return own
        return torch.where(self.trained[subject][:, None], own, embedding.weight[self.trained].mean(0))

    def _into_latent(self, x: Tensor, mask: Tensor, subject: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, V) -> latent (N, d, T') with zeros at masked TRs, and mask (N, 1, T'); T' is T padded."""
        z = self.latent.encode(x, subject).float().masked_fill(~mask[:, :, None], 0.0)
        padding = -x.shape[1] % self.length_factor
        return F.pad(z.transpose(1, 2), (0, padding)), F.pad(mask[:, None], (0, padding)).to(z.dtype)

    def _out_of_latent(self, z: Tensor, anchor: Tensor, subject: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latent (N, d, T') -> BOLD (N, T, V)."""
        return self.latent.decode(z[:, :, : anchor.shape[1]].transpose(1, 2), anchor, subject, noise)

    def _noise(self, keys: Tensor, length: int) -> Tensor:
        """(N, d, length) standard normal; a TR's noise does not depend on how many TRs follow."""
        return normal(keys, SITE_NOISE, (length, self.latent_dim)).transpose(1, 2)


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(key, "unknown choice", found=value, expected=" or ".join(choices))
