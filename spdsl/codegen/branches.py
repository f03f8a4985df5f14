"""branches: a branch as an expression over its parts, as each kind of call combines them."""

from __future__ import annotations

from collections.abc import Mapping

from spdsl.codegen.softmax_text import JointText
from spdsl.ir.branch import softmaxes_in
from spdsl.ir.pattern import Branch, Gate, Softmax
from spdsl.passes.joint import leaves

NONE: Mapping[tuple[str, ...], JointText] = {}


def branch_text(branch: Branch, joints: Mapping[tuple[str, ...], JointText] = NONE) -> str:
    """Parts are (out, lse); those of a joint come merged."""
    if isinstance(branch, Gate):
        return f"gate([{', '.join(branch_text(inner, joints) for inner in branch.branches)}], gates)"
    if isinstance(branch, Softmax):
        return _part(branch)
    names = leaves(branch)
    return f"{joints[names].name}_part" if names in joints else f"rt.merge([{_parts(branch)}])"


def cached_text(branch: Branch) -> str:
    """Parts may be splits: all that becomes one goes to one launch."""
    if isinstance(branch, Gate):
        return f"rt.gated([{', '.join(f'[{_parts(inner)}]' for inner in branch.branches)}], gates)"
    if isinstance(branch, Softmax):
        return f"rt.merged_part({_parts(branch)})"
    return f"rt.merged_parts([{_parts(branch)}])"


def _parts(branch: Branch) -> str:
    """A merge of merges is one merge."""
    return ", ".join(_part(softmax) for softmax in softmaxes_in(branch))


def _part(softmax: Softmax) -> str:
    """Of every query; rows of cells are spread over theirs."""
    own = f"{softmax.name}_part"
    return own if softmax.rows == 1 else f"rt.part_of_queries({own}, inputs.{softmax.query}_rows)"
