"""What every way to update weights shares: AdamW, its moments by parameter name, the loss scale, the snapshot.

A snapshot holds everything by parameter name, so what one launcher wrote, any other one restores, on any number of
ranks. The ways themselves (replicated, sharded) are in `update`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import OptimisationConfig
from trainer.errors import InputError
from trainer.run.checkpoint import Checkpoint
from trainer.run.processes import Processes

MOMENTS = ("exp_avg", "exp_avg_sq")
FIRST_LOSS_SCALE = 2.0**16
STEPS_TO_GROW = 2000
"""The loss scale's start, and how many finite steps in a row double it: those of torch.amp.GradScaler."""


@dataclass(frozen=True)
class Step:
    """What one step did: the global gradient norm before clipping, and whether it was not finite and so skipped.

    Both are 0-dim tensors on the device, the same on all ranks; reading them waits for the device.
    """

    norm: Tensor
    skipped: Tensor


@dataclass(frozen=True)
class Snapshot:
    """Copies on the CPU of all that a training carries from step to step; later steps do not change them.

    `model` is the float32 state_dict, `moments` holds `exp_avg.<name>` and `exp_avg_sq.<name>`, `updates` is Adam's
    count of the steps that it was not made to skip, `loss_scale` is None where losses are not scaled.
    """

    model: dict[str, Tensor]
    moments: dict[str, Tensor]
    updates: int
    loss_scale: dict[str, float] | None

    @property
    def meta(self) -> dict[str, Any]:
        """The numbers, for the checkpoint's meta.json."""
        return {"updates": self.updates, "loss_scale": self.loss_scale}


class LossScale:
    """The factor that keeps float16 gradients from vanishing: halved by each overflow, doubled after many good steps.

    It lives on the device, so the rule costs no synchronisation. Without float16 it is 1 for ever.
    """

    def __init__(self, device: torch.device, *, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.value = torch.full((), FIRST_LOSS_SCALE if dynamic else 1.0, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, skipped: Tensor) -> None:
        """Follow one step; `skipped` is its 0-dim flag."""
        if self.dynamic:
            torch._amp_update_scale_(self.value, self._good_steps, skipped.float(), 2.0, 0.5, STEPS_TO_GROW)

    def state(self) -> dict[str, float] | None:
        """What a checkpoint keeps."""
        return {"value": self.value.item(), "good_steps": self._good_steps.item()} if self.dynamic else None

    def restore(self, state: Mapping[str, float] | None) -> None:
        """Take up a state; a checkpoint of another precision has none, and leaves the start."""
        if self.dynamic and state is not None:
            self.value.fill_(state["value"])
            self._good_steps.fill_(int(state["good_steps"]))


class Update(ABC):
    """How the gradients of one step become new weights.

    For each micro-batch: `with update.micro_batch(last): update.backward(loss of update.objective(...))`; then
    `step`. `objective` is the phase's objective, wrapped for precision and processes.
    """

    objective: nn.Module

    def __init__(self, model: nn.Module, optimizer: torch.optim.AdamW, processes: Processes, *, precision: str) -> None:
        self.model, self._optimizer, self._processes = model, optimizer, processes
        self._loss_scale = LossScale(processes.device, dynamic=precision == "fp16")

    @abstractmethod
    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Lies around forward and backward of one micro-batch; `last`: a step follows it."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss: this rank's sum of terms of this micro-batch / the global batch's count."""

    @abstractmethod
    def step(self, rate: float) -> Step:
        """Change the weights with this learning rate, unless a gradient is not finite; forgets the gradients."""

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """The gradient tensors that this rank holds, between backward and step."""

    @abstractmethod
    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        """A moment of a whole parameter. Collective where the moments are sharded."""

    @abstractmethod
    def _set_moment(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        """Give back what `_moment` gave."""

    def snapshot(self) -> Snapshot | None:
        """Copies of weights and moments on the main rank, None on the others; all ranks must call it."""
        is_main = self._processes.is_main
        moments = {}
        for name, parameter in self._trained():
            for moment in MOMENTS:
                value = self._moment(parameter, moment)
                if is_main:
                    moments[f"{moment}.{name}"] = value.to("cpu", copy=True)
        if not is_main:
            return None
        weights = {name: value.detach().to("cpu", copy=True) for name, value in self.model.state_dict().items()}
        return Snapshot(weights, moments, int(self._counts()[0]), self._loss_scale.state())

    def restore(self, found: Checkpoint) -> None:
        """Go on from a checkpoint, whatever launcher wrote it; every rank calls it with the same one.

        Raises:
            InputError: a moment of a trained parameter is missing.
        """
        self.model.load_state_dict(found.model)
        for name, parameter in self._trained():
            for moment in MOMENTS:
                key = f"{moment}.{name}"
                if key not in found.moments:
                    fix = "Begin anew with --overwrite, or resume with the model that was trained."
                    raise InputError("optimizer.safetensors", f"holds no {key}", fix=fix)
                self._set_moment(parameter, moment, found.moments[key].to(parameter.device))
        for count in self._counts():
            count.fill_(found.meta.get("updates", found.meta["step"]))
        self._loss_scale.restore(found.meta.get("loss_scale"))

    def moments(self) -> list[Tensor]:
        """Adam's moments as they lie on this rank."""
        return [state[moment] for state in self._optimizer.state.values() for moment in MOMENTS]

    def masters(self) -> list[Tensor]:
        """What the optimizer changes: the weights, or a float32 copy of some of them."""
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)

    def _counts(self) -> list[Tensor]:
        return [state["step"] for state in self._optimizer.state.values()]

    def _set_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate


def adamw(model: nn.Module, optimisation: OptimisationConfig) -> torch.optim.AdamW:
    """AdamW that decays weights, but neither biases nor the scales of norms."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if parameter.ndim < 2 or name.endswith("bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": optimisation.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=optimisation.lr, fused=True)


def begin(optimizer: torch.optim.AdamW) -> None:
    """Make the state that AdamW would make at its first step, so that a fresh and a restored one have the same form."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                **{moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS},
            }
