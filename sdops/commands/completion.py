"""`sdops completion SHELL`."""

from __future__ import annotations

import click

from sdops.commands._console import Console

# Where each shell wants the script; shown below the options.
_WHERE = """\b
Add to the start-up file of the shell:
  bash        eval "$(sdops completion bash)"                        ~/.bashrc
  zsh         eval "$(sdops completion zsh)"                         ~/.zshrc
  fish        sdops completion fish | source                         ~/.config/fish/config.fish
  powershell  sdops completion powershell | Out-String | Invoke-Expression     $PROFILE
"""


@click.command(epilog=_WHERE)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish", "powershell"]), help="The shell in use")
@click.pass_obj
def command(console: Console, shell: str) -> int:
    """Print the completion script of a shell."""
    from click.shell_completion import get_completion_class

    from sdops.commands._app import app

    complete = get_completion_class(shell)
    if complete is None:
        raise click.UsageError(f"this version of click has no completion for {shell}")
    console.result(complete(app, {}, "sdops", "_SDOPS_COMPLETE").source())
    return 0
