"""The suite of Native Sparse Attention without a GPU: its reference, its lists, its checks, and every kind of case."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import run as command
from benchmarks.baselines import nsa as peers
from benchmarks.gpu import worker
from benchmarks.gpu.patterns import Case
from benchmarks.nsa import blocked, cases, checks, loops, table, timing
from benchmarks.nsa.inputs import inputs, lists, load, parts_of
from tests.sanitizer.kernels import kernels_of

SMALL = cases.shapes(True, [70])[1]


@pytest.mark.parametrize("by", ["mlp", "mean"])
def test_the_blocked_reference_is_the_reference(by: str) -> None:
    """Output and every gradient of float64 inputs, through the entries, too."""
    case = SMALL | {"by": by, "dtype": "float64"}
    module = load(case)
    given = {name: x.requires_grad_() for name, x in inputs(module, case).items()}
    chosen = lists(70, 2, 16, 4, clustered=False)
    out = module.reference(**given, chosen=chosen)
    dout = torch.randn_like(out)
    want = dict(zip(given, torch.autograd.grad(out, list(given.values()), dout), strict=True))
    made = {f"{side}_entries": blocked.entries(given, side, 8, 4) for side in "kv"}
    streams = made | {name: given[name] for name in blocked.STREAMS[2:]}
    found, grads = blocked.attention(module, given, streams, chosen, dout, torch.float64)
    torch.testing.assert_close(found, out.detach(), rtol=0, atol=1e-12)
    for side in "kv":
        names = [name for name in given if name == f"{side}_rough" or name.startswith(f"entries_{side}_")]
        pulled = torch.autograd.grad(made[f"{side}_entries"], [given[n] for n in names], grads.pop(f"{side}_entries"))
        grads |= dict(zip(names, pulled, strict=True))
    assert grads.keys() == want.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want[name], rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("clustered", [False, True])
def test_lists_are_drawn_as_nsa_draws_them(clustered: bool) -> None:
    """The first unit, the query's own and the one before, the rest among those that have begun."""
    found = lists(1000, 2, 16, 6, clustered=clustered)
    assert found.shape == (1, 2, 1000, 6)
    for head in range(2):
        for q in (0, 15, 16, 40, 95, 96, 500, 999):
            own = q // 16
            units = [u for u in found[0, head, q].tolist() if u >= 0]
            assert units == sorted(set(units))
            assert {0, own, max(0, own - 1)} <= set(units) <= set(range(own + 1))
            assert len(units) == min(6, own + 1)
            assert found[0, head, q].tolist() == units + [-1] * (6 - len(units))
    shared = [
        len(set(a) & set(b)) for a, b in zip(found[0, 0, 800:831].tolist(), found[0, 0, 801:832].tolist(), strict=True)
    ]
    assert (sum(shared) / len(shared) > 4.5) is clustered, "neighbours share most units, or few"


def test_a_wrong_choice_is_found() -> None:
    module = load(SMALL)
    made, _, chosen = parts_of(module, inputs(module, SMALL))
    row, params = 69, module.PARAMS
    right = chosen[0, 0, row]
    assert checks.distance(params, made, right, row, 0) == 0.0
    assert sorted(right.tolist()) == right.tolist()
    (left,) = set(range(5)) - set(right.tolist())
    free = [unit for unit in right.tolist() if unit not in (0, 3, 4)]
    swapped = torch.tensor([left if unit == free[0] else unit for unit in right.tolist()])
    assert checks.distance(params, made, swapped, row, 0) > checks.TIE
    without_own = torch.tensor([unit if unit != 4 else left for unit in right.tolist()])
    assert checks.distance(params, made, without_own, row, 0) == float("inf")
    assert checks.distance(params, made, right[:3], row, 0) == float("inf"), "one is missing"
    assert checks.distance(params, made, torch.tensor([0, 1, 1, 4]), row, 0) == float("inf"), "one is there twice"


