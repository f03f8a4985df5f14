"""Every kernel of every shipped pattern, and of words that these do not use, runs under the sanitizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from spdsl.resources import folder
from tests.numerics.patterns import CATALOGUE, module_of, pattern_of
from tests.numerics.selected import AT_CALL, PUBLISHED, SELECTED
from tests.numerics.test_antidiagonal import WHOLE
from tests.numerics.test_cohesion import BODIES as ALIKE
from tests.numerics.test_combined_scores import BODIES
from tests.numerics.test_gathered import CHOSEN, GIVEN
from tests.sanitizer.cases import cached, packed, packed_keys, padded, padded_right, paged, part, train
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
    "numbers of heads": (packed, paged),  # what only the call knows of lists that are ranked, and of those that are cut
    "a level, any number": (packed, cached),
    "two_streams_sink": (train, paged),
    "token_bias": (packed, cached),
    "a mask and a bias of the call": (train, packed, padded, paged, cached, part),
    "given tokens": (train, packed, padded, paged, cached),  # keys that are gathered, dK and dV over whole units
    "given units of 6 of heads": (train, packed, paged),
    "units of 8": (train, packed, paged),
    "tokens by an indexer": (train, cached),
    "a table that learns": (train, packed),  # gradients of what biases read
    "rows and keys that learn": (train, packed),
    "pairs that learn": (train, packed),
    "pairs of units that learn": (train,),
    "tables of heads that learn": (train,),
    "columns": (packed, padded, paged, cached),  # one list for all queries, by the last ones
    "tiles of cells": (packed, padded, paged, cached),  # rows of cells, whose lists are ranked and cut
    "skips of maps": (train, packed, padded),
    "cells of queries": (train, packed, padded, paged),  # products that stand in memory
    "a sum of scores": (packed, paged, cached),
    "cohesion": (packed, paged),
}
LISTED = "c = given(unit = 16)"
CALLED = (
    "causal m = tensor(query, token, bool) b = tensor(head, query, token) n = tensor(query, 5, int) "
    "return attend(sliding(3) | where(m[q][k] & n[q][k - q + 8] > 9), bias = b[h][q][k])"
)
SHORT = {
    "a mask and a bias of the call": CALLED,
    "given tokens": GIVEN["tokens"],
    "given units of 6 of heads": "causal t = given(unit = 6, share = head) return attend(t)",
    "a table that learns": "causal t = tensor(head, 40) return attend(all, bias = t[h][min(q - k, 39)]) if train",
    "rows and keys that learn": "causal c = tensor(head, token) return attend(all, bias = c[h][q] - c[h][k]) if train",
    "pairs that learn": "p = tensor(query, token) return attend(sliding(20), bias = p[q][k]) if train",
    "pairs of units that learn": f"causal p = tensor(query, token) {LISTED} return attend(c, bias = p[q][k]) if train",
    "tables of heads that learn": f"causal t = tensor(head, 9) {LISTED} "
    "return attend(c, bias = t[h][(q + k) % 9]) if train",
    "columns": "seen = softmax(dot(kv, query = tail(q, 7))) allow(W404) "
    "return attend(top_k(2, score = seen, rows = sum(all), share = head, unit = sum(16)))",
    "tiles of cells": "q_mean = compress(8, of = q, by = mean, partial = keep) k_mean = compress(8) allow(W404) "
    "few = top_k(2, score = softmax(dot(k_mean, query = q_mean)), share = head, unit = sum(16)) "
    "cut = top_k(2, score = dot(k_mean, query = q_mean), share = max(group), unit = max(16), rows = max(16)) "
    "return gate(attend(few), attend(cut), attend(k_mean, query = q_mean))",
    "skips of maps": "causal a = given(rows = 16, unit = 16) "
    "return attend(a | sliding(9), skip = below(1 / 4, rows = 16, unit = 32)) if train",
    "cells of queries": WHOLE["mass of a group"], "a sum of scores": BODIES["a sum"],
    "cohesion": ALIKE["of a group"],
    "units of 8": CHOSEN["units of 8"], "tokens by an indexer": CHOSEN["tokens by an indexer"],
}  # fmt: skip
CASES = dict.fromkeys(CATALOGUE, (*ALL, part)) | dict.fromkeys(PUBLISHED, ALL) | FURTHER
for _name in ("streaming_llm", "document", "dilated", "nsa", "given tokens"):
    CASES[_name] = (*CASES[_name], packed_keys, padded_right)
CASES["blasst"] = ALL  # a part of the keys begins with a tile: tests/numerics/test_skip.py
# A score that is a result is of dense sequences.
CASES["seer_attention"] = (train, paged, cached)
CASES["vsa"] = (train, packed, padded)  # for training alone
# What host code names and this pattern never starts: a merge of one part, gradients of entries that only choose, those
# of learned weights where there are none, and the step of one token of a result that only a prefill has.
NEVER = {
    "nsa": {"merge_rows"},
    "infllm_v2": {"spread_entries"},
    "moba": {"spread_entries"},
    "seer_attention": {"attend_decode"},
    "vsa": {"append_rows", "append_lengths", "close_cells", "merge_ranks"},
    "xattention": {"attend_decode"},
    "tiles of cells": {"merge_rows"},
    "softmax": {"merge_rows"},
    "max": {"merge_rows"},
    "cells that begin early": {"merge_rows"},
    "threshold of at least": {"merge_rows"},
    "at least of a logit": {"spread_entries"},
    "tiles of 24 rows": {"spread_entries"},
    "numbers of heads": {"spread_entries"},
    "a level, any number": {"spread_entries"},
    "units of 8": {"merge_rows"},
    "a sum of scores": {"spread_entries"},
    "cohesion": {"close_cells"},
    **{name: {"append_rows", "append_lengths"} for name in FURTHER if name.endswith("that learn")},
    "a table that learns": {"append_rows", "append_lengths"},
    "skips of maps": {"append_rows", "append_lengths"},
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", CASES)
def test_every_kernel(name: str) -> None:
    body = (SELECTED | AT_CALL | SHORT).get(name, name)
    module, pattern = module_of(body), pattern_of(body)
    assert module.__file__ is not None
    with sanitized() as found:
        for case in CASES[name]:
            case(module, pattern)
    started = found.kernels(module.__file__)
    assert kernels_of(Path(module.__file__).read_text()) == started | NEVER.get(name, set())


def test_every_shipped_pattern_has_its_cases() -> None:
    assert {path.stem for path in folder("patterns").glob("*.spat")} == {*CATALOGUE, *PUBLISHED}
