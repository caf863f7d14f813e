"""Published weights, read into our classes.

The names on the published side are those of MedARC's MultiSubjectConvLinearEncoder and of Matcha-TTS's decoder. For
each tensor of ours this module says what it is called there; a tensor that is missing, has another shape or is left
over is an `InputError` that uses the published name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.errors import InputError
from trainer.models.anchor import Anchor
from trainer.models.unet import UNet

StateDict = Mapping[str, Tensor]

# What the published encoder takes where a config does not say; its causal default differs from ours.
_ANCHOR_DEFAULTS: dict[str, Any] = {
    "embed_dim": 256,
    "encoder_kernel_size": 33,
    "decoder_kernel_size": 0,
    "encoder_causal": True,
    "encoder_positive": False,
    "encoder_blockwise": False,
    "global_pool": "avg",
    "with_shared_decoder": True,
    "with_subject_decoders": True,
}

# ours -> published; the first pattern that matches the whole name is applied
_ANCHOR_NAMES = (
    (r"streams\.(\d+)\.linear\.(.*)", r"feat_embeds.\1.fc.\2"),
    (r"streams\.(\d+)\.conv\.(.*)", r"feat_embeds.\1.conv.\2"),
    (r"pool\.weight", "feat_pool.weight"),
    (r"decoder\.shared\.(.*)", r"shared_decoder.\1"),
)

_OUTER_NAMES = (
    (r"time(\d)\.(.*)", r"time_mlp.linear_\1.\2"),
    (r"final\.conv\.(.*)", r"final_block.block.0.\1"),
    (r"final\.norm\.(.*)", r"final_block.block.1.\1"),
    (r"project\.(.*)", r"final_proj.\1"),
)

_RESNET_NAMES = (
    (r"time\.(.*)", r"mlp.1.\1"),
    (r"(block\d)\.conv\.(.*)", r"\1.block.0.\2"),
    (r"(block\d)\.norm\.(.*)", r"\1.block.1.\2"),
    (r"residual\.(.*)", r"res_conv.\1"),
)

_BLOCK_NAMES = (
    # Conformer
    (r"(ff\d)\.norm\.(.*)", r"\1.fn.norm.\2"),
    (r"(ff\d)\.inner\.(.*)", r"\1.fn.fn.net.0.\2"),
    (r"(ff\d)\.outer\.(.*)", r"\1.fn.fn.net.3.\2"),
    (r"attention_norm\.(.*)", r"attn.norm.\1"),
    (r"attention\.query\.(.*)", r"attn.fn.to_q.\1"),
    (r"attention\.key_value\.(.*)", r"attn.fn.to_kv.\1"),
    (r"attention\.out\.(.*)", r"attn.fn.to_out.\1"),
    (r"attention\.distance\.(.*)", r"attn.fn.rel_pos_emb.\1"),
    (r"conv\.norm_in\.(.*)", r"conv.net.0.\1"),
    (r"conv\.expand\.(.*)", r"conv.net.2.\1"),
    (r"conv\.depthwise\.(.*)", r"conv.net.4.conv.\1"),
    (r"conv\.norm\.(.*)", r"conv.net.5.\1"),
    (r"conv\.contract\.(.*)", r"conv.net.7.\1"),
    (r"norm_out\.(.*)", r"post_norm.\1"),
    # Transformer
    (r"norm1\.(.*)", r"norm1.\1"),
    (r"norm2\.(.*)", r"norm3.\1"),
    (r"(q|k|v)(uery|ey|alue)\.(.*)", r"attn1.to_\1.\3"),
    (r"out\.(.*)", r"attn1.to_out.0.\1"),
    (r"inner\.(.*)", r"ff.net.0.proj.\1"),
    (r"outer\.(.*)", r"ff.net.2.\1"),
    (r"(alpha|beta)", r"ff.net.0.\1"),
)


def anchor_from_upstream(config: Mapping[str, Any], state_dict: StateDict, where: str = "upstream") -> Anchor:
    """A published mean anchor.

    Args:
        config: the arguments of the published class (`feat_dims`, `num_subjects`, `target_dim`, ...).
        state_dict: its tensors by their published names.
        where: the file that they come from, for error messages.

    Raises:
        InputError: for a tensor that is missing, misshapen or unexpected, and for an option we cannot rebuild.
    """
    known = {"feat_dims", "num_subjects", "target_dim", *_ANCHOR_DEFAULTS}
    options = _options(config, _ANCHOR_DEFAULTS, known, where)
    kernel = options["decoder_kernel_size"]
    for key, works in (("global_pool", options["global_pool"] != "attn"), ("decoder_kernel_size", not kernel > 1)):
        if not works:
            raise InputError(where, f"the published code never ran with this {key}", found=options[key])
    streams = [(1, dim) if isinstance(dim, int) else (int(dim[0]), int(dim[1])) for dim in options["feat_dims"]]
    anchor = Anchor(
        streams,
        options["num_subjects"],
        options["target_dim"],
        embed_dim=options["embed_dim"],
        encoder_kernel_size=options["encoder_kernel_size"],
        encoder_causal=options["encoder_causal"],
        encoder_positive=options["encoder_positive"],
        encoder_blockwise=options["encoder_blockwise"],
        pool=options["global_pool"],
        shared_decoder=options["with_shared_decoder"],
        subject_decoders=options["with_subject_decoders"],
    )
    # the published causal mask is a constant of the architecture, which we rebuild from the config
    tensors = {name: tensor for name, tensor in state_dict.items() if not name.endswith(".conv.attn_mask")}
    convolved = options["encoder_kernel_size"] > 1
    _load(anchor, tensors, lambda name: _anchor_names(name, options["num_subjects"], convolved), where)
    return anchor


def estimator_from_upstream(
    config: Mapping[str, Any], state_dict: StateDict, where: str = "upstream", prefix: str = "estimator."
) -> UNet:
    """A published vector field's network, computing as the published code does (`UNet(published=True)`).

    Args:
        config: `latent_dim` and `decoder`, the arguments of the published decoder.
        state_dict: its tensors by their published names, each of which begins with `prefix`. Select those of a
            whole two-stage checkpoint first (`with_prefix`).
        where: the file that they come from, for error messages.

    Raises:
        InputError: for a tensor that is missing, misshapen or unexpected, and for an option we cannot rebuild.
    """
    for key in ("latent_dim", "decoder"):
        if key not in config:
            raise InputError(where, f"the config lacks {key}", expected="the published config")
    network = UNet(config["latent_dim"], **config["decoder"], norm="batch", published=True)
    _load(network, state_dict, lambda name: [prefix + _estimator_name(name, len(network.down))], where)
    return network


_NUMPY: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "b1"))]
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy's name for it before 2.0, and since
    _NUMPY += [(np.zeros(1).__reduce__()[0], f"{_module}._reconstruct")]
    _NUMPY += [(np.float64(0).__reduce__()[0], f"{_module}.scalar")]


def read_published(path: Path) -> Any:
    """What a published `.pt` file holds: tensors, numbers, texts, numpy's arrays and scalars, lists and dicts of them.

    Such files are pickles, which can run code. Only what torch itself takes for harmless is built, and numpy's
    numbers, of which the published encoder's checkpoints hold some (the scores of its validation).

    Raises:
        InputError: no such file, no file of torch, or one that asks for anything else.
    """
    try:
        with torch.serialization.safe_globals(_NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(path, "cannot be read", found=error.strerror) from error
    except Exception as error:  # of any kind: in a file of another sort, torch's reader stumbles anywhere
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise InputError(path, "no .pt file of tensors", found=type(error).__name__) from error
        raise InputError(
            path,
            "asks for more than tensors, which could run code, and is not opened",
            found=asked[1],
            fix="If you trust it, save its tensors alone (`model.state_dict()`).",
        ) from error


def with_prefix(state_dict: StateDict, prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins with `prefix`, without it: one model's out of a checkpoint of several."""
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def _options(config: Mapping[str, Any], defaults: Mapping[str, Any], known: set[str], where: str) -> dict[str, Any]:
    unknown = sorted(set(config) - known)
    if unknown:
        raise InputError(where, "the config has keys we do not know", found=", ".join(unknown))
    options = {**defaults, **config}
    missing = sorted(known - set(options))
    if missing:
        raise InputError(where, "the config lacks keys", found=", ".join(sorted(config)), expected=", ".join(missing))
    return options


