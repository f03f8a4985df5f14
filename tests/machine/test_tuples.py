"""Kernels whose arguments are named tuples: specialised leaf by leaf, as Triton's own launcher does."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.crosscompile

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from spdsl import targets  # noqa: E402
from spdsl.machine.crosscompile import compile_launch  # noqa: E402
from spdsl.machine.launches import Launch, specialise  # noqa: E402
from spdsl.machine.record import record  # noqa: E402

TOY = """
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spdsl.runtime import rt


class Strided(NamedTuple):
    data: torch.Tensor
    head: int
    token: int


class Moved(NamedTuple):
    data: torch.Tensor
    head: int
    token: int


class Keys(NamedTuple):
    k: Strided
    count: int
    spans: torch.Tensor | None
    GROUP: tl.constexpr


class Const(NamedTuple):
    BLOCK: tl.constexpr
    ACC: tl.constexpr


@triton.jit
def sums(keys, out, C):
    count = keys.count
    if keys.spans is not None:
        count = tl.load(keys.spans)
    rows = tl.arange(0, C.BLOCK)
    head = tl.program_id(0) // keys.GROUP
    pointers = keys.k.data + head * keys.k.head + rows[:, None] * keys.k.token + rows[None, :]
    tile = tl.load(pointers, mask=rows[:, None] < count, other=0.0)
    tl.store(out.data + rows * out.token, tl.sum(tile.to(C.ACC), 1))


@triton.jit(do_not_specialize=["keys"], do_not_specialize_on_alignment=["out"])
def reserved(keys, out, C):
    tl.store(out.data, keys.count)


def run(k, group=4, count=64, spans=None, kind=Strided, grid=(8,)):
    out = torch.empty(64, dtype=torch.float32)
    keys = Keys(kind(k, k.stride(0), k.stride(1)), count, spans, tl.constexpr(group))
    constants = Const(tl.constexpr(64), tl.constexpr(tl.float32))
    rt.launch(sums, grid, keys, Strided(out, 64, 1), constants, num_warps=4, num_stages=1)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    path = tmp_path_factory.mktemp("toy") / "tuples.py"
    path.write_text(TOY, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("spdsl_toy_tuples", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["spdsl_toy_tuples"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["spdsl_toy_tuples"]


def heads(token: int = 64) -> torch.Tensor:
    """Two heads of 64 rows of 64 elements; rows lie `token` elements apart."""
    return torch.empty(2, 64, token, dtype=torch.bfloat16)[..., :64]


def one(toy: ModuleType, k: torch.Tensor, **sizes: Any) -> Launch:
    (launch,) = record(toy, lambda: toy.run(k, **sizes))
    return launch


def test_leaves(toy: ModuleType) -> None:
    launch = one(toy, heads())
    assert [(path, name, leaf.type) for path, name, leaf in launch.leaves()] == [
        ((0, 0, 0), "keys.k.data", "*bf16"),
        ((0, 0, 1), "keys.k.head", "i32"),
        ((0, 0, 2), "keys.k.token", "i32"),
        ((0, 1), "keys.count", "i32"),
        ((0, 2), "keys.spans", "constexpr"),
        ((0, 3), "keys.GROUP", "constexpr"),
        ((1, 0), "out.data", "*fp32"),
        ((1, 1), "out.head", "i32"),
        ((1, 2), "out.token", "constexpr"),
        ((2, 0), "C.BLOCK", "constexpr"),
        ((2, 1), "C.ACC", "constexpr"),
    ]
    assert launch.constexprs == {
        "keys.spans": None,
        "keys.GROUP": 4,
        "out.token": 1,
        "C.BLOCK": 64,
        "C.ACC": tl.float32,
    }
    assert launch.source("cuda").signature["keys"].k == toy.Strided("*bf16", "i32", "i32")


def test_each_leaf_counts(toy: ModuleType) -> None:
    known = one(toy, heads())
    changes: list[dict[str, Any]] = [
        {"k": heads(72)},  # rows that are no multiple of 16 elements apart
        {"k": heads(), "group": 2},
        {"k": heads(), "count": 1},
        {"k": heads(), "count": 63},
        {"k": heads(), "spans": torch.zeros(2, dtype=torch.int32)},
        {"k": heads(), "kind": toy.Moved},
    ]
    keys = {one(toy, **change).key for change in changes}
    assert len(keys | {known.key}) == 1 + len(changes)
    assert one(toy, heads(), count=48).key == known.key
    assert (0, 0, 2) in known.attributes("cuda")
    assert (0, 0, 2) not in one(toy, heads(72)).attributes("cuda")


def test_an_empty_grid_is_no_launch(toy: ModuleType) -> None:
    assert record(toy, lambda: toy.run(heads(), grid=(8, 0))) == []


def test_unknown_leaf(toy: ModuleType) -> None:
    with pytest.raises(TypeError, match="argument GROUP: a kernel takes"):
        specialise(toy.sums, (toy.Keys(None, 1, None, "four"), None, None), {})


@pytest.mark.parametrize(("backend", "arch", "width"), [("cuda", 90, 32), ("hip", "gfx942", 64)])
@pytest.mark.parametrize("kernel", ["sums", "reserved"])
def test_same_as_triton_itself(toy: ModuleType, kernel: str, backend: str, arch: int | str, width: int) -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    function = getattr(toy, kernel)
    if not hasattr(function, "_pack_args"):
        pytest.skip("this triton binds arguments in another way")
    flat = heads().flatten()
    keys = toy.Keys(toy.Strided(flat[1:], 1, 2**40), 0, flat, tl.constexpr(4))
    out = (True, 1.5, (7, 2**63), (), None, toy.Moved(flat[8:], -16, tl.constexpr(tl.float32)))
    args = (keys, out, toy.Const(tl.constexpr(0.125), tl.constexpr("ieee")))
    maker = make_backend(GPUTarget(backend, arch, width))
    bind = jit.create_function_from_signature(function.signature, function.params, maker)
    bound, special, options = bind(*args, num_warps=8)
    _, signature, constexprs, attrs = function._pack_args(maker, {"num_warps": 8}, bound, special, options)
    source = specialise(function, args, {"num_warps": 8}).source(backend)
    assert source.signature == signature
    assert [type(x) for x in source.signature.values()] == [type(x) for x in signature.values()]
    assert source.constants == {path: getattr(value, "value", value) for path, value in constexprs.items()}
    assert source.attrs == {path: known for path, known in attrs.items() if known}


@pytest.mark.parametrize("name", ["h100", "mi300x"])
def test_compiles(toy: ModuleType, name: str) -> None:
    compiled = compile_launch(one(toy, heads()), targets.find(name))
    assert compiled.error is None
    assert compiled.registers > 0
    assert compiled.code.widest_load == 128
    assert ("C.ACC", "fp32") in compiled.constexprs
