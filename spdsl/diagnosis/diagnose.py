"""diagnose: a pattern on real queries, keys and values, layer by layer, in pieces of rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from spdsl import api, compiler
from spdsl.diagnosis.arguments import arguments
from spdsl.diagnosis.call import LayerCall
from spdsl.diagnosis.data import Given, Layer, layers_of, opened
from spdsl.diagnosis.layer import LayerSums, choices_of, heads_of, measure
from spdsl.diagnosis.record import Diagnosis
from spdsl.diagnostics import Source
from spdsl.ir.pattern import Pattern, Phase
from spdsl.oracle.sizes import Sizes

Progress = Callable[[int, int], None]


def diagnose(
    path_or_text: str | os.PathLike[str],
    /,
    data: Given,
    *,
    weights: Given | None = None,
    pattern: str | None = None,
    phase: str | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **params: api.Number,
) -> Diagnosis:
    """What a pattern leaves out of dense attention with these tensors.

    data, weights: tensors by the names of arguments, or the path of a safetensors file; those of one layer of several
    are named `layers.<i>.<argument>`. Queries and keys are [B, heads, tokens, dim], as `attention` takes them: rotated,
    the last query at the last key. What nobody gives is drawn from `seed`, and told in `notes`. phase: by default
    prefill, or the first that the pattern covers. layers: those to look at, by default all. progress: is called with
    (rows done, of how many). Other keyword arguments override `param`s.

    Raises SpatError for the pattern, ValueError or TypeError for what does not fit, OSError for a file.
    """
    source = api.source_of(path_or_text)
    options = Options(pattern, phase, layers, seed, progress)
    return diagnosis_of(source, data, weights, compiler.as_params(params), options)


@dataclass(frozen=True, slots=True)
class Options:
    """What may be asked of a diagnosis, as `diagnose` says."""

    pattern: str | None = None
    phase: str | None = None
    layers: Sequence[int] | None = None
    seed: int = 0
    progress: Progress | None = None


def diagnosis_of(
    source: Source, data: Given, weights: Given | None, params: compiler.Params, options: Options
) -> Diagnosis:
    """As `diagnose`, of a source that has been read."""
    made = compiler.compile(source, options.pattern, params)
    meant = compiler.pattern_of(source, options.pattern, params)
    module = api.Module(made.name, made.text, made.digest, made.diagnostics).load()
    tensors, more = opened(data), opened(weights) if weights is not None else {}
    chosen, phase = _layers(options.layers, layers_of(tensors)), _phase(meant, options.phase)
    measured: _Measured | None = None
    for done, number in enumerate(chosen):
        given = arguments(meant, module, Layer(tensors, number), Layer(more, number), phase, options.seed)
        call = LayerCall(meant, module, phase, given.tensors)
        measured = measured or _Measured(meant, phase, call.sizes)
        measured.expect(call.sizes, number)
        measured.notes = dict.fromkeys((*measured.notes, *given.notes))
        for rows in measure(call, measured.layer(number)):
            if options.progress is not None:
                options.progress(done * call.rows + rows, len(chosen) * call.rows)
    assert measured is not None
    return measured.record()


def _layers(wanted: Sequence[int] | None, there: list[int]) -> list[int]:
    if wanted is None:
        return there
    for number in wanted:
        if number not in there:
            raise ValueError(f"layers: the data holds {', '.join(map(str, there))}, not {number}")
    return sorted(set(wanted))


def _phase(pattern: Pattern, wanted: str | None) -> str:
    covered: list[str] = [
        phase.value for phase in (Phase.PREFILL, Phase.TRAIN, Phase.DECODE) if pattern.cases_of(phase)
    ]
    if wanted is None:
        return covered[0]
    if wanted not in covered:
        raise ValueError(f"phase: expected one that a result covers, {' or '.join(covered)}, got {wanted!r}")
    return wanted


@dataclass(slots=True)
class _Measured:
    """What the layers come to."""

    pattern: Pattern
    phase: str
    sizes: Sizes
    notes: dict[str, None] = field(default_factory=dict)
    layers: dict[int, LayerSums] = field(default_factory=dict)

    def expect(self, sizes: Sizes, number: int) -> None:
        """All layers have one shape."""
        if sizes != self.sizes:
            raise ValueError(f"layers.{number}: expected the shape of the first layer, {self.sizes}, got {sizes}")

    def layer(self, number: int) -> LayerSums:
        self.layers[number] = LayerSums(self.sizes.length)
        return self.layers[number]

    def record(self) -> Diagnosis:
        rows = self.sizes.rows * self.sizes.batch
        lost = [sums.lost for sums in self.layers.values()]
        queries = lost[0].rows_of(self.sizes) * self.sizes.batch
        maps = torch.stack([one.sums for one in lost]).mean(0) / queries.clamp(min=1)
        return Diagnosis(
            self.pattern.name,
            {name: str(value) for name, value in self.pattern.params},
            self.phase, self.sizes.rows, self.sizes.keys,
            tuple(head for number, sums in self.layers.items() for head in heads_of(number, sums)),
            tuple(one for number, sums in self.layers.items() for one in choices_of(number, sums, rows)),
            tuple(self.notes), maps, lost[0].step,
        )  # fmt: skip
