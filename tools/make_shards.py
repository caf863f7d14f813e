"""Turn the HDF5 files of a data set into shards: one sample a run, aligned, checked and described.

python tools/make_shards.py --layout configs/datasets/algonauts2025.yaml --root DATA --out SHARDS
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from trainer.data.build import Report, build, check_output
from trainer.data.layout import load_layout
from trainer.data.survey import request_streams, survey
from trainer.errors import InputError, exit_on_input_error


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
    return made


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parser().parse_args(argv)
    if options.shard_size_mb < 1:
        raise InputError("--shard-size-mb", "", found=options.shard_size_mb, expected="1 or more")
    layout = load_layout(options.layout)
    requests = request_streams(layout, options.features, options.float32, options.pool)
    check_output(options.out, options.overwrite)
    found = survey(layout, options.root, requests, options.series)
    for note in found.notes:
        print(f"note: {note}", flush=True)
    bar = tqdm(total=len(found.runs), unit="run", disable=not sys.stderr.isatty())
    with bar:
        manifest = build(
            layout, found, requests, options.out, shard_bytes=options.shard_size_mb * 2**20,
            overwrite=options.overwrite, report=_reporter(bar),
        )  # fmt: skip
    trs = sum(sample.n_trs for sample in manifest.samples)
    size = sum(record.size for record in manifest.shards) / 1e6
    print(
        f"{options.out}: {len(manifest.samples)} runs, {trs} TRs, {len(manifest.subjects)} subjects, "
        f"{manifest.parcels} parcels, {len(manifest.streams)} streams, {len(manifest.shards)} tar(s), {size:.1f} MB"
    )
    return 0


def _reporter(bar: tqdm) -> Report:
    """A bar on a terminal; in a log file a line for about every tenth of the runs."""

    def report(done: int, total: int, key: str) -> None:
        if not bar.disable:
            bar.set_postfix_str(key, refresh=False)
            bar.update()
        elif done == total or done % max(total // 10, 1) == 0:
            print(f"{done}/{total} runs: {key}", flush=True)

    return report


if __name__ == "__main__":
    sys.exit(main())