def _anchor_names(name: str, n_subjects: int, convolved: bool) -> list[str]:
    """What one tensor of the anchor is called there; several names are stacked along a new first axis."""
    own = re.fullmatch(r"decoder\.own_(weight|bias)", name)
    if own:
        return [f"subject_decoders.{subject}.{own[1]}" for subject in range(n_subjects)]
    published = _translate(name, _ANCHOR_NAMES)
    return [published if convolved else published.replace(".fc.", ".")]


def _estimator_name(name: str, levels: int) -> str:
    """What one tensor of the U-Net is called there."""
    conv = re.fullmatch(r"(shorten|lengthen)\.(\d+)\.(.*)", name)
    if conv:
        way = "down_blocks" if conv[1] == "shorten" else "up_blocks"
        # a convolution that changes the length is wrapped there; the last level's, which does not, is bare
        return f"{way}.{conv[2]}.2.{'' if int(conv[2]) == levels - 1 else 'conv.'}{conv[3]}"
    inner = re.fullmatch(r"(down|middle|up)\.(\d+)\.(?:resnet|blocks\.(\d+))\.(.*)", name)
    if inner is None:
        return _translate(name, _OUTER_NAMES)
    way = {"down": "down_blocks", "middle": "mid_blocks", "up": "up_blocks"}[inner[1]]
    if inner[3] is None:
        return f"{way}.{inner[2]}.0.{_translate(inner[4], _RESNET_NAMES)}"
    return f"{way}.{inner[2]}.1.{inner[3]}.{_translate(inner[4], _BLOCK_NAMES)}"


