"""One rule for new weights, whoever carries it out: one process, DDP, ZeRO-1, ZeRO-2, with micro-batches or without.

Starting two ranks costs many seconds, so one launch of this file as a program does all that two ranks must show, writes
it down, and the tests read it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.config import OptimisationConfig
from trainer.errors import InputError
from trainer.run import checkpoint
from trainer.run.checkpoint import Checkpoint
from trainer.training.adam import FIRST_LOSS_SCALE, STEPS_TO_GROW, LossScale, Snapshot, Step, Update, adamw
from trainer.training.update import configure, make_update, state_bytes

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_SECONDS = 300
"""A bound for what takes half a minute, on a machine that may be busy."""
STEPS, ROWS = 50, 8
SMALL = 1e-2
"""Times this, the losses below do not overflow float16 with the first loss scale; times 1e5 they do."""
OPTIMISATION = OptimisationConfig(lr=0.01, weight_decay=0.1, clip_grad_norm=0.05)


@dataclass
class Ranks:
    """The processes as an update sees them."""

    world: int = 1
    rank: int = 0
    sharded: bool = False
    precision: str = "no"
    accelerator: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return torch.autocast("cpu", dtypes[self.precision]) if self.precision in dtypes else nullcontext()


class Curve(nn.Module):
    """A small model with weights that decay, weights that do not, one that is frozen, and a buffer."""

    offset: Tensor

    def __init__(self, width: int = 33, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.norm, self.outer = nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, 4)
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("offset", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.norm(self.inner(x)))) + self.offset + self.frozen


class Objective(nn.Module):
    """Squared error over the rows that count, and how many do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: set[torch.dtype] = set()

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        prediction = self.model(x)
        self.seen.add(prediction.dtype)
        return ((prediction.float() - y).square().mean(dim=1) * mask).sum(), mask.sum()


def a_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The global batch of a step: rows are missing unevenly, so that some micro-batches hold not one term."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(ROWS, 6, generator=generator)
    mask = (torch.arange(ROWS) < 1 + step % ROWS).float()
    return x, torch.sin(x[:, :4] * 2) * 3, mask


def an_update(
    ranks: Ranks, *, seed: int = 0, optimisation: OptimisationConfig = OPTIMISATION, repeats: bool = False
) -> Update:
    model, precision = Curve(seed=seed), ranks.precision
    return make_update(model, Objective(model), optimisation, ranks, precision=precision, deterministic=repeats)


def learn(
    update: Update, ranks: Ranks, number: int, micro_batches: int = 1, factor: Callable[[int], float] = lambda rank: 1.0
) -> tuple[Step, Tensor]:
    """One step, and its global loss; `factor(rank)` multiplies the loss of a rank."""
    batch = [part[ranks.rank :: ranks.world] for part in a_batch(number)]
    count, total = a_batch(number)[2].sum(), torch.zeros(())
    for k in range(micro_batches):
        with update.micro_batch(last=k == micro_batches - 1):
            loss = update.objective(*(part[k::micro_batches] for part in batch))[0] * factor(ranks.rank)
            update.backward(loss / count)
            total += loss.detach() / count
    if ranks.world > 1:
        torch.distributed.all_reduce(total)
    return update.step(rate(number)), total


def rate(number: int) -> float:
    return 0.01 * (1 + number % 3)


def train(update: Update, ranks: Ranks, numbers: range, micro_batches: int = 1) -> dict[str, list[float]]:
    """Losses, norms and skips of these steps."""
    done = [learn(update, ranks, number, micro_batches) for number in numbers]
    return {
        "loss": [loss.item() for _, loss in done],
        "norm": [step.norm.item() for step, _ in done],
        "skipped": [step.skipped.item() for step, _ in done],
    }


def taken(update: Update) -> Snapshot:
    snapshot = update.snapshot()
    assert snapshot is not None
    return snapshot


def as_checkpoint(snapshot: Snapshot, step: int) -> Checkpoint:
    return Checkpoint(snapshot.model, snapshot.moments, {**snapshot.meta, "step": step})


