"""Every kernel of every shipped pattern, and of words that these do not use, runs under the sanitizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from spdsl.resources import folder
from tests.numerics.patterns import CATALOGUE, module_of, pattern_of
from tests.numerics.selected import PUBLISHED, SELECTED
from tests.sanitizer.cases import cached, packed, padded, paged, part, train
from tests.sanitizer.kernels import kernels_of
from tests.sanitizer.mode import sanitized

ALL = (train, packed, padded, paged, cached)
FURTHER = {
    "softmax": (train, paged),  # closing by logits
    "max": (train, paged),
    "cells that begin early": (train, packed, paged),  # learned weights; tokens before the first
    "threshold of at least": (train, paged),  # pairs of parts
    "at least of a logit": (train, packed, cached),  # lists that are cut
    "tiles of 24 rows": (train, packed, paged),
    "two_streams_sink": (train, paged),
    "token_bias": (packed, cached),
}
CASES = dict.fromkeys(CATALOGUE, (*ALL, part)) | dict.fromkeys(PUBLISHED, ALL) | FURTHER
# A score that is a result is of dense sequences.
CASES["seer_attention"] = (train, paged, cached)
# What host code names and this pattern never starts: a merge of one part, gradients of entries that only choose, those
# of learned weights where there are none, and the training and decoding of a result that only a prefill has.
NEVER = {
    "nsa": {"merge_rows"},
    "infllm_v2": {"spread_entries", "weight_sums"},
    "moba": {"spread_entries", "weight_sums"},
    "seer_attention": {"attend_dq", "attend_dkdv", "attend_decode"},
    "softmax": {"merge_rows"},
    "max": {"merge_rows", "weight_sums"},
    "cells that begin early": {"merge_rows"},
    "threshold of at least": {"merge_rows", "weight_sums"},
    "at least of a logit": {"spread_entries", "weight_sums"},
    "tiles of 24 rows": {"spread_entries", "weight_sums"},
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", CASES)
def test_every_kernel(name: str) -> None:
    body = SELECTED.get(name, name)
    module, pattern = module_of(body), pattern_of(body)
    assert module.__file__ is not None
    with sanitized() as found:
        for case in CASES[name]:
            case(module, pattern)
    started = found.kernels(module.__file__)
    assert kernels_of(Path(module.__file__).read_text()) == started | NEVER.get(name, set())


def test_every_shipped_pattern_has_its_cases() -> None:
    assert {path.stem for path in folder("patterns").glob("*.spat")} == {*CATALOGUE, *PUBLISHED}
