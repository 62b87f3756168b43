"""`consumer diagram`, and the short way to the schemes' names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, consumer, is_one_line

from consumer import schemes

MODULE = """
from consumer import App, Tx
from consumer.schemes import StateMachine

ORDERS = StateMachine("orders", "status", {"new": {"paid"}, "paid": ()})
ALIAS = ORDERS
app = App("shop")
bare = App("bare")

@app.handler("orders")
async def settle(order: dict, tx: Tx) -> None: ...
"""


def test_each_machine_is_drawn_once_and_found_by_either_name(tmp_path: Path) -> None:
    (tmp_path / "orders.py").write_text(MODULE)
    drawn = consumer(tmp_path, "diagram", "orders:app")
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout.splitlines()[:3] == ["%% orders.ORDERS: orders.status", "stateDiagram-v2", "    [*] --> new"]
    assert drawn.stdout.count("stateDiagram-v2") == 1
    for name in ("ORDERS", "orders.ORDERS", "orders.status"):
        machines = json.loads(consumer(tmp_path, "diagram", "orders:app", name, "--json").stdout)
        assert [machine["name"] for machine in machines] == ["orders.ORDERS"]
        assert machines[0]["mermaid"] in drawn.stdout


def test_none_and_none_of_that_name_are_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "orders.py").write_text(MODULE)
    is_one_line(
        consumer(tmp_path, "diagram", "orders:app", "refunds"), "no StateMachine 'refunds'", "orders.status", code=2
    )
    (tmp_path / "orders.py").write_text(MODULE.replace("ORDERS = ", "orders = lambda: ").replace("ALIAS", "#"))
    is_one_line(consumer(tmp_path, "diagram", "orders:app"), "has no StateMachine", code=1)
    is_one_line(consumer(tmp_path, "diagram", "orders:bare"), "no handlers")


@pytest.mark.parametrize("name", schemes.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(schemes, name).__name__ == name


def test_schemes_are_loaded_on_first_use() -> None:
    code = (
        "import sys, consumer, consumer.schemes\n"
        "assert not [each for each in sys.modules if each.startswith('consumer.schemes.')]\n"
        "from consumer.schemes import insert_once\n"
        "assert 'consumer.schemes.lock' not in sys.modules and 'redis' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="nothing"):
        schemes.nothing  # noqa: B018
