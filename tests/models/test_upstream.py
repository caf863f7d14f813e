"""The published models' own tensors, reproduced: outputs, losses, gradients, velocities and whole solutions."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from trainer.errors import InputError
from trainer.models.anchor import anchor_loss
from trainer.models.flow import euler, flow_loss, flow_path
from trainer.models.upstream import anchor_from_upstream, estimator_from_upstream, read_published, with_prefix

FIXTURES = Path(__file__).resolve().parents[1] / "data" / "upstream"
ANCHORS = ["anchor_avg", "anchor_causal_linear", "anchor_positive_blockwise"]
UNETS = ["unet_conformer", "unet_transformer"]


def _read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _close(found: Tensor, expected: Tensor) -> bool:
    """Within 1e-5 of the expected tensor's largest number."""
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("name", ANCHORS)
def test_anchor_agrees_in_output_loss_and_gradients(name: str) -> None:
    config, tensors = _read(name)
    anchor = anchor_from_upstream(config, with_prefix(tensors, "state_dict."))
    features = [tensors[f"features.{i}"] for i in range(len(config["feat_dims"]))]
    output = anchor(features)
    assert _close(output, tensors["output"])

    batch, subjects, length, _ = output.shape
    mask, subject_mask = torch.ones(batch, length).bool(), torch.ones(batch, subjects).bool()
    loss = anchor_loss(output, tensors["target"], mask, subject_mask)
    assert _close(loss[None], tensors["loss"])

    loss.backward()
    stream = anchor.streams[0]
    found = {
        "feat_embeds.0.fc.weight": stream.linear.weight.grad,
        "feat_embeds.0.fc.bias": stream.linear.bias.grad,
        "feat_embeds.0.conv.weight": stream.conv.weight.grad,
        "feat_embeds.0.conv.bias": stream.conv.bias.grad,
        "shared_decoder.weight": anchor.decoder.shared.weight.grad,
        "shared_decoder.bias": anchor.decoder.shared.bias.grad,
    }
    expected = with_prefix(tensors, "grad.")
    assert set(expected) == set(found)
    for key, gradient in expected.items():
        assert _close(found[key], gradient), key


@pytest.mark.parametrize("name", UNETS)
def test_unet_agrees_in_velocity_solution_and_loss(name: str) -> None:
    config, tensors = _read(name)
    network = estimator_from_upstream(config, with_prefix(tensors, "state_dict.")).eval()
    z, mask, mu, t, x1 = (tensors[key] for key in ("x", "mask", "mu", "t", "x1"))
    with torch.no_grad():
        assert _close(network(z, mask, mu, t), tensors["velocity"])
        solution = euler(lambda y, t: network(y, mask, mu, t), z, config["n_timesteps"])
        assert _close(solution, tensors["euler25"])
        y, target = flow_path(x1, z, t, config["sigma_min"])
        # The published loss masks the prediction but not the target: it also counts the target's square at masked
        # positions, though it divides by the number of valid ones. Ours does not, so it is asked for that here.
        loss = flow_loss(network(y, mask, mu, t), target, torch.ones_like(mask), count=int(mask.sum()))
    assert _close(loss[None], tensors["loss"])


def test_a_missing_misshapen_or_unknown_tensor_is_named() -> None:
    config, tensors = _read("anchor_causal_linear")
    weights = with_prefix(tensors, "state_dict.")

    lacking = {key: tensor for key, tensor in weights.items() if key != "subject_decoders.2.bias"}
    with pytest.raises(InputError, match=r"weights\.pt.*missing.*subject_decoders\.2\.bias"):
        anchor_from_upstream(config, lacking, where="weights.pt")

    wide = {**weights, "feat_pool.weight": torch.zeros(4, 8)}
    with pytest.raises(InputError, match=r"feat_pool\.weight.*found \(4, 8\), expected \(3, 8\)"):
        anchor_from_upstream(config, wide)

    with pytest.raises(InputError, match=r"no place for.*hidden_model\.blocks"):
        anchor_from_upstream(config, {**weights, "hidden_model.blocks.0.weight": torch.zeros(1)})

    with pytest.raises(InputError, match=r"keys we do not know.*colour"):
        anchor_from_upstream({**config, "colour": 1}, weights)

    with pytest.raises(InputError, match=r"lacks keys.*target_dim"):
        anchor_from_upstream({key: value for key, value in config.items() if key != "target_dim"}, weights)


