"""The Python interface: compile a pattern, check a file, load the module of a pattern."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
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

Number = compiler.Number
_LOCK_SECONDS = 10.0  # the lock of the folder is held for one write; its holder's death frees it
_DRAFT = re.compile(r"\.spdsl_\w+\.\w+")  # as `_write` names them
_loading = threading.RLock()  # a module is whole before another thread sees it


@dataclass(frozen=True, slots=True)
class Module:
    """A compiled pattern. `text` is the module's source; `load()` imports it from the private cache."""

    name: str
    text: str
    digest: str
    diagnostics: tuple[Diagnostic, ...]

    def load(self) -> ModuleType:
        """The imported module; a text is imported once per process."""
        with _loading:
            for name in self._names():
                known = sys.modules.get(name)
                if known is None:
                    return _imported(name, self.text)
                loader = getattr(known, "__loader__", None)
                if isinstance(loader, _Loader) and loader.text == self.text:
                    return known
        raise ImportError(f"{name} is the name of another module")

    def _names(self) -> Iterator[str]:
        """Texts of one digest differ in comments, such as the name of the file: the second gets a name of its own."""
        name = f"spdsl_{self.name}_{self.digest}"
        yield name
        yield f"{name}_{hashlib.sha256(self.text.encode()).hexdigest()}"


def _imported(name: str, text: str) -> ModuleType:
    spec = importlib.util.spec_from_loader(name, _Loader(name, text))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _Loader(SourceFileLoader):
    """Runs the text itself. Its file is for tracebacks and for Triton, which reads the kernels from there; neither
    the file nor a compiled twin beside it is trusted.
    """

    def __init__(self, name: str, text: str) -> None:
        super().__init__(name, str(_cached(name, text)))
        self.text = text

    def get_source(self, fullname: str) -> str:
        return self.text

    def get_code(self, fullname: str) -> CodeType:
        code = self.source_to_code(self.text.encode(), self.path)
        assert isinstance(code, CodeType)
        return code


def source_of(path_or_text: str | os.PathLike[str]) -> Source:
    """A file's source; a string with a `{` is a pattern's text."""
    if not isinstance(path_or_text, str | os.PathLike):
        raise _other_type("path_or_text", "a path or a text", path_or_text)
    if isinstance(path_or_text, str) and "{" in path_or_text:
        return Source(path_or_text)
    return read(Path(path_or_text))


def compile(path_or_text: str | os.PathLike[str], /, pattern: str | None = None, **params: Number) -> Module:
    """Compiles a pattern; keyword arguments override its `param`s. Raises SpatError with all findings.

    TypeError or ValueError name an argument that is none: a parameter is a finite number, no bool.
    """
    if not isinstance(pattern, str | None):
        raise _other_type("pattern", "a name or None", pattern)
    made = compiler.compile(source_of(path_or_text), pattern, compiler.as_params(params))
    return Module(made.name, made.text, made.digest, made.diagnostics)


def load(path_or_text: str | os.PathLike[str], /, pattern: str | None = None, **params: Number) -> ModuleType:
    """Compiles a pattern and imports its module; equal texts give one module. Raises what `compile` does."""
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
    codes of warnings to leave out. Other keyword arguments override `param`s. TypeError or ValueError name an argument
    that does not fit.
    """
    if not isinstance(length, int | None) or isinstance(length, bool):
        raise _other_type("length", "a number of tokens or None", length)
    if length is not None and not 0 < length < 2**31:
        raise ValueError(f"length: expected 1 to 2**31 - 1 tokens, got {length}")
    if not isinstance(target, str | None):
        raise _other_type("target", "the name of a GPU or None", target)
    codes = frozenset(allow) if isinstance(allow, Iterable) and not isinstance(allow, str) else {allow}
    if isinstance(allow, str) or not all(isinstance(code, str) for code in codes):
        raise _other_type("allow", "codes of warnings, such as ('W501',)", allow)
    judged = Setting((find(target),) if target is not None else (), length, frozenset(codes))
    return compiler.check(source_of(path_or_text), compiler.as_params(params), judged)


def _other_type(name: str, expected: str, got: object) -> TypeError:
    return TypeError(f"{name}: expected {expected}, got {type(got).__name__}")


def cache_folder() -> Path:
    """The folder of loaded modules, private to the user: whoever can write there can change the user's kernels.

    `SPDSL_CACHE_DIR` chooses another one; a `~` in front is the user's home. Raises PermissionError if the folder is
    somebody else's, OSError if there can be none.
    """
    folder = Path(os.path.expanduser(os.environ.get("SPDSL_CACHE_DIR") or user_cache_path("spdsl")))
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
    """The file of a module, written whole or not at all; one with other contents, or of somebody else, is replaced.

    Drafts that processes left when they died are removed.
    """
    folder = cache_folder()
    path, contents = folder / f"{name}.py", text.encode()
    if _holds(path, contents) and not _drafts(folder):
        return path
    with _named(folder), _locked(folder) as alone:
        for left in _drafts(folder) if alone else []:
            with suppress(OSError):
                left.unlink()
        if not _holds(path, contents):
            _write(path, contents)
    return path


def _holds(path: Path, contents: bytes) -> bool:
    """Whether a plain file with these contents is there, that nobody but this user could change until now."""
    try:
        state = path.lstat()
        private = os.name != "posix" or (state.st_uid == os.getuid() and not state.st_mode & 0o022)
        return stat.S_ISREG(state.st_mode) and private and path.read_bytes() == contents
    except OSError:
        return False


def _drafts(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _DRAFT.fullmatch(path.name)]


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
def _locked(folder: Path) -> Iterator[bool]:
    """One writer at a time; -> whether that is certain, and every draft is a dead one.

    False where folders have no locks (Windows, some network file systems) or one is held for too long.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        end, alone = time.monotonic() + _LOCK_SECONDS, False
        while not alone and time.monotonic() < end:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
        yield alone
    finally:
        os.close(handle)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """An OSError says which folder it is about and what helps."""
    try:
        yield
    except OSError as error:
        reason = f"cannot write to {folder}: {error.strerror}; set SPDSL_CACHE_DIR to a private folder"
        raise OSError(error.errno, reason) from error
