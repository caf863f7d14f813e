"""Stage 2: path, loss, solver, latent, and what the untrained and the ideal model give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.errors import InputError
from trainer.models.flow import (
    SITE_COMPLEMENT,
    FlowMatching,
    euler,
    flow_loss,
    flow_path,
    linear_guess,
)
from trainer.models.latent import CovarianceAccumulator, Latent, LinearLatent
from trainer.models.randomness import make_keys, normal

SUBJECTS, PARCELS, LATENT = 2, 10, 4
DECODER = {"channels": [8, 8], "attention_head_dim": 4, "num_mid_blocks": 1, "dropout": 0.1}


def _bold(length: int, seed: int = 0, items: int | None = None) -> Tensor:
    """BOLD with a decaying spectrum and a mean far from 0: (T, V), or (N, T, V)."""
    mixing = torch.randn(PARCELS, PARCELS, generator=torch.Generator().manual_seed(99)) / torch.arange(1, PARCELS + 1)
    shape = (length, PARCELS) if items is None else (items, length, PARCELS)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) @ mixing.T + 5.0


def _accumulator() -> CovarianceAccumulator:
    accumulator = CovarianceAccumulator(SUBJECTS, PARCELS)
    for run in range(4):
        accumulator.update(_bold(100 + run, seed=run) + 3 * (run % 2), run % 2)
    return accumulator


def _flow(trained: bool = True, latent_dim: int = LATENT, **options: Any) -> FlowMatching:
    """A flow with a fitted latent; `trained`: its last layer is not 0."""
    torch.manual_seed(0)
    flow = FlowMatching(SUBJECTS, PARCELS, latent_dim, DECODER, **{"n_timesteps": 4, **options})
    if isinstance(flow.latent, Latent):
        flow.fit_latent(_accumulator())
        flow.latent.residual_std.copy_(torch.rand(SUBJECTS, PARCELS) + 0.5)
    if trained:
        for estimator in flow.estimators:
            torch.nn.init.normal_(estimator.project.weight, std=0.3)
    return flow.eval()


def _items(length: int = 9, items: int = 5, seed: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """bold, anchor, mask, subject, keys"""
    bold, anchor = _bold(length, seed, items), _bold(length, seed + 1, items)
    mask = torch.arange(length)[None] < torch.tensor([length, 4, length, 1, 7])[:items, None].clamp(max=length)
    subject = torch.tensor([0, 1, 1, 0, 1])[:items]
    return bold, anchor, mask, subject, make_keys(1, 2, torch.arange(items), subject)


# ---- path, loss, guess, solver


def test_the_path_runs_from_noise_to_data_at_the_target_velocity() -> None:
    x1, z, sigma = torch.randn(4, 3, 5).double(), torch.randn(4, 3, 5).double(), 0.01
    start, target = flow_path(x1, z, torch.zeros(4).double(), sigma)
    end, _ = flow_path(x1, z, torch.ones(4).double(), sigma)
    assert torch.equal(start, z)
    assert torch.allclose(end, x1 + sigma * z)
    t = torch.rand(4).double()
    (ahead, _), (here, same) = flow_path(x1, z, t + 1e-4, sigma), flow_path(x1, z, t, sigma)
    assert torch.allclose((ahead - here) / 1e-4, target, atol=1e-6)
    assert torch.equal(same, target)


def test_the_loss_counts_valid_entries_only() -> None:
    velocity, target = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    mask = (torch.arange(6)[None] < torch.tensor([6, 2, 3])[:, None]).float()[:, None]
    expected = sum(
        (velocity[n, c, t] - target[n, c, t]) ** 2 for n in range(3) for c in range(4) for t in range([6, 2, 3][n])
    )
    assert flow_loss(velocity, target, mask).item() == pytest.approx(float(expected) / (11 * 4), rel=1e-5)
    assert flow_loss(velocity, target, mask, 22).item() == pytest.approx(float(expected) / (22 * 4), rel=1e-5)


@pytest.mark.parametrize("sigma", [0.0, 1e-4, 0.2])
def test_the_linear_guess_is_the_regression_of_the_velocity_on_the_state(sigma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    r, z = torch.randn(2, 400_000, generator=generator).double()
    for t in (0.0, 0.2, 0.5, 0.9, 1.0):
        c = linear_guess(torch.tensor([t]).double(), sigma)[0]
        (y,), (u,) = (part[0] for part in flow_path(r[None, None], z[None, None], torch.tensor([t]).double(), sigma))
        assert (y @ u) / (y @ y) == pytest.approx(c.item(), abs=0.01)
        if sigma == 0:
            assert c.item() == pytest.approx((t - (1 - t)) / ((1 - t) ** 2 + t**2))
        mu = 1.7  # x1 = mu + r: the residual of the guess is uncorrelated with y, and has mean 0
        y, u = y + t * mu, u + mu
        rest = u - c * y - (1 - t * c) * mu
        assert abs(rest.mean()) < 0.01 and abs((rest * (y - y.mean())).mean()) < 0.01
    assert linear_guess(torch.zeros(1), sigma).item() == pytest.approx(-(1 - sigma), abs=1e-7)


def test_euler_takes_equal_steps_from_0() -> None:
    z = torch.randn(2, 3, 4)
    times: list[float] = []

    def field(y: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,)
        times.append(t[0].item())
        return y

    assert torch.allclose(euler(field, z, 4), z * 1.25**4)
    assert times == [0.0, 0.25, 0.5, 0.75]


def _silent(y: Tensor, *_: Tensor) -> Tensor:
    """What the untrained network says, at no cost."""
    return torch.zeros_like(y)


def test_the_known_part_alone_carries_a_gaussian_to_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """x1 = mu + r, r ~ N(0, 1): the linear guess is then the exact field, so Euler must end at mean mu, variance 1,
    and the field at t = 0 must be mu - z."""
    flow = _flow(sigma_min=0.0)
    monkeypatch.setattr(flow, "_one_pass", _silent)
    items, length = 400, 8
    subject = torch.arange(items) % 2
    keys = make_keys(0, 0, torch.arange(items), subject)
    valid, mu = torch.ones(items, 1, length), torch.full((items, LATENT, length), 1.5)
    z = flow._noise(keys, length)
    with torch.no_grad():
        v = flow.velocity(z, valid, mu, torch.zeros(items), subject, keys)
        assert torch.allclose(v, mu - z, atol=1e-6)
        end = euler(lambda y, t: flow.velocity(y, valid, mu, t, subject, keys), z, 50)
    assert end.mean().item() == pytest.approx(1.5, abs=0.05)
    assert end.std().item() == pytest.approx(1.0, abs=0.03)


# ---- latent


def test_the_accumulator_gives_the_pooled_covariance_within_subjects() -> None:
    runs = [(_bold(100 + run, seed=run).double() + 3 * (run % 2), run % 2) for run in range(4)]
    by_subject = [torch.cat([x for x, s in runs if s == subject]) for subject in range(2)]
    centred = torch.cat([x - x.mean(0) for x in by_subject])
    accumulator = CovarianceAccumulator(SUBJECTS, PARCELS)
    for x, subject in runs:
        accumulator.update(x[:0], subject)
        accumulator.update(x, subject)
    assert torch.allclose(accumulator.covariance(), centred.T @ centred / len(centred), rtol=1e-10)
    assert torch.allclose(accumulator.mean, torch.stack([x.mean(0) for x in by_subject]), rtol=1e-12)


def test_a_large_mean_costs_no_digits() -> None:
    plain, shifted = CovarianceAccumulator(1, PARCELS), CovarianceAccumulator(1, PARCELS)
    for run in range(3):
        x = _bold(50, seed=run).double()
        plain.update(x, 0)
        shifted.update(x + 1e8, 0)
    assert torch.allclose(plain.covariance(), shifted.covariance(), rtol=1e-5, atol=1e-6)


def test_the_latent_is_standardised_orthonormal_and_of_largest_variance() -> None:
    accumulator = _accumulator()
    latent = accumulator.fit(LATENT)
    assert torch.allclose(latent.basis @ latent.basis.T, torch.eye(LATENT), atol=1e-5)
    runs = torch.cat([_bold(100 + run, seed=run) + 3 * (run % 2) for run in (0, 2)])
    z = latent.encode(runs[None], torch.tensor([0]))[0]
    other = torch.cat([_bold(100 + run, seed=run) + 3 * (run % 2) for run in (1, 3)])
    z = torch.cat((z, latent.encode(other[None], torch.tensor([1]))[0]))
    assert z.mean(0).abs().max() < 1e-4
    assert torch.allclose(z.T @ z / len(z), torch.eye(LATENT), atol=1e-4)
    values = torch.linalg.eigvalsh(accumulator.covariance()).flip(0)
    assert torch.allclose(latent.scale.double() ** 2, values[:LATENT], rtol=1e-4)
    assert (latent.basis.gather(1, latent.basis.abs().argmax(1, keepdim=True)) > 0).all()


@settings(deadline=None, max_examples=15)
@given(length=st.integers(1, 12), latent_dim=st.integers(2, PARCELS))
def test_decoding_an_encoding_keeps_what_the_latent_holds_and_the_anchor_elsewhere(
    length: int, latent_dim: int
) -> None:
    latent = _accumulator().fit(latent_dim)
    x, anchor, subject = _bold(length, 5, 3), _bold(length, 6, 3), torch.tensor([0, 1, 1])
    back = latent.decode(latent.encode(x, subject), anchor, subject)
    if latent_dim == PARCELS:
        assert torch.allclose(back, x, atol=1e-4)
    basis, mean = latent.basis, latent.mean[subject][:, None]
    inside = basis.T @ basis
    written = mean + (x - mean) @ inside + (anchor - mean) @ (torch.eye(PARCELS) - inside)
    assert torch.allclose(back, written, atol=1e-4)
    assert torch.allclose(latent.subspace(back, subject), latent.subspace(x, subject), atol=1e-4)
    assert torch.allclose(latent.subspace(x, subject), (x - mean) @ inside, atol=1e-4)
    e = torch.randn_like(x)
    noisy = latent.decode(latent.encode(x, subject), anchor, subject, e)
    assert torch.allclose(noisy, written + e @ (torch.eye(PARCELS) - inside), atol=1e-4)


def test_an_anchors_own_encoding_decodes_to_the_anchor_to_the_bit() -> None:
    latent, anchor, subject = _accumulator().fit(LATENT), _bold(9, 6, 3), torch.tensor([0, 1, 1])
    assert torch.equal(latent.decode(latent.encode(anchor, subject), anchor, subject), anchor)


def test_a_constant_parcel_does_no_harm_and_constant_bold_is_an_error() -> None:
    accumulator = CovarianceAccumulator(1, 3)
    bold = torch.randn(50, 3)
    bold[:, 1] = 4.0
    accumulator.update(bold, 0)
    latent = accumulator.fit(3)
    z = latent.encode(bold[None], torch.tensor([0]))
    assert z.isfinite().all() and z.abs().max() < 10
    flat = CovarianceAccumulator(1, 3)
    flat.update(torch.ones(5, 3), 0)
    with pytest.raises(InputError, match="does not vary"):
        flat.fit(2)


def test_a_latent_wider_than_bold_is_an_error_and_an_unfitted_one_is_nan() -> None:
    with pytest.raises(InputError, match=r"stage2\.latent_dim.*found 11, expected at most 10"):
        _accumulator().fit(11)
    with pytest.raises(InputError, match=r"stage2\.latent_dim"):
        FlowMatching(SUBJECTS, PARCELS, 11, DECODER)
    with pytest.raises(InputError, match=r"stage2\.latent_dim"):
        FlowMatching(SUBJECTS, PARCELS, 11, DECODER, projection="linear")
    latent = Latent(1, 3, 2)
    assert latent.encode(torch.zeros(1, 2, 3), torch.tensor([0])).isnan().all()


# ---- the model


@settings(deadline=None, max_examples=8)
@given(length=st.integers(1, 11), subjects=st.sampled_from(["embedding", "separate"]), draws=st.integers(1, 4))
def test_the_untrained_posterior_mean_is_the_anchor(length: int, subjects: str, draws: int) -> None:
    flow = _flow(trained=False, subjects=subjects)
    _, anchor, mask, subject, keys = _items(length)
    mean = flow.posterior_mean(anchor, mask, subject, keys, n_draws=draws)
    assert torch.equal(mean[mask], anchor[mask])


@pytest.mark.parametrize("parametrisation", ["skip", "velocity"])
def test_the_posterior_mean_of_an_ideal_field_is_exact(parametrisation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that answers as the exact posterior of the toy x1 ~ N(2 mu + 1, 1) does at t = 0."""
    flow = _flow(parametrisation=parametrisation, sigma_min=0.01)

    def ideal(y: Tensor, valid: Tensor, mu: Tensor, t: Tensor, subject: Tensor, keys: Tensor) -> Tensor:
        assert (t == 0).all()
        expected = 2 * mu + 1
        return (expected - mu if parametrisation == "skip" else expected - 0.99 * y) * valid

    monkeypatch.setattr(flow, "_one_pass", ideal)
    _, anchor, mask, subject, keys = _items()
    mean = flow.posterior_mean(anchor, mask, subject, keys, n_draws=3)
    z = 2 * flow.latent.encode(anchor, subject) + 1
    assert torch.allclose(mean[mask], flow.latent.decode(z, anchor, subject)[mask], atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"subjects": "separate"}, {"parametrisation": "velocity"}])
