"""Further results of `attention`: scores, and how far one is from another; over all keys, or on the lists alone."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spdsl.oracle import dense
from tests.library import broken
from tests.numerics.cases import Found, Inputs, Shape, assert_same, evaluated, generated, inputs_of, parts_of
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of, printed
from tests.numerics.selected import SELECTED
from tests.numerics.test_selection_choices import scrambled
from tests.numerics.test_selection_layouts import check_packed


def divergence(pattern_body: str, module: ModuleType) -> tuple[Found, Found, Inputs]:
    """The second result alone, with its gradients."""
    pattern = pattern_of(pattern_body)
    inputs = inputs_of(pattern, Shape(37, 37, heads=4, kv_heads=2))
    found = evaluated(lambda x: parts_of(module.attention(**x, return_lse=True))[1:], pattern, inputs)
    wanted = evaluated(lambda x: dense.results(pattern, x)[1:], pattern, inputs)
    return found, wanted, inputs


def test_kl_trains_the_score_only(engine: Engine) -> None:
    body = SELECTED["msa_minimax"]
    found, wanted, _ = divergence(body, engine(body))
    assert_same(found, wanted)
    for name in ("q", "k", "v"):
        assert found.grads[name].eq(0).all()
    for name in ("q_index", "k_index"):
        assert found.grads[name].abs().sum() > 0
    assert found.parts[0].ge(-1e-12).all()


@pytest.mark.parametrize(
    "result",
    [
        "kl(mass(full), softmax(dot(index)), share = mean(group))", "kl(mass(full), dot(index), share = sum(group))",
        "kl(mass(near), dot(index))", "pool(mass(near), share = mean(group), unit = max(8))",
        "kl(mass(full), cosine(index), share = mean(group))", "pool(cosine(index), rows = max(16))",
        "kl(mass(full), softmax(cosine(index)), share = mean(group))", "pool(softmax(cosine(index)), unit = max(8))",
        "pool(mass(full), rows = max(16), unit = 16)", "pool(dot(index), share = max(group), unit = mean(16))",
        "mass(full)",
    ],
)  # fmt: skip
def test_further_results(engine: Engine, result: str) -> None:
    body = (
        "heads query = 4, kv = 2 causal index = stream(value = none) full = attend(all) near = attend(sliding(9)) "
        f"return {'near' if 'near' in result else 'full'}, {result}"
    )
    found, wanted, _ = divergence(body, engine(body))
    assert_same(found, wanted)


def test_divergence_of_cells_of_which_the_last_is_short(cpu: Engine) -> None:
    """Cells begin early and one is cut: there are more of them than strides."""
    body = (
        "heads query = 4, kv = 2 causal e = compress(8, 4, before = 4, partial = keep, by = mean) coarse = attend(e) "
        "return coarse, kl(mass(coarse), dot(e), share = head) if train"
    )
    found, wanted, _ = divergence(body, cpu(body))
    assert_same(found, wanted)


def listed(
    chosen: str = "top_k(2, score = rank, unit = max(16), share = max(group), force = last(1))",
    kl: str = "mean(group)", over: str = "chosen", extra: str = "", score: str = "rank",
) -> str:  # fmt: skip
    return (
        "heads query = 4, kv = 2 causal index = stream(heads = 1, qk = 8, value = none) "
        "asks = query(heads = 4, dim = 8) doc = tensor(token, int) rank = dot(index, query = asks) "
        f"chosen = {chosen} fine = attend({over}{extra}) return fine, kl(mass(fine), {score}, share = {kl})"
    )


# On the lists alone: what a head sees, or all heads of a group.
ON_LISTS = {
    "group": listed(),
    "sum": listed(kl="sum(group)"),
    "every head": listed(kl="head"),
    "lists of heads": listed("top_k(2, score = rank, unit = max(16), share = head)", kl="head"),
    "probabilities of heads": listed(kl="head", score="softmax(rank)"),
    "cut": listed(over="chosen & sliding(19)"),
    "documents": listed(over="chosen & where(doc[k] == doc[q])"),
    "softcap": listed(extra=", softcap = 1.5"),
    "bias": listed(extra=", bias = -0.125 * (h + 1) * (q - k)"),
}
# Over all keys: heads that are added up have lists of their own, or totals over all keys of their own.
ON_ALL = {
    "heads apart": listed("top_k(2, score = rank, unit = max(16), share = head)"),
    "totals": listed(score="softmax(rank)"),
}


def check(body: str, module: ModuleType) -> None:
    found, wanted, _ = divergence(body, module)
    assert_same(found, wanted)
    assert found.parts[0][0].max() > 1e-3


RARE = ("sum", "cut", "softcap", "lists of heads")


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.full] * (one in RARE)) for one in (*ON_LISTS, *ON_ALL)]
)
def test_divergence_beside_lists(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name not in ("group", "heads apart"):
        pytest.skip("torch on the same lists")
    body = (ON_LISTS | ON_ALL)[name]
    assert ("rt.logits_of_units" in printed(body)) == (name in ON_LISTS)
    check(body, engine(body))


def test_divergence_of_packed_sequences(engine: Engine) -> None:
    check_packed(ON_LISTS["documents"], engine(ON_LISTS["documents"]), [0, 21, 22, 38])


def test_divergence_on_a_passed_choice(engine: Engine) -> None:
    """Repeats, another order, units past the end of a sequence and rows without any."""
    body = ON_LISTS["group"]
    pattern, module = pattern_of(body), engine(body)
    inputs = inputs_of(pattern, Shape(37, 37, heads=4, kv_heads=2))
    chosen = dense.choices(pattern, inputs)["chosen"]
    chosen[:, :, 5] = -1
    far = torch.full_like(chosen[..., :1], 9)
    found = generated(module, pattern, {**inputs, "chosen": torch.cat([scrambled(chosen), far], 3)})
    own = generated(module, pattern, {**inputs, "chosen": chosen})
    assert own.parts[1][:, :, 5].eq(0).all()
    assert_same(found, own)


def test_the_work_of_a_divergence_follows_the_lists(cpu: Engine) -> None:
    """Twice the tokens are twice the products, not four times."""
    body = ON_LISTS["group"]
    module = cpu(body)

    def products(tokens: int) -> int:
        inputs = inputs_of(pattern_of(body), Shape(tokens, tokens, heads=4, kv_heads=2), torch.float32)
        chosen = module.choices(**inputs)
        with FlopCounterMode(display=False) as counted:
            module.attention(**inputs, **chosen)
        return counted.get_total_flops()

    assert products(256) == 2 * products(128)


def test_a_divergence_on_lists_repeats_to_the_bit(cpu: Engine) -> None:
    """Unit 0 is in the list of many queries; with two threads."""
    body = listed("top_k(2, score = rank, unit = max(16), share = max(group), force = first(1))")
    pattern, module = pattern_of(body), cpu(body)
    inputs = inputs_of(pattern, Shape(512, 512, heads=4, kv_heads=2), torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [generated(module, pattern, inputs).grads["k_index"] for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    assert found[0].abs().sum() > 0
    assert all(torch.equal(found[0], other) for other in found[1:])


SEEDED = [
    ("a list of the head before", "x.repeat_interleave(heads // x.shape[1], 1) for x in (k, chosen)",
     "x.repeat_interleave(heads // x.shape[1], 1) for x in (k, chosen.roll(1, 1))"),
    ("padding counts as unit 0", "seen | (number < 0)", "seen | (number < -1)"),
    ("the first tokens of a unit alone", "chosen.unsqueeze(-1) * unit + torch.arange(unit,",
     "chosen.unsqueeze(-1) * unit + 0 * torch.arange(unit,"),
    ("keys of the sequence before", "k = torch.nn.functional.pad(k, (0, 0, 0, units * unit - keys))",
     "k = torch.nn.functional.pad(k.roll(1, 2), (0, 0, 0, units * unit - keys))"),
]  # fmt: skip


@pytest.mark.parametrize("title, old, new", SEEDED, ids=[title for title, *_ in SEEDED])
def test_a_bug_is_seen(cpu: Engine, title: str, old: str, new: str, tmp_path: Path) -> None:
    body = ON_LISTS["group"]
    seeded = broken(printed(body), old, new, tmp_path)
    with pytest.raises(AssertionError):
        check(body, cpu(seeded))