def same(a: Snapshot | Checkpoint, b: Snapshot | Checkpoint) -> bool:
    pairs = [(a.model, b.model), (a.moments, b.moments)]
    return all(x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in pairs)


# One process


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.sampled_from([None, 0.05, 1e6]))
def test_it_is_the_adamw_and_the_clipping_of_torch(micro_batches: int, max_norm: float | None) -> None:
    optimisation = OPTIMISATION.model_copy(update={"clip_grad_norm": max_norm})
    update = an_update(Ranks(), optimisation=optimisation)
    plain = Curve()
    trained = [p for p in plain.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
    groups[1]["params"] = [p for p in trained if p.ndim < 2]
    adam = torch.optim.AdamW(groups, foreach=False, fused=False)
    for number in range(12):
        step, _ = learn(update, Ranks(), number, micro_batches)
        for group in adam.param_groups:
            group["lr"] = rate(number)
        total, count = Objective(plain)(*a_batch(number))
        adam.zero_grad()
        (total / count).backward()
        norm = nn.utils.clip_grad_norm_(trained, max_norm or float("inf"))
        adam.step()
        torch.testing.assert_close(step.norm, norm, rtol=1e-5, atol=0)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(update.model.state_dict()[name], weight, rtol=1e-5, atol=1e-6)


def test_biases_and_norms_are_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    decayed, free = adamw(model, OptimisationConfig(weight_decay=0.3)).param_groups
    assert [p is model[0].weight for p in decayed["params"]] == [True]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert len(free["params"]) == 3


def test_a_snapshot_is_a_copy_and_names_everything() -> None:
    update = an_update(Ranks())
    train(update, Ranks(), range(3))
    snapshot = taken(update)
    before = as_checkpoint(snapshot, 3)
    before = Checkpoint(*({k: v.clone() for k, v in part.items()} for part in (before.model, before.moments)), meta={})
    train(update, Ranks(), range(3, 6))
    assert same(snapshot, before)
    assert not same(snapshot, taken(update))
    assert set(snapshot.model) == set(Curve().state_dict())
    trained = {name for name, p in Curve().named_parameters() if p.requires_grad}
    assert set(snapshot.moments) == {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in trained}
    assert (snapshot.meta, taken(update).updates) == ({"updates": 3, "loss_scale": None}, 6)


@pytest.mark.parametrize("stopped_at", [0, 1, 7])
def test_a_restored_training_goes_on_bit_for_bit(stopped_at: int) -> None:
    whole, part, rest = an_update(Ranks()), an_update(Ranks()), an_update(Ranks(), seed=1)
    train(whole, Ranks(), range(12))
    train(part, Ranks(), range(stopped_at))
    train(rest, Ranks(), range(2))  # a restore takes the place of whatever was
    rest.restore(as_checkpoint(taken(part), stopped_at))
    train(rest, Ranks(), range(stopped_at, 12))
    assert same(taken(whole), taken(rest))


def test_checkpoints_from_before_adam_had_its_own_count_tell_the_step() -> None:
    update = an_update(Ranks())
    snapshot = taken(update)
    update.restore(Checkpoint(snapshot.model, snapshot.moments, {"step": 9}))
    assert taken(update).updates == 9


def test_a_checkpoint_without_a_moment_is_refused() -> None:
    update = an_update(Ranks())
    snapshot = taken(update)
    del snapshot.moments["exp_avg_sq.outer.bias"]
    with pytest.raises(InputError, match=r"optimizer.safetensors: holds no exp_avg_sq\.outer\.bias"):
        update.restore(as_checkpoint(snapshot, 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(bad: float) -> None:
    update = an_update(Ranks())
    train(update, Ranks(), range(3))
    before = taken(update)
    step, _ = learn(update, Ranks(), 3, factor=lambda rank: bad)
    assert step.skipped and not step.norm.isfinite()
    assert same(before, taken(update)) and taken(update).updates == 3
    assert not learn(update, Ranks(), 4)[0].skipped
    assert taken(update).updates == 4


def test_the_loss_scale_halves_at_an_overflow_and_comes_back_from_a_checkpoint() -> None:
    ranks = Ranks(precision="fp16")
    update, plain = an_update(ranks), an_update(Ranks())
    assert not learn(update, ranks, 7, factor=lambda rank: SMALL)[0].skipped
    assert learn(update, ranks, 7, factor=lambda rank: 1e5)[0].skipped
    snapshot = taken(update)
    assert snapshot.loss_scale == {"value": FIRST_LOSS_SCALE / 2, "good_steps": 0}
    rest = an_update(ranks, seed=1)
    rest.restore(as_checkpoint(snapshot, 2))
    for again in (rest, update):
        for number in range(4, 8):
            learn(again, ranks, number, factor=lambda rank: SMALL)
    assert same(taken(rest), taken(update))
    assert taken(rest).loss_scale == taken(update).loss_scale == {"value": FIRST_LOSS_SCALE / 2, "good_steps": 4}
    plain.restore(as_checkpoint(snapshot, 2))
    assert taken(plain).loss_scale is None


def test_the_norm_and_the_weights_do_not_depend_on_the_loss_scale() -> None:
    ranks = Ranks(precision="fp16")
    updates = [an_update(ranks) for _ in range(2)]
    snapshot = taken(updates[0])
    for update, scale in zip(updates, (2.0**10, 2.0**12), strict=True):
        meta = {"updates": 0, "loss_scale": {"value": scale, "good_steps": 0}, "step": 0}
        update.restore(Checkpoint(snapshot.model, snapshot.moments, meta))
    lines = [train(update, ranks, range(8)) for update in updates]
    assert lines[0]["norm"] == pytest.approx(lines[1]["norm"], rel=1e-3)
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-3)


def test_the_loss_scale_doubles_after_many_good_steps() -> None:
    scale = LossScale(torch.device("cpu"), dynamic=True)
    scale.restore({"value": 8.0, "good_steps": STEPS_TO_GROW - 2})
    scale.update(torch.tensor(False))
    assert scale.state() == {"value": 8.0, "good_steps": STEPS_TO_GROW - 1}
    scale.update(torch.tensor(False))
    assert scale.state() == {"value": 16.0, "good_steps": 0}


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_the_objective_runs_in_autocast_and_weights_stay_float32(precision: str, dtype: torch.dtype) -> None:
    objective = Objective(Curve().outer)
    ranks = Ranks(precision=precision)
    update = make_update(objective.model, objective, OPTIMISATION, ranks, precision=precision)
    with update.micro_batch(last=True):
        update.backward(update.objective(torch.randn(8, 33), torch.randn(8, 4), torch.ones(8))[0])
    assert objective.seen == {dtype}
    assert {t.dtype for t in [*update.model.parameters(), *update.gradients(), *update.moments()]} == {torch.float32}


def test_the_bytes_of_one_process_are_those_of_its_parameters() -> None:
    update = an_update(Ranks())
    update.backward(update.objective(*a_batch(1))[0])
    size = 4 * sum(p.numel() for p in update.model.parameters() if p.requires_grad)
    assert state_bytes(update) == {"moments": 2 * size, "gradients": size, "masters": 0}


def test_what_deepspeed_is_told_is_ours() -> None:
    config: dict[str, Any] = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "gradient_clipping": 1.0}
    configure(config, None)
    assert (config["bf16"], config["fp16"], config["gradient_clipping"]) == ({"enabled": False}, {"enabled": False}, 0)
    configure(config, 0.3)
    assert config["gradient_clipping"] == 0.3


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 3}, "zero_optimization.stage: not supported: found 3, expected 1 or 2"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer.device: not supported: found cpu"),
    ],
)
def test_a_zero_that_checkpoints_by_name_do_not_cover_is_refused(zero: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        configure({"zero_optimization": zero}, None)


# Two ranks


def an_accelerator() -> Any:
    """Two gloo ranks with DeepSpeed: what `trainer.run.processes` does, as little of it as this needs."""
    import deepspeed.ops
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

    class Plugin(DeepSpeedPlugin):
        def set_deepspeed_weakref(self) -> None:
            """It would import transformers."""

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return Accelerator(deepspeed_plugin=Plugin(), kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])


