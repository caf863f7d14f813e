"""From the configuration to the models, so that training, scoring and export build the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config import AnchorConfig, Config
from trainer.models.anchor import Anchor
from trainer.models.flow import FlowMatching


@dataclass(frozen=True)
class Shapes:
    """What the data ask of the models; kept in every checkpoint's meta.json.

    streams: (name, layers, width) of each stream, in the order in which the anchor reads them.
    subjects: labels, in the order of the subject axis.
    """

    streams: Sequence[tuple[str, int, int]]
    subjects: Sequence[str]
    n_parcels: int

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers, equal after a round trip through JSON."""
        return {
            "streams": [list(stream) for stream in self.streams],
            "subjects": list(self.subjects),
            "n_parcels": self.n_parcels,
        }


def build_anchor(config: AnchorConfig, shapes: Shapes) -> Anchor:
    """Stage 1, freshly initialised from torch's generator."""
    transformer, conv1dnext = config.transformer, config.conv1dnext
    return Anchor(
        [(layers, width) for _, layers, width in shapes.streams],
        len(shapes.subjects),
        shapes.n_parcels,
        embed_dim=config.embed_dim,
        encoder_kernel_size=config.encoder_kernel_size,
        encoder_causal=config.encoder_causal,
        encoder_positive=config.encoder_positive,
        encoder_blockwise=config.encoder_blockwise,
        pool=config.global_pool,
        hidden_model=config.hidden_model,
        hidden_depth=transformer.depth if config.hidden_model == "transformer" else conv1dnext.depth,
        hidden_heads=transformer.num_heads,
        hidden_mlp_ratio=transformer.mlp_ratio,
        hidden_kernel_size=conv1dnext.kernel_size,
        dropout=config.dropout,
        shared_decoder=config.with_shared_decoder,
        subject_decoders=config.with_subject_decoders,
        decoder_kernel_size=max(1, config.decoder_kernel_size),
    )


def build_flow(config: Config, shapes: Shapes) -> FlowMatching:
    """Stage 2, freshly initialised from torch's generator; its latent is fitted or loaded afterwards."""
    options = config.stage2
    return FlowMatching(
        len(shapes.subjects),
        shapes.n_parcels,
        options.latent_dim,
        options.decoder.model_dump(),
        sigma_min=options.cfm.sigma_min,
        n_timesteps=options.n_timesteps,
        parametrisation=options.parametrisation,
        projection=options.projection,
        subjects=options.subjects,
        window_trs=config.window_trs,
    )
