"""How a mistake in the input reads, and how a command ends on it."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from trainer.errors import InputError, exit_on_input_error, file_error


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


@pytest.mark.parametrize(
    "code",
    [errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
     errno.EIO, errno.ESTALE, errno.EFBIG, errno.ENOTCONN],
)  # fmt: skip
def test_what_a_file_system_refuses_is_one_line_that_names_the_file(
    capsys: pytest.CaptureFixture[str], code: int
) -> None:
    @exit_on_input_error
    def command(_: list[str]) -> int:
        raise OSError(code, os.strerror(code), Path("labels.txt"))

    assert command([]) == 2
    assert capsys.readouterr().err.startswith(f"error: labels.txt: {os.strerror(code)}")


@pytest.mark.parametrize("words", [["run"], ["--run", "run"], ["--run=run"], ["x", "data.shards=run"], ["run/a/"]])
@pytest.mark.parametrize("code", [errno.ENOENT, errno.EEXIST])
def test_a_file_that_is_missing_among_what_is_named_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("run")
    for path in ("run/a/x.json", tmp_path / "run/a/x.json", "link/a/x.json"):
        assert file_error(OSError(code, os.strerror(code), path), words) == f"{path}: {os.strerror(code)}"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "other/x.json"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "run2/x.json"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        PermissionError(errno.EPERM, "Operation not permitted"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        TimeoutError("a rank did not answer"),
    ],
    ids=repr,
)
def test_an_error_about_no_file_of_the_user_keeps_its_traceback(error: OSError) -> None:
    @exit_on_input_error
    def command(_: list[str]) -> int:
        raise error

    with pytest.raises(type(error)):
        command(["--run", "run", "key="])


def test_other_errors_keep_their_traceback() -> None:
    @exit_on_input_error
    def command() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command()


def test_ctrl_c_is_one_line_and_the_status_of_its_signal(capsys: pytest.CaptureFixture[str]) -> None:
    def pressed(argv: list[str]) -> int:
        raise KeyboardInterrupt

    assert exit_on_input_error(pressed)([]) == 130
    assert capsys.readouterr().err == "interrupted\n"
