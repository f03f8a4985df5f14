"""Every kernel of every pattern on four architectures: fits, uses matrix instructions, repeats none, does not spill."""

from __future__ import annotations

import io
from itertools import product

import pytest

pytestmark = pytest.mark.crosscompile

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from rich.console import Console  # noqa: E402

import spdsl  # noqa: E402
from spdsl import targets  # noqa: E402
from spdsl.machine import report  # noqa: E402
from spdsl.machine.record import record  # noqa: E402
from spdsl.machine.survey import TOKENS  # noqa: E402
from spdsl.resources import folder  # noqa: E402
from tests.crosscompile.kernels import Dims, compiled, kernels, kind, load  # noqa: E402
from tests.crosscompile.spills import FEW, ON_HOPPER, most_spills  # noqa: E402

# Those that choose units have a test of their own, and of their other kernels the full product.
CHOOSING = ("infllm_v2", "moba", "msa_minimax", "nsa", "seer_attention", "vsa", "xattention")
PATTERNS = sorted(path.stem for path in folder("patterns").glob("*.spat"))
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DIMS = ((24, 24), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
MAIN = ("forward", "dq", "dkdv")
PHASES = ("train", "prefill", "decode")

# In the usual part the range form and the list form stand for the others on all targets; other head dims and dtypes of
# theirs are compiled for one target in turn, each dims on another one in either form; so is every other pattern.
LEADING = [(name, "bf16", (128, 128)) for name in ("streaming_llm", "document")]
OTHERS = [(name, "bf16", (128, 128)) for name in PATTERNS if name not in (*CHOOSING, *(case[0] for case in LEADING))]
USUAL = [(name, "bf16", dims) for name in ("streaming_llm", "document") for dims in ((64, 64), (192, 128), (256, 256))]
USUAL += [("streaming_llm", "fp16", (64, 64)), ("streaming_llm", "fp32", (64, 64)), ("streaming_llm", "bf16", (80, 80))]
IN_TURN = ("sm_80", "sm_90", "sm_100", "sm_100", "gfx942", "sm_90", "gfx942", "sm_90", "sm_80")
CHOSEN = {(*case, target) for case in LEADING for target in TARGETS}
CHOSEN |= {(*case, TARGETS[i % len(TARGETS)]) for i, case in enumerate(OTHERS)}
CHOSEN |= {(*case, target) for case, target in zip(USUAL, IN_TURN, strict=True)}
EVERY = list(product(PATTERNS, ("bf16", "fp16", "fp32"), DIMS, TARGETS))
CASES = [case if case in CHOSEN else pytest.param(*case, marks=pytest.mark.full) for case in EVERY]

# Elsewhere the forward kernel of prefill, which is that of train with a page table, is left out.
PREFILLED = {(name, (128, 128)) for name in ("streaming_llm", "document", "alibi")}
CLEAN = ("causal", "sliding_window", "streaming_llm", "alibi", "document")
# Both dtypes of the range form and of the list form; of the others, the one that `test_kernels` leaves out. The two
# plainest ones differ from the range form by less than it does from itself at other dims.
HOPPER = [(name, "fp16", (128, 128)) for name in CLEAN]
HOPPER += [(name, "fp16", (64, 64)) for name in ("streaming_llm", "alibi", "document")]
HOPPER += [(name, "bf16", dims) for name in ("streaming_llm", "document") for dims in ((64, 64), (128, 128))]
EVERY_HOPPER = [(name, dtype, dims) for name in CLEAN for dtype in ("bf16", "fp16") for dims in ((64, 64), (128, 128))]


def named(one: str | Dims) -> str:
    return one if isinstance(one, str) else f"{one[0]}/{one[1]}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("pattern, dtype, dims, target", CASES, ids=named)
def test_kernels(pattern: str, dtype: str, dims: Dims, target: str) -> None:
    phases = PHASES if (pattern, dims) in PREFILLED else ("train", "decode")
    found = list(kernels(pattern, target, dtype, dims, phases))
    assert {kind(one) for one in found} >= {*MAIN, *(["decode"] if "decode" in load(pattern).PHASES else [])}
    for one in found:
        assert one.ok, f"{one.kernel}: {one.error}"
        assert one.shared <= one.shared_limit, f"{one.kernel}: {one.shared} bytes of shared memory"
        assert one.fits, f"{one.kernel}: {one.occupancy}"
        assert one.spills <= most_spills(pattern, kind(one), target, dtype, dims), f"{one.kernel}: {one.spills} spills"
        assert one.tensor_core_instructions > 0 or kind(one) not in (*MAIN, "decode"), one.kernel
        assert one.computed == 1, f"{one.kernel}: {one.products}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "pattern, dtype, dims",
    [case if case in HOPPER else pytest.param(*case, marks=pytest.mark.full) for case in EVERY_HOPPER],
    ids=named,
)
def test_hopper(pattern: str, dtype: str, dims: Dims) -> None:
    """Warp-group products in forward, dQ and dK/dV, and nothing in local memory (from triton 3.7 on)."""
    found = {kind(one): one for one in kernels(pattern, "sm_90", dtype, dims, ("train",))}
    for name in MAIN:
        assert found[name].mma("wgmma") > 0, name
        assert found[name].spills <= (ON_HOPPER if name == "dkdv" else 0), f"{name}: {found[name].spills} spills"
        # One block of dK and dV with loads ahead, or two on an SM without.
        assert found[name].async_copies > 0 or found[name].occupancy.blocks > 1, name


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), pytest.param((256, 256), marks=pytest.mark.full)])
def test_small_shared_memory(dims: Dims) -> None:
    """What the tables give an architecture with 99 KB a block (here sm_89, by those of sm_80) fits."""
    for one in kernels("streaming_llm", "sm_89", "bf16", dims, PHASES):
        assert one.ok, f"{one.kernel}: {one.error}"
        assert one.fits, f"{one.kernel}: {one.shared} bytes of shared memory"


