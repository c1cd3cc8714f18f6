"""The command line's promise: each failure is one message on standard error and an exit code, never a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import click
import typer
from typer.core import TyperGroup

from experiments import interrupts
from fedmm.errors import FedmmError, Interrupted

CODES = {
    0: "ok",
    2: "the configuration or the call is not valid",
    3: "data are missing or differ from the recorded hash, or a checkpoint is corrupt",
    4: "the run failed",
    5: "finished with fewer replies than asked for, and --strict was given",
    6: "interrupted; --resume continues",
}
"""Exit code -> meaning."""

DEGRADED = 5


def failure(error: BaseException) -> tuple[str, int]:
    """The message and the exit code for an exception."""
    if isinstance(error, FedmmError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", Interrupted.exit_code
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        missing = isinstance(error, FileNotFoundError)
        remedy = "check the path" if missing else "is it writable, with space left? --out names another directory"
        return f"{place}{error.strerror or error} ({remedy})", FedmmError.exit_code
    kind = type(error).__name__
    return f"unexpected error: {kind}: {error}; set FEDMM_DEBUG=1 for the trace, please report", FedmmError.exit_code


class Guarded(TyperGroup):
    """A command group that turns every exception of its commands into a message and an exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse what no file that we write could name."""
        for text in args:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise click.UsageError(f"{text!a} is not UTF-8; give names in UTF-8", ctx) from None
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if interrupts.asked() and not isinstance(error, Interrupted):
                error = KeyboardInterrupt()  # what it became on its way through a library
            message, code = failure(error)
            if os.environ.get("FEDMM_DEBUG") == "1":
                traceback.print_exception(error)
            typer.secho(f"fedmm: {message}", err=True, fg=typer.colors.RED)
            raise typer.Exit(code) from None


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send whatever is printed meanwhile, by libraries and child processes too, to standard error."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
