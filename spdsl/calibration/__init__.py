"""calibrate: the level of a threshold skip that leaves out a wanted share of tiles at any length.

`margins` counts on real queries and keys, `fit` draws the line through the counts, `plot` shows it.
"""

from __future__ import annotations

from spdsl.calibration.fit import Calibration, Curve, calibrated
from spdsl.calibration.margins import Rule, margins

__all__ = ["Calibration", "Curve", "Rule", "calibrated", "margins"]
