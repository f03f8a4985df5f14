"""The names that a generated module uses beside names of the pattern, read off a module that uses everything."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

PATTERN = """pattern zzp { causal
    zzt = tensor(head, token, int)
    zzf = tensor(kv_head)
    zzz = tensor(int)
    zzk = tensor(head)
    zzq = query()
    zzs = stream()
    zzv = stream(value = key)
    zzg = given(unit = 4, rows = 4)
    zzr = random(2, unit = 4, rows = 4)
    zza = attend(
        (zzs[sliding(5)] | kv[sink(4) - sliding(5)]) & (where(zzt[h][k] == zzt[h][q] & zzf[h] > 0) | zzg | zzr),
        query = zzq, sink_logit = zzk, bias = zzf[h] * (q - k)
    )
    zzb = attend(zzs[sliding(3)] | zzv[dilated(3, 2) - sliding(3)])
    zzc = attend(dilated(3, 2))
    zzd = attend(sink(2) - sliding(5))
    return merge(zza, zzd) if length > zzz & train
    return merge(zzb, zzd) if length > 3 & decode
    return gate(zzb, zzc)
}"""
_ARGUMENT = re.compile(r"([kv]_zz[sv]|zz[tfzkqgr](_first)?)")
_STREAM = re.compile(r"zz[sv](_keys|_lists)?")
_OWN = re.compile(r"(^|_)(zz[a-z]|Zz[a-z]|kv_(keys|lists)$)")


@dataclass(frozen=True)
class Hazards:
    """`arguments`: beside inputs; `kernels`: beside the names of streams; `prefixes`: of top-level definitions."""

    arguments: set[str]
    kernels: set[str]
    prefixes: set[str]
    tails: set[str]  # second parts of the definitions of a softmax


def hazards(text: str) -> Hazards:
    """Of the text of `PATTERN`'s module."""
    found = Hazards(set(), set(), set(), set())
    definitions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in definitions:
        names = _names(node)
        others = {name for name in names if not _OWN.search(name)}
        if any(_ARGUMENT.fullmatch(name) for name in names):
            found.arguments.update(others)
        if any(_STREAM.fullmatch(name) for name in names):
            found.kernels.update(others)
    suffixes = {node.name[3:] for node in definitions if re.match("zz[abcd]_", node.name)}
    plain = {node.name for node in definitions if not _OWN.search(node.name)}
    for suffix in suffixes:
        found.prefixes.update(name.removesuffix(suffix) for name in plain if name.endswith(suffix))
    found.prefixes.discard("")
    found.tails.update(suffix.split("_")[1] for suffix in suffixes)
    found.tails.difference_update({"zzs", "zzv", "kv"})
    return found


def _names(node: ast.AST) -> set[str]:
    found = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    found |= {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
    return found | {part.name for part in ast.walk(node) if isinstance(part, ast.FunctionDef) and part is not node}
