"""The reference page of the command line and of what commands end with."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import typer

from fedclip import errors
from fedclip.cli.main import app

HEAD = """\
# Command reference

<!-- Made by scripts/reference.py from src/fedclip/cli and src/fedclip/errors.py; edit there. -->

`fedclip COMMAND --help` says the same as this page. Results go to standard output; progress,
warnings and errors go to standard error. [Exit codes](#exit-codes) stand at the end.
"""

ENDS = """\
## Exit codes

| code | meaning |
|---|---|
| 0 | done; also for `--resume` on a finished run |
| 1 | failed: a loss that is not a number, a full disk or GPU, too few sites, a process or machine that is gone, something unforeseen; the last finished round is kept. Also: `fedclip predict --on-bad skip` left images out, or an arm or a run of `fedclip bench` failed |
| 2 | something to mend: a key, an option, a file, a folder that already holds a run, an adapter that does not fit. What is found before the work begins changes nothing; what comes to light in a round leaves the finished rounds |
| 129, 130, 143 | stopped by SIGHUP, by Ctrl-C, by SIGTERM. The last finished round is kept |

Messages are one paragraph without a traceback; `FEDCLIP_DEBUG=1` shows it.

## Errors

From Python, the same failures are these exceptions, in `fedclip.errors`:
"""  # noqa: E501


def page() -> str:
    """The whole page as Markdown."""
    root = typer.main.get_command(app)
    commands = list(_commands(root, click.Context(root, info_name="fedclip")))
    overview = [
        f"| [`{context.command_path}`](#{_anchor(context)}) | {_summary(command)} |"
        for command, context in commands
    ]
    return "\n".join(
        [
            HEAD,
            "| command | does |\n|---|---|",
            *overview,
            "",
            *(line for found in commands for line in _section(*found)),
            ENDS,
            *_errors(),
            "",
        ]
    )


def _commands(
    command: click.Command, context: click.Context
) -> Iterator[tuple[click.Command, click.Context]]:
    if not isinstance(command, click.Group):
        yield command, context
        return
    for name, inner in command.commands.items():
        yield from _commands(inner, click.Context(inner, info_name=name, parent=context))


def _anchor(context: click.Context) -> str:
    return context.command_path.replace(" ", "-")


def _summary(command: click.Command) -> str:
    return (command.help or "").partition("\n")[0]


def _section(command: click.Command, context: click.Context) -> Iterator[str]:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    told = " ".join((command.help or "").partition("\n")[2].split())
    yield f"## `{context.command_path}`\n\n{_summary(command)}\n\n```text\n{usage}\n```\n"
    if told:
        yield f"{told}\n"
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    yield "| option | default | meaning |\n|---|---|---|"
    yield from (_row(option, context) for option in options)
    yield ""


def _row(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    takes = "" if option.is_flag else f" `{option.make_metavar(context)}`"
    text = option.help or ""
    told = re.search(r"\\?\s*\[default: (.*?)\]", text)
    meaning = text.replace(told[0], "") if told else text
    usual = told[1] if told else "" if option.default in (None, False, ()) else option.default
    if option.required:
        usual = "required"
    cells = (names + takes, str(usual), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "\\<") for cell in cells) + " |"


def _errors() -> Iterator[str]:
    """What can be raised, as it is declared."""
    yield "| exception | is a | exit code | meaning |\n|---|---|---|---|"
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, Exception) and kind.__doc__:
            parent = kind.__bases__[0].__name__
            code = getattr(kind, "exit_code", "none: a warning")
            yield f"| `{kind.__name__}` | `{parent}` | {code} | {kind.__doc__} |"
