"""From the environment that a launcher made to the processes of a training, and what they agree on.

Plain Python, torchrun, `accelerate launch` and srun all come to one `Processes`. Several combinations silently train N
independent copies, or drop DeepSpeed: `launch.py` reads what was announced, and `join.py` sees that it came true. Small
things (numbers, names, errors) go through a control group of gloo beside NCCL, so that no GPU waits for them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from trainer.errors import InputError
from trainer.run.join import join
from trainer.run.launch import Parent, read_launch
from trainer.run.signals import Interrupted, StopRequest

__all__ = ["Agreement", "Boundary", "Interrupted", "Processes", "StopRequest", "make_processes"]

T = TypeVar("T")

WATCHED_PATIENCE = timedelta(days=30)
"""How long torch waits where a watchdog looks on, which ends a wait in which no rank makes progress."""
GRACE_SECONDS = 30.0
"""How much longer than `timeout_s` torch waits: the watchdog, which knows which rank is missing, speaks first."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Waits:
    """How many waits for other ranks this process is in."""

    count: int = 0


@dataclass(frozen=True)
class Processes:
    """What the launcher made of this process, one of `world`; all ranks make the same calls in the same order.

    `zero_stage` is DeepSpeed's; None without it. `precision` is `no`, `bf16` or `fp16`, and is applied by `autocast`
    alone: accelerate and DeepSpeed are told `no`, so that weights and gradients stay float32.
    """

    accelerator: Accelerator
    rank: int
    world: int
    device: torch.device
    host: str
    launcher: str
    zero_stage: int | None
    precision: str
    timeout_s: float
    control: Any = None
    waits: Waits = field(default_factory=Waits, compare=False)

    @property
    def is_waiting(self) -> bool:
        """Whether this process waits for other ranks now."""
        return self.waits.count > 0

    def set_patience(self, *, watched: bool) -> None:
        """How long waits for other ranks may take from now on: for about `timeout_s`, or as long as a watchdog says."""
        if self.world > 1:
            patience = WATCHED_PATIENCE if watched else timedelta(seconds=self.timeout_s + GRACE_SECONDS)
            # torch has no public name for it
            dist.distributed_c10d._set_pg_timeout(patience, self.control)

    @property
    def sharded(self) -> bool:
        """Whether DeepSpeed shares optimizer states (ZeRO-1), and gradients (ZeRO-2), out."""
        return self.zero_stage is not None

    @property
    def is_main(self) -> bool:
        """Whether this one prints, and writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all ranks are here. Raises TimeoutError."""
        if self.world > 1:
            with self.bounded():
                dist.barrier(group=self.control)

    def gather_objects(self, value: T) -> list[T]:
        """The values of all ranks, in the order of the ranks, on every rank. Raises TimeoutError."""
        values: list[Any] = [value]
        if self.world > 1:
            values = [None] * self.world
            with self.bounded():
                dist.all_gather_object(values, value, group=self.control)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, formed in float64 on the CPU, the same bits on every rank.

        Returns: a tensor of the shape, dtype and device of `values`; `values` itself for one process.
        """
        if self.world == 1:
            return values
        total = values.detach().to("cpu", torch.float64, copy=True)
        with self.bounded():
            dist.all_reduce(total, group=self.control)
        return total.to(values.device, values.dtype)

    def from_main(self, value: T) -> T:
        """The main process's value, on every rank. Raises TimeoutError."""
        values = [value]
        if self.world > 1:
            with self.bounded():
                dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that this rank is dealt: every `world`-th, from number `rank` on."""
        return items[self.rank :: self.world]

    def first(self, action: Callable[[], T]) -> T:
        """Run on the main process while the others wait; every rank gets the value.

        They wait for as long as the main process says that it goes on; without a watchdog, for `timeout_s` or so.

        Raises: on every rank, the InputError, OSError or Interrupted of the action. What else it raises is raised on
            the main process, and a RuntimeError that quotes it on the others: no rank is left waiting.
        """
        if self.world == 1:
            return action()
        value: Any = None
        error: Exception | None = None
        if self.is_main:
            try:
                value = action()
            except Exception as caught:
                error = caught
        known = error is None or isinstance(error, InputError | OSError | Interrupted)
        told = error if known else RuntimeError(f"the main process failed: {error!r}")
        value, told = self.from_main((value, told))
        if error is not None:
            raise error
        if told is not None:
            raise told
        return value

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which a model computes at the configured precision."""
        if self.precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision])

    @contextlib.contextmanager
    def bounded(self) -> Iterator[None]:
        """Around a wait for other ranks: says what it means that it was too long. Raises TimeoutError."""
        self.waits.count += 1
        try:
            yield
        except RuntimeError as error:
            if "timed out" not in str(error).lower():
                raise
            raise TimeoutError(
                f"rank {self.rank} of {self.world} on {self.host} waited for the other ranks for longer than "
                f"timeout_s={self.timeout_s:g}: one hangs, or what it does takes longer (then raise timeout_s)"
            ) from error
        finally:
            self.waits.count -= 1


