"""Tests that need a Debian package: skipped where it is missing, failed where `tools/test.sh --system` installed it."""

from __future__ import annotations

import os
import shutil

import pytest


def need_command(command: str, package: str) -> str:
    """The path of a command of a Debian package."""
    path = shutil.which(command, path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")
    if path is None:
        reason = f"{command} is missing (Debian package {package}; `tools/test.sh --system` installs it)"
        if os.environ.get("FMRI_FLOW_SYSTEM"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path
