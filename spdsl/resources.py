"""Where the data files are: inside the package when it is installed, beside it in a checkout."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

Folder = Literal["grammar", "templates", "patterns"]

_PACKAGE = Path(__file__).resolve().parent


@cache
def folder(name: Folder) -> Path:
    """The data folder `name`.

    Raises FileNotFoundError if it is at neither place, which means a broken installation.
    """
    for place in (_PACKAGE / name, _PACKAGE.parent / name):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"the data folder `{name}` is missing from the installation at {_PACKAGE}")


def text(name: Folder, file: str) -> str:
    """The text of one data file."""
    return (folder(name) / file).read_text(encoding="utf-8")