def make_processes(*, precision: str, deterministic: bool, timeout_s: float, tf32: bool = False) -> Processes:
    """Join the other processes that the launcher announced, if any.

    Args:
        precision: `no`, `bf16` or `fp16`.
        deterministic: use only deterministic kernels; on CUDA those that have none give a warning.
        timeout_s: how long ranks wait for each other, in seconds.
        tf32: form float32 products and convolutions on NVIDIA GPUs of TF32 numbers. Torch's own default is to do so in
            convolutions and not in products.

    Raises:
        InputError: the processes do not see each other, or not as the launcher announced them; a port is taken.
    """
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    launch = read_launch(os.environ, _parent(), precision, 0 if on_cpu else torch.cuda.device_count())
    os.environ.update(launch.settings)
    _set_determinism(deterministic, on_cpu)
    use_tf32(tf32)
    patience = timedelta(seconds=timeout_s + GRACE_SECONDS)
    accelerator = join(launch, on_cpu, patience)
    processes = Processes(
        accelerator=accelerator,
        rank=launch.rank,
        world=launch.world,
        device=torch.device("cpu") if on_cpu else accelerator.device,  # accelerate also says "cpu:0"
        host=socket.gethostname(),
        launcher=launch.launcher,
        zero_stage=launch.zero_stage,
        precision=precision,
        timeout_s=timeout_s,
        control=dist.new_group(backend="gloo", timeout=patience) if launch.world > 1 else None,
    )
    _check_devices(processes)
    warning = slow_precision(precision, processes.device.type, cpu_units())
    if warning and processes.is_main:
        print(f"warning: {warning}", file=sys.stderr)
    return processes


def use_tf32(allowed: bool) -> None:
    """Say how this process forms float32 products and convolutions on NVIDIA GPUs, both alike."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def _parent() -> Parent:
    """The process that started this one, where it can be read."""
    home = Path("/proc") / str(os.getppid())
    try:
        pairs = (home / "environ").read_bytes().decode(errors="replace").split("\0")
        command = (home / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return Parent()
    return Parent(dict(pair.split("=", 1) for pair in pairs if "=" in pair), tuple(command))


def _set_determinism(deterministic: bool, on_cpu: bool) -> None:
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic, warn_only=not on_cpu)


def _check_devices(processes: Processes) -> None:
    """No two ranks compute on one GPU: NCCL would end them later, with less to say. Raises InputError."""
    device = ""
    if processes.device.type == "cuda":
        device = str(getattr(torch.cuda.get_device_properties(processes.device), "uuid", ""))
    crowded = ranks_on_one_gpu(processes.gather_objects((processes.host, device)))
    if crowded:
        raise InputError(
            f"{processes.launcher}, {processes.world} processes",
            f"ranks {', '.join(map(str, crowded))} share a GPU with another",
            fix="Start as many processes on each node as it has GPUs: torchrun --nproc_per_node, accelerate's "
            "num_processes, srun --ntasks-per-node.",
        )


def ranks_on_one_gpu(places: Sequence[tuple[str, str]]) -> list[int]:
    """The ranks that share a GPU with another one, of (host, GPU or "" without one) by rank."""
    counts = Counter(places)
    return [rank for rank, place in enumerate(places) if place[1] and counts[place] > 1]


def cpu_units() -> set[str]:
    """The precisions that this CPU has units for, as far as torch tells (x86)."""
    told = {"bf16": ("_is_avx512_bf16_supported", "_is_amx_tile_supported"), "fp16": ("_is_amx_fp16_supported",)}
    return {name for name, tests in told.items() if any(getattr(torch.cpu, test, bool)() for test in tests)}


def slow_precision(precision: str, device: str, units: Set[str]) -> str | None:
    """What to say of a precision that the device has no units for; None where it has (figures: a Cascade Lake)."""
    if precision == "no" or device != "cpu" or precision in units:
        return None
    cost = "about 3 times" if precision == "bf16" else "many times"
    return f"precision={precision}: this CPU has no {precision} units; a step takes {cost} as long as with precision=no"


class Agreement(NamedTuple):
    """What all ranks do at a step boundary: end on a signal (0: go on), write a checkpoint."""

    signum: int
    save: bool


class Boundary:
    """The agreement of all ranks at a step boundary: what one of them was asked for, all do at the same step.

    `begin` starts the exchange over the control group and `agreed` waits for it, so that a step can compute in between.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._wishes = torch.zeros(2, dtype=torch.int64)
        self._work: Any = None

    def begin(self, stop: int, save: bool) -> None:
        """Say what this rank was asked for: to end on signal `stop` (0: it was not), to write a checkpoint."""
        assert self._work is None, "the last exchange was not waited for"
        self._wishes = torch.tensor([stop, int(save)])
        if self._processes.world > 1:
            group = self._processes.control
            self._work = dist.all_reduce(self._wishes, op=dist.ReduceOp.MAX, group=group, async_op=True)

    def agreed(self) -> Agreement:
        """What the ranks agreed on since `begin`; of several signals the highest. Raises TimeoutError."""
        if self._work is not None:
            with self._processes.bounded():
                self._work.wait()
            self._work = None
        signum, save = self._wishes.tolist()
        return Agreement(signum, bool(save))
