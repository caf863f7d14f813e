"""How the gradients of one step become new weights: replicated (one process, DDP) or sharded (ZeRO-1, ZeRO-2).

Both follow the same rule, so that a training does not depend on its launcher. Each rank hands in the sum of its terms
divided by the count of the whole global batch, so the gradient is the *sum* over ranks and micro-batches; DDP and
DeepSpeed average over ranks, hence every loss is multiplied by the world size. The global norm is clipped; a norm that
is not finite skips the step: weights, Adam's moments and Adam's own count of steps stay as they are. Weights, gradients
and moments are float32; autocast lies around the objective's forward and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config import OptimisationConfig
from trainer.errors import InputError
from trainer.run.checkpoint import Checkpoint
from trainer.run.processes import Processes
from trainer.training.adam import Step, Update, adamw, begin

BUCKET_ELEMENTS = 25 * 2**20 // 4
"""Gradients that DeepSpeed reduces at once: 25 MiB as DDP does, where its own 5e8 would take 2 GB of each device."""


class Autocast(nn.Module):
    """Runs an objective in autocast from the inside.

    Outside of a DeepSpeed engine it would be lost without a word: on CUDA, the engine's forward switches off an
    autocast that its own configuration does not name.
    """

    def __init__(self, objective: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.objective, self._autocast = objective, autocast

    def forward(self, *arguments: Any) -> Any:
        """What the objective gives."""
        with self._autocast():
            return self.objective(*arguments)


class Replicated(Update):
    """Every rank holds all moments and gradients: one process, or DDP."""

    def __init__(
        self,
        model: nn.Module,
        objective: nn.Module,
        optimisation: OptimisationConfig,
        processes: Processes,
        *,
        precision: str,
        deterministic: bool,
    ) -> None:
        self.objective = objective.to(processes.device)
        super().__init__(model, adamw(model, optimisation), processes, precision=precision)
        begin(self._optimizer)
        self._max_norm = optimisation.clip_grad_norm
        self._is_distributed = processes.world > 1
        if self._is_distributed:
            self.objective = distributed(self.objective, processes.device, deterministic=deterministic)

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """All but the last micro-batch keep their gradients on the rank."""
        objective = self.objective
        if last or not isinstance(objective, DistributedDataParallel):
            return nullcontext()
        return objective.no_sync()

    def backward(self, loss: Tensor) -> None:
        """See `Update`."""
        (loss * (self._loss_scale.value * self._processes.world)).backward()

    def step(self, rate: float) -> Step:
        """See `Update`. The kernel itself divides the gradients and looks at the flag: nothing waits for the device."""
        self._set_rate(rate)
        norm = torch.nn.utils.get_total_norm(self.gradients()) / self._loss_scale.value
        skipped = ~torch.isfinite(norm)
        # as torch.nn.utils.clip_grad_norm_: gradients * min(1, max_norm / (norm + 1e-6))
        clip = ((norm + 1e-6) / self._max_norm).clamp(min=1) if self._max_norm else torch.ones_like(norm)
        self._optimizer.grad_scale = self._loss_scale.value * clip  # type: ignore[attr-defined]
        self._optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self._optimizer.step()
        # DDP's gradients are views of what it sends; without them it would hold a second set while micro-batches add up
        self._optimizer.zero_grad(set_to_none=not self._is_distributed)
        self._loss_scale.update(skipped)
        return Step(norm, skipped)

    def gradients(self) -> list[Tensor]:
        """See `Update`."""
        return [parameter.grad for parameter in self.masters() if parameter.grad is not None]

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        return self._optimizer.state[parameter][moment]

    def _set_moment(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        self._optimizer.state[parameter][moment].copy_(value)


class Sharded(Update):
    """Every rank holds its part of the moments (ZeRO-1), and of the gradients (ZeRO-2)."""

    def __init__(
        self,
        model: nn.Module,
        objective: nn.Module,
        optimisation: OptimisationConfig,
        processes: Processes,
        *,
        precision: str,
    ) -> None:
        super().__init__(model, adamw(model, optimisation), processes, precision=precision)
        accelerator = processes.accelerator
        configure(accelerator.deepspeed_plugin.deepspeed_config, optimisation.clip_grad_norm)
        accelerator.free_memory()  # the engine of the phase before
        self._engine, _ = accelerator.prepare(objective, self._optimizer)
        self.objective, self._zero = self._engine, self._engine.optimizer
        self._use_the_weights_as_masters()
        begin(self._optimizer)
        self._zero._lazy_init_hp_params_optimizer_state()  # lets the moments be reached by parameter
        self._tell_loss_scale()

    def _use_the_weights_as_masters(self) -> None:
        """Let the optimizer change the weights in place: DeepSpeed's copies of what is float32 anyway are waste."""
        zero = self._zero
        for group, master in enumerate(zero.single_partition_of_fp32_groups):
            rank = torch.distributed.get_rank(group=zero.real_dp_process_group[group])
            master.data = zero.parallel_partitioned_bit16_groups[group][rank].data
        zero._link_all_hp_params()  # else its notes of where the copies lie would keep them in memory

    def _tell_loss_scale(self) -> None:
        if self._loss_scale.dynamic:
            self._zero.override_loss_scale(float(self._loss_scale.value))

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """ZeRO-1 reduces at the last micro-batch; ZeRO-2 at each, to keep no more than its part."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """See `Update`."""
        self._engine.backward(loss * self._processes.world, scale_wrt_gas=False)

    def step(self, rate: float) -> Step:
        """See `Update`. DeepSpeed reads the norm on the host; it says inf for whatever is not finite."""
        self._set_rate(rate)
        self._engine.step()
        device = self._processes.device
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=device)
        skipped = torch.tensor(not self._engine.was_step_applied(), device=device)
        self._loss_scale.update(skipped)
        self._tell_loss_scale()
        return Step(norm, skipped)

    def restore(self, found: Checkpoint) -> None:
        """See `Update`."""
        super().restore(found)
        self._tell_loss_scale()

    def gradients(self) -> list[Tensor]:
        """See `Update`."""
        whole = [parameter.grad for _, parameter in self._trained() if parameter.grad is not None]
        parts = [self._zero.averaged_gradients, self._zero.all_grad_tensors]
        return whole + [gradient for part in parts for group in part.values() if group for gradient in group]

    def masters(self) -> list[Tensor]:
        """See `Update`; DeepSpeed's notes of where each parameter's master lies hold memory, too."""
        places = [getattr(parameter, "_hp_mapping", None) for _, parameter in self._trained()]
        return super().masters() + [place.hp_fragment for place in places if place is not None]

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, moment)

    def _set_moment(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value, moment)


def make_update(
    model: nn.Module,
    objective: nn.Module,
    optimisation: OptimisationConfig,
    processes: Processes,
    *,
    precision: str,
    deterministic: bool = False,
) -> Update:
    """The update of the launcher's kind; moves the objective, which contains the model, to the device.

    Raises:
        InputError: DeepSpeed is asked for more than ZeRO-1 or ZeRO-2 without offloading.
    """
    objective = Autocast(objective, processes.autocast)
    if processes.sharded:
        return Sharded(model, objective, optimisation, processes, precision=precision)
    return Replicated(model, objective, optimisation, processes, precision=precision, deterministic=deterministic)


def distributed(objective: nn.Module, device: torch.device, *, deterministic: bool) -> DistributedDataParallel:
    """An objective in DDP. Its buffers are constants, alike on all ranks."""
    name = "forward_sync_buffers"  # since torch 2.13
    known = name in inspect.signature(DistributedDataParallel.__init__).parameters
    options: dict[str, Any] = {name if known else "broadcast_buffers": False}
    return DistributedDataParallel(
        objective,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # otherwise the buckets are rebuilt after the first step, and a resumed run sums in another order
        find_unused_parameters=deterministic,
        **options,
    )


def configure(config: dict[str, Any], max_norm: float | None) -> None:
    """Write into a DeepSpeed configuration what is ours to say: precision, batches, clipping, buckets.

    Raises:
        InputError: a ZeRO stage or an offloading that checkpoints by name do not cover.
    """
    zero = config["zero_optimization"]
    if zero.get("stage") not in (1, 2):
        raise InputError("zero_optimization.stage", "not supported", found=zero.get("stage"), expected="1 or 2")
    for key in ("offload_optimizer", "offload_param"):
        device = (zero.get(key) or {}).get("device") or "none"
        if device != "none":
            raise InputError(f"zero_optimization.{key}.device", "not supported", found=device, expected="none")
    zero.setdefault("reduce_bucket_size", BUCKET_ELEMENTS)
    config["bf16"] = config["fp16"] = {"enabled": False}
    # batches are the plan's and micro-batches the loop's: DeepSpeed need not count them
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "train_batch_size": "auto"}
    config["gradient_clipping"] = max_norm or 0.0


def state_bytes(update: Update) -> dict[str, int]:
    """Bytes that this rank holds between backward and step: `moments`, `gradients`, and `masters`.

    Masters are copies of weights that the optimizer changes instead of the weights: 0 where it changes these in place.
    """
    weights = _storages(update.model.parameters())
    masters = {place: size for place, size in _storages(update.masters()).items() if place not in weights}
    held = {"moments": _storages(update.moments()), "gradients": _storages(update.gradients()), "masters": masters}
    return {name: sum(storages.values()) for name, storages in held.items()}


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the memory behind tensors; views of one memory count once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
