"""What a source may hold at most, and how much work a file may make: every limit of the language in one place.

A source is untrusted. Each limit is far above any pattern that was published, and low enough that `check` answers any
file within 2 seconds and 500 MB, and `compile` one pattern within 5. What is beyond a limit is refused by a diagnostic
that names the number and the limit.
"""

from __future__ import annotations

# ---- the text (E001, E005, E006, E104)

SOURCE_BYTES = 128 * 1024  # the longest published pattern has 1.6 KiB
TOKENS = 20_000  # the longest published pattern has about 400
LIST_ITEMS = 1000  # of one list: items of a pattern, arguments of a call
PATTERNS = 32  # of a file: published files hold one, documents up to three
BRACKETS = 64  # open at once
TREE_DEPTH = 100  # of one expression; what walks a tree may recurse
NUMBER_DIGITS = 18  # of a literal, before and after the point together
NUMBER_VALUE = 2**31 - 1  # sizes and positions are 32-bit in the kernels, offsets 64-bit
NAME_LENGTH = 64  # names become file names and arguments

# ---- numbers and sizes (E006, E203 or E502)

EXACT_DIGITS = 40  # of numerator or denominator of what is computed: products of two literals are exact
HEADS = 4096  # published models have up to 128; some checks look at each head
HEAD_DIM = 4096  # published up to 576; a row of a tile lies in shared memory, which ends near 1024
BATCH = 65_536  # sequences that `expect` declares

# ---- expressions, sets and results (E307)

EXPRESSION_SIZE = 128  # operators, positions and numbers of one element expression, names written out; published: 30
NESTED = (
    8  # roundings, remainders, minima, maxima, absolute values inside one another: sympy looks into each; published: 2
)
EXPANDED_TERMS = 64  # of an expression that is multiplied out: it grows with the power of its factors
SET_SIZE = 1024  # the same of a set: 64 cases of a few comparisons each
SET_CASES = 64  # conjuncts of one set: beyond this the derived loops would be longer than any kernel should be
SOFTMAXES = 32  # of a pattern, each a kernel forward and two backward; published patterns have up to four
INPUTS = 128  # of a pattern: each becomes one argument or more
RESULTS = 32  # `return` lines of a pattern
SKIP_TILE = 256  # queries, and keys, of a tile of a skip: a program holds one whole; published: 128
ENTRIES_OF_UNIT = 1024  # entries of a score that overlap one unit: each is a step of the kernel that chooses

# ---- work (E312). A step is about 10 microseconds of one core of a server of 2024.

CHECK_STEPS = 50_000  # of a file; the longest of the shipped patterns takes 6,000, a window and a sink 1,600
ESTIMATE_STEPS = 100_000  # of a file, for what is only remarked (W510); nsa at 1M tokens takes 98,000
RENDER_STEPS = 200_000  # of the text of one module