def test_strides_that_are_no_multiples_of_16() -> None:
    """They compile, and the report shows what they cost: narrow loads and no asynchronous copies of k and v."""
    module, gpu = load("streaming_llm"), targets.find("sm_90")
    found = []
    for width in (128, 129):
        q, k, v = (torch.zeros(2, heads, TOKENS, width, dtype=torch.bfloat16)[..., :128] for heads in (8, 2, 2))
        (launch,) = record(module, lambda q=q, k=k, v=v: module.attention(q, k, v))
        found.append(compiled(launch, gpu))
    aligned, odd = found
    assert odd.ok, odd.error
    assert odd.fits
    assert aligned.code.widest_load == 128
    assert odd.code.widest_load < 128
    assert odd.async_copies < aligned.async_copies
    text = io.StringIO()
    Console(file=text, width=200).print(report.report(found))
    rows = [line for line in text.getvalue().splitlines() if "attend_forward" in line and "│" in line]
    for row, one in zip(rows, found, strict=True):
        cells = [cell.strip() for cell in row.strip("│┃ ").split("│")]
        assert int(cells[-1]) == one.code.widest_load
        copies = ", ".join(f"{count} {name}" for name, count in one.code.async_copies) or "none"
        assert cells[-2] == copies


# Numbers of the caller for each pair: of the mask, of the bias, of both.
OF_PAIRS = {
    "mask": "causal m = tensor(query, token, bool) return attend(where(m[q][k]))",
    "bias": "causal b = tensor(head, query, token) return attend(all, bias = b[h][q][k])",
    "both": "m = tensor(query, token, bool) b = tensor(head, query, token) "
    "return attend(where(m[q][k]), bias = b[h][q][k])",
}
USUAL_PAIRS = [("mask", (128, 128), "sm_90"), ("bias", (128, 128), "gfx942")]
EVERY_PAIRS = [(name, dims, target) for name in OF_PAIRS for dims in DIMS[1:] for target in TARGETS]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name, dims, target",
    [case if case in USUAL_PAIRS else pytest.param(*case, marks=pytest.mark.full) for case in EVERY_PAIRS],
    ids=named,
)
def test_numbers_for_each_pair(name: str, dims: Dims, target: str) -> None:
    """They take shared memory where they are loaded ahead, and registers: to memory goes none at 128 or few."""
    module = spdsl.load(f"pattern pairs {{ {OF_PAIRS[name].replace(' return', chr(10) + 'return')} }}")
    phases = ("train", "decode") if (name, dims, target) in USUAL_PAIRS else PHASES
    for one in kernels(module, target, "bf16", dims, phases):
        assert one.ok, f"{one.kernel}: {one.error}"
        assert one.fits, f"{one.kernel}: {one.shared} bytes of shared memory"
        few = FEW if max(dims) > 128 or target in ("sm_80", "sm_100") else ON_HOPPER
        assert one.spills <= few, f"{one.kernel}: {one.spills} spills"
        assert one.computed == 1, f"{one.kernel}: {one.products}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_80", marks=pytest.mark.full)])
def test_a_scale_of_the_call(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that get it as an argument spill no more than those of which it is a constant."""
    module = load("streaming_llm")
    monkeypatch.setattr(module.rt, "scale_of", lambda q, layout: 0.1)
    found = list(kernels(module, target, "bf16", (128, 128), ("train", "decode")))
    assert {kind(one) for one in found} >= {*MAIN, "decode"}
    for one in found:
        assert one.ok, f"{one.kernel}: {one.error}"
        limit = most_spills("streaming_llm", kind(one), target, "bf16", (128, 128))
        assert one.spills <= limit, f"{one.kernel}: {one.spills} spills"
