"""What a launcher said about this process, read from the environment before anything is started.

torchrun, `accelerate launch` and srun announce themselves by environment variables, each in its own way, and some say
nothing of the other processes: those would train the same thing N times. Pure functions; `processes.py` acts on them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from trainer.errors import InputError

MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""What mpiexec, and srun with an MPI plugin, say about the number of processes."""
HOW_TO_START = (
    "Start with `torchrun --nproc_per_node N -m trainer -- train ...`, with `srun python -m trainer train ...`, or "
    "with `accelerate launch --config_file F` where F is one of configs/accelerate."
)
ALONE = "For one process in spite of that, put WORLD_SIZE=1 in front of the command."


@dataclass(frozen=True)
class Parent:
    """The process that started this one: its environment and its command line."""

    environment: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """What was announced: who launched, which rank of how many, what torch still has to be told, and the ZeRO stage."""

    launcher: str
    rank: int = 0
    world: int = 1
    settings: Mapping[str, str] = field(default_factory=dict)
    zero_stage: int | None = None


def read_launch(environment: Mapping[str, str], parent: Parent, precision: str = "no", gpus: int = 0) -> Launch:
    """The launch of this process.

    Args:
        environment: of this process.
        parent: who started it; tells whether `accelerate launch` was asked for more processes than it starts.
        precision: of the configuration; a launcher that asks for another one is refused.
        gpus: how many this process sees; 0 where it computes on the CPU.

    Raises:
        InputError: several processes were asked for that would not know of each other, or what was asked for does not
            fit this trainer.
    """
    _check_accelerate(environment, precision)
    if "RANK" in environment:
        return _read_torchrun(environment, gpus)
    if environment.get("WORLD_SIZE", "1") != "1":
        raise InputError("WORLD_SIZE", "is set, but RANK is not", found=environment["WORLD_SIZE"], fix=HOW_TO_START)
    if "WORLD_SIZE" not in environment:
        _check_mpi(environment)
        _check_simple_launcher(environment, parent)
        tasks, step = _number(environment, "SLURM_NTASKS", 1), _number(environment, "SLURM_STEP_NUM_TASKS", 1)
        if step > 1:
            return _read_srun(environment, step, gpus)
        if tasks > 1:
            raise InputError(
                "SLURM_NTASKS",
                f"{tasks - 1} of {tasks} tasks would be idle, as neither srun nor torchrun started this process",
                fix=f"Start with `srun python -m trainer train ...`, or ask for one task. {ALONE}",
            )
        if _zero_stage(environment) is not None and "SLURM_STEP_ID" in environment:
            return _read_srun(environment, step, gpus)
    if _zero_stage(environment) is not None:
        raise InputError("DeepSpeed", "needs a launcher that sets RANK, even for one process", fix=HOW_TO_START)
    return Launch("srun" if "SLURM_STEP_ID" in environment else "one process")


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name, "" if default is None else str(default))
    try:
        return int(value)
    except ValueError:
        raise InputError(name, "announces this process", found=repr(value), expected="a number") from None


def _read_torchrun(environment: Mapping[str, str], gpus: int) -> Launch:
    """torchrun, and `accelerate launch`, which starts its processes through torchrun."""
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise InputError("RANK", f"is set, but {' and '.join(missing)} not", fix=HOW_TO_START)
    rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if not 0 <= rank < world:
        raise InputError("RANK", "lies outside the world", found=rank, expected=f"0 to {world - 1}")
    launcher = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in environment else "torchrun"
    local = _number(environment, "LOCAL_RANK")
    device = local_device(local, gpus)
    settings = {} if device == local else {"LOCAL_RANK": str(device)}
    return Launch(launcher, rank, world, settings, _zero_stage(environment))


def _read_srun(environment: Mapping[str, str], world: int, gpus: int) -> Launch:
    """A task of `srun python -m trainer train`: SLURM's names become those that torch reads."""
    rank, step = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_ID")
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if not hosts and "MASTER_ADDR" not in environment:
        raise InputError("SLURM_STEP_NODELIST", "is not set", fix="Set MASTER_ADDR to the host of the first task.")
    local = tasks_of_node(
        environment.get("SLURM_STEP_TASKS_PER_NODE", str(world)), int(environment.get("SLURM_NODEID", 0))
    )
    settings = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local_device(_number(environment, "SLURM_LOCALID"), gpus)),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(hosts),
        "MASTER_PORT": environment.get("MASTER_PORT")
        or str(master_port(_number(environment, "SLURM_JOB_ID", 0), step)),
    }
    return Launch("srun", rank, world, settings, _zero_stage(environment))


