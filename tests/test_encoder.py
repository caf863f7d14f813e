"""Arrays that people have are taken by `predict`, and what is no finite float is refused by its place."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import Config
from trainer.encoder import Encoder, as_floats
from trainer.errors import InputError
from trainer.models.build import Shapes, build_anchor
from trainer.scoring.predictor import AnchorPredictor

TRS, WIDTH, LAYERS = 12, 5, 3


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """An untrained anchor of one stream of one layer, `flat`, and one of three, `deep`."""
    streams = ["flat", "deep"]
    sets = {"train": {}, "val": {}}
    small = {"embed_dim": 8, "encoder_kernel_size": 3}
    config = Config.model_validate(
        {"data": {"shards": "-"}, "include_features": [f"{s}/x" for s in streams], "datasets": sets,
         "val_set_name": "val", "stage1": {"model": small}}
    )  # fmt: skip
    shapes = Shapes([("flat", 1, WIDTH), ("deep", LAYERS, 4)], ["001", "002"], 7)
    torch.manual_seed(0)
    anchor = build_anchor(config.stage1.model, shapes).eval()
    return Encoder(AnchorPredictor(anchor), shapes, config, {})


@pytest.fixture(scope="module")
def features() -> dict[str, np.ndarray]:
    """Float32 numbers that float16 and bfloat16 hold exactly."""
    rng = np.random.default_rng(0)
    return {
        "flat": rng.integers(-8, 8, (TRS, WIDTH)).astype(np.float32) / 4,
        "deep": rng.integers(-8, 8, (TRS, LAYERS, 4)).astype(np.float32) / 4,
    }


def read_only(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.setflags(write=False)
    return copy


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "big-endian float32": lambda a: a.astype(">f4"),
    "big-endian float64": lambda a: a.astype(">f8"),
    "big-endian float16": lambda a: a.astype(">f2"),
    "little-endian float64": lambda a: a.astype("<f8"),
    "float16": lambda a: a.astype(np.float16),
    "long double": lambda a: a.astype(np.longdouble),
    "negative strides": lambda a: a[::-1, ..., ::-1].copy()[::-1, ..., ::-1],
    "every other column": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "transposed": lambda a: a.T.copy().T,
    "Fortran order": np.asfortranarray,
    "read-only": read_only,
    "misaligned": lambda a: np.frombuffer(b"\0" + a.tobytes(), "u1")[1:].view(np.float32).reshape(a.shape),
    "lists": lambda a: a.tolist(),
    "masked, nothing hidden": np.ma.masked_array,
    "tensor": torch.tensor,
    "float64 tensor": lambda a: torch.tensor(a, dtype=torch.float64),
    "float16 tensor": lambda a: torch.tensor(a, dtype=torch.float16),
    "bfloat16 tensor": lambda a: torch.tensor(a, dtype=torch.bfloat16),
    "transposed tensor": lambda a: torch.tensor(a.T.copy()).permute(*reversed(range(a.ndim))),
    "tensor with a gradient": lambda a: torch.tensor(a, requires_grad=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_array_gives_the_same_bits(
    encoder: Encoder, features: dict[str, np.ndarray], form: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = encoder.predict({name: FORMS[form](array) for name, array in features.items()})
    expected = encoder.predict(features)
    assert found.dtype == np.float32 and found.shape == (2, TRS, 7)
    np.testing.assert_array_equal(found, expected)


def test_stream_of_one_layer_may_say_so(encoder: Encoder, features: dict[str, np.ndarray]) -> None:
    found = encoder.predict({**features, "flat": features["flat"][:, None]})
    np.testing.assert_array_equal(found, encoder.predict(features))


def test_what_is_given_is_left_as_it_is(encoder: Encoder, features: dict[str, np.ndarray]) -> None:
    before = {name: array.copy() for name, array in features.items()}
    encoder.predict(features)
    assert all(np.array_equal(features[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((TRS, WIDTH), int), r"found int64 \(12, 5\), expected floats\. Convert it with .astype"),
        (np.zeros((TRS, WIDTH), bool), r"found bool \(12, 5\), expected floats"),
        (np.zeros((TRS, WIDTH), complex), r"found complex128 \(12, 5\), expected floats"),
        (np.full((TRS, WIDTH), "a"), r"found <U1 \(12, 5\), expected floats"),
        (np.full((TRS, WIDTH), None), r"found object \(12, 5\), expected floats"),
        (torch.zeros(TRS, WIDTH, dtype=torch.int32), r"found torch.int32 \(12, 5\), expected floats\. Convert it"),
        ([[1.0], [1.0, 2.0]], "no array: found .*inhomogeneous"),
        (np.zeros((TRS, WIDTH + 1)), r"found torch.float32 \(12, 6\), expected floats \(TRs, 5\)"),
        (np.zeros((TRS, 2, WIDTH)), r"found torch.float32 \(12, 2, 5\), expected floats \(TRs, 5\)"),
        (np.zeros((1, TRS, WIDTH)), r"found torch.float32 \(1, 12, 5\), expected floats \(TRs, 5\)"),
        (np.float32(1), r"found torch.float32 \(\), expected floats \(TRs, 5\)"),
    ],
)  # fmt: skip
def test_other_types_and_shapes_are_refused(
    encoder: Encoder, features: dict[str, np.ndarray], values: Any, message: str
) -> None:
    with pytest.raises(InputError, match=f"features: flat: .*{message}") as caught:
        encoder.predict({**features, "flat": values})
    assert "\n" not in str(caught.value)


@given(st.integers(0, TRS - 1), st.integers(0, LAYERS - 1), st.integers(0, 3), st.sampled_from([np.nan, np.inf, 1e300]))
def test_value_that_is_not_finite_is_refused_by_its_place(
    encoder: Encoder, features: dict[str, np.ndarray], tr: int, layer: int, column: int, value: float
) -> None:
    values = features["deep"].astype(float)
    values[tr, layer, column] = value
    place = f"at TR {tr}, layer {layer}, column {column},"
    with pytest.raises(InputError, match=f"features: deep: not a finite number: found (nan|inf) {place}"):
        encoder.predict({**features, "deep": values})


def test_masked_value_is_refused_by_its_place(encoder: Encoder, features: dict[str, np.ndarray]) -> None:
    hidden = np.ma.masked_array(features["flat"], np.zeros((TRS, WIDTH), bool))
    hidden[3, 2] = np.ma.masked
    with pytest.raises(InputError, match="features: flat: not a finite number: found nan at TR 3, column 2"):
        encoder.predict({**features, "flat": hidden})


def test_features_that_overflow_the_arithmetic_are_refused(encoder: Encoder, features: dict[str, np.ndarray]) -> None:
    strong = copy.deepcopy(encoder)
    for weight in strong._predictor.anchor.parameters():
        weight.data.mul_(1e3)
    assert np.isfinite(strong.predict(features)).all()
    with pytest.raises(InputError, match="features: the model's arithmetic overflows: expected features in the units"):
        strong.predict({**features, "flat": features["flat"] * np.float32(1e36)})


def test_short_floats_stay_short() -> None:
    assert as_floats(np.zeros(2, ">f2"), "a").dtype == torch.float16
    assert as_floats(torch.zeros(2, dtype=torch.bfloat16), "a").dtype == torch.bfloat16
    assert as_floats(np.zeros(2), "a").dtype == torch.float32
