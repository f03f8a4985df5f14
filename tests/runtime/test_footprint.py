"""The model of shared memory against what triton 3.7.1 gave, and the tables against the model."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest

from benchmarks.footprint_samples import FOLDER, Sample, read
from spdsl import targets
from spdsl.runtime.tuning.configs import TABLES, Config, Tables, lookup, plain_name, power_of_2, split_dim, tables_for
from spdsl.runtime.tuning.footprint import KernelShape, fits, matrix_unit, rows_of, shared_bytes, spills
from spdsl.runtime.tuning.footprint_terms import FITTED_WITH, SHARED_LIMITS
from spdsl.runtime.tuning.unit_configs import UNIT_TABLES

WITHIN = 1.1
SAMPLES = [sample for sample, _ in read(FOLDER / "shared.csv")]
HELD_OUT = [sample for sample, _ in read(FOLDER / "blind.csv")]  # drawn once the arithmetic was done
DIMS = (24, 64, 80, 96, 128, 192, 256)


def predicted(sample: Sample) -> int:
    return shared_bytes(sample.shape, sample.config, sample.architecture)


@pytest.mark.parametrize("samples", [SAMPLES, HELD_OUT], ids=["fitted", "held out"])
def test_no_sample_is_under(samples: list[Sample]) -> None:
    assert [sample for sample in samples if predicted(sample) < sample.shared] == []


@pytest.mark.parametrize("samples", [SAMPLES, HELD_OUT], ids=["fitted", "held out"])
def test_nine_of_ten_samples_are_near(samples: list[Sample]) -> None:
    """benchmarks/NOTES.md has the earlier blind draws, whose samples were fitted to later."""
    assert sum(predicted(sample) <= WITHIN * sample.shared for sample in samples) >= 0.9 * len(samples)


def test_held_out_samples_are_no_others() -> None:
    assert len(HELD_OUT) >= 300
    assert {sample[:-1] for sample in HELD_OUT}.isdisjoint(sample[:-1] for sample in SAMPLES)


def test_samples_cover_what_is_predicted() -> None:
    assert {sample.triton for sample in SAMPLES} == {FITTED_WITH}
    assert {sample.architecture for sample in SAMPLES} == {*SHARED_LIMITS}
    names = {*TABLES["sm_90"], *UNIT_TABLES["sm_90"]}
    assert {sample.kernel for sample in SAMPLES} == {plain_name(name) for name in names}
    units = {matrix_unit(sample.shape, sample.config, sample.architecture) for sample in SAMPLES}
    assert units == {"mma", "wgmma", "tcgen05", "mfma"}
    assert {sample.dtype for sample in SAMPLES} == {"bf16", "fp16", "fp32"}


def test_limits_are_those_of_the_targets() -> None:
    known = {target.architecture: target.shared_per_block for target in map(targets.find, targets.names())}
    assert known == SHARED_LIMITS


@pytest.mark.parametrize("architecture", sorted(SHARED_LIMITS))
@pytest.mark.parametrize("tables", [TABLES, UNIT_TABLES], ids=["plain", "units"])
def test_every_configuration_of_the_tables_fits(tables: Tables, architecture: str) -> None:
    """At the head dims for which it is looked up, contiguous and paged."""
    for name, dim, size, paged in product(tables_for(architecture, tables), DIMS, (2, 4), (False, True)):
        if paged and plain_name(name) in ("dq", "dkdv", "units_dq", "units_dkdv"):
            continue
        kernel = KernelShape(plain_name(name), dim, dim, size, group=16 if tables is UNIT_TABLES else 4, paged=paged)
        config = lookup(name, architecture, dim, size, tables)
        taken = shared_bytes(kernel, config, architecture)
        assert fits(kernel, config, architecture), f"{kernel} with {config}: {taken} bytes"


@pytest.mark.parametrize("architecture", sorted(SHARED_LIMITS))
@pytest.mark.parametrize("name", ["forward", "dq", "dkdv", "units", "units_dq", "units_dkdv", "decode", "select"])
def test_more_takes_more(name: str, architecture: str) -> None:
    """A wider head, a larger block or one more stage never takes less (from the second stage on)."""
    kernel, config = KernelShape(name, 64, 64, 2, 4), Config(64, 32, 4, 2)
    before = shared_bytes(kernel, config, architecture)
    assert shared_bytes(kernel._replace(qk=128, v=128), config, architecture) > before
    assert shared_bytes(kernel, config._replace(block_n=64), architecture) >= before
    assert shared_bytes(kernel, config._replace(num_stages=3), architecture) >= before


def test_too_much_does_not_fit() -> None:
    forward = KernelShape("forward", 256, 256, 4)
    assert not fits(forward, Config(128, 128, 4, 4), "sm_90")
    assert shared_bytes(forward, Config(128, 128, 4, 4), "sm_90") > 4 * 128 * 256 * 4  # two blocks of k and v
    assert spills(forward, Config(128, 128, 4, 1), "sm_80")


@pytest.mark.parametrize(
    "group, block_m, rows", [(1, 16, 16), (1, 128, 128), (2, 256, 128), (5, 64, 64), (100, 64, 128)]
)
def test_rows_of_a_tile_over_units(group: int, block_m: int, rows: int) -> None:
    """At most 64 queries, heads padded to a power of two; a list of one head may have gathered rows, any number."""
    assert rows_of(KernelShape("units", 64, 64, 2, group), Config(block_m, 32, 4, 2)) == rows


def test_split_dims() -> None:
    assert [split_dim(dim) for dim in (16, 24, 80, 96, 128, 192)] == [
        (16, 0), (32, 0), (64, 16), (64, 32), (128, 0), (128, 64),
    ]  # fmt: skip
    assert [power_of_2(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]


def test_without_torch() -> None:
    """The analyses that ask for a footprint run where torch is not installed."""
    check = "import sys; from spdsl.runtime.tuning import footprint, unit_configs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
