"""arguments: inputs whose arguments the module's public functions cannot have.

A name that stays inside of a module is written so that it meets nothing there; an argument is what the caller writes.
"""

from __future__ import annotations

from spdsl.ir.pattern import Choice, Input, Query, Stream, Tensor, Weight
from spdsl.passes.names import Names

# Arguments and attributes of every generated module.
MODULE_WORDS = frozenset(
    "gates return_lse return_counts phase where how rows block_table seq_lens cu_seqlens_q max_seqlen_q states"
    " state_rows new_tokens cu_seqlens max_seqlen cu_seqlens_k max_seqlen_k lengths side q_offset k_offset"
    " scale cache page capacity batch attention reference launch Cache tensors spans".split()
)


def check_arguments(names: Names) -> None:
    """Reports inputs that are named like a word of every module, and two that would come as one argument."""
    taken: dict[str, str] = {}
    for found in names.inputs:
        if found.name in MODULE_WORDS and not isinstance(found, Stream) and _given(found):
            names.report.error(
                "E104", f"`{found.name}` cannot be bound", names.spans.get(found.name, found.span),
                "has a meaning of its own", hint="choose another name",
            )  # fmt: skip
            continue
        for text in arguments(found):
            if text in taken:
                _refuse(names, found, f"the generated module would have two `{text}`, the other from `{taken[text]}`")
            taken.setdefault(text, found.name)
        if found.name.startswith("_") and _given(found):
            _refuse(names, found, "fields of a named tuple do not start with an underscore")


def arguments(found: Input) -> tuple[str, ...]:
    """The arguments that an input becomes; a set is known by its first row tile, too."""
    if isinstance(found, Stream):
        given = (found.key_argument, found.value_argument) if _given(found) else ()
        return tuple(text for text in given if text)
    if isinstance(found, Choice) and not (found.listed or found.selected):
        return found.name, f"{found.name}_first"
    return (found.name,) if _given(found) else ()


def _given(found: Input) -> bool:
    """Whether it comes from the caller; what is compressed brings weights."""
    if isinstance(found, Query):
        return found.source is None
    return not isinstance(found, Stream) or found.compress is None


def _refuse(names: Names, found: Input, why: str) -> None:
    if found.name in names.refused:
        return
    what = {
        Query: "a query", Stream: "a stream", Tensor: "a tensor", Weight: "a weight", Choice: "a set of the caller",
    }[type(found)]  # fmt: skip
    names.report.error(
        "E104", f"`{found.name}` cannot name {what}", found.span, "taken", note=why, hint="choose another name"
    )
