"""Which configuration a call takes, with a host function and a clock that the test holds in its hands."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spdsl.runtime.sequences import Layout
from spdsl.runtime.tuning import buckets, search, trials, tuned_store, tuner
from spdsl.runtime.tuning import candidates as choice
from spdsl.runtime.tuning.buckets import length_bucket
from spdsl.runtime.tuning.candidates import candidates, rank
from spdsl.runtime.tuning.configs import TABLES, Config, Tables, lookup, plain_name, table_dim, tables_for
from spdsl.runtime.tuning.footprint import KernelShape, fits
from spdsl.runtime.tuning.gpu import Gpu
from spdsl.runtime.tuning.search import tuned_config
from spdsl.runtime.tuning.tuned_store import Winner
from spdsl.runtime.tuning.tuner import Tuner
from spdsl.runtime.tuning.unit_configs import UNIT_TABLES, fitted
from spdsl.runtime.tuning.warps import product_repeats, without_repeats

ROOT = Path(__file__).parents[2]
LIBRARY = "l" * 64  # its digest
GPU = Gpu("sm_90", 132)
DEFAULT = Config(64, 64, 4, 2)
DIMS = (*((d, d) for d in (16, 24, 40, 64, 72, 80, 96, 112, 128, 144, 160, 192, 256)), (192, 128))
WIDE = Config(64, 128, 4, 2)
NARROW = Config(64, 32, 4, 2)


class Host:
    """A host function of a module that notes its configurations; some make it slow, wrong or fail."""

    def __init__(self, module: Path) -> None:
        self.tuner = Tuner(str(module), LIBRARY)
        self.kernels: tuple[str, ...] = ("forward",)
        self.used: list[tuple[Config, ...]] = []
        self.times: dict[Config, float] = {}
        self.wrong: dict[Config, Tensor] = {}
        self.failing: dict[Config, str] = {}
        self.default = DEFAULT
        self.call = self.tuner.tuned(self.run)

    def run(self, q: Tensor, layout: Layout, page: int = 0) -> list[Tensor]:
        used = tuple(tuned_config(x, q, 64, GPU, 1, page, False, False, self.default) for x in self.kernels)
        self.used.append(used)
        for config in used:
            if config in self.failing:
                raise ValueError(self.failing[config])
        return [q + self.wrong.get(config, 0.0) for config in used]

    def milliseconds(self, run: Callable[[], object], most: float = math.inf) -> float:
        run()
        return sum(self.times.get(config, 5.0) for config in self.used[-1])

    def __call__(self, queries: int = 256, keys: int = 256, q: Tensor | None = None, page: int = 0) -> list[Tensor]:
        q = torch.ones(1, 1, 4, 64) if q is None else q
        found: list[Tensor] = self.call(q, Layout(None, None, None, None, queries, keys), page)
        return found

    @property
    def last(self) -> tuple[Config, ...]:
        return self.used[-1]

    def tunes(self, queries: int = 256, keys: int = 256, **more: int) -> bool:
        before = len(self.used)
        self(queries, keys, **more)
        return len(self.used) > before + 1

    def restart(self) -> None:
        """What a new process knows: nothing but the files."""
        self.tuner._winners = None


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """A module of its own, whose tensors count as those of a GPU."""
    monkeypatch.setenv("SPDSL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SPDSL_TUNE", raising=False)
    path = tmp_path / "module.py"
    path.write_text("")
    monkeypatch.setattr(tuner, "on_gpu", lambda args: True)
    monkeypatch.setattr(tuned_store, "_said", set())
    caplog.set_level(logging.WARNING, "spdsl")
    return path


@pytest.fixture
def host(module: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """All neighbours of the default are candidates."""
    found = Host(module)
    for each in (choice, buckets):
        monkeypatch.setattr(each, "fits", lambda *args: True)
    monkeypatch.setattr(search, "milliseconds", lambda *args: found.milliseconds(*args))
    return found


def test_the_fastest_is_used_from_the_second_call_on(host: Host) -> None:
    host.times = {WIDE: 3.0, NARROW: 4.0}
    host()
    assert host.used[0] == (DEFAULT,)
    host()
    assert host.last == (WIDE,)
    assert not host.tunes()


def test_a_new_process_uses_what_was_found(host: Host) -> None:
    host.times = {WIDE: 3.0}
    host()
    host.restart()
    assert not host.tunes()
    assert host.last == (WIDE,)


def test_another_text_of_the_module_is_tuned_anew(host: Host, module: Path) -> None:
    host()
    module.write_text("changed = 1\n")
    host.restart()
    assert host.tunes()


def test_another_library_is_tuned_anew(host: Host) -> None:
    """Its kernels are part of every module."""
    host()
    host.restart()
    host.tuner.library = "m" * 64
    assert host.tunes()


@pytest.mark.parametrize("length, bucket", [(0, 1), (1, 1), (2, 128), (128, 128), (129, 256), (4096, 4096)])
def test_length_buckets(length: int, bucket: int) -> None:
    assert length_bucket(length) == bucket


def test_a_new_length_in_a_known_bucket_is_not_tuned(host: Host) -> None:
    assert host.tunes(5000, 5000)
    assert not any(host.tunes(n, n) for n in (4097, 6001, 8192))
    assert host.tunes(8193, 8193)
    assert host.tunes(1, 8192)
    assert not host.tunes(1, 4097)


def test_every_kernel_of_a_function_is_found_for_itself(host: Host) -> None:
    host.kernels = ("dq", "dkdv")
    host.times = {WIDE: 3.0}
    host()
    host()
    assert host.last == (WIDE, WIDE)
    mixed = {config for pair in host.used for config in pair} - {DEFAULT, WIDE}
    assert all(pair.count(DEFAULT) or pair.count(WIDE) for pair in host.used if mixed & set(pair))


def test_noise_does_not_replace_the_default(host: Host) -> None:
    host.times = {WIDE: 4.95}
    host()
    host()
    assert host.last == (DEFAULT,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_candidate_with_other_results_is_skipped(
    host: Host, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    host.times = {WIDE: 1.0, NARROW: 3.0}
    one_row = torch.zeros(1, 1, 4, 64, dtype=dtype)
    one_row[..., 3, 5] = 8 * torch.finfo(dtype).eps if dtype != torch.float32 else 2.0**-8
    host.wrong = {WIDE: one_row}
    q = torch.ones(1, 1, 4, 64, dtype=dtype)
    host(q=q)
    host(q=q)
    assert host.last == (NARROW,)
    assert "64 x 128, 4 warps, 2 stages is skipped: results differ" in caplog.text


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_in_place(fill: float) -> None:
    wanted = torch.ones(3, 4)
    wanted[1, 2] = fill
    assert trials.difference([wanted], [wanted.clone()]) == ""
    moved_to = wanted.clone()
    moved_to[1, 2], moved_to[0, 0] = 1.0, fill
    assert "NaN or infinity" in trials.difference([wanted], [moved_to])
    assert "NaN or infinity" in trials.difference([torch.ones(3, 4)], [wanted])
    assert "NaN or infinity" in trials.difference([wanted], [wanted.nan_to_num()])


def test_lists_may_differ_at_ties_only() -> None:
    wanted = torch.arange(4000, dtype=torch.int32).view(1000, 4)
    near, far = wanted.clone(), wanted.clone()
    near[:10, 3] += 1
    far[:11, 3] += 1
    assert trials.difference(wanted, near) == ""
    assert "lists differ" in trials.difference(wanted, far)


def test_a_candidate_that_fails_is_reported_and_skipped(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.times = {WIDE: 1.0, NARROW: 3.0}
    host.failing = {WIDE: "out of resource: shared memory"}
    host()
    host()
    assert host.last == (NARROW,)
    assert "64 x 128, 4 warps, 2 stages is skipped: ValueError: out of resource: shared memory" in caplog.text


def test_a_default_that_fails_gives_way(host: Host) -> None:
    host.failing = {DEFAULT: "out of resource"}
    assert host()[0].sum() == 256
    host()
    assert host.last != (DEFAULT,)


def test_a_stored_winner_that_fails_gives_way(host: Host) -> None:
    host.times = {WIDE: 1.0}
    host()
    host.failing = {WIDE: "out of resource"}
    host()
    host()
    assert host.last != (WIDE,)


def test_none_left_says_why(host: Host) -> None:
    shape = KernelShape("forward", 64, 64, 4)
    all_of_them = candidates(shape, DEFAULT, "sm_90", 0, False)
    host.failing = {config: f"reason {number}" for number, config in enumerate(all_of_them)}
    with pytest.raises(RuntimeError, match="no configuration of forward runs") as caught:
        host()
    assert all(f"reason {number}" in str(caught.value) for number in range(len(all_of_them)))


def test_memory_that_runs_out_is_the_callers_error(host: Host) -> None:
    def run(q: Tensor, layout: Layout) -> Tensor:
        tuned_config("forward", q, 64, GPU, 1, 0, False, False, DEFAULT)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        host.tuner.tuned(run)(torch.ones(1, 1, 4, 64), Layout(None, None, None, None, 4, 4))


def test_never_during_a_capture(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    host.times = {WIDE: 1.0}
    assert not host.tunes()
    assert host.last == (DEFAULT,)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    host()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not host.tunes()
    assert host.last == (WIDE,)  # what was found before is used in a capture, too


@pytest.mark.parametrize("how", ["environment", "function"])
def test_modes(host: Host, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def switch(mode: str) -> None:
        if how == "environment":
            monkeypatch.setenv("SPDSL_TUNE", mode)
        else:
            host.tuner.tuning(mode)

    host.times = {WIDE: 1.0}
    switch("stored")
    assert not host.tunes()
    assert host.last == (DEFAULT,)
    switch("on")
    assert host.tunes()
    switch("stored")
    assert not host.tunes()
    assert host.last == (WIDE,)
    switch("off")
    assert not host.tunes()
    assert host.last == (DEFAULT,)


def test_an_unknown_mode_is_refused(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="mode: expected on, stored, off or None, got sometimes"):
        host.tuner.tuning("sometimes")
    monkeypatch.setenv("SPDSL_TUNE", "yes")
    with pytest.raises(ValueError, match="SPDSL_TUNE: expected on, stored or off, got yes"):
        host()


def test_tensors_of_the_cpu_are_not_tuned(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not host.tunes()
    with pytest.raises(RuntimeError, match="launched no kernel on a GPU"):
        host.tuner.tune(host)


def test_tune_finds_anew_and_writes_where_it_is_told(host: Host, tmp_path: Path) -> None:
    host.times = {WIDE: 3.0}
    host()
    host.times = {NARROW: 2.0}
    host.tuner.tuning("off")
    found = host.tuner.tune(host, store=tmp_path / "module.tuned.json")
    ((bucket, winner),) = found.items()
    assert winner == Winner(NARROW, 2.0, 5.0, winner.tried, "no GPU")
    assert (bucket.kernel, bucket.queries, bucket.keys, bucket.dtype) == ("forward", 256, 256, "float32")
    host.tuner.tuning(None)
    host.restart()
    assert not host.tunes()
    assert host.last == (NARROW,)  # the file beside the module comes before the cache


def test_a_winner_that_does_not_fit_is_not_used(host: Host, module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host()
    monkeypatch.setattr(buckets, "fits", fits)
    large = Config(512, 512, 4, 8)
    (key,) = host.tuner.known()
    tuned_store.write_winners(tuned_store.store_beside(module, LIBRARY), {key: Winner(large, 1.0, 2.0, 1, "")})
    host.restart()
    host.tuner.tuning("stored")
    host()
    assert host.last == (DEFAULT,)


def test_a_call_that_cannot_be_timed_keeps_its_results(
    host: Host, monkeypatch: pytest.MonkeyPatch, module: Path
) -> None:
    def milliseconds(run: object, most: float = 0.0) -> float:
        raise torch.OutOfMemoryError("no room to empty the cache")

    monkeypatch.setattr(search, "milliseconds", milliseconds)
    assert host()[0].sum() == 256
    assert not host.tunes()  # nor again in this process
    assert host.last == (DEFAULT,)
    assert tuned_store.stored_winners(module, LIBRARY) == {}


def test_a_search_ends_in_time(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_SEARCH_SECONDS", -1.0)
    host()
    assert next(iter(host.tuner.known().values())).tried == 1


def test_candidates_are_near_and_fit() -> None:
    shape = KernelShape("forward", 128, 128, 2)
    default = Config(128, 64, 8, 3)
    found = candidates(shape, default, "sm_90", 0, False)
    assert found[0] == default
    assert 4 <= len(found) <= 10
    assert len(set(found)) == len(found)
    assert all(fits(shape, x, "sm_90") for x in found[1:])
    order = [rank("forward", x, default) for x in found[1:]]
    assert order == sorted(order)
    assert all(x.block_n <= 64 for x in candidates(shape, default, "sm_90", 64, False))
    assert all(x.block_m == 128 for x in candidates(shape, default, "sm_90", 0, True))
    assert all(min(x.block_m, x.block_n) >= 16 for x in candidates(shape, Config(16, 16, 4, 1), "sm_90", 0, False))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("tables", [TABLES, UNIT_TABLES], ids=["plain", "units"])
def test_no_candidate_computes_a_product_twice(tables: Tables, architecture: str) -> None:
    for name, (qk, v), size in product(tables_for(architecture, tables), DIMS, (2, 4)):
        group = 16 if tables is UNIT_TABLES else 4
        shape = KernelShape(plain_name(name), qk, 16 if name == "select" else v, size, group)
        default = without_repeats(shape, lookup(name, architecture, table_dim(name, qk, v), size, tables), architecture)
        for config in candidates(shape, default, architecture, 0, name.endswith("decode")):
            assert product_repeats(shape, config, architecture) == 1, f"{shape}: {config}"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("tables", [TABLES, UNIT_TABLES], ids=["plain", "units"])
def test_no_row_of_the_tables_computes_a_product_twice(tables: Tables, architecture: str) -> None:
    """At the head dims that rows are made for; others, with a second part of 16 columns say, take fewer warps."""
    dims = ((64, 64), (128, 128), (192, 128), (256, 256))
    for name, (qk, v), size in product(tables_for(architecture, tables), dims, (2, 4)):
        shape = KernelShape(
            plain_name(name), qk, 16 if name == "select" else v, size, 16 if tables is UNIT_TABLES else 4
        )
        config = lookup(name, architecture, table_dim(name, qk, v), size, tables)
        assert product_repeats(shape, config, architecture) == 1, f"{shape}: {config}"


def test_the_search_reaches_what_is_best_elsewhere() -> None:
    """Keys of dK and dV change with the warps, as rows do elsewhere; a tile of 64 rows and 8 warps is not tried."""
    found = candidates(KernelShape("dkdv", 128, 128, 2), Config(64, 64, 4, 1), "sm_90", 0, False)
    assert Config(64, 128, 8, 1) in found
    assert Config(64, 64, 8, 1) not in found
    found = candidates(KernelShape("dq", 192, 128, 2), Config(128, 64, 8, 2), "sm_90", 0, False)
    assert Config(64, 64, 4, 2) in found
    found = candidates(KernelShape("forward", 192, 128, 2), Config(128, 64, 8, 2), "sm_90", 0, False)
    assert Config(64, 64, 8, 2) not in found


def test_a_stored_winner_that_computes_twice_is_not_used(host: Host) -> None:
    host()
    (key,) = host.tuner.known()
    host.tuner.known()[key] = Winner(Config(64, 64, 8, 2), 1.0, 2.0, 2, "")
    host.tunes()
    assert host.used[-1] != (Config(64, 64, 8, 2),)


def test_a_tile_over_units_may_be_one_query_of_16_heads() -> None:
    default = Config(64, 64, 4, 3)
    for name in ("units", "units_dq", "units_dkdv"):
        found = candidates(KernelShape(name, 128, 128, 2, 16), default, "sm_90", 64, False)
        assert {fitted(x, 16, 64).lanes for x in found} >= {1, 2, 4}, name
    assert all(x.block_m >= 32 for x in candidates(KernelShape("forward", 128, 128, 2), default, "sm_90", 0, False))


def test_a_tile_of_dk_and_dv_keeps_its_keys() -> None:
    tall, wide = Config(128, 64, 8, 2), Config(64, 128, 8, 2)
    assert rank("forward", tall, DEFAULT) < rank("forward", wide, DEFAULT)
    assert rank("dkdv", wide, DEFAULT) < rank("dkdv", tall, DEFAULT)
    assert rank("units_dkdv", wide, DEFAULT) < rank("units_dkdv", tall, DEFAULT)
    assert rank("forward", DEFAULT, DEFAULT) < rank("forward", tall._replace(num_stages=1), DEFAULT)


def test_ranks_choose_the_same(tmp_path: Path) -> None:
    """Alone each would choose another one: a rank of many does not tune without its group."""
    script = str(Path(__file__).with_name("rank.py"))
    environment = os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, script, str(rank), str(tmp_path / "meeting")] for rank in (0, 1)]
    ranks = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) for command in commands
    ]
    first, second = (json.loads(rank.communicate(timeout=100)[0]) for rank in ranks)
    assert first == second
    assert first[0] == ["", 2]
    assert first[1][0] == "stages"
