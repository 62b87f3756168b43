"""Imports the App of "module:app", and runs its lifespan.

Every error is one line that names the place.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, redirect_stdout
from pathlib import Path

from consumer.app import App
from consumer.core.errors import Misconfigured
from consumer.error_places import is_users
from consumer.logs import describe, log


def names_in(path: str) -> tuple[str, str]:
    """Return the module and the attribute of "module:attribute".

    Raises Misconfigured for another form.
    """
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise Misconfigured(f'{path!r}: does not name an App; write "module:attribute", for example "handlers:app"')
    if module_name.startswith(".") or "/" in module_name or module_name.endswith(".py"):
        better = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise Misconfigured(f"{path!r}: names a file; write the module, {better}:{attribute}")
    return module_name, attribute


def load_app(path: str) -> App:
    """Import the App that `path` names.

    The current directory is on the import path. Raises Misconfigured for a path that is not "module:attribute", a
    module that cannot be imported, an attribute that is not an App, and an App without handlers.
    """
    module_name, attribute = names_in(path)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        with redirect_stdout(sys.stderr):  # what a module prints is not part of our output
            module = importlib.import_module(module_name)
    except Misconfigured:
        raise
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise Misconfigured(
                f"{module_name!r}: no such module in {here} or among the installed packages; change to its directory, or install it"
            ) from None
        raise Misconfigured(f"{module_name!r}: cannot be imported; {error}{_place(error)}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        try:
            text = " ".join(str(error).split()) or "no text"
        except Exception:
            text = "no text"
        raise Misconfigured(
            f"{module_name!r}: cannot be imported; {type(error).__name__}: {text}{_place(error)}"
        ) from None
    log.disabled = False  # dictConfig in a module disables the loggers that it does not name
    target = module
    for name in attribute.split("."):
        if not hasattr(target, name):
            apps = [known for known, value in vars(module).items() if isinstance(value, App)]
            hint = f"did you mean {module_name}:{apps[0]}?" if apps else "name the variable that holds the App"
            raise Misconfigured(f"module {module_name!r}: no attribute {attribute!r}; {hint}")
        target = getattr(target, name)
    if not isinstance(target, App):
        raise Misconfigured(
            f"{path}: not a consumer.App, but {type(target).__name__}; name the variable that holds the App"
        )
    if not target.handlers:
        raise Misconfigured(
            f"{path}: no handlers; name the module that registers them, as in PACKAGE.handlers:{attribute}, or import it in {module_name}"
        )
    return target


def _place(error: BaseException) -> str:
    """Return where in the application's files an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(Path(__file__).parent)
    own = [frame for frame in frames if "importlib" not in frame.filename and not frame.filename.startswith(ours)]
    own = [frame for frame in own if is_users(frame.filename)] or own
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


@asynccontextmanager
async def running(app: App) -> AsyncIterator[None]:
    """Run the block inside the App's lifespan.

    Raises Misconfigured for a lifespan that cannot be entered.
    """
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(app.running())
        except (Misconfigured, asyncio.CancelledError):
            raise
        except (Exception, SystemExit) as error:
            raise Misconfigured(
                f"the lifespan of {app.name!r} failed: {describe(error)}; correct what it needs"
            ) from None
        yield
