"""A distributed trainer of a two-stage encoder that predicts fMRI BOLD from films.

To use a model that `python -m trainer export` wrote: `trainer.load(folder).predict(features)`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.encoder import Encoder

__version__ = "0.1.0"

# OpenMP's threads spin while they wait for each other. Where another process wants the same core (a shared node, a
# loader's workers, an evaluation beside the training) that made training 7 times slower; asleep, they lose nothing
# measurable on a core of their own. It is read when torch is loaded, so it stands here; the environment wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def load(folder: str | Path, device: str = "cpu") -> Encoder:
    """The trained model of an exported folder.

    Raises:
        InputError: the folder is no export, or damaged.
    """
    from trainer.encoder import load_encoder  # torch takes seconds to import, and most of the package needs none

    return load_encoder(folder, device)
