"""Stage 1: what each option computes, against plain loops; masks, standardising, and the loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.errors import InputError
from trainer.models.anchor import Anchor, DepthwiseConv, anchor_loss
from trainer.models.randomness import keyed, make_keys

STREAMS = [(1, 5), (3, 4)]
SUBJECTS, PARCELS, DIM = 3, 7, 8
VARIANTS: dict[str, dict[str, Any]] = {
    "avg": {},
    "linear": {"pool": "linear"},
    "attn": {"pool": "attn"},
    "transformer": {"hidden_model": "transformer", "hidden_depth": 2, "hidden_heads": 2},
    "conv1dnext": {"hidden_model": "conv1dnext", "hidden_depth": 2, "hidden_kernel_size": 5},
    "decoder conv": {"decoder_kernel_size": 3},
    "decoder conv, own alone": {"decoder_kernel_size": 3, "shared_decoder": False},
    "shared alone": {"subject_decoders": False},
    "own alone": {"shared_decoder": False},
    "long kernel": {"encoder_kernel_size": 21},
    "causal": {"encoder_causal": True},
    "no kernel": {"encoder_kernel_size": 1},
    "positive": {"encoder_positive": True},
    "blockwise": {"encoder_blockwise": True},
    "all": {
        "pool": "attn",
        "hidden_model": "transformer",
        "hidden_depth": 1,
        "hidden_heads": 4,
        "decoder_kernel_size": 3,
        "encoder_causal": True,
        "encoder_positive": True,
        "encoder_blockwise": True,
    },
}


def _anchor(seed: int = 0, **options: Any) -> Anchor:
    """An anchor whose every parameter is of order 1, biases and norms too, so that no term of a sum is hidden."""
    options = {"embed_dim": DIM, "encoder_kernel_size": 5, **options}
    anchor = Anchor(STREAMS, SUBJECTS, PARCELS, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in anchor.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return anchor.eval()


def _features(length: int = 13, batch: int = 2, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, 5, generator=generator), torch.randn(batch, length, 3, 4, generator=generator)]


# ---- the plain float64 reference: one window, one TR and one channel at a time


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    out = layer.weight.double() @ x
    return out if layer.bias is None else out + layer.bias.double()


def _conv_loop(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """x (T, C), kernel (C, K): out[t, c] = bias[c] + sum_k kernel[c, k] x[t + k - (K - 1) // 2, c]."""
    length, taps = x.shape[0], kernel.shape[1]
    out = bias.double().expand(length, -1).clone()
    for t in range(length):
        for k in range(taps):
            source = t + k - (taps - 1) // 2
            if 0 <= source < length:
                out[t] += kernel[:, k].double() * x[source]
    return out


def _kernel(conv: DepthwiseConv, causal: bool, positive: bool) -> Tensor:
    kernel = conv.weight.double().clone()[:, 0]
    if causal:
        kernel[:, kernel.shape[1] // 2 + 1 :] = 0
    return (kernel.abs() if positive else kernel).expand(conv.bias.shape[0], -1)


def _pool_loop(anchor: Anchor, pool: str, embedded: list[Tensor]) -> Tensor:
    """embedded: one (L_i, T, d) a stream -> (T, d)."""
    if pool == "avg":
        return sum(stream.mean(0) for stream in embedded)  # type: ignore[return-value]
    layers = torch.cat(embedded)
    pooled: Any = anchor.pool
    if pool == "linear":
        return sum(pooled.weight[i].double() * layers[i] for i in range(len(layers)))  # type: ignore[return-value]
    heads, width = 4, layers.shape[2] // 4
    rows = []
    for t in range(layers.shape[1]):
        x = layers[:, t] + pooled.layer_embedding.double()
        keys = torch.stack([_linear(row, pooled.key) for row in x])
        values = torch.stack([_linear(row, pooled.value) for row in x])
        row = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = keys[:, part] @ pooled.query.double()[part] / math.sqrt(width)
            row.append(scores.softmax(0) @ values[:, part])
        rows.append(_linear(torch.cat(row), pooled.out))
    return torch.stack(rows)


def _mlp(x: Tensor, mlp: Any) -> Tensor:
    inner = _linear(x, mlp.inner)
    return _linear(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))), mlp.outer)