def test_every_case_runs_dry_and_is_shown() -> None:
    """Each kind of case once, without a clock, and the table of them."""
    checked = [worker.run(case) for case in cases.checked(True, [40])[:4]]
    assert [row["ok"] for row in checked] == [True] * 4, checked
    wanted = [case for case in cases.timed(True, [40]) if case["kind"] != "ceilings"]
    rows = [worker.run(case | {"once": True}) for case in wanted]
    assert [row for row in rows if "failure" in row or "backward_failure" in row] == []
    assert {row["kind"] for row in rows} == {f"nsa_{kind}" for kind in timing.KINDS}
    results: Case = {"device": {"name": "cpu"}, "checks": checked, "times": rows}
    text = table.summary(results)
    assert "checks: 4 of 4 pass" in text
    assert "40, D 16" in text
    assert table.markdown(results).count("\n| ") > 20


def test_both_loops_are_the_same_attention() -> None:
    case = SMALL | {"kind": "nsa_loop", "lists": "clustered", "dtype": "float64"}
    results = []
    for outer in loops.OUTERMOST:
        module = loops.load(case | {"outer": outer})
        inputs, chosen = loops.arguments(module, case | {"outer": outer})
        results.append(module.attention(*inputs, chosen=chosen))
        assert ("merge_pairs" in kernels_of(Path(module.__file__).read_text())) is (outer == "keys")
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_flops_are_the_exact_counts() -> None:
    count = worker.run(SMALL | {"kind": "nsa_counted"})
    whole = SMALL | {"kind": "nsa_whole"}
    assert count["flops"]["near_forward"] == 2 * 4 * (32 + 16) * sum(min(20, q + 1) for q in range(70))
    known = table.counts({"times": [count]})
    parts = ("entries_compress", "coarse_forward", "chosen_select", "fine_forward", "near_forward")
    assert table.flops(whole, known, "forward") == sum(count["flops"][name] for name in parts)
    given = whole | {"lists": "random"}
    assert table.flops(given, known, "forward") == sum(count["flops"][n] for n in parts if n != "chosen_select")
    assert table.flops(whole | {"kind": "nsa_peer", "peer": "fla", "branch": "whole"}, known, "forward") is None


def test_a_peer_that_runs_out_of_memory_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*_: Any) -> Any:
        def run(*_: Tensor) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")

        return run

    monkeypatch.setattr(timing.peers, "prepare", prepare)
    row = worker.run(SMALL | {"kind": "nsa_peer", "peer": "fla", "branch": "whole"})
    assert "out of memory" in row["failure"]
    assert "out of memory" in table.summary({"device": {}, "checks": [], "times": [row]})


def test_the_adapter_of_fla_hands_over_lists_and_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def parallel_nsa(
        q: Tensor, k: Tensor, v: Tensor, g_cmp: Any, g_slc: Any, g_swa: Any, lists: Any, *rest: Any
    ) -> Tensor:
        seen.update(
            q=q.shape, k=k.shape, gates=[g is None for g in (g_cmp, g_slc, g_swa)], lists=lists.shape, rest=rest
        )
        return q[..., :1] * v.repeat_interleave(q.shape[2] // v.shape[2], 2)

    package = ModuleType("fla.ops.nsa")
    vars(package)["parallel_nsa"] = parallel_nsa
    for name, module in (("fla", ModuleType("fla")), ("fla.ops", ModuleType("fla.ops")), ("fla.ops.nsa", package)):
        monkeypatch.setitem(sys.modules, name, module)
    row = worker.run(SMALL | {"kind": "nsa_peer", "peer": "fla", "branch": "fine", "lists": "random", "once": True})
    assert "failure" not in row, row
    assert seen == {"q": (1, 70, 4, 32), "k": (1, 70, 2, 32), "gates": [True, False, True], "lists": (1, 70, 2, 4),
                    "rest": (4, 16, 0)}  # fmt: skip


def test_what_is_not_installed_is_said() -> None:
    assert set(peers.found()) == set(peers.NAMES)
    row = worker.run(SMALL | {"kind": "nsa_peer", "peer": "flash_nsa", "branch": "fine", "lists": "random"})
    assert "flash_nsa" in row["absent"]


@pytest.mark.slow
def test_the_command_runs_dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "dry.json"
    words = ["run", "--suite", "nsa", "--dry", "--lengths", "40", "--part", "correctness", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    assert command.main() == 0
    results = json.loads(out.read_text())
    assert len(results["checks"]) == 8
    assert out.with_suffix(".md").is_file()
