"""What an iteration multiplies and loads, from a text of Triton's GPU dialect, by hand."""

from __future__ import annotations

from spdsl.machine.loop_work import innermost
from spdsl.machine.products import products

# Eight warps on 64 rows compute the first product twice; a loop around has a product, too, and one behind it has none.
TEXT = """#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 64, 16]}>
#wide = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 2], instrShape = [16, 64, 16]}>
module {
  tt.func public @kernel() {
    %before = tt.load %x : tensor<64x!tt.ptr<f32>, #blocked> loc(#loc)
    %outer = scf.for %i = %a to %b step %c iter_args(%d = %e) -> (f32)  : i32 {
      %q = tt.dot %f, %g, %h : tensor<64x32xbf16, #x> * tensor<32x64xbf16, #y> -> tensor<64x64xf32, #mma> loc(#loc)
      %inner = scf.for %j = %a to %b step %c iter_args(%k = %e) -> (f32)  : i32 {
        %number = tt.load %y : !tt.ptr<i32> loc(#loc)
        %0 = ttg.async_copy_global_to_local %p, %t : tensor<64x128x!tt.ptr<bf16>, #blocked> -> <64x128xbf16, #shared, #smem>
        ttng.async_tma_copy_global_to_local %u[%v, %w] %t, %n, %o : !tt.tensordesc<tensor<64x64xbf16, #shared>>, !ttg.memdesc<1xi64>
        %s = ttng.warp_group_dot %l, %m, %z {isAsync = true} : !ttg.memdesc<64x128xbf16, #shared, #smem> * !ttg.memdesc<128x64xbf16, #shared1, #smem> -> tensor<64x64xf32, #mma> loc(#loc)
        %r = ttng.warp_group_dot %l, %m, %z : tensor<64x64xbf16, #x> * !ttg.memdesc<64x128xbf16, #shared, #smem> -> tensor<64x128xf32, #wide> loc(#loc)
        scf.yield %r : f32 loc(#loc)
      } loc(#loc)
      %last = tt.load %y : tensor<64x64x!tt.ptr<bf16>, #blocked> loc(#loc)
      scf.yield %inner : f32 loc(#loc)
    } loc(#loc)
    %again = scf.for %i = %a to %b step %c iter_args(%d = %e) -> (f32)  : i32 {
      %last = tt.load %y : tensor<64x64x!tt.ptr<bf16>, #blocked> loc(#loc)
      scf.yield %last : f32 loc(#loc)
    } loc(#loc)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""  # noqa: E501


def test_the_innermost_loop() -> None:
    """64 x 64 numbers of 128 products, and 64 x 128 of 64; a number, a tile by pointers, a tile by a descriptor."""
    (work,) = innermost(TEXT)
    assert [(one.rows, one.columns, one.depth, one.times) for one in work.products] == [
        (64, 64, 128, 2),
        (64, 128, 64, 1),
    ]
    assert work.multiplied == 64 * 64 * 128 + 64 * 128 * 64
    assert work.executed == 2 * 64 * 64 * 128 + 64 * 128 * 64
    assert work.loaded == 4 + 64 * 128 * 2 + 64 * 64 * 2


def test_all_loops_have_their_products() -> None:
    """The one of the loop around first, as it stands there."""
    assert [(one.depth, one.times) for one in products(TEXT)] == [(32, 2), (128, 2), (64, 1)]


def test_nothing() -> None:
    assert innermost("") == ()
    assert innermost(TEXT.replace("dot", "dots")) == ()
