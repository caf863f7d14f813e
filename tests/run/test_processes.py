"""What a launcher announces is read rightly or refused, and a signal becomes a wish read at a step boundary."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import InputError
from trainer.models.anchor import has_few_digits
from trainer.run import signals
from trainer.run.join import no_meeting
from trainer.run.launch import (
    Launch,
    Parent,
    first_host,
    master_port,
    read_launch,
    sharing,
    tasks_of_node,
    zero_environment,
)
from trainer.run.processes import (
    Boundary,
    Interrupted,
    Processes,
    StopRequest,
    make_processes,
    ranks_on_one_gpu,
    slow_precision,
)

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
DEEPSPEED = TORCHRUN | ACCELERATE | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
SRUN = {  # as SLURM 22.05 sets them for the last of `srun -N 2 -n 3`
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
SBATCH = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "3", "SLURM_PROCID": "0"}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    """The processes of a plain start."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    yield make_processes(precision="no", deterministic=False, timeout_s=600)
    torch.use_deterministic_algorithms(before)


def read(environment: dict[str, str], precision: str = "no") -> Launch:
    return read_launch(environment, Parent(), precision)


def refusal(environment: dict[str, str], parent: Parent | None = None, precision: str = "no") -> str:
    with pytest.raises(InputError) as caught:
        read_launch(environment, parent or Parent(), precision)
    return str(caught.value)


def test_each_launcher_is_understood() -> None:
    assert read({}) == Launch("one process")
    assert read({"WORLD_SIZE": "1"}) == Launch("one process")
    assert read(TORCHRUN) == Launch("torchrun", 1, 4)
    assert read(TORCHRUN | ACCELERATE) == Launch("accelerate launch", 1, 4)
    assert read(ACCELERATE) == Launch("one process"), "accelerate launch with cpu.yaml or gpu.yaml"
    assert read(DEEPSPEED) == Launch("accelerate launch", 1, 4, zero_stage=2)
    assert read(DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}).zero_stage == 1


