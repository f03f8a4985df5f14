"""What a check of the hardware sees: the plan, how it was written, and the calls and the GPU that it is judged by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from spdsl.budget import Budget
from spdsl.diagnostics import Diagnostic, Hint, Severity, Source, Span
from spdsl.ir.pattern import Choice, Expected, Query, Softmax, Stream
from spdsl.ir.plan import Plan
from spdsl.limits import ESTIMATE_STEPS
from spdsl.passes.count import Shape, shape_of
from spdsl.syntax.tree import PatternTree
from spdsl.targets import Target

USUAL_LENGTH = 65536  # where a number needs a length and none is declared; the number then says so
USUAL_ARCHITECTURE = "sm_90"  # of the tables, where no GPU is named, as for tensors that lie on none


@dataclass(frozen=True, slots=True)
class Setting:
    """What a command adds to a pattern: GPUs and a length to judge it by, codes of warnings that are not told."""

    targets: tuple[Target, ...] = ()
    length: int | None = None
    allowed: frozenset[str] = frozenset()
    estimates: Budget | None = None  # what estimates may spend in all; None: each pattern as much as a file


NOTHING_MORE = Setting()


@dataclass(frozen=True, slots=True)
class View:
    """A plan to judge. `target` is None where no GPU is named; `shape` holds what the pattern fixes, else defaults."""

    plan: Plan
    source: Source
    target: Target | None
    expected: Expected
    shape: Shape
    tree: PatternTree | None = None
    estimates: Budget = field(default_factory=lambda: Budget(ESTIMATE_STEPS), compare=False)

    @property
    def architecture(self) -> str:
        return self.target.architecture if self.target is not None else USUAL_ARCHITECTURE

    @property
    def length(self) -> int:
        """The declared length, or a usual one."""
        return self.expected.length or USUAL_LENGTH

    @property
    def at_length(self) -> str:
        """`at 65,536 tokens`, and whose number that is."""
        own = "" if self.expected.length else ", the usual length (`expect(length = n)` declares another)"
        return f"at {self.length:,} tokens{own}"

    def units(self, choice: Choice) -> int:
        """Units of a sequence of the length."""
        return -(-self.length // choice.unit)

    def query_heads(self, softmax: Softmax) -> int | None:
        """Heads that ask, if declared."""
        query = self.plan.pattern.input(softmax.query)
        own = query.heads if isinstance(query, Query) else None
        return own or self.plan.pattern.query_heads

    def kv_heads(self, stream: Stream) -> int | None:
        """Heads of a stream, if declared; entries have those of their source."""
        if stream.compress is not None:
            source = self.plan.pattern.input(stream.compress.source)
            assert isinstance(source, Stream)
            stream = source
        return stream.heads or self.plan.pattern.kv_heads


def views(plan: Plan, source: Source, tree: PatternTree, setting: Setting) -> Iterator[View]:
    """One view for each GPU of the setting, or one for none."""
    expected = replace(plan.pattern.expected, length=setting.length or plan.pattern.expected.length)
    shape = shape_of(plan.pattern, Shape(batch=expected.batch))
    for target in setting.targets or (None,):
        yield View(plan, source, target, expected, shape, tree, setting.estimates or Budget(ESTIMATE_STEPS))


def warning(
    code: str, message: str, span: Span | None, label: str, *notes: str, hints: tuple[Hint, ...] = ()
) -> Diagnostic:
    return Diagnostic(code, message, span, label, notes, hints, Severity.WARNING)
