"""One source through the compiler, with its CPU seconds: it ends in diagnostics, well formed, within the limits."""

from __future__ import annotations

import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TypeVar

from spdsl import api, compiler
from spdsl.catalogue import entries
from spdsl.diagnostics import Diagnostic, Severity, Source, SpatError
from spdsl.fixing import fix
from spdsl.rendering import as_data, render

CHECK_SECONDS, COMPILE_SECONDS = 2.0, 5.0
PATIENCE = 3  # times as long a case may run before it is ended, so that its time can be told
MEGABYTES = 500
LENGTH, TARGET = 65536, "h200"
Made = TypeVar("Made")


class TooLong(BaseException):
    """The case was ended. No Exception: nothing on the way catches it."""


@dataclass
class Finding:
    """What came of a source. `wrong` says what should not have been; empty where all is well."""

    outcome: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    megabytes: float = 0.0
    wrong: list[str] = field(default_factory=list)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TooLong after so much CPU time."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TooLong("".join(traceback.format_stack(frame)[-6:]))

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def examine(text: str, compiles: bool = False, fixes: bool = False, slower: float = 1.0) -> Finding:
    """Checks a source twice, plainly and for a GPU and a length; compiles it, and applies its hints, if asked.

    The machine may be `slower` than the one of the limits.
    """
    check, compile = CHECK_SECONDS * slower, COMPILE_SECONDS * slower
    finding, peak = Finding(), _peak()
    plain = _timed(finding, "check", check, lambda: api.check(written(text)))
    judged = _timed(finding, "check --target", check, lambda: api.check(written(text), target=TARGET, length=LENGTH))
    for found in dict.fromkeys([*(plain or ()), *(judged or ())]):
        finding.wrong += _malformed(Source(text), found)
    if compiles and plain is not None and not _fails(plain):
        _timed(finding, "compile", compile, lambda: _compile(text))
    if fixes and plain is not None and any(hint.replacement is not None for found in plain for hint in found.hints):
        _timed(finding, "fix", 20 * check, lambda: fix(Source(text), lambda one: compiler.check(one, {})))
    finding.megabytes = _peak() - peak
    if finding.megabytes > MEGABYTES:
        finding.wrong.append(f"{finding.megabytes:.0f} MB")
    codes = sorted({found.code for found in plain or () if found.severity is Severity.ERROR})
    finding.outcome = "wrong" if finding.wrong else "+".join(codes) or "valid"
    return finding


def written(text: str) -> str:
    """`api.check` takes a string without `{` for a path; a text without one is no pattern whatever stands in it."""
    return text if "{" in text else text + " {"


def _timed(finding: Finding, what: str, most: float, run: Callable[[], Made]) -> Made | None:
    start = time.process_time()
    try:
        with limited(most * PATIENCE):
            return run()
    except TooLong as ended:
        finding.wrong.append(f"{what}: ended after {most * PATIENCE:.0f} s in\n{ended}")
    except Exception:
        finding.wrong.append(f"{what}: {traceback.format_exc(limit=-4)}")
    finally:
        taken = time.process_time() - start
        finding.seconds[what] = taken
        if taken > most and not any(wrong.startswith(f"{what}: ended") for wrong in finding.wrong):
            finding.wrong.append(f"{what}: {taken:.2f} s, at most {most:.0f}")
    return None


def _compile(text: str) -> None:
    try:
        compiler.compile(Source(text), compiler.pattern_names(Source(text))[0], {})
    except SpatError as error:
        if not error.diagnostics:
            raise


def _fails(found: list[Diagnostic]) -> bool:
    return any(one.severity is Severity.ERROR for one in found)


def _malformed(source: Source, found: Diagnostic) -> list[str]:
    """What is wrong with a diagnostic itself."""
    wrong: list[str] = []
    spans = [found.span, *(hint.span for hint in found.hints)]
    if any(span is not None and not 0 <= span.start <= span.end <= len(source.text) + 2 for span in spans):
        wrong.append(f"{found.code}: a span outside of the source")
    if found.code not in entries():
        wrong.append(f"{found.code}: not in the catalogue")
    if not found.message or len(found.message) > 2000:
        wrong.append(f"{found.code}: a message of {len(found.message)} characters")
    try:
        as_data(source, found)
        if not render(source, found).plain.endswith("\n"):
            wrong.append(f"{found.code}: drawn without an end")
    except Exception:
        wrong.append(f"{found.code}: {traceback.format_exc(limit=-4)}")
    return wrong


def _peak() -> float:
    """Megabytes that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