def test_names_of_slurm_become_those_of_torch() -> None:
    launch = read(SRUN)
    assert (launch.launcher, launch.rank, launch.world) == ("srun", 2, 3)
    assert launch.settings == {
        "RANK": "2",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": str(master_port(77, 0)),
    }
    chosen = read(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345"}).settings
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("10.0.0.1", "12345")
    other = read({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"} | {"SLURM_JOB_NODELIST": "x[07,9]"})
    assert other.settings["MASTER_ADDR"] == "x07"
    # torchrun inside a task of srun has announced itself, and one task is one process
    assert read(SRUN | TORCHRUN) == Launch("torchrun", 1, 4)
    assert read(SRUN | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}) == Launch("srun")


@pytest.mark.parametrize(
    ("local_rank", "gpus", "device"),
    [(3, 4, "3"), (3, 1, "0"), (3, 2, "1"), (0, 1, "0"), (3, 0, "3"), (3, 8, "3")],
    ids=["all are seen", "one a task", "two for two tasks", "the first", "no GPU", "more than tasks"],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_local_rank_is_the_number_of_a_gpu_that_the_process_sees(
    local_rank: int, gpus: int, device: str, sharded: bool
) -> None:
    zero = zero_environment(2) if sharded else {}
    step = {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}
    task = SRUN | step | zero | {"SLURM_PROCID": str(local_rank), "SLURM_LOCALID": str(local_rank)}
    launch = read_launch(task, Parent(), gpus=gpus)
    assert (launch.rank, launch.settings["LOCAL_RANK"]) == (local_rank, device)
    assert (launch.settings["RANK"], launch.settings["LOCAL_WORLD_SIZE"]) == (str(local_rank), "4")
    # so does whoever announces the tasks of srun in torch's names, which most scripts of the web do
    announced = read_launch(TORCHRUN | zero | {"LOCAL_RANK": str(local_rank)}, Parent(), gpus=gpus)
    assert announced.settings.get("LOCAL_RANK", str(local_rank)) == device
    assert announced.zero_stage == launch.zero_stage == (2 if sharded else None)


@pytest.mark.parametrize(("gpus", "on_cpu", "device"), [(1, "", "0"), (8, "", "3"), (1, "true", "3")])
def test_a_process_counts_the_gpus_that_it_sees(
    gpus: int, on_cpu: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Joined(Exception):
        pass

    def joined(launch: Launch, *_: object) -> None:
        raise Joined(os.environ["LOCAL_RANK"])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("trainer.run.processes.join", joined)
    for name, value in {**TORCHRUN, "LOCAL_RANK": "3", "ACCELERATE_USE_CPU": on_cpu}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Joined, match=f"^{device}$"):
        make_processes(precision="no", deterministic=False, timeout_s=600)


def test_a_zero_stage_is_read_as_it_was_told_and_one_task_of_srun_may_have_one() -> None:
    assert [read(SRUN | zero_environment(stage)).zero_stage for stage in (0, 1, 2)] == [None, 1, 2]
    one = SRUN | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    one |= {"SLURM_NODEID": "0", "SLURM_PROCID": "0"}
    launch = read(one | zero_environment(1))
    assert (launch.world, launch.zero_stage, launch.settings["RANK"]) == (1, 1, "0")
    assert read(one | zero_environment(0)) == Launch("srun")


def test_how_processes_share_is_said_in_a_word() -> None:
    assert [sharing(*way) for way in ((1, None), (1, 0), (4, None), (4, 0), (4, 1), (1, 2))] == [
        "", "", "DDP", "DDP", "ZeRO-1", "ZeRO-2",
    ]  # fmt: skip


def test_idle_tasks_of_slurm_are_refused() -> None:
    text = refusal(SBATCH)
    assert "2 of 3 tasks would be idle" in text and "srun python -m trainer" in text and "WORLD_SIZE=1" in text
    # a shell that `salloc` opened on the first node is a step of one task
    assert "2 of 3 tasks would be idle" in refusal(
        SBATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
    )
    assert read(SBATCH | {"WORLD_SIZE": "1"}) == Launch("one process")
    assert read(SBATCH | {"SLURM_NTASKS": "1"}) == Launch("one process")
    assert read(SBATCH | TORCHRUN) == Launch("torchrun", 1, 4)


def test_accelerate_that_starts_one_of_several_is_refused() -> None:
    left_behind = ACCELERATE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    command = ("python", "accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "trainer")
    assert "--num_processes 2" in refusal(left_behind, Parent({}, command))
    assert "found a file or flags that ask for several" in refusal(
        left_behind, Parent({"PATH": "/bin"}, ("accelerate",))
    )
    # a MASTER_PORT that somebody exported announces nothing, but the command line still does
    inherited = {"MASTER_PORT": "29500"}
    one = ("accelerate", "launch", "--num-processes=1")
    assert read_launch(left_behind, Parent(inherited, one)) == Launch("one process")
    assert "cpu2.yaml" in refusal(left_behind, Parent(inherited, ("accelerate", "launch", "--num-processes=3")))


@pytest.mark.parametrize(
    ("environment", "precision", "expected"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "no", "LOCAL_RANK and MASTER_ADDR and MASTER_PORT not"),
        ({"WORLD_SIZE": "2"}, "no", "WORLD_SIZE: is set, but RANK is not"),
        (TORCHRUN | {"RANK": "4"}, "no", "found 4, expected 0 to 3"),
        (TORCHRUN | {"WORLD_SIZE": "four"}, "no", "WORLD_SIZE: .* found 'four', expected a number"),
        ({"PMI_SIZE": "2"}, "no", "mpiexec started 2 processes"),
        ({k: v for k, v in SRUN.items() if "NODELIST" not in k}, "no", "Set MASTER_ADDR"),
        (TORCHRUN | {"ACCELERATE_USE_FSDP": "true"}, "no", "FSDP is not supported"),
        (TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "bf16"}, "no", "found bf16, expected no.*precision=bf16"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "no", "found 3, expected 1 or 2.*deepspeed_zero1.yaml"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "no", "found ds.json"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "no", "offload_param_device: .*found cpu"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "no", "needs a launcher"),
    ],
)
def test_what_does_not_fit_is_one_line_with_a_way_out(
    environment: dict[str, str], precision: str, expected: str
) -> None:
    assert re.search(expected, refusal(environment, precision=precision))


def test_launcher_may_ask_for_the_precision_of_the_configuration() -> None:
    assert read(TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16").world == 4
    assert read(SRUN | {"PMI_SIZE": "3"}).world == 3, "srun --mpi=pmi2"


HOSTS = st.lists(
    st.tuples(st.sampled_from(["n", "gpu-a", "x1c"]), st.lists(st.integers(0, 99), min_size=1)), min_size=1
)


@given(groups=HOSTS, data=st.data())
def test_first_host_is_the_first_of_the_list(groups: list[tuple[str, list[int]]], data: st.DataObject) -> None:
    written, first = [], f"{groups[0][0]}{groups[0][1][0]:03d}"
    for name, numbers in groups:
        ranges = [f"{n:03d}-{n + 1:03d}" if data.draw(st.booleans()) else f"{n:03d}" for n in numbers]
        written.append(f"{name}[{','.join(ranges)}]" if len(ranges) > 1 or "-" in ranges[0] else f"{name}{ranges[0]}")
    assert first_host(",".join(written)) == first


def test_node_lists_as_slurm_writes_them() -> None:
    assert first_host("node[03-07,09],x1") == "node03"
    assert first_host("login.cluster-a.org") == "login.cluster-a.org"
    assert first_host("rack[1-2]n[04-05]-ib") == "rack1n04-ib"
    assert [tasks_of_node("2(x3),1", node) for node in range(4)] == [2, 2, 2, 1]


@given(job=st.integers(0, 10**8), step=st.integers(0, 60), later=st.integers(1, 300), other=st.integers(0, 60))
def test_neighbouring_jobs_and_steps_have_ports_of_their_own(job: int, step: int, later: int, other: int) -> None:
    assert 10_000 <= master_port(job, step) < 30_000
    assert master_port(job, step) != master_port(job + later, other)
    assert (master_port(job, step) == master_port(job, other)) == (step == other)


def test_ranks_that_do_not_meet_say_why() -> None:
    taken = RuntimeError(
        "The server socket has failed to listen. port: 29500, code: -98, name: EADDRINUSE, message: ..."
    )
    text = str(no_meeting(taken, Launch("srun", 0, 2), "n1", "29500"))
    assert "port 29500 is in use on n1" in text and "Set MASTER_PORT" in text
    late = RuntimeError("Timed out after 601 seconds waiting for clients. 1/2 clients joined.")
    assert "rank 0 of 2 did not meet the others at n1:29500" in str(
        no_meeting(late, Launch("srun", 0, 2), "n1", "29500")
    )


def test_ranks_that_share_a_gpu_are_found() -> None:
    assert ranks_on_one_gpu([("a", "GPU-0"), ("a", "GPU-1"), ("b", "GPU-0"), ("a", "GPU-0")]) == [0, 3]
    assert ranks_on_one_gpu([("a", ""), ("a", "")]) == [], "processes on a CPU may share it"


def test_slow_precision_is_said_with_its_cost() -> None:
    assert "about 3 times as long" in (slow_precision("bf16", "cpu", set()) or "")
    assert "fp16 units" in (slow_precision("fp16", "cpu", {"bf16"}) or "")
    assert slow_precision("bf16", "cpu", {"bf16"}) is None
    assert slow_precision("bf16", "cuda", set()) is None
    assert slow_precision("no", "cpu", set()) is None


def test_warning_is_printed_once(
    alone: Processes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.run.processes.cpu_units", set)
    slow = make_processes(precision="bf16", deterministic=False, timeout_s=600)
    assert capsys.readouterr().err.count("warning: precision=bf16: this CPU has no bf16 units") == 1
    with slow.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with alone.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_one_process_is_a_world_of_its_own(alone: Processes) -> None:
    assert (alone.rank, alone.world, alone.is_main, alone.sharded) == (0, 1, True, False)
    assert alone.device == torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    values = torch.tensor([1.5])
    assert alone.sum(values) is values
    assert alone.gather_objects("a") == ["a"] and alone.from_main("b") == "b" and alone.share([1, 2, 3]) == [1, 2, 3]
    alone.barrier()

    def fail() -> None:
        raise InputError("here", "is wrong")

    assert alone.first(lambda: 7) == 7
    with pytest.raises(InputError, match="here: is wrong"):
        alone.first(fail)


def a_rank(rank: int) -> Processes:
    """One of two, without the other."""
    device = torch.device("cpu")
    return Processes(None, rank, 2, device, "here", "torchrun", False, "no", 600.0)


def test_wish_to_end_on_the_main_process_is_raised_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[object, Exception | None]] = []
    monkeypatch.setattr(Processes, "from_main", lambda self, value: told.append(value) or value)
    wish = Interrupted(signal.SIGUSR1, 12)

    def leave() -> None:
        raise wish

    with pytest.raises(Interrupted) as raised:
        a_rank(0).first(leave)
    assert raised.value is wish
    (_, error), *_ = told
    other = pickle.loads(pickle.dumps(error))
    assert isinstance(other, Interrupted) and str(other) == str(wish) == "SIGUSR1 at step 12; the checkpoint is written"
    assert (other.signum, other.step) == (signal.SIGUSR1, 12)


def test_world_that_is_not_the_announced_one_is_refused(alone: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    # the state of accelerate in this process is made: a world of one
    for name, value in (TORCHRUN | {"MASTER_ADDR": "localhost"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="found rank 0 of 1, expected rank 1 of 4"):
        make_processes(precision="no", deterministic=False, timeout_s=600)
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(InputError, match=r"no address on .*: found no-such-host.invalid .*Set MASTER_ADDR"):
        make_processes(precision="no", deterministic=False, timeout_s=600)


def test_deterministic_kernels_are_asked_for_and_given_up_again(
    alone: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back as it was
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    make_processes(precision="no", deterministic=True, timeout_s=600)
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    make_processes(precision="no", deterministic=False, timeout_s=600)
    assert not torch.are_deterministic_algorithms_enabled()


def test_products_and_convolutions_are_float32_unless_tf32_is_asked_for(alone: Processes) -> None:
    """On CPUs the settings mean nothing, and can be read all the same."""
    for tf32 in (True, False):
        make_processes(precision="no", deterministic=False, timeout_s=600, tf32=tf32)
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32
        assert has_few_digits(torch.device("cuda")) is tf32 and not has_few_digits(torch.device("cpu"))


def test_boundary_of_one_process_agrees_with_itself(alone: Processes) -> None:
    boundary = Boundary(alone)
    for stop, save in [(0, False), (signal.SIGTERM, True), (0, True)]:
        boundary.begin(stop, save)
        assert boundary.agreed() == (stop, save)


@contextlib.contextmanager
def handlers(handler: object) -> Iterator[None]:
    """A handler for all signals that stand for an end, which a failing test leaves alone."""
    before = {number: signal.signal(number, handler) for number in StopRequest.SIGNALS}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_first_signal_is_a_wish_and_what_follows_it_is_not_heard(number: signal.Signals) -> None:
    with handlers(signal.default_int_handler), StopRequest() as stop:
        assert not stop.requested and stop.signum == 0
        os.kill(os.getpid(), number)
        assert stop.requested
        for other in StopRequest.SIGNALS:  # a Ctrl-C reaches a rank from the terminal and from torchrun
            os.kill(os.getpid(), other)
        assert stop.signum == number
        with pytest.raises(Interrupted, match=f"{number.name} at step 7") as caught:
            stop.leave(7)
        assert caught.value.signum == number


def test_second_ctrl_c_of_a_person_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with handlers(signal.default_int_handler), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now = time.monotonic()
        monkeypatch.setattr(signals.time, "monotonic", lambda: now + signals.AGAIN_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_rank_without_a_signal_leaves_on_the_agreed_one() -> None:
    with pytest.raises(Interrupted, match="SIGUSR1 at step 3"), StopRequest() as stop:
        stop.leave(3, signal.SIGUSR1)
