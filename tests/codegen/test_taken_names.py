"""No input can be named like something that a function with inputs uses: it would hide it."""

from __future__ import annotations

import ast
import re

import pytest

import spdsl
from spdsl.passes.clashes import ARGUMENT_WORDS, KERNEL_WORDS

SELECTED = """
pattern p {
    causal
    zzraw = stream()
    zzlog = stream()
    zzt = tensor(token, int)
    zzsink = tensor(head)
    zzent = compress(8, 4, of = zzraw, by = mlp)
    zzoth = compress(8, 4, of = zzraw, by = softmax(zzlog))
    zzwei = compress(8, 4, of = zzraw, by = weighted)
    coarse = attend(zzent, sink_logit = zzsink)
    zzcho = top_k(4, score = mass(coarse), unit = 16, share = group, force = first(1) | last(1))
    zzask = query()
    rank = dot(zzraw, query = zzask)
    zzbest = top_k(3, score = rank, unit = max(16), share = sum(group))
    others = gate(attend(zzoth), attend(zzwei))
    fine = attend(zzraw[zzcho], sink_logit = zzsink)
    near = attend(kv[sliding(8) & where(zzt[k] == zzt[q])])
    most = attend(zzbest & where(zzt[k] == zzt[q]))
    zzown = top_k(3, score = rank, unit = max(16), share = head)
    apart = attend(zzraw[zzown & where(zzt[k] == zzt[q])], sink_logit = zzsink)
    return gate(coarse, fine, near, most, apart), kl(mass(most), rank, share = mean(group)), attend(zzoth)
}
"""
STATIC = """
pattern p {
    causal
    zzt = tensor(token, int)
    zzg = given(unit = 16, rows = 16)
    zzs = tensor(head)
    near = attend(sliding(8) | zzg, bias = zzs[h] * (q - k))
    return merge(near, attend(where(zzt[k] == zzt[q]) - sliding(8) - zzg)) if length > 9
    return attend(dilated(4, 2), sink_logit = zzs)
}
"""


def _names(text: str, kernels: bool) -> set[str]:
    """What functions use that have an input of the pattern as an argument or a variable."""
    found: set[str] = set()
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef):
            continue
        if kernels != any("jit" in ast.unparse(decorator) for decorator in function.decorator_list):
            continue
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        own = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
        own |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        if any(re.fullmatch("(k_|v_)?zz[a-z]+", name) for name in own):
            found |= own | {node.id for node in names}
    return found


@pytest.mark.parametrize("text", [SELECTED, STATIC], ids=["selected", "static"])
def test_names_that_inputs_would_hide_are_refused(text: str) -> None:
    module = spdsl.compile(text).text
    own = ("coarse", "fine", "near", "most", "apart", "rank", "attend", "p_", "_")
    own += ("Coarse", "Fine", "Near", "Most", "Apart", "Attend")
    for kernels, words in ((False, ARGUMENT_WORDS), (True, KERNEL_WORDS)):
        used = {name for name in _names(module, kernels) if "zz" not in name and not name.startswith(own)}
        used = {name for name in used if not re.fullmatch(r"(range|scored?_)\d+", name)}  # no stream may be named so
        assert used - words == set()