def _transformer_loop(x: Tensor, block: Any, heads: int) -> Tensor:
    def norm(row: Tensor, layer: Any) -> Tensor:
        eps = torch.finfo(torch.float32).eps
        return row / (row.square().mean() + eps).sqrt() * layer.weight.double()

    normed = [norm(row, block.norm1) for row in x]
    q, k, v = ([_linear(row, layer) for row in normed] for layer in (block.query, block.key, block.value))
    width, out = x.shape[1] // heads, []
    for i in range(len(x)):
        row = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = torch.stack([q[i][part] @ k[j][part] / math.sqrt(width) for j in range(len(x))])
            row.append(sum(w * v[j][part] for j, w in enumerate(scores.softmax(0))))
        out.append(x[i] + _linear(torch.cat(row), block.out))
    return torch.stack([row + _mlp(norm(row, block.norm2), block.mlp) for row in out])


def _convnext_loop(x: Tensor, block: Any) -> Tensor:
    h = _conv_loop(x, block.conv.weight[:, 0], block.conv.bias)
    centred = h - h.mean(1, keepdim=True)
    h = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    h = h * block.norm.weight.double() + block.norm.bias.double()
    return x + torch.stack([_mlp(row, block.mlp) for row in h])


def _decode_loop(anchor: Anchor, x: Tensor) -> Tensor:
    decoder, out = anchor.decoder, []
    for s in range(decoder.n_subjects):
        y = torch.zeros(x.shape[0], PARCELS, dtype=torch.float64)
        if decoder.shared is not None:
            y += torch.stack([_linear(row, decoder.shared) for row in x])
        if decoder.own_weight is not None and decoder.own_bias is not None:
            own = x
            if decoder.conv_weight is not None and decoder.conv_bias is not None:
                own = _conv_loop(x, decoder.conv_weight[s], decoder.conv_bias[s])
            y += torch.stack([decoder.own_weight[s].double() @ row + decoder.own_bias[s].double() for row in own])
        out.append(y)
    return torch.stack(out)


@torch.no_grad()
def _reference(anchor: Anchor, features: list[Tensor], options: dict[str, Any]) -> Tensor:
    out = []
    for n in range(features[0].shape[0]):
        embedded = []
        for x, stream in zip(features, anchor.streams, strict=True):
            layers = []
            for layer in (x[n][:, None] if x.ndim == 3 else x[n]).double().unbind(1):
                h = torch.stack([_linear(row, stream.linear) for row in layer])
                if stream.conv is not None:
                    causal, positive = (options.get(f"encoder_{key}", False) for key in ("causal", "positive"))
                    h = _conv_loop(h, _kernel(stream.conv, causal, positive), stream.conv.bias)
                layers.append(h)
            embedded.append(torch.stack(layers))
        pooled = _pool_loop(anchor, options.get("pool", "avg"), embedded)
        for block in anchor.hidden:
            if options["hidden_model"] == "transformer":
                pooled = _transformer_loop(pooled, block, options["hidden_heads"])
            else:
                pooled = _convnext_loop(pooled, block)
        out.append(_decode_loop(anchor, pooled))
    return torch.stack(out)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_computes_what_the_plain_loops_do(name: str) -> None:
    anchor, features = _anchor(**VARIANTS[name]), _features()
    expected = _reference(anchor, features, VARIANTS[name])
    found = anchor(features)
    assert found.shape == (2, SUBJECTS, 13, PARCELS)
    assert (found.double() - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_padded_window_gives_what_the_unpadded_one_gives(name: str) -> None:
    anchor, length, padding = _anchor(**VARIANTS[name]), 11, 6
    features = _features(length)
    padded = [torch.cat((x, torch.full_like(x[:, :padding], 3.0)), dim=1) for x in features]
    mask = (torch.arange(length + padding) < length).expand(2, -1)
    expected = anchor(features)
    found = anchor(padded, mask)[:, :, :length]
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()
    without_mask = anchor(padded)[:, :, :length]
    if name not in ("no kernel", "causal"):  # where nothing reaches back from later TRs
        assert (without_mask - expected).abs().max() > 1e-3 * expected.abs().max()


def test_a_causal_anchor_sees_nothing_of_later_trs() -> None:
    for kernel_size in (5, 45):
        anchor = _anchor(encoder_kernel_size=kernel_size, encoder_causal=True)
        features = _features(30)
        changed = [x.clone() for x in features]
        for x in changed:
            x[:, 20:] += 1.0
        difference = (anchor(changed) - anchor(features)).abs().amax(dim=(0, 1, 3))
        assert difference[:20].max() < 1e-5 < 1e-2 < difference[20:].min()


@pytest.mark.parametrize("name", ["avg", "linear", "attn", "all"])
def test_standardising_inside_the_projection_equals_standardised_features(name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    means = [torch.randn(width, generator=generator) * 3 for width in (5, 4)]
    scales = [torch.rand(width, generator=generator) + 0.5 for width in (5, 4)]
    inside, outside = _anchor(**VARIANTS[name]), _anchor(**VARIANTS[name]).double()
    inside.set_standardising(means, scales)
    inside.double()
    features = [x.double() for x in _features()]
    standardised = [(x - m) / s for x, m, s in zip(features, means, scales, strict=True)]
    expected, found = outside(standardised), inside(features)
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
    expected.square().sum().backward()
    found.square().sum().backward()
    gradients = [[parameter.grad for parameter in model.parameters()] for model in (inside, outside)]
    largest = max(gradient.abs().max().item() for gradient in gradients[1] if gradient is not None)
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is not None and theirs is not None
        assert (ours - theirs).abs().max() <= 1e-12 * largest


def test_standardising_travels_with_the_weights_and_survives_a_constant_feature() -> None:
    anchor = _anchor()
    scales = [torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0]), torch.ones(4)]
    anchor.set_standardising([torch.ones(5), torch.zeros(4)], scales)
    other = _anchor(seed=9)
    other.load_state_dict(anchor.state_dict())
    assert torch.equal(other(_features()), anchor(_features()))
    assert anchor(_features()).isfinite().all()
    with pytest.raises(ValueError, match="stream 1"):
        anchor.set_standardising([torch.ones(5), torch.ones(3)], [torch.ones(5), torch.ones(3)])
    with pytest.raises(ValueError, match=r"stream 0.*finite"):
        anchor.set_standardising([torch.full((5,), torch.nan), torch.ones(4)], scales)


