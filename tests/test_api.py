"""spdsl.compile, load and check, and the cache of loaded modules."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import spdsl
from spdsl.api import Module, cache_folder
from spdsl.codegen import render
from spdsl.runtime.tuning.tuned_store import store_in_cache

PATTERNS = Path(__file__).resolve().parents[1] / "patterns"
STREAMING = PATTERNS / "streaming_llm.spat"
TEXT = "pattern mine { param window = 4 causal return attend(sliding(window)) }"
POSIX = pytest.mark.skipif(os.name != "posix", reason="file modes")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; modules that this process has loaded already are forgotten."""
    monkeypatch.setenv("SPDSL_CACHE_DIR", str(tmp_path / "cache"))
    for name in [name for name in sys.modules if name.startswith("spdsl_")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "cache"


def test_a_path_and_its_text_give_the_same_kernels() -> None:
    from_path, from_text = spdsl.compile(STREAMING), spdsl.compile(STREAMING.read_text(encoding="utf-8"))
    assert (from_path.name, from_path.digest) == (from_text.name, from_text.digest)
    renamed = from_path.text.replace("streaming_llm.spat", "_text_")  # the name of the file stands in comments
    assert renamed == from_text.text
    assert from_path.text == spdsl.compile(str(STREAMING)).text


def test_parameters_change_text_and_digest() -> None:
    made = [spdsl.compile(TEXT, **params) for params in ({}, {"window": 4}, {"window": 5})]
    assert made[0].digest == made[1].digest != made[2].digest
    assert made[0].text == made[1].text != made[2].text


NAMED_ALIKE = ({"window": 22040}, {"window": 94507})  # with 32 bits of their digests


def test_modules_are_told_apart_by_all_of_their_digests() -> None:
    one, two = (spdsl.load(TEXT.replace("mine", "p"), **params) for params in NAMED_ALIKE)
    assert one is not two
    assert (one.PARAMS, two.PARAMS) == NAMED_ALIKE
    assert one.MODULE.namespace != two.MODULE.namespace


EXACT = "pattern exact { param x = 1 causal return attend(where(k * x <= q)) }"
THIRDS = [1 / 3, Fraction(1, 3), Fraction(1, 3) + Fraction(1, 10**30), np.float32(1 / 3), 1]


def test_parameters_are_told_apart_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "formatted", lambda made: made)  # which takes most of the time
    made = [spdsl.compile(EXACT, x=x) for x in THIRDS]
    assert len({module.digest for module in made}) == len(THIRDS)
    same = [spdsl.compile(EXACT, x=x) for x in (1.0, Decimal("1.0"), np.int64(1))]
    assert {module.digest for module in same} == {made[-1].digest}
    assert spdsl.compile(EXACT, x=0.1).digest == spdsl.compile(EXACT, x=Decimal("0.1")).digest


def test_two_texts_of_one_digest_are_two_modules(cache: Path) -> None:
    one, two = (Module("mine", f"X = {i}\n", "0", ()) for i in (1, 2))
    assert (one.load().X, two.load().X, one.load().X) == (1, 2, 1)
    assert two.load() is two.load()
    assert len(list(cache.glob("*.py"))) == 2


def test_one_of_several_patterns() -> None:
    both = f"{TEXT}\npattern other {{ return attend(all) }}"
    assert spdsl.compile(both, "other").name == "other"
    assert spdsl.compile(both, pattern="mine", window=7).name == "mine"


@pytest.mark.parametrize(
    "text, params, code",
    [
        (TEXT, {"widow": 3}, "E"),
        (TEXT, {"window": -3}, "E"),
        (TEXT.replace("sliding", "slidding"), {}, "E"),
        ("pattern p {", {}, "E"),
    ],
)
def test_errors_are_raised_and_checked_alike(text: str, params: dict[str, int], code: str) -> None:
    with pytest.raises(spdsl.SpatError) as caught:
        spdsl.compile(text, **params)
    found = spdsl.check(text, **params)
    assert [one.code for one in caught.value.diagnostics] == [one.code for one in found]
    assert found[0].code.startswith(code)


