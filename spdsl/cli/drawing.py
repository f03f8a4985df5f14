"""What commands say where a picture cannot be drawn or written, and where it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from spdsl.cli.inputs import Failed


@contextmanager
def drawing(path: Path, quiet: bool) -> Iterator[None]:
    """Around drawing and the import of what draws; then tells the path (`quiet`: on standard error). Raises Failed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        raise Failed("a PNG needs matplotlib: pip install 'spdsl[pictures]'") from None
    except OSError as error:
        raise Failed(f"cannot write {path}: {error.strerror or error}") from None
    click.echo(path.as_posix(), err=quiet)