def test_options_with_which_the_published_code_never_ran_are_refused() -> None:
    config, tensors = _read("anchor_avg")
    weights = with_prefix(tensors, "state_dict.")
    with pytest.raises(InputError, match=r"global_pool.*found attn"):
        anchor_from_upstream({**config, "global_pool": "attn"}, weights)
    with pytest.raises(InputError, match=r"decoder_kernel_size.*found 5"):
        anchor_from_upstream({**config, "decoder_kernel_size": 5}, weights)


def test_the_published_defaults_fill_a_sparse_config() -> None:
    config, tensors = _read("anchor_causal_linear")
    assert config["encoder_causal"] is True  # the published default
    del config["encoder_causal"]
    anchor = anchor_from_upstream(config, with_prefix(tensors, "state_dict."))
    features = [tensors["features.0"], tensors["features.1"]]
    assert _close(anchor(features), tensors["output"])


def test_published_tensors_are_read(tmp_path: Path) -> None:
    content = {"model": {"feat_pool.weight": torch.arange(3.0)}, "epoch": 3, "args": {"lr": 3e-4, "streams": ["a"]}}
    torch.save(content, tmp_path / "ckpt.pt")
    found = read_published(tmp_path / "ckpt.pt")
    assert torch.equal(found["model"]["feat_pool.weight"], torch.arange(3.0))
    assert (found["epoch"], found["args"]) == (3, content["args"])


def test_the_scores_in_a_published_checkpoint_are_read(tmp_path: Path) -> None:
    """They are numpy's, and stand beside the weights."""
    scores = {"accmap": np.arange(3.0), "acc": np.float64(0.2), "acc32": np.float32(0.5), "n": np.int64(4)}
    torch.save({"model": {}, "metrics": {"val": scores, "wide": np.ones((2, 2), np.float32)}}, tmp_path / "ckpt.pt")
    found = read_published(tmp_path / "ckpt.pt")["metrics"]
    np.testing.assert_array_equal(found["val"].pop("accmap"), scores.pop("accmap"))
    np.testing.assert_array_equal(found["wide"], np.ones((2, 2)))
    assert found["val"] == scores
    assert np.ndarray not in torch.serialization.get_safe_globals(), "what is allowed here is allowed nowhere else"


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch '{self.path}'",)


OLD_FORMAT = partial(torch.save, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("dump", [torch.save, OLD_FORMAT, partial(pickle.dump, protocol=2)])
def test_a_malicious_file_is_refused_and_does_not_run(tmp_path: Path, dump: Callable[..., None]) -> None:
    with (tmp_path / "ckpt.pt").open("wb") as file:
        dump({"model": Malicious(tmp_path / "it ran")}, file)
    with pytest.raises(InputError, match=r"ckpt\.pt: asks for more than tensors, .* found posix\.system"):
        read_published(tmp_path / "ckpt.pt")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut short", None])
def test_a_file_that_is_none_of_torch_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"ckpt\.pt: "):
        read_published(tmp_path / "ckpt.pt")


def test_an_estimator_of_another_kind_is_refused() -> None:
    config, tensors = _read("unet_conformer")
    config["decoder"]["mid_block_type"] = "transformer"
    with pytest.raises(InputError, match=r"missing.*expected estimator\.mid_blocks\.0\.1\.0\."):
        estimator_from_upstream(config, with_prefix(tensors, "state_dict."))
    with pytest.raises(InputError, match="config lacks decoder"):
        estimator_from_upstream({"latent_dim": 16}, {})


def test_an_estimator_inside_a_whole_checkpoint_is_found_by_its_prefix() -> None:
    config, tensors = _read("unet_transformer")
    whole = {f"flow.{key}": tensor for key, tensor in with_prefix(tensors, "state_dict.").items()}
    whole["to_latent.weight"] = torch.zeros(16, 30)
    network = estimator_from_upstream(config, with_prefix(whole, "flow.")).eval()
    with torch.no_grad():
        velocity = network(*(tensors[key] for key in ("x", "mask", "mu", "t")))
    assert _close(velocity, tensors["velocity"])
