"""Writes generated modules: all or nothing, and never over a file that someone else made."""

from __future__ import annotations

import codecs
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

HEADER = "# Made by spdsl"  # how the first line of every generated module begins


class Foreign(Exception):
    """The file is there already and is not ours."""


def write_module(folder: Path, name: str, text: str, *, force: bool = False) -> Path:
    """Writes `folder/name.py`, making the folder if needed, and returns its path.

    Readers see the old file or the new one, never a part. Raises Foreign if a file of that name lacks our header
    (unless `force`), ValueError for a name that is no plain file name, OSError if it cannot be written.
    """
    if not name.isidentifier():
        raise ValueError(f"`{name}` cannot name a module")
    path = folder / f"{name}.py"
    if not force and os.path.lexists(path) and not is_ours(path):
        raise Foreign(f"{path.as_posix()} was not made by spdsl")
    folder.mkdir(parents=True, exist_ok=True)
    _replace(path, text)
    return path


def write_package(folder: Path, name: str, files: Mapping[str, str], *, force: bool = False) -> Path:
    """Writes the files of a package `folder/name`, its `__init__.py` last, and returns that one's path.

    What else lies in its runtime folder goes: a library is all of its files. Raises as `write_module` does; a folder
    that is there without our `__init__.py`, or a link, is not ours.
    """
    if not name.isidentifier():
        raise ValueError(f"`{name}` cannot name a package")
    package, first = folder / name, folder / name / "__init__.py"
    known = is_ours(first) and not any(path.is_symlink() for path in (package, package / "runtime"))
    if not force and os.path.lexists(package) and not known:
        raise Foreign(f"{package.as_posix()} was not made by spdsl")
    for path in sorted((package / "runtime").rglob("*.py")):
        if path.relative_to(package).as_posix() not in files:
            path.unlink()
    for inside in sorted(files, key=lambda inside: inside == "__init__.py"):
        place = package / inside
        place.parent.mkdir(parents=True, exist_ok=True)
        _replace(place, files[inside])
    return first


def is_ours(path: Path) -> bool:
    """A link or a folder is never ours."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(HEADER)) == HEADER.encode()


def rewrite(path: Path, before: str, text: str) -> None:
    """Replaces the text of a source, whole or not at all, in the place that a link leads to.

    Its mode, its byte order mark and its line ends stay. Raises OSError, also if it no longer holds `before`.
    """
    path = path.resolve(strict=True)
    data = path.read_bytes()
    mark = codecs.BOM_UTF8.decode() if data.startswith(codecs.BOM_UTF8) else ""
    if data.decode("utf-8-sig") != before:
        raise OSError(f"{path} has changed meanwhile")
    _replace(path, mark + text, stat.S_IMODE(path.stat().st_mode))


def _replace(path: Path, text: str, mode: int = 0o644) -> None:  # mkstemp gives 0600
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
