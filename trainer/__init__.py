"""A distributed trainer of a two-stage encoder that predicts fMRI BOLD from films."""

__version__ = "0.1.0"
