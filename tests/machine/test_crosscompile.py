"""Launches recorded from a small module, compiled for GPUs that are not there."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest

pytestmark = pytest.mark.crosscompile

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from rich.console import Console  # noqa: E402

from spdsl import targets  # noqa: E402
from spdsl.machine import report as reporting  # noqa: E402
from spdsl.machine.crosscompile import Compiled, compile_launch  # noqa: E402
from spdsl.machine.machine_code import read_amdgcn, read_sass  # noqa: E402
from spdsl.machine.occupancy import occupancy  # noqa: E402
from spdsl.machine.record import Launch, record, specialise  # noqa: E402
from spdsl.runtime.launch import launch as launching  # noqa: E402

TOY = """
import torch
import triton
import triton.language as tl

from spdsl.runtime import rt


@triton.jit
def scores(q, k, out, length, stride, extra, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, DIM)
    columns = tl.arange(0, BLOCK_N)
    mine = tl.load(q + rows[:, None] * stride + dims[None, :])
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, length, BLOCK_N):
        theirs = tl.load(k + (start + columns)[:, None] * stride + dims[None, :])
        total = tl.dot(mine, tl.trans(theirs), total)
    if extra is not None:
        total += tl.load(extra)
    tl.store(out + rows[:, None] * BLOCK_N + columns[None, :], total)


@triton.jit
def refused(q, BLOCK: tl.constexpr):
    tl.store(q + tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK))