def test_results_do_not_depend_on_padding_or_on_who_shares_the_batch(options: dict[str, Any]) -> None:
    flow = _flow(**options)
    _, anchor, mask, subject, keys = _items(length=9)
    for estimate in (flow.posterior_mean, flow.sample):
        whole = estimate(anchor, mask, subject, keys)
        assert whole.shape == anchor.shape
        for item in range(5):
            length = int(mask[item].sum())
            part = slice(item, item + 1)
            alone = estimate(anchor[part, :length], mask[part, :length], subject[part], keys[part])
            assert torch.allclose(alone[0], whole[item, :length], atol=2e-4), (item, length)


@pytest.mark.parametrize(("options", "cut"), [({}, 2), ({"subjects": "separate"}, 1), ({"projection": "linear"}, 3)])
def test_losses_of_micro_batches_add_up_to_the_batches(options: dict[str, Any], cut: int) -> None:
    flow = _flow(**options).train()
    bold, anchor, mask, subject, keys = _items()
    order = torch.tensor([3, 0, 4, 2, 1])
    results = []
    for parts in ([torch.arange(5)], [order[:cut], order[cut:]]):
        flow.zero_grad()
        losses = [
            flow.loss(bold[part], anchor[part], mask[part], subject[part], keys[part], count=int(mask.sum()))
            for part in parts
        ]
        torch.stack(losses).sum().backward()
        gradients = {name: parameter.grad for name, parameter in flow.named_parameters()}
        results.append((sum(loss.item() for loss in losses), gradients))
    (whole, expected), (split, found) = results
    assert split == pytest.approx(whole, rel=1e-5)
    bold_alone = flow.loss(bold, anchor, mask, subject, keys).item()
    assert bold_alone == pytest.approx(whole, rel=1e-6)
    largest = max(gradient.abs().max().item() for gradient in expected.values() if gradient is not None)
    for name, gradient in expected.items():
        # a parameter without a gradient would stop DDP, and be decayed or not depending on the world size
        assert gradient is not None and found[name] is not None, name
        assert (gradient - found[name]).abs().max() < 1e-4 * largest, name


