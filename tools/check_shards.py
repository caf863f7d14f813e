"""Check that a folder of shards is whole and that its manifest tells the truth. Reads every byte, twice.

    python tools/check_shards.py SHARDS

Prints one line for each problem, and leaves with status 2 if there are any. What is odd but may be right, such as a run
of zeros, is a warning.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.data.check import find_problems
from trainer.data.manifest import Manifest
from trainer.errors import InputError, exit_on_input_error
from trainer.progress import progress


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder that tools/make_shards.py wrote")
    folder = parser.parse_args(argv).shards
    try:
        manifest = Manifest.read(folder)
    except InputError as error:
        print(f"problem: {error}")
        return 2
    count = 0
    with progress(len(manifest.shards), "tar") as tick:
        for problem in find_problems(manifest, tick, lambda line: print(f"warning: {line}", file=sys.stderr)):
            print(f"problem: {problem}", flush=True)
            count += 1
    if count:
        print(f"error: {folder}: {count} problem(s). Copy the files again, or build the shards again.", file=sys.stderr)
        return 2
    size = sum(record.size for record in manifest.shards) / 1e6
    print(f"ok: {folder}: {len(manifest.samples)} runs in {len(manifest.shards)} tar(s), {size:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
