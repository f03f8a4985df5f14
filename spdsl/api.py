"""The Python interface: compile a pattern, check a file, load the module of a pattern."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from platformdirs import user_cache_path

from spdsl import compiler
from spdsl.checks.view import Setting
from spdsl.diagnostics import Diagnostic, Source
from spdsl.syntax.read import read
from spdsl.targets import find

Number = int | float


@dataclass(frozen=True, slots=True)
class Module:
    """A compiled pattern. `text` is the module's source; `load()` imports it from the private cache."""

    name: str
    text: str
    digest: str
    diagnostics: tuple[Diagnostic, ...]

    def load(self) -> ModuleType:
        """The imported module; a module of one digest is imported once per process."""
        name = f"spdsl_{self.name}_{self.digest}"
        if name not in sys.modules:
            spec = importlib.util.spec_from_loader(name, _Loader(name, self.text))
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]


class _Loader(SourceFileLoader):
    """Runs the text itself. Its file is for tracebacks and for Triton, which reads the kernels from there; neither
    the file nor a compiled twin beside it is trusted.
    """

    def __init__(self, name: str, text: str) -> None:
        super().__init__(name, str(_cached(name, text)))
        self.text = text

    def get_code(self, fullname: str) -> CodeType:
        code = self.source_to_code(self.text.encode(), self.path)
        assert isinstance(code, CodeType)
        return code


def source_of(path_or_text: str | os.PathLike[str]) -> Source:
    """A file's source; a string with a `{` is a pattern's text."""
    if isinstance(path_or_text, str) and "{" in path_or_text:
        return Source(path_or_text)
    return read(Path(path_or_text))


def compile(path_or_text: str | os.PathLike[str], /, pattern: str | None = None, **params: Number) -> Module:
    """Compiles a pattern; keyword arguments override its `param`s. Raises SpatError with all findings."""
    made = compiler.compile(source_of(path_or_text), pattern, compiler.as_params(params))
    return Module(made.name, made.text, made.digest, made.diagnostics)


def load(path_or_text: str | os.PathLike[str], /, pattern: str | None = None, **params: Number) -> ModuleType:
    """Compiles a pattern and imports its module."""
    return compile(path_or_text, pattern, **params).load()


def check(
    path_or_text: str | os.PathLike[str],
    /,
    *,
    length: int | None = None,
    target: str | None = None,
    allow: Iterable[str] = (),
    **params: Number,
) -> list[Diagnostic]:
    """Everything there is to say about a file or text; no exception for what is wrong with it.

    `length` is the one to judge by, in place of that of `expect`; `target` a GPU that the kernels must fit; `allow` are
    codes of warnings to leave out. Other keyword arguments override `param`s. Raises ValueError for an unknown GPU.
    """
    judged = Setting((find(target),) if target is not None else (), length, frozenset(allow))
    return compiler.check(source_of(path_or_text), compiler.as_params(params), judged)


def cache_folder() -> Path:
    """The folder of loaded modules, private to the user: whoever can write there can change the user's kernels.

    `SPDSL_CACHE_DIR` chooses another one. Raises PermissionError if the folder is somebody else's, OSError if there
    can be none.
    """
    folder = Path(os.environ.get("SPDSL_CACHE_DIR") or user_cache_path("spdsl"))
    with _named(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix":
        state = folder.stat()
        if {state.st_uid, folder.lstat().st_uid} != {os.getuid()}:
            raise PermissionError(f"{folder} belongs to another user; set SPDSL_CACHE_DIR to a private folder")
        if state.st_mode & 0o077:
            folder.chmod(0o700)
    return folder


def _cached(name: str, text: str) -> Path:
    """The file of a module, written whole or not at all; a file with other contents is replaced."""
    folder = cache_folder()
    path, contents = folder / f"{name}.py", text.encode()
    if path.is_file() and not path.is_symlink() and path.read_bytes() == contents:
        return path
    with _named(folder):
        _write(path, contents)
    return path


def _write(path: Path, contents: bytes) -> None:
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(contents)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """An OSError says which folder it is about and what helps."""
    try:
        yield
    except OSError as error:
        reason = f"cannot write to {folder}: {error.strerror}; set SPDSL_CACHE_DIR to a private folder"
        raise OSError(error.errno, reason) from error