def test_float16_features_are_read_in_the_weights_precision() -> None:
    for options in ({}, {"pool": "linear"}):
        anchor, features = _anchor(**options), [x.half() for x in _features()]
        assert torch.equal(anchor(features), anchor([x.float() for x in features]))
        with torch.autocast("cpu", torch.bfloat16):
            short = anchor(features)
        assert (short.float() - anchor(features)).abs().max() < 0.05 * anchor(features).abs().max()


def test_a_feature_of_infinite_scale_says_nothing_and_is_not_learnt() -> None:
    anchor, features = _anchor(), _features()
    scales = [torch.tensor([1.0, torch.inf, 1.0, 1.0, 1.0]), torch.ones(4)]
    anchor.set_standardising([torch.full((5,), 3.0), torch.zeros(4)], scales)
    before = anchor(features)
    before.square().sum().backward()
    gradient = anchor.streams[0].linear.weight.grad
    assert isinstance(gradient, Tensor)
    assert not gradient[:, 1].any() and gradient[:, 0].any()
    features[0][..., 1] = 1e9
    assert torch.equal(anchor(features), before)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert anchor(features).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_of_small_scale_and_large_mean_survive_autocast(dtype: torch.dtype) -> None:
    """W / scale would overflow float16, and the mean would take all digits of the product."""
    anchor, features = _anchor(), _features()
    plain = anchor(features)
    means, scales = [torch.full((5,), 50.0), torch.full((4,), 2e-5)], [torch.ones(5), torch.full((4,), 1e-6)]
    anchor.set_standardising(means, scales)
    moved = [x * scale + mean for x, mean, scale in zip(features, means, scales, strict=True)]
    with torch.autocast("cpu", dtype):
        found = anchor(moved)
        found.square().sum().backward()
    assert (found.float() - plain).abs().max() < 0.05 * plain.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in anchor.streams.parameters())


