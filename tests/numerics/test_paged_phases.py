"""Adopted pages where prefill and decode answer apart: the call says which."""

from __future__ import annotations

import pytest
import torch

from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of
from tests.numerics.test_attend_paged import check, filled

BODIES = {
    "sets": "causal return attend(sliding(5)) if prefill return attend(sliding(9) | first(2))",
    "gates": "causal return gate(attend(sliding(5)), attend(first(3))) if prefill return attend(all)",
    "lists": "causal t = given(share = all) return attend(all) if prefill return attend(t | sliding(2))",
    "a tensor": "causal s = tensor(head) return attend(all, sink_logit = s) if decode return attend(sliding(7))",
}


@pytest.mark.parametrize("page", [16, 1])
@pytest.mark.parametrize("name", BODIES)
def test_each_phase(engine: Engine, name: str, page: int) -> None:
    if engine.name == "interpreted" and (page == 1) == (name in ("sets", "lists")):
        pytest.skip("pairwise")
    module, pattern = engine(BODIES[name]), pattern_of(BODIES[name])
    several, single = (
        [(20, 9, -1), (33, 1, 0), (0, 1, -1), (7, 7, -1)],
        [(20, 1, -1), (33, 1, 0), (0, 1, -1), (7, 0, -1)],
    )
    for phase, requests in (("prefill", several), ("decode", single)):
        pages = filled(pattern, requests, page)
        unread = {"t": "prefill", "gates": "decode", "s": "prefill"}
        pages.given = {key: x for key, x in pages.given.items() if unread.get(key) != phase}
        check(module, pattern, pages, phase=phase)


def test_what_a_phase_needs_and_refuses(cpu: Engine) -> None:
    module, pattern = cpu(BODIES["lists"]), pattern_of(BODIES["lists"])
    given = filled(pattern, [(20, 3, -1), (5, 1, -1)], 16).given
    with pytest.raises(TypeError, match="phase"):
        module.attend_paged(**given)
    with pytest.raises(ValueError, match="phase: expected"):
        module.attend_paged(**given, phase="train")
    with pytest.raises(ValueError, match="max_seqlen_q: expected 1"):
        module.attend_paged(**given, phase="decode", max_seqlen_q=3)
    with pytest.raises(ValueError, match="max_seqlen_q"):
        module.attend_paged(**given, phase="decode")
    one = filled(pattern, [(20, 1, -1), (5, 1, -1)], 16).given
    del one["t"]
    with pytest.raises(TypeError, match="t: expected"):
        module.attend_paged(**one, phase="decode")
    assert torch.isfinite(module.attend_paged(**one, phase="prefill")[0]).all()
