"""Random arguments for `attention`, made from the table of a pattern's arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.call.examples import check_example, example_tensor, example_units, example_weight
from spdsl.runtime.call.table import Arguments, GivenArgument


class Sizes(NamedTuple):
    """Of what a pattern leaves open."""

    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int


def example_arguments(
    arguments: Arguments, batch: int, tokens: int, sizes: Sizes, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Token tensors rise in steps, flags are rare, given lists hold near units; chosen ones are as long as can be."""
    check_example(batch, tokens, dtype, **sizes._asdict())

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)

    found: dict[str, Tensor] = {}
    for query in arguments.queries:
        found[query.name] = normal(batch, query.heads or sizes.heads, tokens, query.dim or sizes.qk_dim)
    for stream in arguments.streams:
        heads = stream.heads or sizes.kv_heads
        found[stream.k] = normal(batch, heads, tokens, stream.qk or sizes.qk_dim)
        if stream.v:
            found[stream.v] = normal(batch, heads, tokens, stream.v_dim or sizes.v_dim)
    hidden = {name: 2 * found[x.k].shape[3] for x in arguments.streams for name in (x.k, x.v)}
    for weight in arguments.weights:
        of = found[weight.of]
        axes = {"heads": of.shape[1], "dim": of.shape[3], "hidden": hidden[weight.of]}
        shape = [axes[axis] if isinstance(axis, str) else axis for axis in weight.axes]
        found[weight.name] = example_weight(*shape, dtype=dtype, device=device)
    along: dict[str, Any] = {"head": sizes.heads, "kv_head": sizes.kv_heads, "token": tokens, "query": tokens, "one": 1}
    for tensor in arguments.tensors:
        found[tensor.name] = example_tensor(tensor.axes, tensor.kind, batch, along, device)
        if tensor.units:
            found[tensor.name] = torch.full_like(found[tensor.name], tensor.units)
    for given in arguments.maps:
        if isinstance(given, GivenArgument):
            found[given.name] = example_units(batch, along[given.by], tokens, given.rows, given.unit, device)
    for listed in arguments.lists:
        units = example_units(batch, along[listed.by], tokens, 1, listed.unit, device)
        found[listed.name] = units[..., : listed.most]
    if arguments.gates:
        gates = torch.rand(batch, sizes.heads, tokens, arguments.gates, device=device, dtype=torch.float32)
        found["gates"] = gates.to(dtype)
    return found
