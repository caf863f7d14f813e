"""Turn the HDF5 files of a data set into shards: one sample a run, aligned, checked and described.

    python tools/make_shards.py --layout configs/datasets/algonauts2025.yaml --root DATA --out SHARDS
    mpiexec -n 8 python -m mpi4py tools/make_shards.py ...
    srun --ntasks 8 --mpi=pmi2 python -m mpi4py tools/make_shards.py ...

Any number of processes writes the same bytes. A build that was killed or interrupted leaves the folder .SHARDS.building
beside SHARDS; the same command goes on with the tars that are finished there. A build that failed leaves nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from trainer.data.build import build
from trainer.data.layout import load_layout
from trainer.data.manifest import Manifest
from trainer.data.ranks import Crew, on_ranks
from trainer.data.survey import request_streams, survey
from trainer.data.unfinished import check_output
from trainer.errors import InputError, exit_on_input_error
from trainer.progress import progress


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--layout", required=True, type=Path, help="YAML that describes the data set")
    made.add_argument("--root", required=True, type=Path, help="folder that the layout's patterns start from")
    made.add_argument("--out", required=True, type=Path, help="folder of shards to write")
    streams = "KEY/LAYER"
    made.add_argument("--features", nargs="+", action="extend", default=[], metavar=streams, help="streams to store")
    made.add_argument("--series", nargs="+", action="extend", metavar="NAME", help="series to store (default: all)")
    made.add_argument(
        "--float32", nargs="+", action="extend", default=[], metavar=streams, help="streams stored as float32"
    )
    made.add_argument(
        "--pool", nargs="+", action="extend", default=[], metavar=streams, help="streams whose layers are averaged"
    )
    made.add_argument("--shard-size-mb", type=int, default=256, help="size that a tar is filled to (default: 256)")
    made.add_argument("--overwrite", action="store_true", help="replace shards that OUT holds already")
    made.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out scans, or runs, with something wrong, and list them in the manifest",
    )
    made.add_argument(
        "--drop-parcels", metavar="N,N",
        help="columns of the BOLD, counted from 0, to leave out of all scans, e.g. one that is NaN in one subject",
    )  # fmt: skip
    return made


def _columns(text: str | None) -> list[int]:
    """Numbers between commas. Raises InputError."""
    try:
        return [int(number) for number in text.split(",")] if text else []
    except ValueError as error:
        expected = "numbers of columns, from 0, between commas"
        raise InputError("--drop-parcels", "", found=text, expected=expected) from error


@exit_on_input_error
def main(argv: Sequence[str] | None = None, before_abort: Callable[[int], None] | None = None) -> int:
    """Run the command on all ranks; returns its exit status. What MPI ends all ranks for is told `before_abort`."""
    return on_ranks(functools.partial(_lead, argv), before_abort)


@exit_on_input_error
def _lead(argv: Sequence[str] | None, crew: Crew) -> int:
    """The command itself, on rank 0."""
    options = parser().parse_args(argv)
    try:
        with _signals_as_interrupts():
            manifest = _build(options, crew)
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        print(
            f"interrupted by {signal.Signals(number).name}; the same command goes on with the tars that are finished.",
            file=sys.stderr,
        )
        return 128 + int(number)
    _summarise(options.out, manifest)
    return 0


def _build(options: argparse.Namespace, crew: Crew) -> Manifest:
    if options.shard_size_mb < 1:
        raise InputError("--shard-size-mb", "", found=options.shard_size_mb, expected="1 or more")
    layout = load_layout(options.layout)
    requests = request_streams(layout, options.features, options.float32, options.pool)
    check_output(options.out, options.overwrite)
    found = survey(
        layout, options.root, requests, options.series, skip_bad=options.skip_bad, drop=_columns(options.drop_parcels)
    )
    for note in found.notes:
        print(f"note: {note}", flush=True)
    with progress(len(found.runs), "run") as tick:
        return build(
            layout, found, requests, options.out, shard_bytes=options.shard_size_mb * 2**20,
            overwrite=options.overwrite, skip_bad=options.skip_bad, tick=tick, crew=crew,
            warn=lambda line: print(f"warning: {line}", file=sys.stderr),
        )  # fmt: skip


def _summarise(out: Path, manifest: Manifest) -> None:
    for skipped in manifest.skipped:
        print(f"skipped: {skipped}")
    trs = sum(sample.n_trs for sample in manifest.samples)
    size = sum(record.size for record in manifest.shards) / 1e6
    print(
        f"{out}: {len(manifest.samples)} runs, {trs} TRs, {len(manifest.subjects)} subjects, "
        f"{manifest.parcels} parcels, {len(manifest.streams)} streams, {len(manifest.shards)} tar(s), {size:.1f} MB"
    )


@contextlib.contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """SIGTERM (the end of a job's time) ends the work as Ctrl-C does: with its folder left as a restart needs it."""

    def interrupt(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
