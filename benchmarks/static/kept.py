"""What is kept of an earlier run: rows by the digest of all that decides them."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import triton

import spdsl
from benchmarks.static import code

FORM = 1  # of the file of results
READERS = ("loop_work.py", "machine_code.py", "occupancy.py", "products.py", "sass.py")


def digest_of(*texts: str) -> str:
    """With the versions of triton and its assembler, and the text of all that reads machine code."""
    whole = "\n".join((triton.__version__, assembler(), *_texts((Path(code.__file__), *_of_machine())), *texts))
    return hashlib.sha256(whole.encode()).hexdigest()[:24]


def everything() -> str:
    """The digest of all that prints kernels and counts for them: where it is the same, nothing of ours has changed."""
    here, own = Path(__file__).parent, Path(spdsl.__file__).parent
    folders = ((own, "*.py"), (own, "*.toml"), (own.parent / "templates", "*.jinja"), (here, "*.py"))
    files = sorted(path for folder, ending in folders for path in folder.rglob(ending))
    return digest_of(*_texts(tuple(path for path in files if "peers" not in path.parts)))


def of_folder(root: Path) -> str:
    """The digest of the kernels and templates of a peer, and of what calls it."""
    files = [*root.rglob("*.py"), *root.rglob("*.jinja"), *(Path(__file__).parent / "peers").glob("*.py")]
    return digest_of(*_texts(tuple(sorted(files))))


@cache
def assembler() -> str:
    """The version of ptxas that triton brings along."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    done = subprocess.run([str(tool), "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"\bV([\d.]+)", done.stdout)
    return found[1] if found else "unknown"


def read(path: Path) -> dict[str, Any]:
    """The file of an earlier run; empty where there is none, or it is no result of this suite."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if found.get("form") == FORM else {}


def _of_machine() -> tuple[Path, ...]:
    return tuple(Path(spdsl.__file__).parent / "machine" / name for name in READERS)


@cache
def _texts(files: tuple[Path, ...]) -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8") for path in files)