def test_check_has_nothing_to_say_about_a_good_file() -> None:
    assert spdsl.check(STREAMING) == []
    assert spdsl.check(TEXT, window=8) == []


def test_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError):
        spdsl.compile(PATTERNS / "missing.spat")


def test_a_module_is_loaded_once(cache: Path) -> None:
    module = spdsl.load(TEXT, window=6)
    assert module.PARAMS == {"window": 6}
    assert spdsl.load(TEXT, window=6) is module
    assert spdsl.load(TEXT, window=7) is not module
    assert len(list(cache.iterdir())) == 2 + (cache / "__pycache__").exists()


@POSIX
def test_the_cache_is_private(cache: Path) -> None:
    previous = os.umask(0)
    try:
        spdsl.load(TEXT)
    finally:
        os.umask(previous)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o077 for path in cache.glob("*.py")] == [0]


@POSIX
def test_an_open_folder_is_closed(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    assert cache_folder() == cache
    assert cache.stat().st_mode & 0o777 == 0o700


@POSIX
def test_what_lay_in_an_open_folder_is_not_trusted(cache: Path) -> None:
    """Somebody may have put a compiled twin beside the module: Python would run it in place of the source."""
    module = spdsl.load(TEXT)
    source = Path(module.__file__ or "")
    (cache / "__pycache__").mkdir(exist_ok=True)
    planted = subprocess.run(
        [sys.executable, "-c", PLANT, str(source)], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert Path(planted).exists()
    del sys.modules[module.__name__]
    cache.chmod(0o777)
    assert spdsl.load(TEXT).PATTERN == "mine"


PLANT = """
import importlib.util, os, py_compile, sys
source, other = sys.argv[1], sys.argv[1] + ".other"
open(other, "w").write("PATTERN = 'planted'")
print(py_compile.compile(other, cfile=importlib.util.cache_from_source(source),
                         invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH))
os.unlink(other)
"""


@POSIX
def test_the_folder_of_somebody_else_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    owner = cache.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(PermissionError, match="belongs to another user; set SPDSL_CACHE_DIR"):
        spdsl.load(TEXT)


@POSIX
def test_a_link_to_the_folder_of_somebody_else_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.symlink_to("/")
    owner, here = Path("/").stat().st_uid, cache.lstat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1 if owner == here else here)
    with pytest.raises(PermissionError, match="belongs to another user"):
        cache_folder()


def test_a_file_in_place_of_the_folder(cache: Path) -> None:
    cache.write_text("not a folder")
    with pytest.raises(OSError, match="SPDSL_CACHE_DIR"):
        spdsl.load(TEXT)


def loaded_again(cache: Path) -> Path:
    """Loads the module a first time and forgets it; -> its file."""
    module = spdsl.load(TEXT)
    del sys.modules[module.__name__]
    (path,) = cache.glob("*.py")
    return path


@POSIX
def test_a_link_in_place_of_the_file_is_replaced(cache: Path, tmp_path: Path) -> None:
    path = loaded_again(cache)
    victim = tmp_path / "victim.py"
    victim.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(victim)
    assert spdsl.load(TEXT).PATTERN == "mine"
    assert not path.is_symlink()


@pytest.mark.parametrize("contents", [b"", b"PATTERN = 'cut", b"\xff\xfe\x00", b"raise SystemExit"])
def test_a_damaged_file_is_replaced(cache: Path, contents: bytes) -> None:
    path = loaded_again(cache)
    whole = path.read_bytes()
    path.write_bytes(contents)
    assert spdsl.load(TEXT).PATTERN == "mine"
    assert path.read_bytes() == whole


def test_an_unwritable_folder_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("spdsl.api.tempfile.mkstemp", refuse)
    with pytest.raises(OSError, match=r"cannot write to .*cache: Permission denied; set SPDSL_CACHE_DIR"):
        spdsl.load(TEXT)


KILLED = """
import os, signal, sys
from spdsl.api import Module
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Module(sys.argv[1], "X = 1\\n" * 2000, "0", ()).load()
"""


@POSIX
def test_drafts_of_dead_processes_are_removed(cache: Path) -> None:
    environment = {**os.environ, "SPDSL_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", KILLED, "other"], env=environment, check=False)
    assert done.returncode == -9
    assert [path.suffix == ".py" for path in cache.iterdir()] == [False]
    mine = Module("mine", "X = 1\n", "0", ())
    assert mine.load().X == 1
    assert [path.name for path in cache.iterdir()] == ["spdsl_mine_0.py"]
    (cache / ".spdsl_mine_0.abcd_123").write_text("left by an earlier version")
    del sys.modules["spdsl_mine_0"]
    assert mine.load().X == 1
    assert [path.name for path in cache.iterdir()] == ["spdsl_mine_0.py"], "a load that writes nothing sweeps, too"


