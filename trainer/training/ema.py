"""A moving average of the weights: what a generative model is sampled with.

Each step's noise moves the weights to and fro; their average over the last 1 / (1 - decay) steps does not follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class MovingAverage:
    """Averages of a model's trainable parameters, by name, on their device.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that the first weights are forgotten soon
    (`tf.train.ExponentialMovingAverage` with num_updates).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1.0 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model holds the averages inside the `with` block, and its own weights again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            own = parameter.clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(own)

    def snapshot(self) -> dict[str, Tensor]:
        """Copies on the CPU."""
        return {name: average.to("cpu", copy=True) for name, average in self.averages.items()}

    @torch.no_grad()
    def restore(self, averages: Mapping[str, Tensor]) -> None:
        """Go on from a snapshot; without one, from the weights as they are."""
        for name, parameter in self.parameters.items():
            self.averages[name].copy_(averages.get(name, parameter))
