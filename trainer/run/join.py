"""How a process joins the others of its launch: the Accelerator that torch and DeepSpeed agree with, or an error."""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import socket
import warnings
from datetime import timedelta

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs

from trainer.errors import InputError
from trainer.run.launch import HOW_TO_START, Launch

LEAVE_SECONDS = 60
"""A process that ends does not wait longer than this for the communication to be taken down."""


def join(launch: Launch, on_cpu: bool, patience: timedelta) -> Accelerator:
    """The Accelerator of this process, after it has met the others.

    Args:
        launch: what was announced; its settings are in the environment.
        on_cpu: there is no GPU, or the launcher was told to leave it alone.
        patience: how long ranks wait for each other, here and in collectives.

    Raises:
        InputError: the ranks do not meet, or not as they were announced.
    """
    plugin = None if launch.zero_stage is None else _deepspeed_plugin(launch.zero_stage, on_cpu)
    if launch.world > 1:
        _check_address(os.environ["MASTER_ADDR"])
    try:
        accelerator = Accelerator(
            # without cpu=True the ranks of torchrun on a CPU do not know of each other; with it, DeepSpeed is dropped
            cpu=on_cpu and plugin is None,
            mixed_precision="no",
            deepspeed_plugin=plugin,
            # without gloo, DeepSpeed on a CPU shards over all ranks while accelerate sees a world of one
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=patience)]
            if "RANK" in os.environ
            else [],
        )
    except dist.DistError as error:
        raise no_meeting(error, launch, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) from error
    _check_world(launch, accelerator)
    atexit.register(_part)
    return accelerator


def _deepspeed_plugin(zero_stage: int, on_cpu: bool) -> DeepSpeedPlugin:
    """What makes accelerate use DeepSpeed. Only here is DeepSpeed imported: that takes seconds."""
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        # accelerate would choose DDP, or a GPU that it was told to leave alone
        os.environ["ACCELERATE_USE_CPU"] = "false"
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # it calls what newer versions of torch name otherwise: nothing that our users could change
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if on_cpu:
        # its communication through shared memory is compiled for minutes at the first start; gloo serves
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    class Plugin(DeepSpeedPlugin):
        def set_deepspeed_weakref(self) -> None:
            """Matters for ZeRO-3 only, and needs the package `transformers`."""

    # clipping and accumulation are the training's own
    return Plugin(zero_stage=zero_stage, gradient_accumulation_steps=1, gradient_clipping=0.0)


def _check_address(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise InputError(
            "MASTER_ADDR",
            f"the host of rank 0 has no address on {socket.gethostname()}",
            found=f"{host} ({error.strerror})",
            fix="Set MASTER_ADDR to an address of that host (SLURM: NodeAddr of `scontrol show node`).",
        ) from error


def no_meeting(error: Exception, launch: Launch, host: str, port: str) -> InputError:
    """What a failed meeting of the ranks means for who started them."""
    text = " ".join(str(error).split())
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return InputError(
            "MASTER_PORT",
            f"port {port} is in use on {host}",
            fix="Set MASTER_PORT to a free port between 10000 and 32767, the same for all ranks.",
        )
    return InputError(
        "MASTER_ADDR",
        f"rank {launch.rank} of {launch.world} did not meet the others at {host}:{port}",
        found=text[:200],
        fix="See whether every rank was started, another program has the port, or a firewall closes it.",
    )


def _check_world(launch: Launch, accelerator: Accelerator) -> None:
    """The ranks that accelerate and torch see are those announced, and DeepSpeed is there where it was asked for."""
    seen = {(accelerator.process_index, accelerator.num_processes)}
    seen.add((dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1))
    if seen != {(launch.rank, launch.world)}:
        raise InputError(
            launch.launcher,
            "the processes do not see each other as they were announced",
            found=" and ".join(f"rank {rank} of {world}" for rank, world in sorted(seen)),
            expected=f"rank {launch.rank} of {launch.world}",
            fix=HOW_TO_START,
        )
    if (launch.zero_stage is not None) != (accelerator.distributed_type == DistributedType.DEEPSPEED):
        raise InputError(
            launch.launcher,
            "asked for one way of sharing the work, and another came of it",
            found=accelerator.distributed_type.value,
            expected="DEEPSPEED" if launch.zero_stage else "one process or DDP",
            fix=HOW_TO_START,
        )


def _part() -> None:
    """Take the communication down at the end, as NCCL asks for; other ranks may be gone, so the wait is bounded."""
    if dist.is_initialized():
        faulthandler.dump_traceback_later(LEAVE_SECONDS, exit=True)
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
