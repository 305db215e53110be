"""The entry point: runs the group and turns every way of ending into a message and an exit code.

0 done · 1 refused or failed with a message · 2 wrong usage · 70 a bug · 130 Ctrl-C · 128+N ended by signal N
141 the reader of our output went away

A signal unwinds the stack once, so that temporary files are removed; further ones do not disturb that.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from sdops import settings
from sdops.errors import SdopsError

if TYPE_CHECKING:
    import click

    from sdops.commands._console import Console


_ENDINGS = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class _Ended(BaseException):
    """A signal arrived; unwinds the stack so that temporary files are removed."""

    def __init__(self, number: int) -> None:
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        _open_closed_streams()
        with _signals_caught():
            from sdops.commands._console import Console

            return _run(Console(), list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        return _interrupted("interrupted", 130)
    except _Ended as ended:
        name = signal.Signals(ended.number).name
        _leave(_interrupted("interrupted" if name == "SIGINT" else f"ended by {name}", 128 + ended.number))
    except BrokenPipeError:
        return 141
    finally:
        _flush_or_forget()
        # The process ends here: looking for garbage once more would take 15 ms. Libraries of torch complain without it.
        if arguments is None and "torch" not in sys.modules:
            gc.freeze()


def _run(console: Console, arguments: list[str]) -> int:
    import click

    from sdops.commands._app import app

    try:
        if request := settings.completion_request():
            from click.shell_completion import shell_complete

            return shell_complete(app, {}, "sdops", "_SDOPS_COMPLETE", request)
        with app.make_context("sdops", arguments, obj=console) as context:
            code = app.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as done:  # --help, --version
        sys.stdout.flush()
        return done.exit_code
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001  the last resort: whatever it is, it ends in one line
        if settings.debug():
            import traceback

            traceback.print_exc()
        return _explain(console, error)
    return int(code or 0)


def _explain(console: Console, error: Exception) -> int:
    """Write what went wrong; returns the exit code."""
    import click

    if isinstance(error, SdopsError):
        console.error(error.message, error.hint)
        return error.exit_code
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        console.result(error.ctx.get_help() if error.ctx else "")
        return 2
    if isinstance(error, click.ClickException):
        console.error(*_usage(error))
        return error.exit_code
    if isinstance(error, OSError) and error.strerror:
        where = f": `{os.fsdecode(error.filename)}`" if isinstance(error.filename, (str, bytes)) else ""
        console.error(f"{error.strerror.lower()}{where}")
        return 1
    console.error(
        f"unexpected {type(error).__name__}: {error}",
        "this is a bug; `SDOPS_DEBUG=1` shows the traceback, `sdops env` what else belongs into a report",
    )
    return 70


def _usage(error: click.ClickException) -> tuple[str, str | None]:
    """Click's usage errors in the words of this house: message and hint."""
    import click

    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context else "sdops"
    guess = getattr(error, "possibilities", None)
    start = f"did you mean `{guess[0]}`? " if guess else ""
    if isinstance(error, click.NoSuchCommand):
        return f"no command `{error.command_name}`", f"{start}`{path} --help` lists the commands"
    if isinstance(error, click.NoSuchOption):
        return f"`{path}` has no option `{error.option_name}`", f"{start}`{path} --help` lists the options"
    message = error.format_message().rstrip(".")
    return message[:1].lower() + message[1:], f"`{path} --help` explains the command"


def _interrupted(how: str, code: int) -> int:
    with contextlib.suppress(OSError):  # the terminal may be gone
        sys.stderr.write(f"error: {how}\n")
    return code


def _leave(code: int) -> NoReturn:
    """End at once: Python's own way out crashes while a thread is deep in a computation of torch."""
    atexit._run_exitfuncs()
    _flush_or_forget()
    os._exit(code)


@contextlib.contextmanager
def _signals_caught() -> Iterator[None]:
    """End by unwinding. What the parent chose to ignore (nohup, a job in the background) stays ignored."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise _Ended(number)

    numbers = [getattr(signal, name) for name in _ENDINGS if hasattr(signal, name)]
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) in usual}
    for number in before:
        signal.signal(number, end)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _open_closed_streams() -> None:
    """Let streams that the caller closed lead nowhere. Else the next file that is opened would be their heir."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  stays open to the end


def _flush_or_forget() -> None:
    """Let the interpreter's last flush go nowhere where it would fail: the exit code shall stay what it is."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
