"""Run as a process of its own: adds winners to a store; some die on the way.

`python writer.py FILE FIRST COUNT [draft|lock]`: the winners FIRST ... FIRST + COUNT - 1, one by one. `draft` waits to
be killed with a draft written and not yet in place, `lock` while it holds the lock; both say so on standard output.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

from spdsl.runtime.tuning import tuned_store
from spdsl.runtime.tuning.configs import Config
from spdsl.runtime.tuning.tuned_store import Store, Winner

DIGEST = "d" * 64


def winner(number: int) -> Winner:
    return Winner(Config(64, 32, 4, 1 + number % 4), float(number), 2.0 * number, 3, "a GPU")


def _wait_for_death() -> None:
    print("here", flush=True)
    time.sleep(60)


def main() -> None:
    store = Store(Path(sys.argv[1]), DIGEST)
    first, count, stop = int(sys.argv[2]), int(sys.argv[3]), (sys.argv[4:] or [""])[0]
    if stop == "draft":
        tuned_store.os.replace = lambda *paths: _wait_for_death()  # type: ignore[assignment,misc]
    if stop == "lock":
        held: AbstractContextManager[None] = tuned_store._locked(store.path.with_name(f".{store.path.name}.lock"))
        with held:
            _wait_for_death()
    for number in range(first, first + count):
        tuned_store.write_winners(store, {f"key {number}": winner(number)})


if __name__ == "__main__":
    main()
