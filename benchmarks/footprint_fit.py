"""How well the model of a block's footprint meets the samples, and the factors that keep it above them.

python -m benchmarks.footprint_fit
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.footprint_samples import FOLDER, Sample, read
from spdsl.runtime.tuning.footprint import matrix_unit, shared_bytes, spills
from spdsl.runtime.tuning.footprint_terms import FACTORS

WITHIN = 1.1
FREE = 4  # spilled words up to which a kernel counts as free of spills


class Told(NamedTuple):
    """Predicted spills against real ones."""

    kernels: int
    real: int
    predicted: int
    right: int

    def __str__(self) -> str:
        precision, recall = self.right / max(self.predicted, 1), self.right / max(self.real, 1)
        return f"{tuple(self)}: precision {precision:.2f}, recall {recall:.2f}"


def main() -> None:
    for path in [FOLDER / "shared.csv", *sorted(FOLDER.glob("blind*.csv"))]:
        name, quotients = path.stem, [quotient(sample) for sample, _ in read(path)]
        under, within = sum(x < 1 for x in quotients), sum(1 <= x <= WITHIN for x in quotients)
        print(f"{name}: {len(quotients)}, under {under}, within {WITHIN}: {within / len(quotients):.3f}")
    print("factors:", factors(sample for sample, _ in read(FOLDER / "shared.csv")))
    print("spills, fitted half:", told(False))
    print("spills, held-out half:", told(True))


def quotient(sample: Sample) -> float:
    """Predicted over measured; a kernel without shared memory counts as 1 byte."""
    return shared_bytes(sample.shape, sample.config, sample.architecture) / max(sample.shared, 1)


def factors(samples: Iterable[Sample]) -> dict[str, float]:
    """By matrix unit: what the arithmetic has to be multiplied with to be under no sample."""
    worst: defaultdict[str, float] = defaultdict(lambda: 1.0)
    for sample in samples:
        unit = matrix_unit(sample.shape, sample.config, sample.architecture)
        worst[unit] = max(worst[unit], FACTORS[unit] / quotient(sample))
    return dict(worst)


def told(held_out: bool) -> Told:
    rows = [(s, a) for s, a in read(FOLDER / "registers.csv") if a is not None and s.held_out == held_out]
    both = [(spills(s.shape, s.config, s.architecture), a.spills > FREE) for s, a in rows]
    return Told(len(both), sum(y for _, y in both), sum(x for x, _ in both), sum(x and y for x, y in both))


if __name__ == "__main__":
    main()
