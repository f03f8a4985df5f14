"""Which overrides of parameters go to which patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from spdsl.syntax.tree import Declaration, PatternTree


def declared(pattern: PatternTree) -> set[str]:
    """The names of its `param`s."""
    declarations = [item for item in pattern.items if isinstance(item, Declaration) and item.keyword == "param"]
    return {pair.name.text for item in declarations for pair in item.pairs}


def divided(patterns: Sequence[PatternTree], params: Mapping[str, Fraction]) -> list[dict[str, Fraction]]:
    """The overrides of each pattern: of parameters that it has, and of those that none has, which each refuses."""
    return shared([declared(pattern) for pattern in patterns], params)


def shared(owners: Sequence[set[str]], params: Mapping[str, Fraction]) -> list[dict[str, Fraction]]:
    """`divided` for whatever has parameters: the names of each owner are known."""
    known = set().union(*owners)
    return [{name: value for name, value in params.items() if name in own or name not in known} for own in owners]
