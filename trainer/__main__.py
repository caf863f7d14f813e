"""`python -m trainer`."""

import faulthandler
import sys

from trainer.cli import main

if __name__ == "__main__":
    faulthandler.enable()  # a disk that fails under a mapped shard is a SIGBUS: say where
    sys.exit(main())