def run(q, k, extra=None, block_m=64, block_n=64, num_warps=4, num_stages=2):
    out = torch.empty(q.shape[0], block_n, dtype=torch.float32, device=q.device)
    sizes = dict(BLOCK_M=block_m, BLOCK_N=block_n, DIM=128)
    grid = (q.shape[0] // block_m,)
    call = (q, k, out, k.shape[0], q.stride(0), extra)
    rt.launch(scores, grid, *call, num_warps=num_warps, num_stages=num_stages, **sizes)
    return out


def run_refused(q):
    rt.launch(refused, (1,), q, num_warps=4, num_stages=1, BLOCK=64)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    path = tmp_path_factory.mktemp("toy") / "toy.py"
    path.write_text(TOY, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("spdsl_toy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["spdsl_toy"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["spdsl_toy"]


def rows(stride: int = 128, count: int = 128) -> torch.Tensor:
    """Rows of 128 elements that lie `stride` elements apart; 100 makes them overlap, which no one reads."""
    return torch.empty(count * stride + 128, dtype=torch.bfloat16).as_strided((count, 128), (stride, 1))


def one(toy: ModuleType, stride: int = 128, **sizes: int) -> Launch:
    launches = record(toy, lambda: toy.run(rows(stride), rows(stride), **sizes))
    assert len(launches) == 1
    return launches[0]


@pytest.fixture(scope="module")
def hopper(toy: ModuleType) -> Compiled:
    return compile_launch(one(toy), targets.find("h200"))


def test_record_restores_the_library(toy: ModuleType) -> None:
    launches = record(toy, lambda: [toy.run(rows(), rows()) for _ in range(3)])
    assert len(launches) == 1
    assert launching._start is None
    assert launching.KERNELS_ON_CPU is False


def test_record_restores_after_an_error(toy: ModuleType) -> None:
    with pytest.raises(ZeroDivisionError):
        record(toy, lambda: 1 / 0)
    assert launching._start is None
    assert launching.KERNELS_ON_CPU is False


def test_signature(toy: ModuleType) -> None:
    launch = one(toy)
    types = {a.name: a.type for a in launch.arguments}
    assert types["q"] == "*bf16"
    assert types["out"] == "*fp32"
    assert types["stride"] == "i32"
    assert launch.constexprs == {"extra": None, "BLOCK_M": 64, "BLOCK_N": 64, "DIM": 128}
    assert launch.options == (("num_stages", 2), ("num_warps", 4))


def test_divisibility_of_strides_is_seen(toy: ModuleType) -> None:
    known, unknown = one(toy, stride=128), one(toy, stride=100)
    position = [a.name for a in known.arguments].index("stride")
    assert known.attributes("cuda")[(position,)] == [["tt.divisibility", 16]]
    assert (position,) not in unknown.attributes("cuda")
    assert known.key != unknown.key


def test_misaligned_view_is_seen(toy: ModuleType) -> None:
    flat = torch.empty(129 * 128, dtype=torch.bfloat16)
    moved = flat[1:].as_strided((128, 128), (128, 1), 1)
    (launch,) = record(toy, lambda: toy.run(moved, rows()))
    assert (0,) not in launch.attributes("cuda")
    assert launch.attributes("hip")[(0,)] == [["tt.pointer_range", 32]]


def test_same_as_triton_itself(toy: ModuleType) -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    from triton.backends.compiler import GPUTarget

    if not hasattr(jit.JITFunction, "_pack_args"):
        pytest.skip("this triton binds arguments in another way")
    args = (rows(), rows(100), rows(), 1, 2**33, None)
    named = {"BLOCK_M": 64, "BLOCK_N": 64, "DIM": 128, "num_warps": 8}
    for backend, arch, width in (("cuda", 90, 32), ("hip", "gfx942", 64)):
        maker = triton_backend(GPUTarget(backend, arch, width))
        bind = jit.create_function_from_signature(toy.scores.signature, toy.scores.params, maker)
        bound, special, options = bind(*args, **named)
        _, signature, constexprs, attrs = toy.scores._pack_args(maker, {"num_warps": 8}, bound, special, options)
        source = specialise(toy.scores, args, named).source(backend)
        assert source.signature == signature
        assert source.constants == constexprs
        assert source.attrs == {place: known for place, known in attrs.items() if known}


def triton_backend(target: object) -> object:
    from triton.compiler.compiler import make_backend

    return make_backend(target)


def test_module_without_a_library() -> None:
    with pytest.raises(RuntimeError, match="module empty has no library: not made by spdsl"):
        record(ModuleType("empty"), lambda: None)


def test_interpreter_is_refused(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = one(toy)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        record(toy, lambda: None)
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        compile_launch(launch, targets.find("h100"))


def test_hopper(hopper: Compiled) -> None:
    assert hopper.error is None
    assert 32 < hopper.registers < 255
    assert hopper.spills == 0
    assert hopper.code.scratch == 0
    assert hopper.mma("wgmma") > 0
    assert hopper.mma("mma") == 0
    assert hopper.async_copies > 0
    assert hopper.code.widest_load == 128
    # 64 rows of q and two stages of 64 rows of k would be 48 KB; q and k are 128 wide, in bf16
    assert hopper.shared >= 3 * 64 * 128 * 2
    assert hopper.fits
    assert hopper.occupancy.blocks >= 2


@pytest.mark.parametrize(
    ("name", "kind"), [("a100", "mma"), ("rtx4090", "mma"), ("b200", "tcgen05"), ("mi300x", "mfma")]
)
def test_matrix_instructions(toy: ModuleType, name: str, kind: str) -> None:
    target = targets.find(name)
    compiled = compile_launch(one(toy), target)
    assert compiled.error is None
    assert kind == target.mma[0]
    assert compiled.mma(kind) > 0
    assert compiled.registers > 0
    assert compiled.spills == 0
    assert compiled.fits
    assert compiled.code.widest_load == 128


def test_unknown_divisibility_costs_wide_loads(toy: ModuleType, hopper: Compiled) -> None:
    compiled = compile_launch(one(toy, stride=100), targets.find("h200"))
    assert compiled.error is None
    assert compiled.code.widest_load < hopper.code.widest_load
    assert compiled.async_copies < hopper.async_copies


def test_spills_are_seen(toy: ModuleType) -> None:
    launch = one(toy, block_m=128, block_n=256, num_warps=4, num_stages=2)
    hopper, ampere = (compile_launch(launch, targets.find(name)) for name in ("h100", "a100"))
    assert hopper.error is None
    assert ampere.error is None
    assert hopper.registers == 255
    assert hopper.spills > 0
    assert hopper.code.scratch > 0
    # ptxas may give up and leave few registers and very many spills: registers alone say nothing
    assert ampere.spills > 1000
    assert ampere.code.scratch > 1000


def test_too_much_shared_memory_is_seen(toy: ModuleType) -> None:
    launch = one(toy, block_m=128, block_n=128, num_warps=8, num_stages=5)
    small, large = (compile_launch(launch, targets.find(name)) for name in ("rtx4090", "h100"))
    assert small.error is None
    assert large.error is None
    assert small.shared > small.shared_limit == 101_376
    assert not small.fits
    assert small.occupancy.blocks == 0
    assert small.occupancy.limit == "shared"
    assert large.shared <= large.shared_limit
    assert large.fits


def test_a_refused_kernel_is_a_result(toy: ModuleType) -> None:
    (launch,) = record(toy, lambda: toy.run_refused(rows()))
    compiled = compile_launch(launch, targets.find("h100"))
    assert not compiled.ok
    assert not compiled.fits
    assert compiled.error is not None
    assert "128" in compiled.error
    assert "64" in compiled.error


def test_report_of_many(toy: ModuleType) -> None:
    launches = record(toy, lambda: (toy.run(rows(), rows()), toy.run_refused(rows())))
    screen = io.StringIO()
    console = Console(file=screen, width=200, force_terminal=True)
    compiled = reporting.compile_all(launches, [targets.find("h200"), targets.find("gfx942")], console=console)
    assert [(c.kernel, c.target, c.ok) for c in compiled] == [
        ("scores", "h200", True),
        ("scores", "mi300x", True),
        ("refused", "h200", False),
        ("refused", "mi300x", False),
    ]
    assert "4/4" in screen.getvalue()
    console.print(reporting.report(compiled))
    assert "wgmma" in screen.getvalue()
    assert "mfma" in screen.getvalue()
    assert "error" in screen.getvalue()
    data = json.loads(reporting.to_json(compiled))
    assert data[0]["code"]["registers"] == compiled[0].registers
    assert data[0]["constexprs"][0] == ["extra", "None"]
    assert data[2]["error"] == compiled[2].error


def test_serial_gives_the_same(toy: ModuleType, hopper: Compiled) -> None:
    assert reporting.compile_all([one(toy)], [targets.find("h200")], workers=1) == [hopper]


def test_a_compiler_that_dies_costs_one_result(
    toy: ModuleType, hopper: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = one(toy)
    deadly = replace(good, name="deadly")

    def compile_or_die(launch: Launch, target: targets.Target) -> Compiled:
        if launch.name == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        return compile_launch(launch, target)

    monkeypatch.setattr(reporting, "compile_launch", compile_or_die)
    compiled = reporting.compile_all([deadly, good], [targets.find("h200")])
    assert compiled[0].error == "the compiler ended its process"
    assert not compiled[0].fits
    assert compiled[1] == hopper


@pytest.mark.parametrize(
    ("name", "registers", "shared", "warps", "blocks", "limit"),
    [
        ("h100", 32, 0, 4, 16, "warps"),
        ("h100", 168, 0, 4, 3, "registers"),  # 512 // 168 = 3 warps on each scheduler
        ("h100", 255, 0, 8, 1, "registers"),
        ("h100", 64, 114_696, 4, 2, "shared"),
        ("h100", 64, 232_448, 4, 1, "shared"),
        ("h100", 64, 232_449, 4, 0, "shared"),
        ("h100", 16, 0, 1, 32, "blocks"),
        ("rtx4090", 32, 0, 4, 12, "warps"),
        ("mi300x", 144, 0, 4, 3, "registers"),  # 512 // 144 = 3 wavefronts on each SIMD
        ("mi300x", 64, 32_768, 4, 2, "shared"),
    ],
)
def test_occupancy(name: str, registers: int, shared: int, warps: int, blocks: int, limit: str) -> None:
    found = occupancy(targets.find(name), registers, shared, warps)
    assert (found.blocks, found.limit, found.warps) == (blocks, limit, blocks * warps)


def test_sass_reading() -> None:
    sass = """
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;        /* 0x000000 */
        /*0010*/              @!P0 LDG.E.U16 R1, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.64 [R1], desc[UR4][R2.64] ;
        /*0030*/             @!UP1 UTMALDG.2D [UR8], [UR4] ;
        /*0040*/                   STL.64 [R1], R2 ;
        /*0050*/               @P1 LDL R2, [R1] ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0080*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
    """
    code = read_sass(sass, registers=10, scratch=8)
    assert code.spills == 2
    assert code.mma == (("mma", 1), ("tcgen05", 1), ("wgmma", 1))
    assert code.async_copies == (("cp.async", 1), ("tma", 1))
    assert code.widest_load == 64


def test_amdgcn_reading() -> None:
    assembly = """
    global_load_dwordx4 v[0:3], v4, s[0:1]
    buffer_load_dword v1, s[4:7], 0 offen lds
    buffer_load_ushort v1, v2, s[4:7], 0 offen
    v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
    .amdgpu_metadata
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 2
    .vgpr_count:     144
    .vgpr_spill_count: 3
"""
    code = read_amdgcn(assembly)
    assert (code.registers, code.spills, code.scalar_spills, code.scratch) == (144, 3, 2, 12)
    assert code.mma == (("mfma", 1),)
    assert code.async_copies == (("buffer_load_lds", 1),)
    assert code.widest_load == 128
