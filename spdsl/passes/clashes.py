"""clashes: inputs and branches whose names would hide something of the generated module.

A tensor, query or choice becomes an argument; a stream becomes two arguments and a name inside the kernels; a softmax
becomes the first part of definitions. Sets and parameters leave no name behind and are free.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from spdsl.ir.pattern import Choice, Input, Query, Softmax, Stream, Tensor, Weight
from spdsl.passes.names import Names

# Names in the functions of a module that take the inputs as arguments.
ARGUMENT_WORDS = frozenset(
    """
    Any C Cache Callable Cells Corner INTERPRETED Inputs Layout Logits MODULE NamedTuple rt Paged Sequence Splits Tensor
    Tiles U add_parts add_rows attention autocast batch bool buffer by_class cache call call_of certain check_attention
    check_sinks check_weight chosen_argument close_mlp close_streamed columns combine condition config config_for
    constants corner corners ctx cu_seqlens decode decode_config delta delta_of dict dk dlse dout dq dv end
    entry_corners entry_source expect expect_gates finish first form found gate gated gates given_argument gpu_of grads
    group h heads inputs int inverse inverse_of job_tiles jobs k k_at k_first k_last k_offset k_spans key_extremes keys
    kv_heads lanes last launch layout layout_of len length lengths list lists lists_of logits longest lse lse_of max
    max_seqlen maximum may merge merge_parts merged_part merged_parts min minimum most_visited must one_query out own
    packed_constants page_of paged pair_constants pair_lists pair_shape part_lse part_out partial partial_lse parts
    parts_of pending per_unit pool_mlp pool_softmax pool_weighted pooled prefill q q_at q_first q_heads q_last q_offset
    q_spans random_argument reference refuse_gradient return_lse room_like row_extremes rows rows_contiguous run seen
    sequences settle shape sink_gradient sizes sizes_of slice slot_buffer some source spans sparse_forward split_count
    splits step_lists str strided summed t tensor_argument tensors there tokens torch triton tuned tuple turns
    unit_constants unit_inverse unit_list unit_lists unit_mask unit_shape units_backward units_forward uses_kernels v
    v_dim visited wide x
    check_chosen check_given check_tensor check_values checked_layout expect_cache expect_flag expect_tensor length_of
    """.split()
)
# Names in the kernels, where streams stand too.
KERNEL_WORDS = ARGUMENT_WORDS | frozenset(
    """
    LN2 LOG2E NOT_RANKED RowGrads Rows S acc0 acc1 allowed at begin best blocks_until chosen cursor divisor dout0 dout1
    dq0 dq1 entry exists forced inside jit job last left list_head load_lse load_packed_lse load_packed_rows
    load_packed_v load_packed_values load_pair_rows load_pairs load_qk load_row_values load_rows load_step_lse load_v m
    pair position q0 q1 q_count q_origin q_start query range0 ranked ranks row row_delta row_lse row_origin
    rows_of_parts s score scored sequence_keys sink span split start_softmax step steps store_packed_qk store_packed_v
    store_packed_values store_qk store_ranks store_row_values store_units store_v tile tl to_blocks token_pointer total
    unit visit visit_lists visit_step visit_unit visit_units visited zeros
    """.split()
)
_NUMBERED = re.compile(r"(range|scored?_)\d+")  # ranges of a step, scores of units ahead
# A softmax `block` would bring a second `block_lists`.
PREFIX_WORDS = frozenset(
    "append block compress dense dot entries entry gate gather matrix merged of packed pair plain row scatter"
    " sequence sparse unit units visit".split()
)
# Second parts of the definitions of a softmax: with one of them in its name, a second softmax could meet the first's.
TAIL_WORDS = frozenset(
    """
    backward bias block cached class cpu decode dense dkdv dq forward gradients joint kernel keys lists logits mask of
    part parts places reads rows save scores second seen span tensors unit units visible visit visits
    """.split()
)


def clashes(names: Names, softmaxes: tuple[Softmax, ...]) -> None:
    """Reports names of which the module needs one for itself, or two of which come out as one."""
    taken: dict[str, str] = {}
    for found in names.inputs:
        for text in _arguments(found):
            words = KERNEL_WORDS if isinstance(found, Stream) else ARGUMENT_WORDS
            numbered = isinstance(found, Stream) and _NUMBERED.fullmatch(text)
            if (text in words or numbered) and not _predeclared(found):
                _refuse(names, found, f"the generated module has a `{text}` of its own")
            elif text in taken:
                _refuse(names, found, f"the generated module would have two `{text}`, the other from `{taken[text]}`")
            taken.setdefault(text, found.name)
        if found.name.startswith("_"):
            _refuse(names, found, "fields of a named tuple do not start with an underscore")
    _softmaxes(names, softmaxes, taken)


def _predeclared(found: Input) -> bool:
    return found.name in ("q", "kv")


def _arguments(found: Input) -> Iterator[str]:
    """Every name of the generated code that one input becomes."""
    yield found.name
    if isinstance(found, Stream):
        yield from (found.key_argument, f"v_{found.name}", f"{found.name}_keys", f"{found.name}_lists")
    elif isinstance(found, Choice) and found.selected:
        parts = (
            "allowed", "forced", "kernel", "of", "of_rows", "op", "scores_of", "select", "torch", "units",
        )  # fmt: skip
        yield from (f"{found.name}_{part}" for part in parts)
    elif isinstance(found, Choice):
        yield from (f"{found.name}_{part}" for part in ("first", "group", "tiles", "units", "sequence"))
    elif isinstance(found, Tensor):
        yield from (f"{found.name}_{part}" for part in ("sequence", "tokens", "group", *range(len(found.axes))))


def _refuse(names: Names, found: Input, why: str) -> None:
    if found.name in names.refused:
        return
    what = {
        Query: "a query", Stream: "a stream", Tensor: "a tensor", Weight: "a weight", Choice: "a set of the caller",
    }[type(found)]  # fmt: skip
    names.report.error(
        "E104", f"`{found.name}` cannot name {what}", found.span, "taken", note=why, hint="choose another name"
    )


def _softmaxes(names: Names, softmaxes: tuple[Softmax, ...], taken: dict[str, str]) -> None:
    streams = {found.name for found in names.inputs if isinstance(found, Stream)}
    before: dict[str, str] = {}
    for softmax in softmaxes:
        name, why = softmax.name, ""
        classes = name.replace("_", "").lower()
        own = next((text for text in taken if text.startswith(f"{name}_")), None)
        prefix = next((other for other in before.values() if _meets(name, other, streams)), None)
        if name.lstrip("_") in PREFIX_WORDS or name.startswith("_"):
            why = f"the generated module has definitions of its own that start with `{name}`"
        elif own or classes in before or prefix:
            why = (
                f"the generated module would mix up its definitions with those of `{own or prefix or before[classes]}`"
            )
        before[classes] = name
        if why and name not in names.refused:
            names.report.error(
                "E104", f"`{name}` cannot name a softmax", softmax.span, "taken", note=why, hint="choose another name"
            )


def _meets(name: str, other: str, streams: set[str]) -> bool:
    """Whether `near_kv_mask` may belong to both `near` (on the stream kv) and `near_kv`."""
    longer, shorter = (name, other) if len(name) > len(other) else (other, name)
    rest = longer.removeprefix(f"{shorter}_")
    return rest != longer and rest.split("_")[0] in TAIL_WORDS | {
        part for x in streams for part in (x, x.split("_")[0])
    }