def test_the_field_of_an_absent_subject_has_gradients_of_zero() -> None:
    """Not None: DDP waits for every parameter, and weight decay must not depend on which rank has which subject."""
    flow = _flow(subjects="separate").train()
    bold, anchor, mask, subject, keys = _items()
    here = subject == 0
    flow.loss(bold[here], anchor[here], mask[here], subject[here], keys[here]).backward()
    for index, estimator in enumerate(flow.estimators):
        gradients = [parameter.grad for parameter in estimator.parameters()]
        assert all(gradient is not None for gradient in gradients)
        assert any((gradient != 0).any() for gradient in gradients if gradient is not None) == (index == 0)


def test_the_loss_reads_nothing_at_masked_trs_and_different_keys_give_different_losses() -> None:
    flow = _flow().train()
    bold, anchor, mask, subject, keys = _items()
    loss = flow.loss(bold, anchor, mask, subject, keys)
    garbage = [x.masked_fill(~mask[:, :, None], torch.nan) for x in (bold, anchor)]
    assert torch.equal(flow.loss(garbage[0], garbage[1], mask, subject, keys), loss)
    other = make_keys(1, 3, torch.arange(5), subject)
    assert (flow.loss(bold, anchor, mask, subject, other) - loss).abs() > 1e-4


def test_a_tenth_of_the_draws_start_at_0_in_skip_only(monkeypatch: pytest.MonkeyPatch) -> None:
    items = 4000
    keys = make_keys(0, 0, torch.arange(items))
    bold, subject = _bold(2, 0, items), torch.zeros(items, dtype=torch.int64)
    for parametrisation, share in (("skip", 0.1), ("velocity", 0.0)):
        flow, times = _flow(parametrisation=parametrisation), []

        def network(y: Tensor, valid: Tensor, mu: Tensor, t: Tensor, *_: Tensor, seen: list[Tensor] = times) -> Tensor:
            seen.append(t)
            return y

        monkeypatch.setattr(flow, "_one_pass", network)
        flow.loss(bold, bold, torch.ones(items, 2).bool(), subject, keys)
        t = times[0]
        assert (t == 0).float().mean().item() == pytest.approx(share, abs=0.02)
        assert t[t > 0].mean().item() == pytest.approx(0.5, abs=0.02)


