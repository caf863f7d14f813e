"""Measure the figures that this project promises, each beside its goal and what it is compared with.

    python tools/bench.py data [--json F]

Each subject is a module of tools/benches with a function `measure(scratch: Path) -> list[Row]`. A missed goal is
reported and does not change the exit status: a busy machine misses them too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import InputError, exit_on_input_error
from trainer.run.files import check_writable, write_whole

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are imported as tools.benches, from wherever this is started


def subjects() -> list[str]:
    """What can be measured."""
    return sorted(module.name for module in pkgutil.iter_modules([str(ROOT / "tools" / "benches")]))


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=[*subjects(), "all"])
    parser.add_argument("--json", type=Path, metavar="F", help="file to write the rows to")
    parser.add_argument("--scratch", type=Path, help="folder for made data (default: among the temporary files)")
    options = parser.parse_args(argv)
    benches = importlib.import_module("tools.benches")
    if options.json:  # before minutes of measuring
        if options.json.is_dir():
            raise InputError(options.json, "is a folder", fix="Choose another --json.")
        check_writable(options.json.parent, "Choose another --json.")
    rows = []
    for name in subjects() if options.subject == "all" else [options.subject]:
        with tempfile.TemporaryDirectory(prefix="fmri-flow-bench-", dir=options.scratch) as scratch:
            rows += importlib.import_module(f"tools.benches.{name}").measure(Path(scratch))
    print(benches.table(rows))
    if options.json:
        write_whole(options.json, json.dumps(benches.as_json(rows), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
