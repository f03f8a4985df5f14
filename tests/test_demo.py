"""`make demo` in small: it ends well only if prefill and decode agree with attention."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.crosscompile
def test_the_quick_demo(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    line = [sys.executable, "-m", "examples.demo", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "40 of 40 bytes equal" in " ".join(done.stdout.split())
    assert "attend_dkdv" in done.stdout, "the compile report"
    made = sorted(path.name for path in tmp_path.iterdir() if path.is_file())  # importing may leave __pycache__
    assert made == ["loss.png", "mask.png", "streaming_llm.py"]