def test_the_linear_projection_is_trained_on_its_reconstruction_too() -> None:
    flow = _flow(projection="linear", parametrisation="velocity")
    assert isinstance(flow.latent, LinearLatent)
    bold, anchor, mask, subject, keys = _items()
    loss = flow.loss(bold, anchor, mask, subject, keys)
    loss.backward()
    assert flow.latent.forth.weight.grad is not None and flow.latent.forth.weight.grad.abs().max() > 0
    error = (flow.latent.back(flow.latent.forth(bold)) - bold)[mask].square().mean()
    with torch.no_grad():
        flow.latent.back.weight.zero_()
        flow.latent.back.bias.zero_()
    without = flow.loss(bold, anchor, mask, subject, keys) - 0.1 * bold[mask].square().mean()
    assert (loss - without).item() == pytest.approx(0.1 * error.item(), rel=1e-4)


def test_samples_have_the_latents_variance_inside_and_the_residuals_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained, in skip: x1 = mu + r, r of variance 1 in the latent; outside, the residuals' standard deviation."""
    flow = _flow(n_timesteps=40)
    monkeypatch.setattr(flow, "_one_pass", _silent)
    assert isinstance(flow.latent, Latent)
    items, length = 600, 6
    anchor, subject = _bold(length, 3, 1).expand(items, -1, -1), torch.zeros(items, dtype=torch.int64)
    mask, keys = torch.ones(items, length).bool(), make_keys(0, 0, torch.arange(items))
    samples = flow.sample(anchor, mask, subject, keys)
    latent = flow.latent
    z = latent.encode(samples, subject) - latent.encode(anchor, subject)
    assert z.mean().abs() < 0.05
    assert torch.allclose(z.flatten(0, 1).std(0), torch.ones(LATENT), atol=0.06)
    outside = (samples - latent.subspace(samples, subject)) - (anchor - latent.subspace(anchor, subject))
    complement = torch.eye(PARCELS) - latent.basis.T @ latent.basis
    expected = complement @ torch.diag(latent.residual_std[0] ** 2) @ complement
    rows = outside.flatten(0, 1)
    assert torch.allclose(rows.T @ rows / len(rows), expected, atol=0.1)
    e = normal(keys, SITE_COMPLEMENT, (length, PARCELS)) * latent.residual_std[0]
    assert torch.allclose(outside, e @ complement, atol=1e-4)


