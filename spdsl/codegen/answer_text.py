"""answer_text: how a call of each phase answers: the cases of its results, what they read, further results."""

from __future__ import annotations

from dataclasses import dataclass, replace

from spdsl.codegen.choice_text import ChoiceText
from spdsl.codegen.softmax_text import JointText, SoftmaxText
from spdsl.ir.pattern import Choice


@dataclass(frozen=True, slots=True)
class PooledText:
    """A score at the grains of a result; `prefix` names it among the parts of the result."""

    prefix: str
    softmax: SoftmaxText
    probability: bool
    unit: int
    rows: int
    share: str
    heads_by: str | None
    rows_by: str | None
    unit_by: str | None

    @property
    def needs_lse(self) -> bool:
        """From outside: that of a softmax which is no branch has no gradient, the score computes it again."""
        return self.probability and self.softmax.is_branch

    @property
    def key_argument(self) -> str:
        return self.softmax.sweeps[0].stream.key_argument


@dataclass(frozen=True, slots=True)
class ExtraText:
    """A further result that is a score, or the divergence of two: target and score."""

    name: str
    parts: tuple[PooledText, ...]
    listed: Choice | None = None  # whose units hold every entry of a divergence
    walked: bool = False  # by kernels

    @property
    def call(self) -> str:
        return f"_{self.name}({self._given})"

    @property
    def dense_call(self) -> str:
        """That of the reference."""
        return f"_{self.name}_torch({self._given})" if self.walked else self.call

    @property
    def _given(self) -> str:
        lses = "".join(f", {part.softmax.name}_part[1]" for part in self.parts if part.needs_lse)
        return f"inputs, layout{lses}"


@dataclass(frozen=True, slots=True)
class KeptText:
    """The tiles that a softmax kept and saw, as a further result."""

    softmax: SoftmaxText

    @property
    def call(self) -> str:
        name, skip = self.softmax.name, self.softmax.skip
        assert skip is not None
        if skip.rows == 1:
            return f"rt.step_counts({name}_notes)"
        return f"rt.kept_counts({name}_notes, inputs.{self.softmax.query}, layout, {skip.rows})"

    @property
    def dense_call(self) -> str:
        """That of the reference."""
        return self.call


@dataclass(frozen=True, slots=True)
class AnswerText:
    """How one kind of call answers: what it computes, in the order of its use, and expressions over their names."""

    calls: tuple[SoftmaxText | JointText | ChoiceText, ...]
    result: str
    extras: tuple[str | ExtraText | KeptText, ...]

    def counts(self, name: str) -> bool:
        """Whether a further result is made of what the softmax noted."""
        return any(isinstance(one, KeptText) and one.softmax.name == name for one in self.extras)


@dataclass(frozen=True, slots=True)
class CaseText:
    condition: str  # over `length` and scalars; empty: always
    uses_length: bool
    scalars: tuple[str, ...]  # of the condition
    gated: bool
    dense: AnswerText  # of `reference`
    answer: AnswerText  # of `attention`: joints in place of their parts; with a cache parts of one query are splits

    @property
    def reads(self) -> frozenset[str]:
        """The tensors and choices that its results are made of."""
        extras = [part.softmax for x in self.dense.extras if isinstance(x, ExtraText) for part in x.parts]
        return frozenset(self.scalars) | read_by(*self.dense.calls, *extras)

    @property
    def without_scores(self) -> CaseText:
        """As the phases with a cache answer."""
        branches = tuple(extra for extra in self.dense.extras if not isinstance(extra, ExtraText))
        return replace(self, dense=replace(self.dense, extras=branches))


def read_by(*steps: SoftmaxText | JointText | ChoiceText) -> frozenset[str]:
    """The tensors and choices that the steps read."""
    softmaxes = [step.softmax if isinstance(step, ChoiceText) else step for step in steps]
    chosen = [x.name for step in steps if isinstance(step, ChoiceText) for x in step.plan.read]
    return frozenset((*(name for step in softmaxes for name in step.tensors), *chosen))


@dataclass(frozen=True, slots=True)
class MeaningText:
    """What `reference` or `choices` computes in phases that mean the same."""

    name: str
    phases: tuple[str, ...]
    cases: tuple[CaseText, ...] = ()  # of the reference
    steps: tuple[SoftmaxText | ChoiceText, ...] = ()  # of the choices
    needs: tuple[str, ...] = ()  # arguments that the signature lets one leave out, and these phases read