class Shown:
    """What one rank does for the tests below, written to `<out>/rank<n>.json` and as checkpoints."""

    def __init__(self, out: Path) -> None:
        self.out, self.accelerator = out, an_accelerator()
        self.rank = torch.distributed.get_rank()
        worlds = [torch.distributed.get_world_size(), self.accelerator.num_processes]
        self.lines: dict[str, Any] = {"worlds": worlds, "is main": self.accelerator.is_main_process}

    def ranks(self, kind: str, precision: str = "no") -> Ranks:
        """The processes of "one", "ddp", "zero1" or "zero2"."""
        if kind == "one":
            return Ranks(precision=precision)
        if kind.startswith("zero"):
            self.accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] = int(kind[-1])
        return Ranks(2, self.rank, kind.startswith("zero"), precision, self.accelerator)

    def keep(self, update: Update, ranks: Ranks, name: str, step: int) -> Checkpoint:
        """Snapshot and write on rank 0, read on both."""
        snapshot = update.snapshot()
        assert (snapshot is not None) == ranks.is_main
        if snapshot is not None and self.rank == 0:
            checkpoint.save(self.out / name, step, as_checkpoint(snapshot, step))
        torch.distributed.barrier()
        return checkpoint.load(checkpoint.folder_of(self.out / name, step))

    def the_same_losses(self, kind: str, micro_batches: int) -> None:
        ranks = self.ranks(kind)
        update = an_update(ranks)
        lines = train(update, ranks, range(STEPS), micro_batches)
        self.keep(update, ranks, f"{kind}x{micro_batches}", STEPS)
        self.lines[f"{kind}x{micro_batches}"] = lines

    def across(self, *kinds: str) -> None:
        """A third of the steps on each kind of launcher."""
        ends = [0, 17, 34, STEPS]
        lines: dict[str, list[float]] = {}
        found: Checkpoint | None = None
        for k, kind in enumerate(kinds):
            ranks = self.ranks(kind)
            update = an_update(ranks, seed=k)
            if found:
                update.restore(found)
            for name, values in train(update, ranks, range(ends[k], ends[k + 1]), 1 + k % 2).items():
                lines[name] = lines.get(name, []) + values
            found = self.keep(update, ranks, "-".join(kinds), ends[k + 1])
        self.lines["-".join(kinds)] = lines

    def restored(self, kind: str) -> None:
        """Whether a restored training goes on bit for bit."""
        ranks = self.ranks(kind)
        whole = an_update(ranks, repeats=True)
        train(whole, ranks, range(5))
        found = self.keep(whole, ranks, f"part {kind}", 5)
        rest = train(whole, ranks, range(5, 9))
        end = self.keep(whole, ranks, f"whole {kind}", 9)
        again = an_update(ranks, seed=1, repeats=True)
        again.restore(found)
        is_same = train(again, ranks, range(5, 9)) == rest and same(end, self.keep(again, ranks, f"again {kind}", 9))
        self.lines[f"restored {kind}"] = is_same

    def a_bad_gradient(self, kind: str) -> None:
        """Rank 1 alone meets a NaN."""
        ranks = self.ranks(kind)
        update = an_update(ranks)
        train(update, ranks, range(3))
        before = self.keep(update, ranks, f"before {kind}", 3)
        step, _ = learn(update, ranks, 7, factor=lambda rank: float("nan") if rank else 1.0)
        after = self.keep(update, ranks, f"after {kind}", 4)
        later, _ = learn(update, ranks, 7)
        self.lines[f"bad {kind}"] = {
            "skipped": step.skipped.item(),
            "finite": step.norm.isfinite().item(),
            "same": same(before, after),
            "updates": [before.meta["updates"], after.meta["updates"]],
            "skipped later": later.skipped.item(),
        }

    def float16(self, kind: str) -> None:
        """Losses that overflow at steps 2 and 3; a restore before step 5, which would overflow with the first scale."""
        factors = {2: 1e5, 3: 1e5, 5: 1.4}
        ranks = self.ranks(kind, "fp16")
        update = an_update(ranks)
        skipped, norms = [], []
        for number in range(8):
            if number == 5:
                found = self.keep(update, ranks, f"float16 {kind}", 5)
                update = an_update(ranks, seed=1)
                update.restore(found)
            step, _ = learn(update, ranks, number, factor=lambda rank, k=number: factors.get(k, SMALL))
            skipped.append(step.skipped.item())
            norms.append(step.norm.item())
        scale = self.keep(update, ranks, f"float16 {kind}", 8).meta["loss_scale"]
        self.lines[f"float16 {kind}"] = {"skipped": skipped, "norm": norms, "scale": scale}

    def only_the_last_is_sent(self) -> None:
        """Whether DDP would send the gradients of the first and of the last micro-batch."""
        update = an_update(self.ranks("ddp"))
        sends = []
        for last in (False, True):
            with update.micro_batch(last):
                sends.append(update.objective.require_backward_grad_sync)
        self.lines["sends"] = sends

    def autocast_within_the_engine(self) -> None:
        ranks = self.ranks("zero2", "bf16")
        objective = Objective(nn.Linear(6, 4))
        update = make_update(objective.model, objective, OPTIMISATION, ranks, precision="bf16")
        self.lines["mask sum"] = update.objective(*a_batch(3))[1].item()
        self.lines["autocast"] = str(sorted(map(str, objective.seen)))

    def bytes_held(self, kind: str) -> None:
        """A model of 5 M parameters, two micro-batches."""
        ranks = self.ranks(kind)
        model = nn.Sequential(nn.Linear(6, 1024), *(nn.Linear(1024, 1024) for _ in range(5)), nn.Linear(1024, 4))
        update = make_update(model, Objective(model), OPTIMISATION, ranks, precision="no")
        learn(update, ranks, 7)
        for last in (False, True):
            with update.micro_batch(last):
                update.backward(update.objective(*a_batch(7))[0])
        self.lines[f"bytes {kind}"] = state_bytes(update)
        update.step(0.01)