def test_temperature_0_takes_all_noise_away_and_steps_can_be_chosen() -> None:
    flow = _flow()
    _, anchor, mask, subject, keys = _items()
    other = make_keys(5, 5, torch.arange(5), subject)
    cold = [flow.sample(anchor, mask, subject, k, temperature=0.0) for k in (keys, other)]
    assert torch.equal(cold[0], cold[1])
    assert not torch.equal(flow.sample(anchor, mask, subject, keys), flow.sample(anchor, mask, subject, other))
    default = flow.sample(anchor, mask, subject, keys)
    assert torch.equal(default, flow.sample(anchor, mask, subject, keys, n_timesteps=4))
    assert not torch.equal(default, flow.sample(anchor, mask, subject, keys, n_timesteps=2))


@pytest.mark.parametrize("subjects", ["embedding", "separate"])
def test_the_field_knows_the_subject(subjects: str) -> None:
    flow = _flow(subjects=subjects)
    _, _, mask, _, keys = _items()
    valid, mu = mask[:, None].float()[..., :8], torch.randn(5, LATENT, 8)
    fields = [flow.velocity(mu, valid, mu, torch.full((5,), 0.3), torch.full((5,), s), keys) for s in range(SUBJECTS)]
    assert (fields[0] - fields[1]).abs().max() > 1e-4


