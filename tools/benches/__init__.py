"""What benchmarks share: a row with its goal, medians of repeats that take turns, the table and the JSON."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        value: what was measured, in `unit`.
        reference: what it is compared with, in the same unit, measured in the same minutes.
        ratio: value / reference.
        limit_fraction: the share of what the machine can do at most, where that was measured.
        goal: in words; `met` says whether it was reached, None for a figure without a goal.
    """

    name: str
    value: float
    unit: str
    reference: float | None = None
    ratio: float | None = None
    limit_fraction: float | None = None
    goal: str | None = None
    met: bool | None = None


def against(name: str, value: float, unit: str, reference: float, at_least: float) -> Row:
    """A row whose goal is a ratio to its reference."""
    ratio = value / reference
    return Row(name, value, unit, reference, ratio, goal=f"ratio >= {at_least:g}", met=ratio >= at_least)


def below(name: str, value: float, unit: str, limit: float) -> Row:
    """A row whose goal is to stay below a number."""
    return Row(name, value, unit, goal=f"< {limit:g} {unit}", met=value < limit)


def in_turns(contenders: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The median of each contender's results; they take turns, so that a slow minute of the machine meets all."""
    results: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            results[name].append(contender())
    return {name: statistics.median(values) for name, values in results.items()}


def seconds(action: Callable[[], object]) -> float:
    """How long something takes, once."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as file:  # noqa: PTH123
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """The document of --json."""
    return {"machine": machine(), "rows": [asdict(row) for row in rows]}


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""
    head = ("", "value", "", "reference", "ratio", "of limit", "goal", "")
    cells = [head] + [
        (
            row.name,
            _number(row.value),
            row.unit,
            _number(row.reference),
            _number(row.ratio),
            _number(row.limit_fraction),
            row.goal or "",
            {True: "met", False: "MISSED", None: ""}[row.met],
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    aligned = (
        "  ".join(
            cell.rjust(width) if i in (1, 3, 4, 5) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )
    return "\n".join(line.rstrip() for line in aligned)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
