"""Talking with a process of a test, line by line."""

from __future__ import annotations

import subprocess


def tell(process: subprocess.Popen[str]) -> None:
    """Let it go on to its next line."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def line(process: subprocess.Popen[str]) -> str:
    """What it says next."""
    assert process.stdout is not None
    return process.stdout.readline().strip()
