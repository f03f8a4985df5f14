"""How well the model of a block's footprint meets the samples, and the factors that keep it above the fitted ones.

python -m benchmarks.footprint_fit
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from benchmarks.footprint_samples import FOLDER, Sample, read
from spdsl.device.footprint import matrix_unit, shared_bytes, spills
from spdsl.device.footprint_terms import FACTORS

WITHIN = 1.1


def main() -> None:
    samples = [sample for sample, _ in read(FOLDER / "shared.csv")]
    halves = {
        "fitted": [x for x in samples if not x.held_out],
        "held out": [x for x in samples if x.held_out],
    }
    for name, half in halves.items():
        quotients = [quotient(sample) for sample in half]
        under, within = sum(x < 1 for x in quotients), sum(1 <= x <= WITHIN for x in quotients)
        print(f"{name}: {len(half)}, under {under}, within {WITHIN}: {within / len(half):.3f}")
    print("factors:", factors(halves["fitted"]))
    print("spills: precision and recall", precision_and_recall(False), "held out", precision_and_recall(True))


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


def precision_and_recall(held_out: bool) -> tuple[float, float, int]:
    """Of predicted spills (from 4 words on), and how many kernels were judged."""
    rows = [(s, a) for s, a in read(FOLDER / "registers.csv") if a is not None and s.held_out == held_out]
    told = [(spills(s.shape, s.config, s.architecture), a.spills > 4) for s, a in rows]
    right = sum(predicted and real for predicted, real in told)
    predicted, real = sum(x for x, _ in told), sum(x for _, x in told)
    return right / max(predicted, 1), right / max(real, 1), len(told)


if __name__ == "__main__":
    main()
