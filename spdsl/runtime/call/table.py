"""The arguments of a pattern as a table, from which calls check and prepare them.

`Inputs` is the named tuple of a module: the tensors of a call by name. A module says of each what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from spdsl.runtime.call.arguments import (
    autocast,
    check_attention,
    check_given,
    check_sinks,
    check_tensor,
    check_tiles,
    check_values,
    given_argument,
    random_argument,
    refuse_gradient,
    tensor_argument,
    warn_of_layout,
)
from spdsl.runtime.call.weights import check_chosen, check_weight, chosen_argument
from spdsl.runtime.sequences import Layout, expect, expect_flag, sizes_of

Inputs = TypeVar("Inputs", bound=Any)


class QueryArgument(NamedTuple):
    """[B, heads, N, dim]; None: as the call has it."""

    name: str
    heads: int | None = None
    dim: int | None = None


class StreamArgument(NamedTuple):
    """Keys [B, heads, M, qk] that `query` asks, and their values [B, heads, M, v_dim]; v "": they have none."""

    name: str
    k: str
    v: str
    query: str
    heads: int | None = None
    v_dim: int | None = None
    qk: int | None = None


class WeightArgument(NamedTuple):
    """A learned tensor for the entries of the argument `of`. An axis is a number, or "heads", "dim" or "hidden".

    like: the weight whose last axis its `hidden` must be.
    """

    name: str
    axes: tuple[str | int, ...]
    of: str
    like: str = ""


class TensorArgument(NamedTuple):
    """A tensor over heads, kv heads, tokens, queries. sink: logits of the query heads.

    learns: of what a bias reads, whether it gets a gradient there; None: no bias reads it.
    """

    name: str
    axes: tuple[str | int, ...]
    kind: str
    optional: bool = False
    kept: bool = False  # a cache keeps it for its tokens
    sink: bool = False
    learns: bool | None = None
    units: int = 0  # of the lists whose length it says: what examples say, too

    @property
    def by_row(self) -> bool:
        """Whether it has numbers of the rows of a call, which brings it whole."""
        return "query" in self.axes

    @property
    def by_token(self) -> bool:
        """Whether it is as long as the sequence."""
        return "token" in self.axes and not self.by_row


class GivenArgument(NamedTuple):
    """Lists of units for tiles of rows, by query head ("head"), kv head, or "one" for all heads."""

    name: str
    by: str
    rows: int
    unit: int
    optional: bool = False


class ListArgument(NamedTuple):
    """Lists of units for single queries: [B or 1, heads or 1, N, n], n at most `most`."""

    name: str
    by: str
    unit: int
    most: int | None = None
    optional: bool = False


class DrawnArgument(NamedTuple):
    """Units that the module draws itself."""

    name: str
    by: str
    rows: int
    unit: int
    number: int
    seed: int
    causal: bool


class ChosenArgument(NamedTuple):
    """Units of a choice: the module chooses them, or the caller gives them. rows: of a tile that has one list."""

    name: str
    by: str
    unit: int
    rows: int = 1


class Arguments(NamedTuple):
    """All of a pattern. sums: by phase, the values that become one result and so have one dim. gates: of a query."""

    queries: tuple[QueryArgument, ...]
    streams: tuple[StreamArgument, ...]
    weights: tuple[WeightArgument, ...] = ()
    tensors: tuple[TensorArgument, ...] = ()
    maps: tuple[GivenArgument | DrawnArgument, ...] = ()
    lists: tuple[ListArgument, ...] = ()
    chosen: tuple[ChosenArgument, ...] = ()
    sums: Mapping[str, tuple[tuple[str, ...], ...]] = {}
    gates: int = 0

    @property
    def vectors(self) -> tuple[str, ...]:
        """The arguments with a head dim."""
        streams = (name for x in self.streams for name in (x.k, x.v) if name)
        return (*(x.name for x in self.queries), *streams)

    def q(self, inputs: Any) -> Tensor:
        return getattr(inputs, self.queries[0].name)  # type: ignore[no-any-return]

    def k(self, inputs: Any) -> Tensor:
        return getattr(inputs, self.streams[0].k)  # type: ignore[no-any-return]


def changed_in(inputs: Inputs, changed: Mapping[str, Any]) -> Inputs:
    """The inputs with other tensors by name."""
    made: Inputs = type(inputs)(*[changed.get(name, x) for name, x in zip(inputs._fields, inputs, strict=True)])
    return made


def checked(arguments: Arguments, inputs: Inputs, phase: str, return_lse: object = False, cast: bool = True) -> Inputs:
    """The inputs, with `cast` under autocast, after all that can be said of vectors and weights by themselves."""
    inputs = under_autocast(arguments, inputs) if cast else inputs
    expect_flag("return_lse", return_lse)
    check_vectors(arguments, inputs)
    check_sums(arguments, inputs, phase)
    warn_of_layout(arguments.queries[0].name, arguments.q(inputs), arguments.k(inputs))
    return inputs


def under_autocast(arguments: Arguments, inputs: Inputs) -> Inputs:
    names = arguments.vectors
    return changed_in(inputs, dict(zip(names, autocast(*[getattr(inputs, name) for name in names]), strict=True)))


def check_vectors(arguments: Arguments, inputs: Any) -> None:
    own = inputs._asdict()
    check_attention(
        {x.name: (own[x.name], x.heads, x.dim) for x in arguments.queries},
        {x.k: (own[x.k], x.heads, x.query) for x in arguments.streams},
        {x.v: (own[x.v], x.v_dim, x.k) for x in arguments.streams if x.v},
    )
    check_weights(arguments, inputs)


def check_weights(arguments: Arguments, inputs: Any) -> None:
    own = inputs._asdict()
    for weight in arguments.weights:
        of, x = own[weight.of], own[weight.name]
        sizes = {"heads": of.shape[1], "dim": of.shape[3], "hidden": None}
        check_weight(weight.name, x, [sizes[axis] if isinstance(axis, str) else axis for axis in weight.axes], of)
        if weight.like:
            wanted = own[weight.like].shape[3]
            expect(x.shape[1] == wanted, weight.name, "hidden dim {} like {}", x.shape[1], wanted, weight.like)


def check_sums(arguments: Arguments, inputs: Any, phase: str) -> None:
    for group in arguments.sums.get(phase, ()):
        check_values({name: getattr(inputs, name) for name in group})


def _sizes(arguments: Arguments, inputs: Any, tokens: int, batch: int = -1) -> dict[str, int]:
    q, k = arguments.q(inputs), arguments.k(inputs)
    batch = q.shape[0] if batch < 0 else batch
    return {"head": q.shape[1], "kv_head": k.shape[1], "token": tokens, "query": q.shape[2], "batch": batch, "one": 1}


def check_lookups(arguments: Arguments, inputs: Any) -> None:
    """Of new tokens, before they are in the cache."""
    q, own = arguments.q(inputs), inputs._asdict()
    sizes = _sizes(arguments, inputs, q.shape[2])
    for tensor in arguments.tensors:
        x = own[tensor.name]
        if x is None and tensor.optional:
            continue
        if tensor.sink:
            check_sinks(tensor.name, x, q)
            continue
        check_tensor(tensor.name, x, tensor.axes, tensor.kind, sizes, q)
    for given in arguments.maps:
        if isinstance(given, GivenArgument) and not (given.optional and own[given.name] is None):
            check_given(given.name, own[given.name], sizes[given.by], given.rows, q)
    for listed in arguments.lists:
        if not (listed.optional and own[listed.name] is None):
            check_chosen(listed.name, own[listed.name], sizes[listed.by], q, listed.most)
    for chosen in arguments.chosen:
        if own[chosen.name] is not None and chosen.rows > 1:
            check_given(chosen.name, own[chosen.name], sizes[chosen.by], chosen.rows, q)
        elif own[chosen.name] is not None:
            check_chosen(chosen.name, own[chosen.name], sizes[chosen.by], q)


def prepared(
    arguments: Arguments, inputs: Inputs, layout: Layout, tokens: int = -1, keys: int = -1, batch: int = -1
) -> Inputs:
    """Tensors batch first and sets of units as maps. `keys` bounds the keys of a sequence, `tokens` sizes token axes,
    `batch` is the number of sequences that tensors may tell apart; by default those of the call.
    """
    q, k, own = arguments.q(inputs), arguments.k(inputs), inputs._asdict()
    if tokens < 0:
        tokens, keys = sizes_of(q, k, layout)
    sizes = _sizes(arguments, inputs, tokens, batch)
    changed: dict[str, Any] = {}
    for tensor in arguments.tensors:
        x = own[tensor.name]
        if x is None and tensor.optional:
            continue
        if tensor.sink:
            check_sinks(tensor.name, x, q)
            changed[tensor.name] = x.contiguous()  # kernels read one logit after another
            continue
        changed[tensor.name] = tensor_argument(tensor.name, x, tensor.axes, tensor.kind, sizes, q)
        if tensor.learns is False:
            refuse_gradient(tensor.name, changed[tensor.name])
    for units in arguments.maps:
        if isinstance(units, DrawnArgument):
            drawn = (units.number, units.seed, sizes[units.by], units.rows, units.unit, units.causal)
            found = random_argument(*drawn, q, k, layout, keys)
        elif units.optional and own[units.name] is None:
            continue
        else:
            x = own[units.name]
            found = given_argument(units.name, x, sizes[units.by], units.rows, units.unit, q, k, layout, keys)
        changed[units.name], changed[f"{units.name}_first"] = found
    for listed in arguments.lists:
        if not (listed.optional and own[listed.name] is None):
            whole_calls("lists of units are given", layout)
            check_chosen(listed.name, own[listed.name], sizes[listed.by], q, listed.most)
            lists = max(sizes[listed.by], sizes["kv_head"])  # kv heads do not meet in a tile
            changed[listed.name] = chosen_argument(own[listed.name], lists, listed.unit, keys, q)
    return changed_in(inputs, changed)


def with_choices(arguments: Arguments, inputs: Inputs, layout: Layout) -> Inputs:
    """The choices that the caller passes, as lists that kernels walk; those of tiles stay as they are."""
    whole_calls("units are chosen", layout)
    q, sizes = arguments.q(inputs), _sizes(arguments, inputs, 0)
    changed = {}
    for x in arguments.chosen:
        own = getattr(inputs, x.name)
        if own is not None and x.rows > 1:
            check_tiles(x.name, own, sizes[x.by], x.rows, q, layout)
        elif own is not None:
            check_chosen(x.name, own, sizes[x.by], q)
            changed[x.name] = chosen_argument(own, sizes[x.by], x.unit, layout.keys, q)
    return changed_in(inputs, changed)


def whole_calls(where: str, layout: Layout) -> None:
    """Units count from the first key of a sequence."""
    expect(not layout.k_offset, "k_offset", f"0 where {where}", layout.k_offset)


def in_float64(arguments: Arguments, inputs: Inputs) -> Inputs:
    """The inputs in float64, but for what the caller chose: that is not checked yet."""
    chosen = {name for name, *_ in (*arguments.lists, *arguments.chosen)}
    own = {name: x for name, x in inputs._asdict().items() if x is not None and name not in chosen}
    return changed_in(inputs, {name: x.double() for name, x in own.items() if x.is_floating_point()})
