"""Who writes to a Delivery: what its docstring says, against the code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_trees import nodes_of, text_of

import consumer
from consumer.core.delivery import Delivery

pytestmark = pytest.mark.unit

PACKAGE = Path(consumer.__file__).parent
NAMES = {"delivery", "message"}  # what a Delivery is called
WRITERS = {
    "transaction/identify.py": {"id", "fingerprint", "value", "outcome"},
    "precheck/client.py": {"outcome"},
    "transaction/observe.py": {"outcome", "attempts"},
    "transaction/isolate.py": {"outcome", "attempts", "reruns", "call_alone", "success_mark", "failure_cause"},
    "transaction/result.py": {"outcome", "attempts"},
    "core/ordering.py": {"delayed"},
    "decoders/preparation.py": {"id", "outcome", "failure_cause"},
    "effects/stage.py": {"outcome", "attempts", "reply"},
    "rebuild/ledger_history.py": {"outcome"},
    "rebuild/single_pass.py": {"outcome"},
}


def writes(path: Path) -> Iterator[str]:
    """The fields that a file assigns on a Delivery."""
    for node in nodes_of(text_of(path)):
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store):
            continue
        if isinstance(node.value, ast.Name) and node.value.id in NAMES:
            yield node.attr


def test_fields_are_written_only_where_the_table_says() -> None:
    fields = set(Delivery.__struct_fields__)
    written = {str(path.relative_to(PACKAGE)): set(writes(path)) & fields for path in PACKAGE.rglob("*.py")}
    assert {name: names for name, names in written.items() if names} == WRITERS
