"""`spdsl tune`: without a GPU by the model alone, and what it would call on one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner, Result

import spdsl
from spdsl.cli import main
from spdsl.cli.numbers import lengths
from spdsl.machine import tune
from spdsl.machine.module_report import loaded
from spdsl.runtime.tuning import search, tuner
from spdsl.runtime.tuning.configs import Config
from spdsl.runtime.tuning.tuned_store import Winner, read_winners, write_winners
from tests.library import tables

pytestmark = pytest.mark.crosscompile

ROOT = Path(__file__).parents[2]
OFFLINE = ("--offline", "--target", "h200")


@pytest.fixture(scope="module")
def text() -> str:
    return spdsl.compile(ROOT / "patterns" / "streaming_llm.spat").text


@pytest.fixture
def module(text: str, tmp_path: Path) -> Path:
    path = tmp_path / "streaming_llm.py"
    path.write_text(text)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["tune", *map(str, arguments)])


def stored(module: Path) -> dict[str, dict[str, object]]:
    winners: dict[str, dict[str, object]] = json.loads(module.with_name("streaming_llm.tuned.json").read_text())[
        "winners"
    ]
    return winners


def test_the_model_alone(module: Path) -> None:
    done = run(module, "--length", "4k..8k", *OFFLINE)
    assert done.exit_code == 0, done.output
    found = stored(module)
    assert all(x["milliseconds"] is None and x["gpu"] == "ranked for h200" for x in found.values())
    for kernel in ("forward", "dq", "dkdv", "decode"):
        for keys in (4096, 8192):
            assert any(f"kernel={kernel} " in key and f"keys={keys} " in key for key in found), (kernel, keys)
    assert all("architecture=sm_90 processors=132 " in key for key in found)
    assert {key.split("queries=")[1].split()[0] for key in found if "kernel=decode" in key} == {"1"}
    assert "streaming_llm.tuned.json" in done.output


def nobody(*args: object, **named: object) -> None:
    """Starts no kernel."""


def test_the_module_takes_what_was_ranked(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(module, "--length", "256", "--phase", "train", *OFFLINE).exit_code == 0
    used: list[int] = []

    def launch(kernel: object, grid: object, *args: object, num_warps: int, num_stages: int) -> None:
        used.extend(x.BLOCK_M.value for x in args if hasattr(x, "BLOCK_M"))

    key = next(key for key in stored(module) if "kernel=forward" in key)
    monkeypatch.setattr(tuner, "on_gpu", lambda args: True)
    with loaded(module) as made, tables("sm_90", 132):
        made.tuning("stored")
        with made.rt.launching(launch):
            made.attention(**made.example_inputs(1, 200, dtype=torch.bfloat16))
    config = stored(module)[key]["config"]
    assert isinstance(config, list)
    assert used == [config[0]]


def test_a_measured_winner_stays(module: Path) -> None:
    assert run(module, "--length", "256", *OFFLINE).exit_code == 0
    with loaded(module) as made:
        store = made.MODULE.tuner.store_for(module.with_name("streaming_llm.tuned.json"))
        key = next(iter(read_winners(store)))
        write_winners(store, {key: Winner(Config(32, 32, 4, 1), 1.0, 2.0, 3, "a GPU")})
    assert run(module, "--length", "256", *OFFLINE).exit_code == 0
    assert stored(module)[key]["config"] == [32, 32, 4, 1]


def test_phases_and_where_to(module: Path, tmp_path: Path) -> None:
    done = run(module, "--length", "256", "--phase", "decode", "-o", tmp_path / "mine.json", *OFFLINE)
    assert done.exit_code == 0, done.output
    winners = json.loads((tmp_path / "mine.json").read_text())["winners"]
    assert len(winners) == 1
    assert not module.with_name("streaming_llm.tuned.json").exists()


def test_rows_as_json(module: Path) -> None:
    sizes = ("--batch", 2, "--dtype", "fp16", "--page", 0, "--heads", 4, "--kv-heads", 4, "--dim", 32)
    done = run(module, "--length", "256,1k", "--phase", "decode", "--format", "json", *sizes, *OFFLINE)
    assert (done.exit_code, done.stderr) == (0, f"{module.with_name('streaming_llm.tuned.json').as_posix()}\n")
    found = json.loads(done.stdout)
    assert [(row["keys"], row["dtype"], row["qk"], row["most_n"]) for row in found] == [
        (256, "float16", 32, 0), (1024, "float16", 32, 0)
    ]  # fmt: skip
    assert all(row["milliseconds"] is None and len(row["config"]) == 4 for row in found)


@pytest.mark.parametrize(
    "phase, kernels", [("train", {"forward", "dq", "dkdv"}), ("prefill", {"forward"}), ("decode", {"decode"})]
)
def test_what_is_called_on_a_gpu(module: Path, phase: str, kernels: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = tune.Sizes(batch=2, heads=4, kv_heads=2, dim=32, dtype="fp16")
    monkeypatch.setattr(tuner, "on_gpu", lambda args: True)
    monkeypatch.setattr(search, "milliseconds", lambda run, most=0.0: 1.0)
    monkeypatch.setattr(search, "difference", lambda wanted, found: "")
    with loaded(module) as made, made.rt.launching(nobody):
        (call,) = [call for _, call in tune._calls(made, [300], [phase], sizes, "cpu")]
        found = made.tune(call, store=module.with_name("x.json"))
    assert {bucket.kernel for bucket in found} == kernels
    assert {(bucket.keys, bucket.dtype, bucket.qk) for bucket in found} == {(512, "float16", 32)}
    tune.table(found)


def test_the_command_on_a_gpu(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the kernels: a clock that halves with each candidate, and tensors that lie on the CPU."""
    real, calls = tune.loaded, tune._calls
    times = iter(2.0**-n for n in range(1000))

    @contextmanager
    def quiet(path: Path) -> Iterator[ModuleType]:
        with real(path) as made, made.rt.launching(nobody):
            yield made

    monkeypatch.setattr(tuner, "on_gpu", lambda args: True)
    monkeypatch.setattr(search, "milliseconds", lambda run, most=0.0: next(times))
    monkeypatch.setattr(search, "difference", lambda wanted, found: "")
    monkeypatch.setattr(tune, "loaded", quiet)
    monkeypatch.setattr(tune, "_calls", lambda *most: calls(*most[:-1], "cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    done = run(module, "--length", "256..512", "--dim", 32, "--heads", 2, "--kv-heads", 1)
    assert done.exit_code == 0, done.output
    assert "attend forward" in done.output
    found = stored(module)
    assert len(found) == 10  # forward, dq, dkdv; forward from pages; decode; at two lengths
    assert all(str(x["gpu"]).startswith("a GPU, ") for x in found.values())
    assert all(float(str(x["milliseconds"])) < float(str(x["default"])) for x in found.values())


def test_refusals(module: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.py"
    foreign.write_text("raise SystemExit('was run')\n")
    assert "was not made by spdsl" in run(foreign, "--length", "4k", *OFFLINE).output
    assert "belong together" in run(module, "--length", "4k", "--offline").output
    assert "belong together" in run(module, "--length", "4k", "--target", "h200").output
    assert "ends before it begins" in run(module, "--length", "8k..4k", *OFFLINE).output
    assert "no number of tokens" in run(module, "--length", "long", *OFFLINE).output
    assert "unknown" in run(module, "--length", "4k", "--offline", "--target", "h9000").output
    if not torch.cuda.is_available():
        done = run(module, "--length", "4k")
        assert done.exit_code == 2
        assert "has no GPU" in done.output


@pytest.mark.parametrize("given, wanted", [("4k", [4096]), ("1k..6k", [1024, 2048, 4096, 6144]), ("100..100", [100])])
def test_lengths(given: str, wanted: list[int]) -> None:
    assert list(lengths(given)) == wanted
