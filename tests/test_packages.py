"""A missing package is a skip, and with --system a failure."""

from __future__ import annotations

import pytest

from tests.packages import need_command


def test_a_command_that_is_there_is_found() -> None:
    assert need_command("sh", "dash").endswith("/sh")


def test_a_missing_command_skips_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FMRI_FLOW_SYSTEM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="Debian package nothing"):
        need_command("no-such-command", "nothing")
    monkeypatch.setenv("FMRI_FLOW_SYSTEM", "1")
    with pytest.raises(pytest.fail.Exception, match="Debian package nothing"):
        need_command("no-such-command", "nothing")
