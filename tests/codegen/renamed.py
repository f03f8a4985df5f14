"""Patterns under other names, and a run of all that their modules do."""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Mapping
from inspect import signature
from types import ModuleType

import torch
from torch import Tensor

# Inputs of all kinds, static sets, a bias, sinks, residue classes, joints, results by length and by phase.
STATIC = """pattern p { causal
    zzdoc = tensor(head, token, int)
    zzbias = tensor(kv_head)
    zzmany = tensor(int)
    zzsink = tensor(head)
    zzask = query()
    zzfar = stream()
    zzlat = stream(value = key)
    zzset = given(unit = 4, rows = 4)
    zzdraw = random(2, unit = 4, rows = 4)
    zzone = attend(
        (zzfar[sliding(5)] | kv[sink(4) - sliding(5)])
        & (where(zzdoc[h][k] <= zzdoc[h][q] & zzbias[h] - k < 9) | zzset | zzdraw),
        query = zzask, sink_logit = zzsink, bias = zzbias[h] * (q - k)
    )
    zztwo = attend(zzfar[sliding(3)] | zzlat[dilated(3, 2) - sliding(3)])
    zzcell = attend(dilated(3, 2))
    zzrest = attend(sink(2) - sliding(5))
    return merge(zzone, zzrest) if length > zzmany & train
    return merge(zztwo, zzrest) if length > 3 & decode
    return gate(zztwo, zzcell)
}"""
# Compressed streams of all kinds, choices by scores, further results.
CHOSEN = """pattern p { causal
    zzraw = stream()
    zzlog = stream()
    zzdoc = tensor(token, int)
    zzsink = tensor(head)
    zzent = compress(8, 4, of = zzraw, by = mlp)
    zzsoft = compress(8, 4, of = zzraw, by = softmax(zzlog))
    zzmean = compress(8, 4, of = zzraw, by = mean)
    zzone = attend(zzent, sink_logit = zzsink)
    zzcho = top_k(2, score = mass(zzone), unit = 16, share = group, force = first(1) | last(1))
    zzask = query()
    zzrank = dot(zzraw, query = zzask)
    zzbest = top_k(2, score = zzrank, unit = max(16), share = sum(group))
    zztwo = attend(zzmean)
    zzfine = attend(zzraw[zzcho], sink_logit = zzsink)
    zznear = attend(kv[sliding(8) & where(zzdoc[k] == zzdoc[q])])
    zzmost = attend(zzbest & where(zzdoc[k] == zzdoc[q]))
    return gate(zzone, zzfine, zznear, zzmost, zztwo), kl(mass(zzmost), zzrank, share = mean(group)), attend(zzsoft)
}"""
BASES = (STATIC, CHOSEN)


def names_of(text: str) -> list[str]:
    """The names that a base binds."""
    return list(dict.fromkeys(re.findall(r"\bzz[a-z]+\b", text)))


def renamed(text: str, names: Mapping[str, str]) -> str:
    return re.sub(r"\bzz[a-z]+\b", lambda found: names.get(found[0], found[0]), text)


def identifiers(text: str) -> list[str]:
    """All words that a generated module mentions as names, fields or keywords."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        for part in ("id", "arg", "attr", "name"):
            if isinstance(name := getattr(node, part, None), str):
                found.add(name)
    return sorted(name for name in found if "zz" not in name.lower() and not keyword.iskeyword(name))


def results(module: ModuleType, tokens: int = 40) -> list[Tensor]:
    """What attention, its gradients, prefill and decode say, checked against the reference."""
    torch.manual_seed(0)
    inputs = module.example_inputs(1, tokens, heads=2, kv_heads=1, qk_dim=16, v_dim=16)
    for x in inputs.values():
        x.requires_grad_(x.is_floating_point() and x.dim() > 2)
    found = _tensors(module.attention(**inputs))
    wanted = _tensors(module.reference(**inputs))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-4, rtol=1e-4)
    grads, exact = (
        torch.autograd.grad([x.double().square().sum() for x in given], _learned(inputs), allow_unused=True)
        for given in (found, wanted)
    )
    for x, y in zip(grads, exact, strict=True):
        if x is not None or y is not None:
            torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        steps = _generated(module, {name: x.detach() for name, x in inputs.items()}, tokens)
    return [*(x.detach() for x in found), *(x for x in grads if x is not None), *steps]


def _learned(inputs: Mapping[str, Tensor]) -> list[Tensor]:
    return [x for x in inputs.values() if x.requires_grad]


def _tensors(found: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _generated(module: ModuleType, inputs: Mapping[str, Tensor], tokens: int) -> list[Tensor]:
    """A prompt and one step, with what they read."""
    cache = module.Cache(1, 64, kv_heads=1, qk_dim=16, v_dim=16, page=16)
    found = []
    for step, given in ((module.prefill, inputs), (module.decode, {k: _last(x, tokens) for k, x in inputs.items()})):
        parameters = signature(step).parameters.values()
        read = [x.name for x in parameters if x.default is x.empty and x.kind is not x.VAR_KEYWORD]
        found += _tensors(step(**{name: given[name] for name in read if name != "cache"}, cache=cache))
    return found


def _last(x: Tensor, tokens: int) -> Tensor:
    """The last token of what runs over tokens."""
    for axis in range(1, x.dim()):
        if x.shape[axis] == tokens:
            return x.narrow(axis, tokens - 1, 1)
    return x
