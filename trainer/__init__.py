"""A distributed trainer of a two-stage encoder that predicts fMRI BOLD from films."""

import os

__version__ = "0.1.0"

# OpenMP's threads spin while they wait for each other. Where another process wants the same core (a shared node, a
# loader's workers, an evaluation beside the training) that made training 7 times slower; asleep, they lose nothing
# measurable on a core of their own. It is read when torch is loaded, so it stands here; the environment wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