@POSIX
def test_the_draft_of_a_living_process_stays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process loads while this one writes: it waits."""
    waiting: list[subprocess.Popen[bytes]] = []
    replace = os.replace

    def slowly(draft: str, path: Path) -> None:
        environment = {**os.environ, "SPDSL_CACHE_DIR": str(cache)}
        waiting.append(subprocess.Popen([sys.executable, "-c", LOAD, "1"], env=environment))
        time.sleep(1)
        replace(draft, path)

    monkeypatch.setattr("spdsl.api.os.replace", slowly)
    assert Module("mine", "X = 0\n", "0", ()).load().X == 0
    assert waiting[0].wait(200) == 0


@POSIX
@pytest.mark.parametrize("change", ["owner", "mode"])
def test_a_file_that_others_can_change_is_replaced(cache: Path, change: str) -> None:
    """Even where its text is right: it could be another one a moment later."""
    path = loaded_again(cache)
    if change == "mode":
        path.chmod(0o666)
    elif os.getuid() == 0:
        os.chown(path, 12345, -1)
    else:
        pytest.skip("only root gives files away")
    before = path.stat().st_ino
    spdsl.load(TEXT)
    state = path.stat()
    assert (state.st_ino != before, state.st_uid, state.st_mode & 0o777) == (True, os.getuid(), 0o600)


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("SPDSL_CACHE_DIR", "~/mine")
    monkeypatch.chdir(tmp_path)
    assert cache_folder() == tmp_path / "home" / "mine"
    assert store_in_cache(Path(__file__), "").path.parent == tmp_path / "home" / "mine"
    assert not (tmp_path / "~").exists()


def test_a_failed_write_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spdsl.api.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        spdsl.load(TEXT)
    assert list(cache.iterdir()) == []


LOAD = """
import sys
from spdsl.api import Module
mine = Module("mine", f"X = {sys.argv[1]}\\n" * 2000, "0", ())
for _ in range(20):
    module = mine.load()
    assert module.X == int(sys.argv[1])
    del sys.modules[module.__name__]
"""


def test_eight_processes_at_once(cache: Path) -> None:
    """All replace one file all the time, with two contents: nobody runs a part of it or what another one wrote."""
    environment = {**os.environ, "SPDSL_CACHE_DIR": str(cache)}
    running = [
        subprocess.Popen([sys.executable, "-c", LOAD, str(i % 2)], stderr=subprocess.PIPE, text=True, env=environment)
        for i in range(8)
    ]
    assert [(process.communicate(timeout=200)[1], process.returncode) for process in running] == [("", 0)] * 8
    (path,) = cache.iterdir()
    assert path.read_text() in {f"X = {i}\n" * 2000 for i in (0, 1)}


def test_dir_lists_what_is_imported_late() -> None:
    program = "import sys, spdsl; print(*dir(spdsl)); assert not {'torch', 'triton', 'sympy'} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"load", "compile", "check", "SpatError", "Diagnostic", "__version__"} <= {*done.stdout.split()}
