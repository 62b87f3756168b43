"""`consumer diagram`: print the state machines of an application as Mermaid.

A machine draws itself (schemes/states.py). Limitation: finds only machines that an imported module holds under a name.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from consumer.app import App
from consumer.app_loader import load_app
from consumer.cli.framework import AppPath, AsJson, Refused, cli, command
from consumer.cli.output import print_json
from consumer.core.errors import Misconfigured
from consumer.core.suggestions import UnknownName, suggestion
from consumer.schemes.states import StateMachine


@command(cli, "diagram")
def diagram(
    app: AppPath,
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="only this machine, by the name of its variable or by table.column"),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Draw the state machines of an application as Mermaid text.

    They are looked for in the App's module, its submodules, and the modules of its handlers. Exit code 1 when there is none,
    2 for a name that none has.

    \b
    Examples:
      consumer diagram shop.orders:app
          all state machines
      consumer diagram shop.orders:app ORDERS > orders.mmd
      consumer diagram shop.orders:app orders.status --json
    """
    machines = find_machines(load_app(app), app.partition(":")[0])
    if not machines:
        raise Refused(f"{app}: has no StateMachine; import the module that creates it, and give it a name there")
    if name is not None:
        known = {text for place, machine in machines.items() for text in (place, machine.name)}
        machines = {
            place: machine
            for place, machine in machines.items()
            if name in (place, place.rpartition(".")[2], machine.name)
        }
        if not machines:
            raise UnknownName(f"NAME: {app} has no StateMachine {name!r}; {suggestion(name, known)}")
    if as_json:
        print_json(
            [
                {"name": place, "column": machine.name, "mermaid": machine.mermaid()}
                for place, machine in machines.items()
            ]
        )
        return 0
    for number, (place, machine) in enumerate(machines.items()):
        if number:
            print()
        print(f"%% {place}: {machine.name}")
        print(machine.mermaid(), end="")
    return 0


def find_machines(app: App, module: str) -> dict[str, StateMachine]:
    """Find the machines of an App by module and variable.

    A machine with several names has the first one. Raises Misconfigured.
    """
    modules = {module, *(handler.function.__module__ for handler in app.handlers.values())}
    modules |= {name for name in sys.modules if name.startswith(f"{module}.")}
    machines: dict[str, StateMachine] = {}
    for name in sorted(modules):
        if name not in sys.modules:
            raise Misconfigured(f"{name}: the module of a handler is not imported; import it in the App's module")
        for variable, value in vars(sys.modules[name]).items():
            if isinstance(value, StateMachine) and not any(value is machine for machine in machines.values()):
                machines[f"{name}.{variable}"] = value
    return machines
