"""`python -m spdsl.cli`"""

from __future__ import annotations

from spdsl.cli import main

main()
