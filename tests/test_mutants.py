"""No entry of the mutation tests is stale: what it changes is there, once, and so are its tests."""

from __future__ import annotations

from collections import Counter

from mutants import MUTANTS, stale


def test_no_mutant_is_stale() -> None:
    found = {mutant.name: text for mutant in MUTANTS if (text := stale(mutant))}
    assert not found, "\n".join(f"{name}: {text}" for name, text in found.items())


def test_every_mutant_has_a_name_of_its_own() -> None:
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1
