"""The operators of a module as PyTorch sees them: schema, fake tensors for tracing, gradients.

A layout is the last eight arguments of each: operators take tensors and numbers, no tuples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.call.arguments import autocasting
from spdsl.runtime.call.scale import expect_scale
from spdsl.runtime.entries.entries import Cells, entry_room
from spdsl.runtime.entries.entry_kernels import entries_backward, entries_forward
from spdsl.runtime.launch.branches import gated_sum, stacked_lse
from spdsl.runtime.launch.gating import gate_backward, gate_forward
from spdsl.runtime.launch.launch import room_like, uses_kernels, wide
from spdsl.runtime.module import Module
from spdsl.runtime.pools.table import entries_by_torch
from spdsl.runtime.sequences import Layout

LAYOUT = (
    "Tensor? q_spans, Tensor? k_spans, SymInt? q_offset, SymInt? k_offset, SymInt longest, SymInt tokens,"
    " float? scale, Tensor? traced_scale"
)
_OF_LAYOUT = 8

Run = Callable[..., Any]


def layout_from(given: Sequence[Any]) -> Layout:
    """The last arguments of an operator as a layout, whose scale is a number by now."""
    layout = Layout(*given)
    if layout.traced_scale is None:
        return layout
    return layout._replace(scale=expect_scale(layout.traced_scale.item()), traced_scale=None)


def operator(module: Module, name: str, schema: str, run: Run, fake: Run) -> Any:
    """An operator of the module: `run` is what it does, `fake` makes results of the right shapes, types and strides."""
    qualified, run = f"{module.namespace}::{name}", module.entry(_in_full(run))
    made = torch.library.custom_op(qualified, run, mutates_args=(), schema=schema)
    made.register_fake(fake)
    return made


def _in_full(run: Run) -> Run:
    """Without autocast inside: arguments are cast before, and sums are float32, as in what PyTorch compiles."""

    def call(*given: Any) -> Any:
        kind = autocasting(next(x for x in given if isinstance(x, Tensor)))
        if kind is None:
            return run(*given)
        with torch.autocast(kind, enabled=False):
            return run(*given)

    return call


def mutating_operator(module: Module, name: str, schema: str, run: Run, fake: Run) -> Any:
    """The same of one that changes the tensors of its last argument, `states`. It has no gradient."""
    qualified = f"{module.namespace}::{name}"
    made = torch.library.custom_op(qualified, module.entry(run), mutates_args=("states",), schema=schema)
    made.register_fake(fake)
    return made


def backward_operator(module: Module, name: str, schema: str, run: Run, fake: Run) -> Any:
    """An operator for a gradient, which has none itself."""
    made = operator(module, f"{name}_backward", schema, run, fake)

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{module.pattern}: attention has first derivatives only (no create_graph=True through it)"
        )

    made.register_autograd(refuse)
    return made


def attention_operators(
    module: Module,
    name: str,
    learned: Sequence[str],
    looked_up: Sequence[str],
    keys: Callable[..., Sequence[tuple[Tensor, Tensor]]],
    forward: Run,
    backward: Run | None = None,
    bias: Sequence[str] = (),
    bias_backward: Run | None = None,
    noted: Callable[[Tensor, Layout], Tensor] | None = None,
) -> tuple[Any, Any]:
    """-> `name_forward` and `name_backward` of one softmax; without `backward` None.

    learned, looked_up: its tensors, with and without gradient, in the order of `forward`; a query and the keys first.
    keys: of these, the (k, v) of its streams. bias: of those without, what its bias reads: `bias_backward` gives the
    gradients of those of them that want one, by an operator of its own, `name_bias_backward`. noted: room for what the
    forward notes behind out and lse, and the backward gets there.
    """
    tensors, sources = (*learned, *looked_up), len(inspect.signature(keys).parameters)
    schema, count = f"{''.join(f'Tensor {x}, ' for x in tensors)}{LAYOUT}", len(tensors)

    def run(*given: Any) -> Any:
        return forward(*given[:count], layout_from(given[count:]))

    def fake(*given: Any) -> Any:
        q, v_dim = given[0], keys(*given[:sources])[0][1].shape[3]
        found = q.new_empty(*q.shape[:3], v_dim), q.new_empty(q.shape[:3], dtype=wide(q.dtype))
        return found if noted is None else (*found, noted(q, Layout(*given[count:])))

    results = 2 if noted is None else 3
    made = operator(module, f"{name}_forward", f"({schema}) -> ({', '.join(['Tensor'] * results)})", run, fake)
    if backward is None:
        return made, None

    def run_back(dout: Tensor, dlse: Tensor | None, *given: Any) -> Any:
        made, given = given[:results], given[results:]
        return backward(dout, dlse, *made, *given[:count], layout_from(given[count:]))

    def fake_back(dout: Tensor, dlse: Tensor | None, *given: Any) -> Any:
        return [room_like(x) for x in given[results : results + len(learned)]]

    made_before = "Tensor out, Tensor lse, " + "Tensor notes, " * (results - 2)
    back_schema = f"(Tensor dout, Tensor? dlse, {made_before}{schema}) -> Tensor[]"
    back = backward_operator(module, name, back_schema, run_back, fake_back)
    places = [tensors.index(x) for x in bias]
    module.learned.update(bias)
    of_bias = None if bias_backward is None else _bias_operator(module, name, schema, places, bias_backward)

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        # The spans of the layout are tensors, too, and so may be its scale.
        ctx.save_for_backward(*output, inputs[-1], *inputs[: count + 2])
        ctx.numbers = inputs[count + 2 : -1]

    def gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *of_notes: None) -> Any:
        (out, lse, *notes), (traced_scale, *inputs) = ctx.saved_tensors[:results], ctx.saved_tensors[results:]
        dout = torch.zeros_like(out) if dout is None else dout
        grads = back(dout, dlse, out, lse, *notes, *inputs, *ctx.numbers, traced_scale)
        found = [*grads, *[None] * (len(looked_up) + _OF_LAYOUT)]
        wanted = [bool(ctx.needs_input_grad[place]) for place in places]
        if of_bias is not None and any(wanted):
            own = iter(of_bias(wanted, dout, dlse, out, lse, *inputs, *ctx.numbers, traced_scale))
            for place, one in zip(places, wanted, strict=True):
                found[place] = next(own) if one else None
        return tuple(found)

    made.register_autograd(gradients, setup_context=save)
    return made, back


def _bias_operator(module: Module, name: str, schema: str, places: Sequence[int], run: Run) -> Any:
    """`name_bias_backward`: the gradients of the wanted of the tensors at these places of the schema."""

    def run_back(
        wanted: Sequence[bool], dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *given: Any
    ) -> Any:
        return run(wanted, dout, dlse, out, lse, *given[:-_OF_LAYOUT], layout_from(given[-_OF_LAYOUT:]))

    def fake(wanted: Sequence[bool], dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *given: Any) -> Any:
        found = (given[place] for place, one in zip(places, wanted, strict=True) if one)
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in found]

    own = f"(bool[] wanted, Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {schema}) -> Tensor[]"
    return backward_operator(module, f"{name}_bias", own, run_back, fake)


def choice_operator(
    module: Module, name: str, reads: Sequence[str], most: Callable[[Layout], int], choose: Callable[..., Tensor]
) -> Any:
    """`name_choose`: int32 [B, lists, N, most], of `choose(q, k, lse, *reads, lists, layout)`. It has no gradient."""

    def run(*given: Any) -> Tensor:
        return choose(*given[:-_OF_LAYOUT], layout_from(given[-_OF_LAYOUT:]))

    def fake(q: Tensor, k: Tensor, lse: Tensor | None, *given: Any) -> Tensor:
        lists, layout = given[len(reads)], Layout(*given[-_OF_LAYOUT:])
        return q.new_empty(q.shape[0], lists, q.shape[2], most(layout), dtype=torch.int32)

    tensors = "".join(f"Tensor {x}, " for x in reads)
    schema = f"(Tensor q, Tensor k, Tensor? lse, {tensors}SymInt lists, {LAYOUT}) -> Tensor"
    return operator(module, f"{name}_choose", schema, run, fake)


def gate_operator(module: Module) -> Callable[[Sequence[tuple[Tensor, Tensor]], Tensor], tuple[Tensor, Tensor]]:
    """A function of branches (out, lse) and gates [B, H, N, branches]
    -> (sum of gate * out, lse per branch [B, H, N, branches]).
    """

    def fake(parts: Sequence[Tensor], gates: Tensor) -> Tensor:
        return torch.empty_like(parts[0], memory_format=torch.contiguous_format)

    def fake_back(dout: Tensor, parts: Sequence[Tensor], gates: Tensor) -> list[Tensor]:
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*parts, gates)]

    made = operator(module, "gate", "(Tensor[] parts, Tensor gates) -> Tensor", gate_forward, fake)
    schema = "(Tensor dout, Tensor[] parts, Tensor gates) -> Tensor[]"
    back = backward_operator(module, "gate", schema, gate_backward, fake_back)

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        parts, gates = inputs
        ctx.save_for_backward(*parts, gates)

    def gradients(ctx: Any, dout: Tensor) -> Any:
        *parts, gates = ctx.saved_tensors
        *dparts, dgates = back(dout, parts, gates)
        return dparts, dgates

    made.register_autograd(gradients, setup_context=save)

    def gate(parts: Sequence[tuple[Tensor, Tensor]], gates: Tensor) -> tuple[Tensor, Tensor]:
        if not uses_kernels(gates):
            return gated_sum(parts, gates)
        return made([out for out, _ in parts], gates), stacked_lse(parts)

    return gate


class _Compression(NamedTuple):
    """The arguments of `compress` as an operator has them."""

    x: Tensor
    weights: list[Tensor]
    width: int
    stride: int
    before: int
    partial: bool
    by: str

    @property
    def cells(self) -> Cells:
        return Cells(self.width, self.stride, self.before, self.partial)


def compress_operator(module: Module) -> Callable[..., Tensor]:
    """A function of (x [B, H, M, D], cells, layout, pool, its weights) -> entries [B, H, E, D].

    By a kernel that streams the tokens; on the CPU by torch.
    """
    schema = "Tensor x, Tensor[] weights, int width, int stride, int before, bool partial, str by"

    def run(*given: Any) -> Tensor:
        own, layout = _Compression(*given[:7]), Layout(*given[7:])
        return entries_forward(own.x, own.cells, layout, own.by, *own.weights)

    def fake(*given: Any) -> Tensor:
        own, layout = _Compression(*given[:7]), Layout(*given[7:])
        return own.x.new_empty(*own.x.shape[:2], entry_room(own.x, own.cells, layout), own.x.shape[3])

    def run_back(dout: Tensor, *given: Any) -> list[Tensor]:
        own, layout = _Compression(*given[:7]), Layout(*given[7:])
        return list(entries_backward(dout, own.x, own.cells, layout, own.by, *own.weights))

    def fake_back(dout: Tensor, x: Tensor, weights: Sequence[Tensor], *given: Any) -> list[Tensor]:
        return [room_like(like) for like in (x, *weights)]

    made = operator(module, "compress", f"({schema}, {LAYOUT}) -> Tensor", run, fake)
    back = backward_operator(module, "compress", f"(Tensor dout, {schema}, {LAYOUT}) -> Tensor[]", run_back, fake_back)

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        x, weights, *cells, q_spans, k_spans = inputs[:9]
        ctx.save_for_backward(x, q_spans, k_spans, *weights)
        ctx.numbers = cells, inputs[9:]  # entries have no scale

    def gradients(ctx: Any, dout: Tensor) -> Any:
        x, q_spans, k_spans, *weights = ctx.saved_tensors
        cells, offsets = ctx.numbers
        dx, *grads = back(dout, x, weights, *cells, q_spans, k_spans, *offsets)
        return dx, grads, *[None] * (5 + _OF_LAYOUT)

    made.register_autograd(gradients, setup_context=save)

    def entries_of(x: Tensor, cells: Cells, layout: Layout, by: str, *weights: Tensor) -> Tensor:
        if uses_kernels(x):
            found: Tensor = made(x, list(weights), *cells, by, *layout._replace(scale=None, traced_scale=None))
            return found
        return entries_by_torch(by, x, cells, layout, *weights)

    return entries_of


def divergence_operator(module: Module, name: str, forward: Run, backward: Run, reads_of: Run | None = None) -> Any:
    """The divergence of a score from a target over the units of lists: (kl, total, norm), each [B, lists, N].

    What the sets read comes as one list, of which `reads_of(heads, *reads)` makes what both functions take behind
    lse. Only the score learns: `asks` and `entries`, its queries and keys.
    """

    def arguments(q: Tensor, k: Tensor, lse: Tensor, reads: Sequence[Tensor], *given: Any) -> tuple[Any, ...]:
        own = () if reads_of is None else (reads_of(q.shape[1], *reads),)
        return (q, k, lse, *own, *given[:3], layout_from(given[3:]))

    schema = f"Tensor q, Tensor k, Tensor lse, Tensor[] reads, Tensor asks, Tensor entries, Tensor chosen, {LAYOUT}"

    def run(*given: Any) -> Any:
        return forward(*arguments(*given))

    def fake(q: Tensor, k: Any, lse: Any, reads: Any, asks: Any, entries: Any, chosen: Tensor, *layout: Any) -> Any:
        return tuple(q.new_empty(q.shape[0], chosen.shape[1], q.shape[2], dtype=wide(q.dtype)) for _ in range(3))

    def run_back(dkl: Tensor, total: Tensor, norm: Tensor, *given: Any) -> Any:
        return backward(dkl, total, norm, *arguments(*given))

    def fake_back(dkl: Tensor, total: Tensor, norm: Tensor, *given: Any) -> Any:
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in given[4:6])

    made = operator(module, f"{name}_forward", f"({schema}) -> (Tensor, Tensor, Tensor)", run, fake)
    back_schema = f"(Tensor dkl, Tensor total, Tensor norm, {schema}) -> (Tensor, Tensor)"
    back = backward_operator(module, name, back_schema, run_back, fake_back)

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        q, k, lse, reads, asks, entries, chosen, q_spans, k_spans, *ctx.numbers, traced = inputs
        ctx.save_for_backward(*output[1:], q, k, lse, asks, entries, chosen, q_spans, k_spans, traced, *reads)

    def gradients(ctx: Any, dkl: Tensor | None, dtotal: Any, dnorm: Any) -> Any:
        total, norm, q, k, lse, asks, entries, chosen, q_spans, k_spans, traced, *reads = ctx.saved_tensors
        dkl = torch.zeros_like(total) if dkl is None else dkl
        numbers = (q, k, lse, reads, asks, entries, chosen, q_spans, k_spans, *ctx.numbers, traced)
        dasks, dentries = back(dkl, total, norm, *numbers)
        return None, None, None, [None] * len(reads), dasks, dentries, *[None] * (1 + _OF_LAYOUT)

    made.register_autograd(gradients, setup_context=save)
    return made
