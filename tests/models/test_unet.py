"""The estimator: padding changes nothing, every part reads what it should, options that do not exist are named."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.errors import InputError
from trainer.models import unet
from trainer.models.randomness import KeyedDropout, keyed, make_keys
from trainer.models.unet import BatchNorm, GroupNorm, RelativeAttention, UNet, time_features

LATENT = 4


def _unet(kind: str = "conformer", seed: int = 0, **options: Any) -> UNet:
    torch.manual_seed(seed)
    blocks = {f"{way}_block_type": kind for way in ("down", "mid", "up")}
    network = UNet(
        LATENT,
        **{"channels": [16, 16], "attention_head_dim": 8, "dropout": 0.0, "num_mid_blocks": 1, **blocks, **options},
    )
    with torch.no_grad():  # biases and norms of order 1, so that no term hides
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1 and "alpha" not in name and "beta" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    return network.eval()


_cached = functools.cache(_unet)


def _inputs(length: int, items: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y, mu = (torch.randn(items, LATENT, length, generator=generator) for _ in range(2))
    return y, mu, torch.rand(items, generator=generator)


def _padded(x: Tensor, padding: int, value: float) -> Tensor:
    return torch.cat((x, torch.full_like(x[..., :1], value).expand(*x.shape[:-1], padding)), dim=-1)


@pytest.mark.parametrize(
    ("kind", "channels", "train"),
    [("conformer", [8, 16, 24], True), ("transformer", [16, 16], True), ("transformer", [8, 16, 24], False)],
)
def test_a_padded_sequence_gives_what_the_unpadded_one_gives(kind: str, channels: list[int], train: bool) -> None:
    network = _unet(kind, channels=channels, n_blocks=2 if len(channels) == 2 else 1).train(train)
    length, padding = 12, 20
    y, mu, t = _inputs(length)
    expected = network(y, torch.ones(2, 1, length), mu, t)
    mask = _padded(torch.ones(2, 1, length), padding, 0.0)
    found = network(_padded(y, padding, 7.0), mask, _padded(mu, padding, -5.0), t)
    assert (found[..., :length] - expected).abs().max() < 3e-6 * expected.abs().max()
    assert (found[..., length:] == 0).all()


@settings(deadline=None, max_examples=10)
@given(valid=st.integers(1, 9), padding=st.integers(0, 4), kind=st.sampled_from(["conformer", "transformer"]))
def test_any_valid_length_gives_the_same_however_far_it_is_padded(valid: int, padding: int, kind: str) -> None:
    network = _cached(kind)
    least, more = valid + valid % 2, valid + valid % 2 + 2 * padding
    y, mu, t = _inputs(more)
    mask = (torch.arange(more) < valid).float().expand(2, 1, -1)
    with torch.no_grad():
        short = network(y[..., :least], mask[..., :least], mu[..., :least], t)
        long = network(y, mask, mu, t)
    assert (long[..., :least] - short).abs().max() < 1e-5 * (1 + short.abs().max())


def test_batch_norm_is_not_moved_by_padding_either_but_published_norms_are() -> None:
    y, mu, t = _inputs(12)
    for options, exact in (({"norm": "batch"}, True), ({"norm": "batch", "published": True}, False)):
        results = []
        for padding in (0, 20):
            network = _unet(**options).train()
            mask = _padded(torch.ones(2, 1, 12), padding, 0.0)
            results.append(network(_padded(y, padding, 7.0), mask, _padded(mu, padding, 7.0), t)[..., :12])
        difference = (results[0] - results[1]).abs().max() / results[0].abs().max()
        assert (difference < 1e-5) == exact


def test_items_do_not_see_each_other() -> None:
    network = _unet().train()
    y, mu, t = _inputs(8, items=3)
    mask = torch.ones(3, 1, 8)
    whole = network(y, mask, mu, t)
    for item in range(3):
        part = slice(item, item + 1)
        alone = network(y[part], mask[part], mu[part], t[part])
        assert (alone - whole[part]).abs().max() < 1e-5 * whole.abs().max()


def test_group_norm_counts_valid_positions_only() -> None:
    norm = GroupNorm(16, published=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 16, 10) * 3 + 2
    plain = nn.functional.group_norm(x, 8, norm.weight, norm.bias)
    assert torch.allclose(norm(x, torch.ones(2, 1, 10)), plain, atol=1e-5)
    mask = (torch.arange(10) < 6).float().expand(2, 1, -1)
    shorter = nn.functional.group_norm(x[..., :6], 8, norm.weight, norm.bias)
    assert torch.allclose(norm(x, mask)[..., :6], shorter, atol=1e-5)
    assert torch.allclose(GroupNorm(16, published=True)(x, mask), nn.functional.group_norm(x, 8), atol=1e-5)
    assert norm(x, torch.zeros(2, 1, 10)).isfinite().all()


def test_batch_norm_gathers_statistics_of_valid_positions() -> None:
    x, mask = torch.randn(3, 4, 10), (torch.arange(10)[None] < torch.tensor([10, 4, 1])[:, None])[:, None]
    masked, plain = BatchNorm(4, published=False).train(), nn.BatchNorm1d(4).train()
    rows = x.transpose(1, 2)[mask[:, 0]]
    found = masked(x, mask.float()).transpose(1, 2)
    assert torch.allclose(found[mask[:, 0]], plain(rows), atol=1e-6)
    assert torch.allclose(masked.running_var, plain.running_var)
    assert (found[~mask[:, 0]] == 0).all()


@pytest.mark.parametrize("length", [1, 2, 5, 12])
def test_relative_attention_is_shaws(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "MAX_DISTANCE", 3)
    attention = RelativeAttention(6, heads=2, head_dim=4, dropout=0.0, published=False).double()
    x = torch.randn(1, length, 6, dtype=torch.float64)
    mask = torch.ones(1, 1, length)
    mask[..., length - length // 3 :] = 0
    valid = length - length // 3
    found = attention(x, mask)
    key_weight, value_weight = attention.key_value.weight.chunk(2)
    for i in range(length):
        heads = []
        for h in range(2):
            part = slice(4 * h, 4 * h + 4)
            q = (attention.query.weight @ x[0, i])[part]
            scores = []
            for j in range(valid):
                distance = attention.distance.weight[max(-3, min(3, i - j)) + 3]
                scores.append(q @ ((key_weight @ x[0, j])[part] + distance) / 2.0)
            weights = torch.stack(scores).softmax(0)
            heads.append(sum(w * (value_weight @ x[0, j])[part] for j, w in enumerate(weights)))
        expected = attention.out.weight @ torch.cat(heads) + attention.out.bias  # type: ignore[arg-type]
        assert (found[0, i] - expected).abs().max() < 1e-5


def test_published_attention_lets_masked_queries_attend_to_everything_alike() -> None:
    """The fixtures hardly see it, yet later convolutions read what comes out there."""
    attention = RelativeAttention(6, heads=2, head_dim=4, dropout=0.0, published=True)
    x, mask = torch.randn(1, 8, 6), (torch.arange(8) < 5).float()[None, None]
    values = x[0] @ attention.key_value.weight.chunk(2)[1].T
    found = attention(x, mask)[0]
    assert torch.allclose(found[5:], attention.out(values.mean(0)).expand(3, -1), atol=1e-5)
    assert torch.allclose(found[:5], attention(x[:, :5], mask[..., :5])[0], atol=1e-5)


def test_time_features_are_sines_and_cosines_of_1000_t() -> None:
    t = torch.tensor([0.0, 0.3, 1.0])
    found = time_features(t, 8)
    for n in range(3):
        for k in range(4):
            angle = 1000 * t[n].double() * 10000 ** (-k / 3)
            assert found[n, k] == pytest.approx(torch.sin(angle).item(), abs=2e-4)
            assert found[n, 4 + k] == pytest.approx(torch.cos(angle).item(), abs=2e-4)


def test_every_input_matters_and_a_condition_of_zeros_does_not() -> None:
    network, mask = _unet(), torch.ones(2, 1, 8)
    y, mu, t = _inputs(8)
    base = network(y, mask, mu, t)
    assert torch.equal(network(y, mask, mu, t, torch.zeros(2, network.time_dim)), base)
    others = [
        network(y + 1, mask, mu, t),
        network(y, mask, mu + 1, t),
        network(y, mask, mu, t * 0.5),
        network(y, mask, mu, t, torch.ones(2, network.time_dim)),
    ]
    for other in others:
        assert (other - base).abs().max() > 1e-3
    conditioned = network(y, mask, mu, t, torch.stack((torch.zeros(network.time_dim), torch.ones(network.time_dim))))
    assert torch.allclose(conditioned[0], base[0], atol=1e-5)
    assert (conditioned[1] - base[1]).abs().max() > 1e-3


def test_the_last_layer_can_start_at_zero() -> None:
    network = _unet()
    network.zero_last_layer()
    y, mu, t = _inputs(8)
    assert (network(y, torch.ones(2, 1, 8), mu, t) == 0).all()


@pytest.mark.parametrize("kind", ["conformer", "transformer"])
def test_dropout_follows_the_items_keys(kind: str) -> None:
    network = _unet(kind, dropout=0.3).train()
    y, mu, t = _inputs(8, items=3)
    mask, keys = torch.ones(3, 1, 8), make_keys(0, 0, torch.arange(3))
    with keyed(keys):
        whole = network(y, mask, mu, t)
    with keyed(keys[1:2]):
        alone = network(y[1:2], mask[1:2], mu[1:2], t[1:2])
    assert (whole[1:2] - alone).abs().max() < 1e-5 * whole.abs().max()
    with keyed(make_keys(0, 1, torch.arange(3))):
        assert (network(y, mask, mu, t) - whole).abs().max() > 1e-2
    sites = [module.site for module in network.modules() if isinstance(module, KeyedDropout)]
    assert len(sites) == len(set(sites)) == (6 if kind == "conformer" else 2) * 5


def test_the_published_size_has_the_published_number_of_parameters() -> None:
    network = UNet(128)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert 12.4e6 < parameters < 12.6e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": [16, 20]}, r"stage2\.decoder\.channels.*\[16, 20\]"),
        ({"act_fn": "relu"}, r"stage2\.decoder\.act_fn.*found relu"),
        ({"mid_block_type": "lstm"}, r"stage2\.decoder\.mid_block_type.*found lstm"),
        ({"norm": "layer"}, r"norm.*found layer"),
    ],
)
def test_options_that_do_not_exist_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _unet(**options)
    with pytest.raises(InputError, match=r"stage2\.latent_dim"):
        UNet(1)


def test_a_length_that_the_levels_do_not_divide_is_refused() -> None:
    y, mu, t = _inputs(9)
    with pytest.raises(ValueError, match="T is 9, expected a multiple of 2"):
        _unet()(y, torch.ones(2, 1, 9), mu, t)