@pytest.mark.parametrize("count", [1, 7, 12_345, 2**25 + 1])
def test_the_loss_over_a_python_number_has_the_bits_of_that_over_a_tensor(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    prediction, bold = (torch.randn(2, 3, 5, 7, generator=generator) for _ in range(2))
    mask, subjects = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    found = anchor_loss(prediction, bold, mask, subjects, count=count)
    assert torch.equal(found, (prediction - bold).square().sum() / (torch.tensor(count) * 7))


def test_the_initial_weights_are_as_published() -> None:
    torch.manual_seed(0)
    for name in ("transformer", "conv1dnext", "attn", "linear", "decoder conv"):
        anchor = Anchor([(2, 64)], 4, 50, **{"embed_dim": 64, **VARIANTS[name]})
        for key, parameter in anchor.named_parameters():
            if "bias" in key:
                assert (parameter == 0).all(), key
            elif "norm" in key:
                assert (parameter == 1).all(), key
            else:
                assert abs(parameter.std() - 0.02) < 0.005, key


def test_dropout_in_the_hidden_model_follows_the_windows_keys() -> None:
    anchor = _anchor(hidden_model="transformer", hidden_depth=2, hidden_heads=2, dropout=0.3).train()
    features, keys = _features(batch=2), make_keys(0, 0, torch.arange(2))
    with keyed(keys):
        whole = anchor(features)
    with keyed(keys[1:]):
        second = anchor([x[1:] for x in features])
    assert torch.allclose(whole[1:], second, atol=1e-5)
    assert (whole - anchor.eval()(features)).abs().max() > 1e-2


def _batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    prediction = torch.randn(4, 3, 6, 5, generator=generator, requires_grad=True)
    bold = torch.randn(4, 3, 6, 5, generator=generator)
    mask = torch.arange(6)[None] < torch.tensor([6, 4, 5, 1])[:, None]
    subject_mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0]]).bool()
    return prediction, bold, mask, subject_mask


def test_the_loss_is_the_mean_over_what_was_measured() -> None:
    prediction, bold, mask, subject_mask = _batch()
    total, count = 0.0, 0
    for n in range(4):
        for s in range(3):
            for t in range(6):
                if mask[n, t] and subject_mask[n, s]:
                    count += 1
                    total += (prediction[n, s, t] - bold[n, s, t]).square().sum().item()
    loss = anchor_loss(prediction, bold, mask, subject_mask)
    assert loss.item() == pytest.approx(total / (count * 5), rel=1e-5)
    everything = torch.ones_like(mask), torch.ones_like(subject_mask)
    assert torch.allclose(anchor_loss(prediction, bold, *everything), nn.functional.mse_loss(prediction, bold))


def test_what_stands_where_nothing_was_measured_is_never_read() -> None:
    prediction, bold, mask, subject_mask = _batch()
    expected = anchor_loss(prediction, bold, mask, subject_mask)
    valid = (mask[:, None] & subject_mask[:, :, None])[..., None]
    garbage = bold.masked_fill(~valid, torch.nan)
    loss = anchor_loss(prediction, garbage, mask, subject_mask)
    assert torch.equal(loss, expected)
    loss.backward()
    assert prediction.grad is not None and prediction.grad.isfinite().all()
    assert (prediction.grad == 0).equal((~valid).expand_as(prediction))


@settings(deadline=None, max_examples=20)
@given(cut=st.integers(0, 4))
def test_parts_of_a_batch_add_up_to_the_whole(cut: int) -> None:
    prediction, bold, mask, subject_mask = _batch()
    count = (mask.sum(1) * subject_mask.sum(1)).sum()
    parts = [
        anchor_loss(prediction[part], bold[part], mask[part], subject_mask[part], count)
        for part in (slice(0, cut), slice(cut, 4))
    ]
    assert torch.allclose(parts[0] + parts[1], anchor_loss(prediction, bold, mask, subject_mask))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_kernel_size": 4, "encoder_causal": True}, r"encoder_kernel_size.*found 4"),
        ({"pool": "max"}, r"global_pool.*found max"),
        ({"pool": "attn", "embed_dim": 6}, r"embed_dim.*found 6"),
        ({"hidden_model": "lstm"}, r"hidden_model.*found lstm"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _anchor(**options)


def test_streams_that_do_not_fit_are_named() -> None:
    anchor = _anchor()
    with pytest.raises(ValueError, match="reads 2 streams, got 1"):
        anchor(_features()[:1])
    with pytest.raises(ValueError, match="3 layers came with 1"):
        anchor([_features()[0], _features()[1][:, :, 0]])