def show(out: Path) -> None:
    torch.set_num_threads(1)
    shown = Shown(out)
    for micro_batches in (1, 2):
        for kind in ("one", "ddp", "zero1", "zero2"):
            shown.the_same_losses(kind, micro_batches)
    shown.across("ddp", "zero2", "one")
    shown.across("one", "zero1", "ddp")
    shown.across("zero2", "ddp", "zero1")
    for kind in ("ddp", "zero1", "zero2"):
        shown.restored(kind)
        shown.a_bad_gradient(kind)
        shown.float16(kind)
        shown.bytes_held(kind)
    shown.float16("one")
    shown.autocast_within_the_engine()
    shown.only_the_last_is_sent()
    (out / f"rank{shown.rank}.json").write_text(json.dumps(shown.lines))


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two ranks did."""
    out = tmp_path_factory.mktemp("ranks")
    settings = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    }
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*start, "-m", "tests.training.test_update", str(out)],
        env=os.environ | settings, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=LAUNCH_SECONDS)
    finally:
        process.terminate()  # the launcher takes its ranks with it
        process.wait(timeout=60)
    assert process.returncode == 0, printed[-8000:]
    return out


def lines_of(shown: Path) -> dict[str, Any]:
    """What rank 0 wrote; both saw a world of two, and the same numbers but for the bytes they hold."""
    ranks = [json.loads((shown / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank["worlds"] for rank in ranks] == [[2, 2], [2, 2]]
    assert [rank.pop("is main") for rank in ranks] == [True, False]
    numbers = [json.dumps({k: v for k, v in rank.items() if not k.startswith("bytes")}) for rank in ranks]
    assert numbers[0] == numbers[1]
    return ranks[0]


@pytest.mark.slow
def test_losses_do_not_depend_on_launcher_and_micro_batches(shown: Path) -> None:
    lines = lines_of(shown)
    one = lines["onex1"]
    assert len(one["loss"]) == STEPS
    assert min(one["norm"]) > 0.05, "clipping must be at work in every step"
    for kind in ("one", "ddp", "zero1", "zero2"):
        for micro_batches in (1, 2):
            way = f"{kind}x{micro_batches}"
            assert lines[way]["loss"] == pytest.approx(one["loss"], rel=1e-5), way
            assert lines[way]["norm"] == pytest.approx(one["norm"], rel=1e-4), way


@pytest.mark.slow
def test_snapshots_by_name_do_not_depend_on_the_launcher(shown: Path) -> None:
    folders = {p.name: p for p in shown.iterdir() if p.name.startswith(("onex", "ddpx", "zero1x", "zero2x"))}
    assert len(folders) == 8
    one = checkpoint.load(checkpoint.folder_of(folders["onex1"], STEPS))
    for name, folder in folders.items():
        found = checkpoint.load(checkpoint.folder_of(folder, STEPS))
        assert found.meta["updates"] == STEPS
        for mine, theirs in ((one.model, found.model), (one.moments, found.moments)):
            assert mine.keys() == theirs.keys(), name
            for key in mine:
                torch.testing.assert_close(theirs[key], mine[key], rtol=1e-4, atol=1e-6, msg=f"{name} {key}")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp-zero2-one", "one-zero1-ddp", "zero2-ddp-zero1"])
def test_a_training_goes_on_under_another_launcher(shown: Path, way: str) -> None:
    lines = lines_of(shown)
    assert lines[way]["loss"] == pytest.approx(lines["onex1"]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2"])
def test_two_ranks_go_on_bit_for_bit(shown: Path, kind: str) -> None:
    assert lines_of(shown)[f"restored {kind}"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2"])
def test_a_bad_gradient_of_one_rank_skips_the_step_of_all(shown: Path, kind: str) -> None:
    expected = {"skipped": True, "finite": False, "same": True, "updates": [3, 3], "skipped later": False}
    assert lines_of(shown)[f"bad {kind}"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", "ddp", "zero1", "zero2"])
def test_the_loss_scale_follows_one_rule(shown: Path, kind: str) -> None:
    lines = lines_of(shown)
    found = lines[f"float16 {kind}"]
    assert found["skipped"] == [number in (2, 3) for number in range(8)]
    assert found["scale"] == {"value": FIRST_LOSS_SCALE / 4, "good_steps": 4}
    finite = [k for k in range(8) if k not in (2, 3)]
    expected = [lines["float16 one"]["norm"][k] for k in finite]
    assert [found["norm"][k] for k in finite] == pytest.approx(expected, rel=1e-2)


@pytest.mark.slow
def test_ddp_sends_only_what_a_step_needs(shown: Path) -> None:
    assert lines_of(shown)["sends"] == [False, True]


@pytest.mark.slow
def test_autocast_reaches_into_the_engine(shown: Path) -> None:
    lines = lines_of(shown)
    assert (lines["mask sum"], lines["autocast"]) == (4, "['torch.bfloat16']")


@pytest.mark.slow
def test_zero_2_holds_its_part_of_moments_and_gradients(shown: Path) -> None:
    for rank in range(2):
        lines = json.loads((shown / f"rank{rank}.json").read_text())
        held = {kind: sum(lines[f"bytes {kind}"].values()) for kind in ("ddp", "zero1", "zero2")}
        assert held["zero2"] <= 0.6 * held["ddp"], lines
        assert lines["bytes zero1"]["moments"] <= 0.51 * lines["bytes ddp"]["moments"]
        assert lines["bytes zero2"]["masters"] == 0


if __name__ == "__main__":
    show(Path(sys.argv[1]))
