"""Remote shards become a local folder: checked, shared by processes, bounded in size, and never half there."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import http.server
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import write_shards
from trainer.data import cache
from trainer.data.cache import local_folder, source_url
from trainer.data.manifest import MANIFEST, STATISTICS, Manifest, Stream
from trainer.data.shards import SampleContent, Shards
from trainer.errors import InputError


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; counts requests; breaks off in the middle of files named in `broken`."""

    asked: list[str]
    broken: set[str]

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        self.asked.append(name)
        if name not in self.broken:
            super().do_GET()
            return
        content = Path(self.directory, name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])


@contextlib.contextmanager
def served(folder: Path, broken: frozenset[str] = frozenset()) -> Iterator[tuple[str, list[str]]]:
    """A folder on a local web server: its URL, and the names that were asked for."""
    handler = type("Served", (Handler,), {"asked": [], "broken": set(broken)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """Shards of three runs, to be served and spoilt."""
    return made(tmp_path / "remote", 0)


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    """What a process holds until it ends is given back after each test."""
    yield
    while cache._HELD:
        os.close(cache._HELD.popitem()[1])


def made(folder: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    samples = [
        SampleContent(
            f"r{i}", {}, {"bold": rng.normal(size=(2, 50, 5)).astype(np.float32), "a/b": rng.normal(size=(50, 30))}
        )
        for i in range(3)
    ]
    write_shards(folder, samples, ["x", "y"], 5, [Stream("a/b", 1, 30, "float64")])
    return folder


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}


WHOLE = {MANIFEST, STATISTICS, *(f"shard-0000{i}.tar" for i in range(3))}


def test_a_local_folder_is_read_where_it_is(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path), str(tmp_path / "cache"), 1) == tmp_path
    assert local_folder("data/some:thing", None, 1) == Path("data/some:thing")
    assert not (tmp_path / "cache").exists()


def test_http_shards_are_copied_once_and_read_like_local_ones(remote: Path, tmp_path: Path) -> None:
    with served(remote) as (url, asked):
        folder = local_folder(url, str(tmp_path / "cache"), 1)
        assert sorted(asked) == sorted(WHOLE)
        assert local_folder(url + "/", str(tmp_path / "cache"), 1) == folder
        assert asked.count(MANIFEST) == 2 and len(asked) == len(WHOLE) + 1
    assert visible(folder) == WHOLE
    np.testing.assert_array_equal(
        Shards(folder, verify="full").read(1, "a/b", 3, 9), Shards(remote).read(1, "a/b", 3, 9)
    )


@pytest.mark.parametrize("form", ["pipe:cat {folder}", "pipe:cat {folder}/{{name}}"])
def test_a_command_gives_the_files(remote: Path, tmp_path: Path, form: str) -> None:
    folder = local_folder(form.format(folder=remote), str(tmp_path / "cache"), 1)
    assert visible(folder) == WHOLE
    Shards(folder, verify="full")


def test_addresses_of_files() -> None:
    assert source_url("https://h/d/", "m.json") == "https://h/d/m.json"
    assert source_url("s3://bucket/a b", "m.json") == "pipe:aws s3 cp 's3://bucket/a b/m.json' -"
    assert source_url("pipe:ssh h cat d/{name} | zcat", "m") == "pipe:ssh h cat d/m | zcat"


def test_a_wrong_hash_is_refused_and_nothing_stays(remote: Path, tmp_path: Path) -> None:
    tar = remote / "shard-00001.tar"
    content = bytearray(tar.read_bytes())
    content[2000] ^= 1
    tar.write_bytes(content)
    with served(remote) as (url, _), pytest.raises(InputError, match=r"shard-00001\.tar: SHA-256: found .* expected"):
        local_folder(url, str(tmp_path / "cache"), 1)
    assert "shard-00001.tar" not in visible(tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.parametrize("name", [MANIFEST, STATISTICS, "shard-00002.tar"])
def test_a_download_that_breaks_off_leaves_nothing_that_looks_whole(remote: Path, tmp_path: Path, name: str) -> None:
    with (
        served(remote, broken=frozenset({name})) as (url, _),
        pytest.raises(InputError, match=rf"{name}: cannot be fetched: found exit status 18"),
    ):
        local_folder(url, str(tmp_path / "cache"), 1)
    assert name not in visible(tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.endswith(".part")]
    with served(remote) as (url, asked):
        folder = local_folder(url, str(tmp_path / "cache"), 1)
    assert visible(folder) == WHOLE
    assert name in (MANIFEST, STATISTICS) or "shard-00000.tar" not in asked


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("http://127.0.0.1:9/x", r"http://127.0.0.1:9/x/manifest.json: cannot be fetched: found exit status 7"),
        ("pipe:cat /nowhere", r"manifest.json: cannot be fetched: found exit status 1"),
        ("pipe:echo hello #", r"manifest.json: not valid JSON"),
        ("gopher://h/x", r"gopher://h/x/manifest.json: cannot be opened: .*no gopen handler"),
    ],
)
def test_a_source_that_gives_no_manifest_is_named(tmp_path: Path, shards: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        local_folder(shards, str(tmp_path / "cache"), 1)
    assert str(tmp_path) not in str(caught.value)
    assert visible(tmp_path / "cache") == set()


def test_an_edited_manifest_is_refused_before_anything_is_copied(remote: Path, tmp_path: Path) -> None:
    content = json.loads((remote / MANIFEST).read_text())
    content["tr"] = 9
    (remote / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(InputError, match="edited since it was written"):
        local_folder(f"pipe:cat {remote}", str(tmp_path / "cache"), 1)
    assert visible(tmp_path / "cache") == set()


def test_a_source_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "STALLED_S", 0.2)
    with pytest.raises(InputError, match="no byte came in"):
        local_folder("pipe:exec sleep 20 #", str(tmp_path / "cache"), 1)


def test_a_full_disk_is_named(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"\(data.cache_dir\): cannot be filled from pipe:.*File too large"):
            local_folder(f"pipe:cat {remote}", str(tmp_path / "cache"), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [name for name in visible(tmp_path / "cache") if name.endswith(".tar")]
    assert not list((tmp_path / "cache").rglob("*.part"))


def _fetch(url: str, directory: str, answers: Queue[str]) -> None:
    folder = local_folder(url, directory, 1)
    Shards(folder, verify="full")
    answers.put(str(folder))


def test_two_processes_fill_one_cache_at_once_and_copy_each_file_once(remote: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with served(remote) as (url, asked):
        processes = [context.Process(target=_fetch, args=(url, str(tmp_path / "c"), answers)) for _ in range(2)]
        for process in processes:
            process.start()
        folders = {answers.get(timeout=60) for _ in processes}
        for process in processes:
            process.join(timeout=30)
    assert len(folders) == 1 and visible(Path(folders.pop())) == WHOLE
    assert {name: asked.count(name) for name in WHOLE} == {name: 1 + (name == MANIFEST) for name in WHOLE}


def test_a_copy_that_a_killed_process_left_unfinished_is_made_again(remote: Path, tmp_path: Path) -> None:
    folder = local_folder(f"pipe:cat {remote}", str(tmp_path / "c"), 1)
    (folder / "shard-00001.tar").unlink()
    (folder / ".shard-00001.tar.part").write_bytes(b"x" * 10**6)
    assert local_folder(f"pipe:cat {remote}", str(tmp_path / "c"), 1) == folder
    Shards(folder, verify="full")
    assert not list(folder.glob("*.part"))


def test_waiting_for_another_process_is_bounded(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_folder(f"pipe:cat {remote}", str(tmp_path / "c"), 1)
    (folder / "shard-00001.tar").unlink()
    monkeypatch.setattr(cache, "PATIENCE_S", 0.3)
    with (folder / ".shard-00001.tar.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"shard-00001\.tar: another process has not finished"):
            local_folder(f"pipe:cat {remote}", str(tmp_path / "c"), 1)


def test_copies_used_longest_ago_make_room_but_never_those_in_use(tmp_path: Path) -> None:
    sources = [made(tmp_path / f"remote{i}", i) for i in range(3)]
    size = sum(record.size for record in Manifest.load(sources[0]).shards) / 1e9
    directory = str(tmp_path / "c")
    first, second = (local_folder(f"pipe:cat {source}", directory, 1) for source in sources[:2])
    with pytest.raises(InputError, match=r"data.cache_gb: other runs use copies in"):
        local_folder(f"pipe:cat {sources[2]}", directory, 2.2 * size)
    for held in (first, second):
        os.close(cache._HELD.pop(held))
    os.utime(first / ".in_use", (1, 1))
    third = local_folder(f"pipe:cat {sources[2]}", directory, 2.5 * size)
    assert visible(third) == WHOLE and visible(second) == WHOLE
    assert not first.exists() or len(visible(first)) < len(WHOLE)
    again = local_folder(f"pipe:cat {sources[0]}", directory, 2.5 * size)  # `third` is in use: `second` must go
    assert again == first and visible(first) == WHOLE == visible(third) and visible(second) < WHOLE


def test_shards_larger_than_the_limit_are_refused_at_once(remote: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.cache_gb: less than the shards need: found 1e-05, expected 6\."):
        local_folder(f"pipe:cat {remote}", str(tmp_path / "c"), 1e-5)
    assert visible(tmp_path / "c") <= {MANIFEST}


def test_the_source_may_change(remote: Path, tmp_path: Path) -> None:
    first = local_folder(f"pipe:cat {remote}", str(tmp_path / "c"), 1)
    shutil.rmtree(remote)
    made(remote, 5)
    second = local_folder(f"pipe:cat {remote}", str(tmp_path / "c"), 1)
    assert second != first
    np.testing.assert_array_equal(Shards(second).read(0, "a/b", 0, 5), Shards(remote).read(0, "a/b", 0, 5))
