"""A chain of jobs as a small tree of text: what is submitted, how large it is, and what it waits for.

    shards               101   16 tasks      4 h
    └─ stage1            102   2 x 4 tasks   12 h     if shards ends well; else cancelled
       ├─ evaluate1      103   1 task        24 h     starts with stage1, ends when all is scored
       └─ stage2         104   2 x 4 tasks   12 h     if stage1 ends well; else cancelled
          └─ evaluate2   105   1 task        24 h     starts with stage2, ends when all is scored
    report               106   1 task        30 min   when all of them have ended

The links of a stage, and the workers of a job array, are one line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from trainer.cluster.chain import Job
from trainer.cluster.settings import JobSettings
from trainer.run.launch import sharing


@dataclass
class Row:
    """A line: jobs of one name that hang on the same one, e.g. the links of a stage or the workers of an array."""

    name: str
    jobs: list[Job] = field(default_factory=list)
    below: list[Row] = field(default_factory=list)


def picture(jobs: Sequence[Job], of: Callable[[str], JobSettings], ids: Mapping[str, str]) -> list[str]:
    """The lines of the tree.

    Args:
        of: what a job of this name asks for.
        ids: of the jobs, by their keys; without them there is no such column.
    """
    cells = [
        [
            f"{branch}{row.name}",
            *([_span([ids[job.key] for job in row.jobs])] if ids else []),
            *_size(row, of(row.name)),
        ]
        for branch, row in _drawn(_rows(jobs))
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]) - 1)] if cells else []
    return [
        "   ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in cells
    ]


def _rows(jobs: Sequence[Job]) -> list[Row]:
    """The rows that hang on nothing, with the others below them."""
    top: list[Row] = []
    of_job: dict[str, Row] = {}
    for job in jobs:
        if job.earlier:
            row = of_job[job.earlier[0]]
        else:
            above = _above(job)
            siblings = of_job[above].below if above else top
            row = next((row for row in siblings if row.name == job.name), Row(job.name))
            if not row.jobs:
                siblings.append(row)
        row.jobs.append(job)
        of_job[job.key] = row
    return top


def _above(job: Job) -> str:
    """The key of the job that another one hangs on in the picture; the report hangs on none."""
    keys = [wait.key for wait in job.waits if wait.key]
    return "" if job.name == "report" or not keys else keys[-1]


def _drawn(rows: Sequence[Row], indent: str | None = None) -> list[tuple[str, Row]]:
    lines = []
    for row in rows:
        last = row is rows[-1]
        lines.append(("" if indent is None else indent + ("└─ " if last else "├─ "), row))
        lines += _drawn(row.below, "" if indent is None else indent + ("   " if last else "│  "))
    return lines


def _size(row: Row, settings: JobSettings) -> list[str]:
    """How large the jobs of a row are, for how long, and what they wait for."""
    first = row.jobs[0]
    tasks = f"{settings.tasks_per_node} task" + ("s" if settings.tasks > 1 else "")
    size = f"{settings.nodes} x {tasks}" if settings.nodes > 1 else tasks
    if first.kind == "train" and settings.zero_stage:
        size += f", {sharing(settings.tasks, settings.zero_stage)}"
    number = sum(len(job.elements) for job in row.jobs if job.link == 1)
    return [f"{number} x ({size})" if number > 1 else size, said(settings.time), _when(row)]


def said(minutes: int) -> str:
    """A time limit as people say it."""
    if minutes % 1440 == 0 and minutes > 1440:
        return f"{minutes // 1440} d"
    return f"{minutes // 60} h" if minutes % 60 == 0 else f"{minutes} min"


def _when(row: Row) -> str:
    job = row.jobs[0]
    if job.name == "report":
        return "when all of them have ended"
    if not job.waits:
        text = ""
    elif job.kind == "evaluate":
        text = f"starts with {_called(job.waits[-1].key, job.waits[-1].id)}, ends when all is scored"
    else:
        text = f"if {_called(job.waits[0].key, job.waits[0].id)} ends well; else cancelled"
    if job.links > 1:
        text += f"{'; ' if text else ''}{job.links} links, each goes on where the one before was stopped"
    return text


def _called(key: str, job_id: str) -> str:
    return f"job {job_id}" if job_id else key.partition(".")[0]


def _span(ids: Sequence[str]) -> str:
    """12, 13, 14, 17 as 12-14,17."""
    if not all(job_id.isdigit() for job_id in ids):
        return ",".join(ids)
    spans = []
    for _, run in groupby(enumerate(sorted(map(int, ids))), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        spans.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return ",".join(spans)
