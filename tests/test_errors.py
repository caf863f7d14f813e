"""How a mistake in the input reads, and how a command ends on it."""

from __future__ import annotations

import errno
import pickle

import pytest

from trainer.errors import InputError, exit_on_input_error


def test_the_message_is_one_line_with_where_found_expected_and_fix() -> None:
    error = InputError("f.h5", "width\n of x", found=3, expected=4, fix="Cut it.")
    assert str(error) == "f.h5: width of x: found 3, expected 4. Cut it."
    assert str(InputError("f.h5", "missing")) == "f.h5: missing"


def test_it_comes_back_from_another_process_as_it_was() -> None:
    error = InputError("f.h5", "width", found=3, expected=4)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_command_prints_it_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    @exit_on_input_error
    def command() -> int:
        raise InputError("f.h5", "missing")

    assert command() == 2
    assert capsys.readouterr().err == "error: f.h5: missing\n"


def test_a_full_disk_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    @exit_on_input_error
    def command() -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "run/x.json")

    assert command() == 2
    assert capsys.readouterr().err.startswith("error: run/x.json: No space left on device.")


def test_other_errors_keep_their_traceback() -> None:
    @exit_on_input_error
    def command() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command()
