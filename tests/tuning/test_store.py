"""The file of winners: many writers at once, writers that die, damaged and foreign files, disks that refuse."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spdsl.runtime.tuning import tuned_store
from spdsl.runtime.tuning.configs import Config
from spdsl.runtime.tuning.tuned_store import (
    Store,
    Winner,
    default_store,
    merged_winners,
    read_winners,
    store_beside,
    store_in_cache,
    stored_winners,
    write_winners,
)
from tests.tuning.writer import DIGEST, winner

ROOT = Path(__file__).parents[2]
WRITER = Path(__file__).with_name("writer.py")
LIBRARY = "l" * 64  # its digest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache" / "module.tuned.json", DIGEST)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(tuned_store, "_said", set())
    caplog.set_level(logging.WARNING, "spdsl")


def start(store: Store, first: int, count: int, *stop: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(WRITER), str(store.path), str(first), str(count), *stop]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."})


def killed_there(store: Store, stop: str) -> None:
    """A writer that is killed with -9 at that place."""
    process = start(store, 900, 1, stop)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_what_is_written_is_read(store: Store) -> None:
    found = {"a": winner(1), "b": Winner(Config(16, 16, 4, 1), None, None, 1, "by the model")}
    write_winners(store, found)
    assert read_winners(store) == found
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700


def test_sixteen_processes_lose_nothing(store: Store) -> None:
    writers = [start(store, 5 * number, 5) for number in range(16)]
    assert [x.wait(60) for x in writers] == [0] * 16
    for x in writers:
        assert x.stdout is not None
        x.stdout.close()
    assert read_winners(store) == {f"key {number}": winner(number) for number in range(80)}


@pytest.mark.parametrize("stop", ["draft", "lock"])
def test_a_writer_that_is_killed_leaves_what_was_there(store: Store, stop: str) -> None:
    write_winners(store, {"before": winner(1)})
    killed_there(store, stop)
    assert read_winners(store) == {"before": winner(1)}
    began = time.monotonic()
    write_winners(store, {"after": winner(2)})
    assert time.monotonic() - began < 1  # its lock died with it
    assert read_winners(store) == {"before": winner(1), "after": winner(2)}
    assert sorted(x.name for x in store.path.parent.iterdir()) == [f".{store.path.name}.lock", store.path.name]


def test_a_lock_that_is_held_ends_the_waiting(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_winners(store, {"before": winner(1)})
    monkeypatch.setattr(tuned_store, "_LOCK_SECONDS", 0.05)
    with tuned_store._locked(store.path.with_name(f".{store.path.name}.lock")):
        write_winners(store, {"after": winner(2)})
    assert "stay in memory" in caplog.text
    assert read_winners(store) == {"before": winner(1)}


def truncated(text: str) -> str:
    return text[: len(text) // 2]


def flipped(text: str) -> str:
    return text.replace('"config": [64, 32', '"config": [32, 64')


def resealed(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    """A file that is wrong in one way and has the right hash."""

    def changed(text: str) -> str:
        body = json.loads(text)
        del body["sha256"]
        change(body)
        return json.dumps(body | {"sha256": tuned_store._body_digest(body)})

    return changed


def with_entry(**fields: object) -> Callable[[str], str]:
    return resealed(lambda body: body["winners"]["a"].update(fields))


DAMAGED = {
    "empty": lambda text: "",
    "truncated": truncated,
    "flipped": flipped,
    "no object": lambda text: "[1, 2]",
    "deep": lambda text: "[" * 100_000,
    "binary": lambda text: "\0" * 100,
    "huge number": lambda text: text.replace("64", "9" * 5000),
    "other format": resealed(lambda body: body.update(format=2)),
    "other text": resealed(lambda body: body.update(module="e" * 64)),
    "more fields": resealed(lambda body: body.update(run="rm")),
    "winners a list": resealed(lambda body: body.update(winners=[])),
    "fields of an entry": with_entry(code="import os"),
    "config a string": with_entry(config="64"),
    "three numbers": with_entry(config=[64, 32, 4]),
    "no power of two": with_entry(config=[48, 32, 4, 1]),
    "too small": with_entry(config=[8, 32, 4, 1]),
    "too large": with_entry(config=[64, 1 << 20, 4, 1]),
    "negative": with_entry(config=[-64, 32, 4, 1]),
    "a flag": with_entry(config=[64, 32, 4, True]),
    "a fraction": with_entry(config=[64.0, 32, 4, 1]),
    "no warps": with_entry(config=[64, 32, 0, 1]),
    "many stages": with_entry(config=[64, 32, 4, 99]),
    "time not a number": with_entry(milliseconds=float("nan")),
    "time a text": with_entry(default="fast"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_ignored_and_replaced(store: Store, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    write_winners(store, {"a": winner(1)})
    text = store.path.read_text()
    damaged = DAMAGED[damage](text)
    assert damaged != text
    store.path.write_text(damaged)
    assert read_winners(store) == {}
    assert read_winners(store) == {}
    assert caplog.text.count("is not used") == 1
    write_winners(store, {"b": winner(2)})
    assert read_winners(store) == {"b": winner(2)}


def test_a_file_of_any_size_is_not_loaded(store: Store) -> None:
    write_winners(store, {"a": winner(1)})
    with store.path.open("a") as file:
        file.truncate(1 << 40)  # sparse
    assert read_winners(store) == {}


def test_a_link_or_a_pipe_is_not_read(store: Store, tmp_path: Path) -> None:
    write_winners(store, {"a": winner(1)})
    elsewhere = tmp_path / "elsewhere.json"
    store.path.rename(elsewhere)
    store.path.symlink_to(elsewhere)
    assert read_winners(store) == {}
    store.path.unlink()
    os.mkfifo(store.path)
    assert read_winners(store) == {}


@pytest.mark.parametrize("owner", [None, 77])
def test_a_file_of_another_owner_is_not_read(store: Store, monkeypatch: pytest.MonkeyPatch, owner: int | None) -> None:
    write_winners(store, {"a": winner(1)})
    there = store.path.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: there + 1)
    assert read_winners(store._replace(owner=owner)) == {}
    assert read_winners(store._replace(owner=there)) == {"a": winner(1)}  # who owns the module beside it


def test_a_cache_folder_of_another_owner_is_not_written(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.path.parent.mkdir()
    there = store.path.parent.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: there + 1)
    write_winners(store, {"a": winner(1)})
    assert not list(store.path.parent.iterdir())
    assert "belongs to another user" in caplog.text


@pytest.mark.parametrize("function", ["open", "fsync", "replace", "chmod"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_disk_that_refuses_is_said_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, function: str, number: int
) -> None:
    write_winners(store, {"a": winner(1)})

    def refuse(*args: object, **named: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, refuse)
    write_winners(store, {"b": winner(2)})
    write_winners(store, {"b": winner(2)})
    monkeypatch.undo()
    assert caplog.text.count("stay in memory") == 1
    assert read_winners(store) == {"a": winner(1)}
    assert not list(store.path.parent.glob("*draft*"))


def test_a_read_that_fails_is_no_winner(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_winners(store, {"a": winner(1)})

    def refuse(*args: object, **named: object) -> None:
        raise OSError(errno.EACCES, "no")

    monkeypatch.setattr(os, "open", refuse)
    assert read_winners(store) == {}


def test_measured_winners_stay_before_ranked_ones() -> None:
    measured, ranked = winner(3), winner(4)._replace(milliseconds=None, default=None)
    assert merged_winners({"a": measured}, {"a": ranked}) == {"a": measured}
    assert merged_winners({"a": ranked}, {"a": measured}) == {"a": measured}
    assert merged_winners({"a": measured}, {"a": winner(5)}) == {"a": winner(5)}
    assert merged_winners({"a": ranked}, {"b": measured}) == {"a": ranked, "b": measured}


def test_the_file_beside_the_module_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPDSL_CACHE_DIR", str(tmp_path / "cache"))
    module = tmp_path / "module.py"
    module.write_text("text = 1\n")
    assert default_store(module, LIBRARY) == store_in_cache(module, LIBRARY)
    write_winners(store_in_cache(module, LIBRARY), {"a": winner(1), "b": winner(1)})
    write_winners(store_beside(module, LIBRARY), {"a": winner(2)})
    assert default_store(module, LIBRARY) == store_beside(module, LIBRARY)
    assert stored_winners(module, LIBRARY) == {"a": winner(2), "b": winner(1)}
    assert stat.S_IMODE(store_beside(module, LIBRARY).path.stat().st_mode) == 0o644
    module.write_text("text = 2\n")  # another text: what was found says nothing about it
    assert stored_winners(module, LIBRARY) == {}
    module.write_text("text = 1\n")
    assert stored_winners(module, LIBRARY) == {"a": winner(2), "b": winner(1)}
    assert stored_winners(module, "m" * 64) == {}  # nor about the kernels of another library


def test_the_cache_is_where_modules_are_loaded_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spdsl.api import cache_folder

    module = tmp_path / "module.py"
    module.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SPDSL_CACHE_DIR", raising=False)
    if sys.platform == "linux":
        assert store_in_cache(module, LIBRARY).path.parent == cache_folder()
    monkeypatch.setenv("SPDSL_CACHE_DIR", str(tmp_path / "mine"))
    assert store_in_cache(module, LIBRARY).path.parent == cache_folder() == tmp_path / "mine"
