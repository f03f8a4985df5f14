"""What a source may hold at most. Far above any pattern that was published, low enough to answer in a second."""

from __future__ import annotations

SOURCE_BYTES = 128 * 1024  # the longest published pattern has 1.6 KiB
TOKENS = 20_000  # the longest published pattern has about 400
LIST_ITEMS = 1000  # of one list: items of a pattern, arguments of a call, patterns of a file
BRACKETS = 64  # open at once
TREE_DEPTH = 100  # of one expression; what walks a tree may recurse
NUMBER_DIGITS = 18  # before and after the point together: numerator and denominator stay below 2**63
NUMBER_VALUE = 2**31 - 1  # sizes and positions are 32-bit in the kernels, offsets 64-bit
NAME_LENGTH = 64  # names become file names and arguments