def local_device(local_rank: int, gpus: int) -> int:
    """The number of a process's GPU, which is what libraries read from LOCAL_RANK.

    Where SLURM shows each task the GPU of its own alone (--gpus-per-task, --gpu-bind), that one is number 0 for every
    task: DeepSpeed and DDP, which take LOCAL_RANK as it is, would ask for a GPU that their process does not see.
    """
    return local_rank % gpus if gpus else local_rank


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `node[03-07,09],x1` -> `node03`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes.strip())
    assert first is not None
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())


def tasks_of_node(counts: str, node: int) -> int:
    """How many tasks a node has, of SLURM's `2(x3),1`, which means 2, 2, 2, 1."""
    each: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        each += [int(count)] * int(times or 1)
    return each[node]


def master_port(job: int, step: int) -> int:
    """A port that the steps of jobs on one machine share as rarely as can be, outside the ports that clients are given.

    Linux gives clients 32768 and more. Jobs with numbers near each other, and the first 61 steps of a job, differ.
    """
    return 10_000 + (job * 61 + step) % 20_000


def _check_mpi(environment: Mapping[str, str]) -> None:
    for name in MPI_SIZES:
        size = _number(environment, name, 1)
        if size > 1 and size != _number(environment, "SLURM_STEP_NUM_TASKS", 1):
            raise InputError(name, f"mpiexec started {size} processes, each of which would be alone", fix=HOW_TO_START)


def _check_simple_launcher(environment: Mapping[str, str], parent: Parent) -> None:
    """`accelerate launch --cpu --num_processes 2`, or MULTI_CPU in its file, starts one process and does not say so.

    What it leaves behind is a MASTER_PORT that its own environment lacks (accelerate 1.15,
    `prepare_simple_launcher_cmd_env`), and its command line.
    """
    if "ACCELERATE_MIXED_PRECISION" not in environment:
        return
    given = re.search(r"--num[_-]processes[= ](\d+)", " ".join(parent.command))
    number = int(given[1]) if given else 0
    if number > 1 or ("MASTER_PORT" in environment and "MASTER_PORT" not in parent.environment):
        raise InputError(
            "accelerate launch",
            "--cpu and MULTI_CPU start one process, whatever the number asked for",
            found=f"--num_processes {number}" if number else "a file or flags that ask for several",
            fix="Start with `accelerate launch --config_file configs/accelerate/cpu2.yaml -m trainer train ...` "
            "(--num_processes changes its 2), or with torchrun; for one process use cpu.yaml.",
        )


def _check_accelerate(environment: Mapping[str, str], precision: str) -> None:
    """What `accelerate launch` may ask for that this trainer does otherwise, or not at all."""
    for name, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if _flag(environment, name):
            raise InputError(
                name,
                f"{what} is not supported",
                expected="DDP, or DeepSpeed with ZeRO stage 1 or 2",
                fix="Use one of the files in configs/accelerate.",
            )
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        raise InputError(
            "accelerate launch",
            "mixed_precision contradicts the configuration of the training",
            found=asked,
            expected=f"no, or the configuration's {precision}",
            fix=f"Leave mixed_precision to the configuration: precision={asked}.",
        )


def sharing(world: int, zero_stage: int | None) -> str:
    """How processes share the work, as people say it; empty for one process that shares nothing."""
    return f"ZeRO-{zero_stage}" if zero_stage else "DDP" if world > 1 else ""


def zero_environment(stage: int) -> dict[str, str]:
    """What tells a process to train with ZeRO of a stage, in the words of `accelerate launch`; 0: not to."""
    if not stage:
        return {"ACCELERATE_USE_DEEPSPEED": "false"}
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}


def _zero_stage(environment: Mapping[str, str]) -> int | None:
    """The ZeRO stage that the launcher asks for; None without DeepSpeed. Raises InputError."""
    if not _flag(environment, "ACCELERATE_USE_DEEPSPEED"):
        return None
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        raise InputError(
            "deepspeed_config_file",
            "precision, clipping and accumulation are the training's own",
            found=file,
            fix="Use configs/accelerate/deepspeed_zero1.yaml or deepspeed_zero2.yaml.",
        )
    stage = _number(environment, "ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)
    if stage not in (1, 2):
        raise InputError(
            "zero_stage",
            "DeepSpeed's checkpoints here are by the names of whole parameters",
            found=stage,
            expected="1 or 2",
            fix="Use configs/accelerate/deepspeed_zero1.yaml or deepspeed_zero2.yaml.",
        )
    for name in ("OPTIMIZER", "PARAM"):
        device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE", "none")
        if device != "none":
            where = f"offload_{name.lower()}_device"
            raise InputError(where, "offloading is not supported", found=device, expected="none")
    return stage


def _flag(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes")
