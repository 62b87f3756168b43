"""A small model of the whole, explored to its end.

The rules hold in every state; each broken rule does not.
"""

from __future__ import annotations

import pytest
from chaos import outbox_model
from chaos.model import MUTANT_RULES, Bounds, Rules, explore

pytestmark = pytest.mark.unit


def test_the_rules_lose_and_double_nothing_in_any_state() -> None:
    explored = explore(Rules())
    assert explored.wrong is None, explored.wrong
    assert explored.states > 50_000
    assert explored.quiescent > 1_000


@pytest.mark.parametrize("name", MUTANT_RULES)
def test_a_broken_rule_is_found(name: str) -> None:
    explored = explore(MUTANT_RULES[name])
    assert explored.wrong is not None
    assert explored.effects != (1, 1)


def test_without_faults_nothing_goes_wrong_even_for_most_mutants() -> None:
    """The model finds mutants only where something fails."""
    quiet = Bounds(crashes=0, failovers=0, faults=0, purges=0)
    fine = {name for name, rules in MUTANT_RULES.items() if explore(rules, quiet).wrong is None}
    assert fine >= set(MUTANT_RULES) - {"M8", "M13"}


def test_senders_that_only_repeat_lose_and_reorder_nothing_in_any_state() -> None:
    explored = outbox_model.explore(outbox_model.Rules())
    assert not explored.wrong, explored.way
    assert explored.states > 40_000


@pytest.mark.parametrize("name", outbox_model.BROKEN_RULES)
def test_a_broken_rule_of_the_outbox_is_found(name: str) -> None:
    rules, wrong = outbox_model.BROKEN_RULES[name]
    assert outbox_model.explore(rules).wrong == wrong
