"""Attention over the units of a choice: packed rows, pairs, inverse lists, divergences."""
