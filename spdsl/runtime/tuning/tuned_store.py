"""Where found configurations are kept: one JSON file for each text of the module, read with distrust, replaced whole.

It lies beside the module if it is there (`<module>.tuned.json`), else in the user's private cache. Reading and writing
never raise: what cannot be read is not used, what cannot be written stays in memory, and the log says so once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from spdsl.runtime.tuning.configs import Config

STORE_FORMAT = 1
_MOST_BYTES = 1 << 22
_LOCK_SECONDS = 10.0  # a lock is held for a read and a write; its holder's death frees it
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # nor waiting for the writer of a pipe
_log = logging.getLogger("spdsl")
_said: set[str] = set()


class Winner(NamedTuple):
    """The configuration that was found for one key."""

    config: Config
    milliseconds: float | None  # of the calls that were timed; None: ranked by the model alone
    default: float | None  # the same for the configuration of the tables
    tried: int  # configurations
    gpu: str  # for the reader of the file


def say_once(text: str) -> None:
    """On standard error, unless the program's logging sends it elsewhere."""
    if text not in _said:
        _said.add(text)
        _log.warning("spdsl: %s", text)


class Store(NamedTuple):
    """A file of winners for one text of a module and one library: those of others say nothing about these."""

    path: Path
    digest: str
    owner: int | None = None  # of the module it lies beside, who may own the file too; None: private to the user


def store_at(path: Path, module: Path, library: str) -> Store:
    return Store(path, _digest(module, library), module.stat().st_uid)


def store_beside(module: Path, library: str) -> Store:
    return store_at(module.with_name(f"{module.stem}.tuned.json"), module, library)


def store_in_cache(module: Path, library: str) -> Store:
    """In the cache folder that `spdsl.load` uses."""
    folder = os.path.expanduser(os.environ.get("SPDSL_CACHE_DIR", ""))
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME", "").strip() or os.path.expanduser("~/.cache"), "spdsl")
    digest = _digest(module, library)
    return Store(Path(folder) / f"{module.stem[:100]}_{digest}.tuned.json", digest)


def _digest(module: Path, library: str) -> str:
    """Of the text of a module, and of the library that it uses."""
    return hashlib.sha256(module.read_bytes() + library.encode()).hexdigest()


def stored_winners(module: Path, library: str) -> dict[str, Winner]:
    """What both files know; measured winners before those of the model, then those beside the module."""
    return merged_winners(read_winners(store_in_cache(module, library)), read_winners(store_beside(module, library)))


def default_store(module: Path, library: str) -> Store:
    """The file beside the module where it can be written, else the one in the cache."""
    own = store_beside(module, library)
    usable = own.path.is_file() and not own.path.is_symlink() and os.access(own.path, os.W_OK)
    return own if usable else store_in_cache(module, library)


def merged_winners(old: Mapping[str, Winner], new: Mapping[str, Winner]) -> dict[str, Winner]:
    """New ones replace old ones, but a measured one is not replaced by one that the model ranked."""
    better = {key: x for key, x in new.items() if x.milliseconds is not None or key not in old or _ranked(old[key])}
    return {**old, **better}


def _ranked(winner: Winner) -> bool:
    return winner.milliseconds is None


def read_winners(store: Store) -> dict[str, Winner]:
    """Of a file that is missing, damaged, a link, for another text or somebody else's: none."""
    try:
        return _parsed(_own_bytes(store), store.digest)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        say_once(f"{store.path} is not used: {error}")
        return {}


def write_winners(store: Store, found: Mapping[str, Winner]) -> None:
    """Adds what was found; the winners of other processes stay. Readers see the old file or the new one, whole."""
    try:
        if store.owner is None:
            _make_private(store.path.parent)
        with _locked(store.path.with_name(f".{store.path.name}.lock")):
            whole = merged_winners(read_winners(store), found)
            _replace_file(store.path, _printed(whole, store.digest), 0o600 if store.owner is None else 0o644)
    except OSError as error:
        say_once(f"{store.path} cannot be written, found configurations stay in memory: {error.strerror or error}")


def _make_private(folder: Path) -> None:
    """The cache folder, made if needed. PermissionError if it is somebody else's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        state = folder.stat()
        if {state.st_uid, folder.lstat().st_uid} != {os.getuid()}:
            raise PermissionError(f"{folder} belongs to another user")
        if state.st_mode & 0o077:
            folder.chmod(0o700)


def _own_bytes(store: Store) -> bytes:
    with os.fdopen(os.open(store.path, os.O_RDONLY | _NO_LINK), "rb") as file:
        state = os.fstat(file.fileno())
        if hasattr(os, "getuid") and state.st_uid not in (os.getuid(), store.owner):
            raise PermissionError("it belongs to another user")
        if state.st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        return file.read(_MOST_BYTES)


def _body_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _printed(found: Mapping[str, Winner], digest: str) -> bytes:
    """One line for each winner."""
    winners = {key: {**x._asdict(), "config": list(x.config)} for key, x in sorted(found.items())}
    body = {"format": STORE_FORMAT, "module": digest, "winners": winners}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(x)}" for key, x in winners.items())
    head = json.dumps({"format": STORE_FORMAT, "module": digest, "sha256": _body_digest(body)})
    return f'{head[:-1]}, "winners": {{\n{lines}\n}}}}\n'.encode()


def _parsed(data: bytes, digest: str) -> dict[str, Winner]:
    """ValueError for anything but what `_printed` wrote for this text."""
    body = json.loads(data)
    _expect_stored(
        isinstance(body, dict) and body.pop("sha256", None) == _body_digest(body),
        "its contents do not match their hash",
    )
    _expect_stored(body.get("format") == STORE_FORMAT, "it has another format")
    _expect_stored(body.get("module") == digest, "it was made for another text of the module")
    _expect_stored(
        body.keys() == {"format", "module", "winners"} and isinstance(body["winners"], dict), "unknown fields"
    )
    return {key: _winner(x) for key, x in body["winners"].items()}


def _winner(x: Any) -> Winner:
    _expect_stored(isinstance(x, dict) and x.keys() == set(Winner._fields), "unknown fields")
    config = x["config"]
    numbers = isinstance(config, list) and len(config) == 4 and all(type(n) is int for n in config)
    _expect_stored(numbers and _is_possible(Config(*config)), f"no configuration: {config!r:.60}")
    times = all(
        t is None or (type(t) is float and math.isfinite(t) and t >= 0) for t in (x["milliseconds"], x["default"])
    )
    _expect_stored(times and type(x["tried"]) is int and isinstance(x["gpu"], str), "unknown values")
    return Winner(Config(*config), x["milliseconds"], x["default"], x["tried"], x["gpu"])


def _is_possible(config: Config) -> bool:
    """Powers of two that a kernel can have; whether it fits the GPU is asked where it is used."""
    blocks = all(16 <= size <= 512 and size & (size - 1) == 0 for size in config[:2])
    return blocks and config.num_warps in (1, 2, 4, 8, 16) and 1 <= config.num_stages <= 8


def _expect_stored(holds: bool, reason: str) -> None:
    if not holds:
        raise ValueError(reason)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; TimeoutError if that takes too long. Without flock (Windows) the last writer wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o600)
    try:
        end = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError("another process holds its lock") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(handle)


def _replace_file(path: Path, data: bytes, mode: int) -> None:
    """Under the lock: drafts that are there now were left by processes that died."""
    prefix = f".{path.name}.draft-"
    for left in path.parent.glob(f"{prefix}*"):
        left.unlink(missing_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=prefix)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        os.chmod(draft, mode)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
