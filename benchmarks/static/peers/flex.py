"""FlexAttention's kernels, as Inductor would print them for a causal window: its templates with our numbers.

The templates are those of the installed torch. Inductor prints them for tensors on a GPU alone, so the few functions
that they call are answered here, for static shapes and the configurations that Inductor has for sm_90 by default.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import torch

from benchmarks.static.peers.cases import EQUAL, HEADS, KV_HEADS, TOKENS, WINDOW, Case

NAME, FOLDER = "FlexAttention", "torch/_inductor/kernel/flex"
FILE = "torch/_inductor/kernel/flex/templates/flex_attention.py.jinja"
SPARSE = 128  # rows and keys of its block masks
HEAD = """import triton
import triton.language as tl

@triton.jit
def {name}({arguments}, out):
{defines}
{renames}
"""
WINDOWED = f"mask_mod_output = ({{m}} >= {{n}}) & ({{m}} - {{n}} < {WINDOW})"
COMMON: dict[str, Any] = {
    "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False, "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False, "FLOAT32_PRECISION": "'ieee'", "IS_DIVISIBLE": True,
    "SM_SCALE": EQUAL[0] ** -0.5, "GQA_SHARED_HEADS": HEADS // KV_HEADS, "HAS_FULL_BLOCKS": True, "USE_TMA": False,
    "QK_HEAD_DIM": EQUAL[0], "QK_HEAD_DIM_ROUNDED": EQUAL[0], "V_HEAD_DIM": EQUAL[1], "V_HEAD_DIM_ROUNDED": EQUAL[1],
    "SAFE_HEAD_DIM": True, "SPARSE_Q_BLOCK_SIZE": SPARSE, "SPARSE_KV_BLOCK_SIZE": SPARSE, "INDEX_DTYPE": "tl.int32",
}  # fmt: skip
# torch/_inductor/template_heuristics: `h100_default_flex_config` and "sm90" at 128, bf16
FORWARD = COMMON | {"BLOCK_M": 128, "BLOCK_N": 64}
BACKWARD = COMMON | {"BLOCK_M1": 64, "BLOCK_N1": 128, "BLOCK_M2": 128, "BLOCK_N2": 64}
WARPS, STAGES = 8, 3
_BLOCKS = TOKENS // SPARSE
_QUERY, _KEY = (1, HEADS, TOKENS, EQUAL[0]), (1, KV_HEADS, TOKENS, EQUAL[0])
_NUMBERS, _INDICES = (1, 1, _BLOCKS), (1, 1, _BLOCKS, _BLOCKS)


def cases(root: Path) -> Iterator[Case]:
    """Forward, and the two kinds of loops of the one kernel of the backward."""
    folder = (root / FILE).parent
    shared = ["utilities", "common"]
    forward = load("flex_forward", folder, ["flex_attention", *shared], FORWARD)
    backward = load("flex_backward", folder, ["flex_backwards", "utilities"], BACKWARD)
    qk, v = EQUAL

    def start(module: ModuleType, name: str) -> object:
        types = [_type(argument) for argument in module.ARGUMENTS]
        return getattr(module, name)[(1,)](*types, types[0], num_warps=WARPS, num_stages=STAGES)

    yield Case(
        "flex_forward", "near_forward", EQUAL, qk + v, lambda: start(forward, "flex_forward"),
        pattern="nsa 128",
    )  # fmt: skip
    for beside, per_pair in (("near_dq", 2 * qk + v), ("near_dkdv", 2 * (qk + v))):
        yield Case(
            "flex_backward", beside, EQUAL, per_pair,
            lambda: start(backward, "flex_backward"), pairs=64 * 128, pattern="nsa 128",
        )  # fmt: skip


def load(name: str, folder: Path, parts: list[str], constants: Mapping[str, Any]) -> ModuleType:
    """A module with the kernel `name` and ARGUMENTS, the names of its tensors."""
    source = "".join((folder / f"{part}.py.jinja").read_text(encoding="utf-8") for part in parts)
    arguments: list[str] = []
    text = _rendered(source, name, constants, arguments)
    path = Path(tempfile.mkdtemp(prefix="flex-"), f"{name}.py")  # triton reads the source of a kernel from its file
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    module.ARGUMENTS = arguments  # type: ignore[attr-defined]
    return module


def _rendered(source: str, name: str, constants: Mapping[str, Any], arguments: list[str]) -> str:
    def def_kernel(*names: str) -> str:
        arguments.extend(names)
        return HEAD.format(
            name=name,
            arguments=argdefs(),
            defines=_indented(defines(), 1),
            renames=_indented("\n".join(f"{one} = arg_{one}" for one in arguments), 1),
        )

    def argdefs() -> str:
        return ", ".join(f"arg_{one}" for one in arguments)

    def defines() -> str:
        return "\n".join(f"{constant} : tl.constexpr = {value}" for constant, value in constants.items())

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)  # noqa: S701 (no HTML)
    environment.filters["indent_except_first"] = lambda text, levels: _indented(text, levels).lstrip()
    template = environment.from_string(source)
    return template.render(
        **constants, def_kernel=def_kernel, gen_argdefs=argdefs, gen_defines=defines, size=_size, stride=_stride,
        modification=_modification, store_output=_store_output,
    )  # fmt: skip


def _modification(subgraph_number: int, output_name: str | None, **values: Any) -> str:
    """A score that stays as it is, its gradient, the mask of the window, and nothing that is captured."""
    if output_name == "mask_mod_output":
        return WINDOWED.format(m=values["m"], n=values["n"])
    if output_name == "grad_scores":
        return f"grad_scores = {values['grad_score_mod']}"
    return f"{output_name} = {values['score']}" if output_name else "pass"


def _store_output(
    indices: tuple[str, ...], value: str, mask: str | None = None, indent_width: int = 4, **_: Any
) -> str:
    strides = _strides("K" if value == "dk" else "Q")
    place = " + ".join(f"({one}) * {stride}" for one, stride in zip(indices, strides, strict=True))
    return f"tl.store(out + tl.broadcast_to({place}, {value}.shape), {value}, {mask})"


def _shape(name: str) -> tuple[int, ...]:
    if name.endswith("_NUM_BLKS"):
        return _NUMBERS
    if name.endswith("_IDX"):
        return _INDICES
    return _KEY if name in ("K", "V", "DV") else _QUERY


def _strides(name: str) -> tuple[int, ...]:
    return torch.empty(_shape(name), device="meta").stride()


def _size(name: str, axis: int) -> int:
    return _shape(name)[axis]


def _stride(name: str, axis: int | None = None) -> str:
    strides = _strides(name)
    return ", ".join(map(str, strides)) if axis is None else str(strides[axis])


def _type(argument: str) -> torch.Tensor:
    kinds = {"LSE": torch.float32, "MAX": torch.float32, "DELTA": torch.float32}
    whole = torch.int32 if argument.endswith(("_BLKS", "_IDX")) else torch.bfloat16
    return torch.zeros(16, dtype=kinds.get(argument, whole))


def _indented(text: str, levels: int) -> str:
    return "\n".join("    " * levels + line for line in text.splitlines())
