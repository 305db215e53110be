"""Every way of ending: message, stream and exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from sdops.commands import _app
from sdops.commands._console import Console
from sdops.commands._options import general_options
from sdops.commands.main import _explain
from sdops.errors import FormatError, SdopsError, UsageError
from sdops.report import Report


@pytest.fixture
def command(monkeypatch):
    """Put a command called `try` into the table, made from a function of the console."""

    def add(function):
        made = click.command()(general_options(function))
        known = _app.LazyGroup.get_command
        monkeypatch.setattr(
            _app.LazyGroup, "get_command", lambda self, ctx, name: made if name == "try" else known(self, ctx, name)
        )

    return add


def test_help_lists_every_command_in_its_section(sdops):
    done = sdops("--help")
    assert done.code == 0
    assert done.err == ""
    lines = [line.strip() for line in done.out.splitlines()]
    for section, commands in _app.COMMANDS.items():
        start = lines.index(f"{section}:")
        shown = [line.split()[0] for line in lines[start + 1 : start + 1 + len(commands)]]
        assert shown == list(commands)


@pytest.mark.parametrize("name", [name for section in _app.COMMANDS.values() for name in section])
def test_a_command_says_what_the_table_says(name, sdops):
    summary = next(section[name] for section in _app.COMMANDS.values() if name in section)
    done = sdops(name, "--help")
    assert done.code == 0
    assert summary in " ".join(done.out.split())


def test_version(sdops):
    from sdops import __version__

    assert sdops("--version").out == f"sdops {__version__}\n"


def test_no_arguments_shows_the_help_as_a_usage_error(sdops):
    done = sdops()
    assert done.code == 2
    assert "Usage: sdops" in done.out


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["inpsect"], "no command `inpsect`", "did you mean `inspect`? `sdops --help` lists the commands"),
        (["qqqqq"], "no command `qqqqq`", "`sdops --help` lists the commands"),
        (["--versoin"], "`sdops` has no option `--versoin`", "did you mean `--version`?"),
        (["hash", "--verfiy", "x"], "`sdops hash` has no option `--verfiy`", "did you mean `--verify`?"),
        (["hash"], "missing argument 'FILE...'", "`sdops hash --help` explains the command"),
        (["env", "--color", "pink"], "invalid value for '--color'", "`sdops env --help` explains the command"),
        (["methods", "wieghted-sum"], "no merge method `wieghted-sum`; did you mean `weighted-sum`?", "sdops methods"),
    ],
)
def test_wrong_usage(arguments, message, hint, sdops):
    done = sdops(*arguments)
    assert done.code == 2
    assert done.out == ""
    first, blank, last = done.err.rstrip("\n").split("\n", 2)
    assert first.startswith("error: ")
    assert message in first
    assert blank == ""
    assert last.startswith("hint: ")
    assert hint in last


def test_expected_errors_have_message_hint_and_code(sdops, command):
    @command
    def _(console):
        raise FormatError("`a.safetensors` is cut short", hint="`sdops pull` fetches it again")

    done = sdops("try")
    expected = "error: `a.safetensors` is cut short\n\nhint: `sdops pull` fetches it again\n"
    assert (done.code, done.out, done.err) == (1, "", expected)


@pytest.mark.parametrize(("error", "code"), [(SdopsError("x"), 1), (UsageError("x"), 2), (OSError(28, "No space"), 1)])
def test_exit_codes(error, code, capsys):
    assert _explain(Console(), error) == code
    assert capsys.readouterr().err.startswith("error: ")


def test_system_errors_name_the_file(sdops, command):
    @command
    def _(console):
        Path("absent.toml").read_text()

    done = sdops("try")
    assert (done.code, done.err) == (1, "error: no such file or directory: `absent.toml`\n")


def test_a_bug_is_one_line_and_says_so(sdops, command):
    @command
    def _(console):
        raise KeyError("oops")

    done = sdops("try")
    assert done.code == 70
    assert done.err.splitlines()[0] == "error: unexpected KeyError: 'oops'"
    assert "SDOPS_DEBUG=1" in done.err
    assert "sdops env" in done.err
    assert "Traceback" not in done.err


def test_debugging_shows_the_traceback(sdops, command, monkeypatch):
    monkeypatch.setenv("SDOPS_DEBUG", "1")

    @command
    def _(console):
        raise UsageError("no")

    done = sdops("try")
    assert done.code == 2
    assert "Traceback" in done.err
    assert done.err.endswith("error: no\n")


def test_a_failed_report_is_exit_code_1(sdops, command):
    @command
    def _(console):
        return console.show(Report("try", result=["x"], failed=True))

    assert sdops("try", "-q").code == 1


def test_environment_twins_of_options(process):
    done = process("methods", SDOPS_METHODS_JSON="1")
    assert done.json["verb"] == "methods"


def test_hostile_names_in_errors_are_escaped(sdops, command):
    @command
    def _(console):
        raise FormatError("`\x1b[31mred\r\u202e[/foo]` is bad")

    assert sdops("try").err == "error: `\\x1b[31mred\\r\\u202e[/foo]` is bad\n"


_SLEEPER = """
import sys, time
from sdops.commands import main, _app
import click

@click.command()
def sleep():
    try:
        print("ready", flush=True)
        time.sleep(30)
    finally:
        print("cleaned", flush=True)

_app.LazyGroup.get_command = lambda self, ctx, name: sleep
sys.exit(main.main(["sleep"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "ended by SIGTERM"), ("SIGHUP", 129, "ended by SIGHUP")],
)
def test_signals_unwind_and_have_their_exit_code(number, code, said):
    child = subprocess.Popen(
        [sys.executable, "-c", _SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.05)
    child.send_signal(getattr(signal, number))
    out, err = child.communicate(timeout=20)
    assert (child.returncode, out, err) == (code, "cleaned\n", f"error: {said}\n")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
@pytest.mark.parametrize("arguments", [["methods"], ["--help"], ["methods", "--json"]])
def test_a_closed_pipe_is_quiet(arguments):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sdops", *arguments]
    done = subprocess.run(command, check=False, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_completion_scripts(shell, sdops):
    done = sdops("completion", shell)
    assert done.code == 0
    assert "_SDOPS_COMPLETE" in done.out


def test_completion_offers_commands_and_methods(process):
    done = process(_SDOPS_COMPLETE="bash_complete", COMP_WORDS="sdops in", COMP_CWORD="1")
    assert done.out.split() == ["plain,inspect"]
    done = process(_SDOPS_COMPLETE="bash_complete", COMP_WORDS="sdops methods weighted", COMP_CWORD="2")
    assert "plain,weighted-sum" in done.out.split()


@pytest.mark.parametrize("name", ["inspect", "hash", "verify", "methods", "env"])
def test_a_command_has_the_parameters_of_its_verb(name):
    import inspect

    import sdops

    known = set(inspect.signature(getattr(sdops, name)).parameters) - {"progress"}
    command = _app.app.get_command(None, name)
    general = {"json", "quiet", "verbose", "color", "no_progress"}
    assert {parameter.name for parameter in command.params} - general == known
