"""Any name will do: what a module uses itself, what is made of another name, what differs by case alone."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Mapping

import pytest
import torch

import spdsl
from spdsl.codegen import render
from spdsl.passes.arguments import MODULE_WORDS
from tests.codegen.renamed import BASES, CHOSEN, STATIC, identifiers, names_of, renamed, results

# Names of the library, of locals, of launchers and tuples, of operators, and of other names' parts.
OF_STATIC = (
    "zzdoc=t zzbias=count zzmany=length_1 zzsink=index zzask=rt zzfar=out zzlat=rows zzset=tile zzdraw=source"
    " zzone=m zztwo=block zzcell=dense zzrest=torch",
    "zzdoc=doc zzbias=doc_0 zzmany=doc_tokens zzsink=Doc zzask=DOC zzfar=num_warps zzlat=options zzset=values"
    " zzdraw=Inputs zzone=near zztwo=near_kv zzcell=near_class zzrest=near_joint",
)
OF_CHOSEN = (
    "zzraw=pooled zzlog=options zzdoc=values zzsink=Inputs zzent=entries zzsoft=out zzmean=own zzone=gate zzcho=rt"
    " zzask=ARGUMENTS zzrank=compress zzbest=inputs zzfine=result_1 zznear=near zztwo=near_kv zzmost=near_backward",
    "zzraw=raw zzlog=Raw zzdoc=raw_keys zzsink=k_ent zzent=ent zzsoft=ENT zzmean=ent_keys zzone=one zzcho=one_part"
    " zzask=layout zzrank=attend zzbest=attend_3 zzfine=One zznear=o_ne zztwo=on_e zzmost=lse",
)
HARD = [*((STATIC, names) for names in OF_STATIC), *((CHOSEN, names) for names in OF_CHOSEN)]
WORDS = frozenset("all case decode dim h heads k kv length match param prefill prompt q tokens train type v".split())
FEW = pytest.mark.parametrize("body", [
    "d = tensor(token, int) d_tokens = tensor(head, int) return attend(where(d[k] <= d_tokens[h] + q))",
    "a = attend(sink(1)) a_cpu = attend(all - sink(1)) return merge(a, a_cpu)",
    "ab = attend(sink(1)) a_b = attend(all - sink(1)) return merge(ab, a_b)",
    "near_mask = tensor(head, int) near = attend(where(near_mask[h] <= k)) return near",
    "doc = tensor(token, int) Doc = tensor(token, int) return attend(where(doc[k] <= Doc[q]))",
    "c = top_k(2, score = dot(compress(16)), unit = max(16), share = head) a = attend(c | sliding(8))"
    " a_rest = attend(sink(2)) return gate(a, a_rest)",
    "x = gate(attend(sink(2)), attend(sliding(3))) attend_2 = attend(all - sink(9))"
    " return merge(attend_2, attend(sink(9))) if train return x",
    "page = sliding(3) launch = 4 batch = attend(page | sink(launch)) return batch",
])  # fmt: skip


def pairs(text: str) -> dict[str, str]:
    return dict(found.split("=") for found in text.split())


def errors(text: str) -> list[str]:
    return [found.message for found in spdsl.check(text) if found.severity.value == "error"]


@pytest.fixture(scope="module")
def plain() -> Mapping[str, list[torch.Tensor]]:
    """The results of the bases under their own names."""
    return {text: results(spdsl.load(text)) for text in BASES}


@pytest.mark.parametrize("base, names", HARD, ids="static parts chosen entries".split())
def test_hard_names_change_no_result(base: str, names: str, plain: Mapping[str, list[torch.Tensor]]) -> None:
    text = renamed(base, pairs(names))
    assert errors(text) == []
    for x, y in zip(results(spdsl.load(text)), plain[base], strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("base, names", HARD, ids="static parts chosen entries".split())
def test_hard_names_in_kernels(base: str, names: str) -> None:
    results(spdsl.load(renamed(base, pairs(names))), tokens=24)


@FEW
def test_names_that_come_out_as_one_run(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "formatted", lambda made: made)
    text = f"pattern p {{ causal allow(W403) {body} }}"
    assert errors(text) == []
    results(spdsl.load(text), tokens=20)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 12))])
@pytest.mark.parametrize("base", BASES, ids=["static", "chosen"])
def test_any_names_change_no_result(
    base: str, seed: int, plain: Mapping[str, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn from all that modules mention. Left unformatted, which takes a second less."""
    monkeypatch.setattr(render, "formatted", lambda made: made)
    known = {name for text in BASES for name in identifiers(spdsl.compile(text).text)}
    free = sorted(name for name in known - WORDS - MODULE_WORDS if not name.startswith("_"))
    assert len(free) > 300
    own = names_of(base)
    names = dict(zip(own, random.Random(seed).sample(free, len(own)), strict=True))
    text = renamed(base, names)
    assert [found for found in errors(text) if "cannot name" not in found] == []
    if not errors(text):  # two inputs may have drawn one argument
        for x, y in zip(results(spdsl.load(text)), plain[base], strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_what_the_caller_sees_keeps_its_name() -> None:
    text = renamed(CHOSEN, pairs(OF_CHOSEN[0]))
    module = spdsl.load(text)
    arguments = list(inspect.signature(module.attention).parameters)
    assert arguments[:8] == ["q", "k", "v", "k_pooled", "v_pooled", "k_options", "v_options", "ARGUMENTS"]
    assert {"values", "Inputs", "rt", "inputs", "entries_k_up", "gates", "return_lse"} <= set(arguments)
    assert arguments[:19] == list(inspect.signature(module.reference).parameters)[:19]
    assert list(module.choices(**module.example_inputs(1, 40, heads=2, kv_heads=1, qk_dim=16, v_dim=16))) == [
        "rt", "inputs",
    ]  # fmt: skip
    assert {"entries", "out", "own"} == set(module.Cache(1, 32, kv_heads=1, qk_dim=16, v_dim=16).entries)
    with pytest.raises(ValueError, match=r"^k_pooled: "):
        module.attention(
            **{**module.example_inputs(1, 40, heads=2, kv_heads=1, qk_dim=16, v_dim=16), "k_pooled": torch.zeros(1)}
        )


def test_operators_keep_the_names_of_softmaxes() -> None:
    module = spdsl.load("pattern p { causal out = attend(sink(1)) lse = attend(all - sink(1)) return gate(out, lse) }")
    assert {"out_forward", "lse_forward"} <= set(vars(getattr(torch.ops, module.MODULE.namespace)))


def test_kernels_have_no_argument_that_a_launch_has() -> None:
    text = spdsl.compile(renamed(STATIC, pairs(OF_STATIC[1]))).text
    arguments = {
        word for found in re.findall(r"@rt\.jit\ndef \w+\(([^)]*)\)", text) for word in re.split(r"\W+", found)
    }
    assert not arguments & {"num_warps", "num_stages", "options", "params", "backend"}
    assert {"num_warps_1", "options_1"} <= arguments


@pytest.mark.parametrize("name", ["cache", "gates", "page", "lengths", "tensors", "where", "how"])
def test_words_of_every_module_are_refused_for_inputs_alone(name: str) -> None:
    given = ("{0} = query() return attend(all, query = {0})", "{0} = tensor(head) return attend(all, sink_logit = {0})")
    for body in given:
        assert errors(f"pattern p {{ causal {body.format(name)} }}") == [f"`{name}` cannot be bound"]
    free = ("param {0} = 3 return attend(sliding({0}))", "{0} = 4 return attend(sliding({0}))",
            "{0} = sliding(3) return attend({0})", "{0} = attend(all) return {0}",
            "{0} = compress(8) return attend({0})", "{0} = stream() return attend({0})")  # fmt: skip
    for body in free:
        assert errors(f"pattern p {{ causal {body.format(name)} }}") == []