def test_a_checkpoint_holds_the_latent_and_a_refit_keeps_the_residuals() -> None:
    flow, empty = _flow(), FlowMatching(SUBJECTS, PARCELS, LATENT, DECODER, n_timesteps=4).eval()
    empty.load_state_dict(flow.state_dict())
    _, anchor, mask, subject, keys = _items()
    assert torch.equal(empty.sample(anchor, mask, subject, keys), flow.sample(anchor, mask, subject, keys))
    residual_std = flow.latent.residual_std.clone()
    flow.fit_latent(_accumulator())
    assert torch.equal(flow.latent.residual_std, residual_std)


@pytest.mark.parametrize("key", ["parametrisation", "projection", "subjects"])
def test_unknown_choices_are_named(key: str) -> None:
    with pytest.raises(InputError, match=rf"stage2\.{key}.*found other"):
        _flow(**{key: "other"})


def test_the_loss_over_a_python_number_has_the_bits_of_that_over_a_tensor() -> None:
    velocity, target, mask = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.ones(3, 1, 5)
    for count in (1, 15, 2**25 + 1):
        expected = (velocity - target).square().sum() / (torch.tensor(count) * 4)
        assert torch.equal(flow_loss(velocity, target, mask, count), expected)


def test_a_subject_who_is_not_trained_has_the_mean_of_the_trained_embeddings() -> None:
    flow = _flow()
    assert flow.subject_embedding is not None
    trained = [subject != 1 for subject in range(SUBJECTS)]
    x, valid, t = torch.randn(2, LATENT, 8), torch.ones(2, 1, 8), torch.full((2,), 0.3)
    keys = make_keys(0, 0, torch.arange(2))

    def velocity(*subjects: int) -> Tensor:
        with torch.no_grad():
            return flow.velocity(x, valid, x, t, torch.tensor(subjects), keys)

    own = velocity(0, 1)
    flow.set_trained(trained)
    found = velocity(0, 1)
    assert torch.equal(found[0], own[0]) and not torch.equal(found[1], own[1])
    with torch.no_grad():
        flow.subject_embedding.weight[1] = flow.subject_embedding.weight[torch.tensor(trained)].mean(0)
    flow.set_trained([True] * SUBJECTS)
    assert torch.equal(velocity(0, 1), found)
    assert "trained" not in flow.state_dict()


def test_the_latent_of_a_subject_who_is_not_trained_is_made_of_the_others() -> None:
    latent = _accumulator().fit(LATENT)
    latent.residual_std.copy_(torch.rand(latent.residual_std.shape) + 0.5)
    before = {name: buffer.clone() for name, buffer in latent.state_dict().items()}
    latent.stand_in(torch.ones(len(latent.mean), dtype=torch.bool))
    assert all(torch.equal(buffer, before[name]) for name, buffer in latent.state_dict().items())
    trained = torch.tensor([False] + [True] * (len(latent.mean) - 1))
    latent.stand_in(trained)
    assert torch.equal(latent.mean[0], before["mean"][1:].mean(0))
    assert torch.allclose(latent.residual_std[0].square(), before["residual_std"][1:].square().mean(0))
    assert torch.equal(latent.mean[1:], before["mean"][1:])
