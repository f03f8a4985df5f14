"""One peer in this process: `python -m benchmarks.static.peers fla /path/to/it` prints its rows as JSON.

Its own process, since triton and torch are told that there is a GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.static.code import Code, read
from benchmarks.static.peers.capture import captured
from benchmarks.static.peers.cases import Case
from spdsl import targets
from spdsl.machine.machine_code import dump
from spdsl.targets import Target


def main() -> None:
    module, root, target = sys.argv[1:]
    sys.path.insert(0, root)
    print(json.dumps(list(rows(module, Path(root), targets.find(target)))))


def rows(module: str, root: Path, target: Target) -> Iterator[dict[str, Any]]:
    """A case that does not compile has its last words under `error`."""
    peer = import_module(f"benchmarks.static.peers.{module}")
    with captured(target, {}, set()):
        cases = list(peer.cases(root))
    for case in cases:
        print(f"{peer.NAME}: {case.kernel} {case.dims[0]}/{case.dims[1]}", file=sys.stderr, flush=True)
        row = {
            "of": peer.NAME, "kernel": case.kernel, "heads": case.heads, "dims": case.dims, "beside": case.beside,
            "pattern": case.ours, "per_pair": case.per_pair, "gathers": case.gathers, "dtype": case.dtype,
        }  # fmt: skip
        try:
            yield row | {"code": _code(case, target).as_dict()}
        except Exception as problem:  # a launcher may fail in any way
            yield row | {"error": f"{type(problem).__name__}: {problem}".strip().splitlines()[-1]}


def _code(case: Case, target: Target) -> Code:
    with captured(target, case.config, {case.kernel}) as found:
        try:
            case.launch()
        except Exception:  # after its kernel a launcher meets numbers that nobody computed
            if not found:
                raise
    made = found[0]
    sass, registers, _ = dump(made.asm["cubin"])
    code = read(
        sass, made.asm["ttgir"], registers, int(made.metadata.shared), int(made.metadata.num_warps),
        int(made.metadata.num_stages), target,
    )  # fmt: skip
    return case.own(code)


if __name__ == "__main__":
    main()
