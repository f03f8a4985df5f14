"""The GPUs spdsl knows: one data file each, read without torch or triton."""

from __future__ import annotations

from spdsl.targets.load import USUAL, Target, find, names

__all__ = ["USUAL", "Target", "find", "names"]
