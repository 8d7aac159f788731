"""What the commands `phfs`, `mount.phfs` and `phfs-csi` have in common: --version and help without a command, and
errors as one line and an exit code. Owns no state."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer

from phfs_fuse import __version__
from phfs_fuse.errors import StartupError, UsageError
from phfs_fuse.host import logs

log = logging.getLogger(__name__)

_PARSE_ERROR: Any = typer.BadParameter.__bases__[0]  # UsageError of click, wherever this typer keeps it
INTERRUPTED: Final = 130  # Source: bash(1), exit status of a command that SIGINT ended


def program(name: str, text: str) -> typer.Typer:
    """Without commands so far. It knows --version, and shows its help when no command is given."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=text)

    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    ) -> None:
        if version:
            print(f"{name} {__version__}")
            raise typer.Exit(0)
        if context.invoked_subcommand is None:
            print(context.get_help())
            raise typer.Exit(UsageError.exit_code)

    return app


def guarded(name: str, call: Callable[[], int | None], *, debug: str) -> int:
    """The exit code of `call`; each error is one line on standard error, with another one for each change that the
    store has refused. `debug` is the setting that shows where an unexpected one came from."""
    try:
        return call() or 0
    except StartupError as exc:
        say(str(exc), name)
        for line in exc.refused:
            print(logs.printable(line), file=sys.stderr)
        return exc.exit_code
    except _PARSE_ERROR as exc:
        say(exc.format_message(), name)
        return int(exc.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted", name)
        return INTERRUPTED
    except Exception as exc:
        say(f"unexpected {type(exc).__name__}: {exc} ({debug} shows where)", name)
        log.debug("unexpected", exc_info=True)
        return 1


def say(line: str, name: str = "phfs") -> None:
    print(f"{name}: {logs.printable(logs.redacted(line))}", file=sys.stderr)
