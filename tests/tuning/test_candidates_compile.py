"""What the model lets through compiles within the shared memory of the target, so that every candidate starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from spdsl import targets
from spdsl.machine import tune
from spdsl.machine.crosscompile import compile_launch
from spdsl.machine.launches import Launch, specialise
from spdsl.runtime.tuning import tuner
from spdsl.runtime.tuning.buckets import bucket_candidates
from tests.crosscompile.kernels import load
from tests.library import tables

pytestmark = [pytest.mark.crosscompile, pytest.mark.full]


def launches(pattern: str, target: targets.Target, phases: tuple[str, ...]) -> list[Launch]:
    """Every kernel of a pattern with every candidate for a head dim of 128 in bf16."""
    module, found = load(pattern), dict[str, Launch]()

    def note(kernel: Any, grid: object, *args: Any, **named: Any) -> None:
        made = specialise(kernel, args, named)
        found.setdefault(made.key, made)

    def try_all(run: Callable[[], object], search: Any) -> object:
        result = run()
        for bucket, default in list(search.asked.items()):
            for config in bucket_candidates(bucket, default):
                search.trial[bucket] = config
                run()
            search.trial[bucket] = default
        return result

    sizes = tune.Sizes(batch=2, heads=8, kv_heads=2, dim=128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner, "on_gpu", lambda args: True)
        patch.setattr(tuner, "find_all", try_all)
        patch.setattr(module.MODULE.tuner, "may_search", lambda: True)
        patch.setattr(module.MODULE.tuner, "known", dict)
        with tables(target.architecture, target.sm_count), module.rt.launching(note):
            for _, call in tune._calls(module, [256], phases, sizes, "cpu"):
                call()
    return list(found.values())


@pytest.mark.parametrize("target", ["h200", "mi300x"])
@pytest.mark.parametrize("pattern, phases", [("streaming_llm", ("train", "decode")), ("document", ("prefill",))])
def test_every_candidate_starts(pattern: str, phases: tuple[str, ...], target: str) -> None:
    gpu = targets.find(target)
    made = launches(pattern, gpu, phases)
    assert len(made) > 4 * len(phases)
    compiled = [compile_launch(launch, gpu) for launch in made]
    too_large = [(x.kernel, x.constexprs, x.shared) for x in compiled if x.error or x.shared > gpu.shared_per_block]
    assert too_large == []