def _translate(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    raise KeyError(f"{name} has no published name")  # our mistake: a tensor of ours that the table lacks


def _load(model: nn.Module, state_dict: StateDict, names: Callable[[str], list[str]], where: str) -> None:
    """Fill `model` from tensors with published names, all of which must be used.

    BatchNorm's batch counter is optional. The statistics that standardise features are ours, and stay as they are.
    """
    left, loaded = dict(state_dict), {}
    for name, ours in model.state_dict().items():
        if re.fullmatch(r"streams\.\d+\.(mean|scale)", name):
            loaded[name] = ours
            continue
        published = names(name)
        if name.endswith("num_batches_tracked"):
            loaded[name] = left.pop(published[0], ours)
            continue
        shape = ours.shape if len(published) == 1 else ours.shape[1:]
        tensors = [_take(left, key, shape, where) for key in published]
        loaded[name] = tensors[0] if len(published) == 1 else torch.stack(tensors)
    if left:
        raise InputError(
            where,
            "tensors that the config has no place for",
            found=_shortened(sorted(left)),
            fix="Is the config that of these weights?",
        )
    model.load_state_dict(loaded)


def _take(left: dict[str, Tensor], name: str, shape: torch.Size, where: str) -> Tensor:
    if name not in left:
        raise InputError(where, "a tensor is missing", found=_shortened(sorted(left)), expected=name)
    tensor = left.pop(name)
    if tensor.shape != shape:
        raise InputError(where, f"{name} has another shape", found=tuple(tensor.shape), expected=tuple(shape))
    return tensor


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
