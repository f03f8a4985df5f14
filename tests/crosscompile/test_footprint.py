"""The kept samples of shared memory are still what this triton gives; with another version the model stays near."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.crosscompile

pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from benchmarks.footprint import Draw, described, launches, shared  # noqa: E402
from benchmarks.footprint_samples import FOLDER, Sample, read  # noqa: E402
from spdsl import targets  # noqa: E402
from spdsl.machine.crosscompile import compile_launch  # noqa: E402
from spdsl.machine.launches import Launch  # noqa: E402
from spdsl.runtime.tuning.footprint import shared_bytes  # noqa: E402
from spdsl.runtime.tuning.footprint_terms import FITTED_WITH  # noqa: E402

LARGEST = 65_536  # bytes of shared memory: larger samples take longer to compile


def chosen() -> list[Sample]:
    """One of each architecture and of several kernels, the first of each."""
    found: dict[tuple[str, str], Sample] = {}
    for sample, _ in read(FOLDER / "shared.csv"):
        if sample.pattern in ("causal", "streaming_llm", "nsa/2") and 1024 < sample.shared < LARGEST:
            found.setdefault((sample.architecture, sample.kernel), sample)
    wanted = [("sm_80", "forward"), ("sm_90", "dkdv"), ("sm_100", "dq"), ("gfx942", "forward"), ("sm_90", "units")]
    return [found[place] for place in wanted if place in found]


def launch_of(sample: Sample) -> Launch:
    """The launch that the sample was taken of: the configuration is that of the launch already."""
    draw = Draw(sample.pattern, 0, sample.dtype, (sample.qk, sample.v), (1, 1, 1, 0), sample.architecture)
    found = launches(draw, targets.find(sample.architecture), lambda *_: sample.config)
    return next(x for x in found if "C.PAGE" in x.constexprs and described(draw, x, sample.config)[:-1] == sample[:14])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("sample", chosen(), ids=lambda sample: f"{sample.architecture}-{sample.kernel}")
def test_samples_hold(sample: Sample) -> None:
    launch, target = launch_of(sample), targets.find(sample.architecture)
    measured = shared(launch, target)
    predicted = shared_bytes(sample.shape, sample.config, sample.architecture)
    if triton.__version__ == FITTED_WITH:
        assert predicted >= measured == sample.shared
    else:  # not fitted to it: triton 3.9.0 was seen 0.3 % above
        assert predicted >= 0.9 * measured


def test_a_sample_is_what_a_whole_compilation_reports() -> None:
    """Samples are taken before LLVM and the assembler run."""
    sample = chosen()[0]
    compiled = compile_launch(launch_of(sample), targets.find(sample.architecture))
    assert compiled.ok, compiled.error
    assert compiled.shared == shared(launch_of(sample), targets.find(sample.architecture)) > 0
