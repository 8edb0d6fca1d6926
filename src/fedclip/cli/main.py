"""The `fedclip` command: each subcommand calls one function.

What a command needs is imported inside it, so that `fedclip --help` answers at once.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedclip.cli import adapters as cli_adapters
from fedclip.cli import deploy as cli_deploy
from fedclip.cli import inference as cli_use
from fedclip.cli import keys as cli_keys
from fedclip.cli import log as cli_log
from fedclip.cli.audit import audit
from fedclip.cli.doctor import doctor
from fedclip.cli.options import AsJson, Best, Overrides, only, sorted_out
from fedclip.cli.report import report
from fedclip.cli.start import configs, init, schema
from fedclip.errors import UsageError

if TYPE_CHECKING:
    from fedclip.config import Config

app = typer.Typer(
    name="fedclip",
    help="Federated LoRA fine-tuning of CLIP: sites exchange small adapters, never images.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    suggest_commands=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fedclip {version('fedclip')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@app.command()
def run(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG [KEY=VALUE]...", hidden=True),
    ] = None,
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The run folder [default: runs/<config>-<number>]."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN", help="Go on with a run that was stopped."),
    ] = None,
) -> None:
    """Train an adapter over the federation.

    CONFIG is a YAML file; KEY=VALUE changes a key of it, such as federation.rounds=5. The result
    is a run folder: the adapter, its figures, and all that it takes to go on after a stop.
    """
    if resume is not None:
        if arguments or overrides or output:
            raise UsageError(
                "--resume takes only the run folder: a resumed run keeps its configuration "
                f"({resume}/config.yaml) and its place"
            )
        from fedclip.cli.runs import resume_run

        resume_run(resume)
        return
    files, changes = sorted_out(arguments, overrides)
    config = _load(only(files, "run"), changes)
    from fedclip.cli.runs import new_run

    new_run(config, Path(files[0]).stem, output)


@app.command()
def validate(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG... [KEY=VALUE]...", hidden=True),
    ],
    overrides: Overrides = None,
    data: Annotated[
        bool, typer.Option("--data", help="Also open every image, and show who has what.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check configurations; report every error.

    KEY=VALUE changes a key in each of them. Without --data only the keys are looked at.
    """
    from fedclip.cli.console import echo

    files, changes = sorted_out(arguments, overrides)
    if not files:
        raise UsageError("fedclip validate needs a CONFIG file, such as configs/quickstart.yaml")
    problems = []
    for file in files:
        try:
            config = _load(file, changes)
            facts = _survey(config, as_json) if data else []
            echo(json.dumps({file: facts}) if as_json else f"{file}: valid")
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    if not data:
        from fedclip.cli.console import say

        say("looked at keys only, not at images, the model or addresses; --data opens the images")


def _survey(config: Config, as_json: bool) -> list[dict[str, Any]]:
    """What the data hold, shown as tables unless it is wanted as JSON."""
    from fedclip.cli.console import show, show_rows
    from fedclip.experiment.survey import survey
    from fedclip.reports.progress import make_progress

    with make_progress() as listener:
        found = survey(config, listener)
    for facts in () if as_json else found:
        show({key: value for key, value in facts.items() if key != "table"}, as_json=False)
        typer.echo()
        show_rows(facts["table"], as_json=False)
    return found


@app.command()
def info(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG|RUN [KEY=VALUE]...", hidden=True),
    ],
    overrides: Overrides = None,
    best: Best = False,
    as_json: AsJson = False,
) -> None:
    """Show parameters and what travels.

    For a CONFIG (a YAML file) or a RUN (a folder that `fedclip run` made): parameters, the
    trainable share, and megabytes per client and round against full fine-tuning.
    """
    targets, changes = sorted_out(arguments, overrides)
    target = Path(only(targets, "info"))
    if target.is_dir() and changes:
        raise UsageError(f"{target} is a run, whose configuration cannot be changed any more")
    from fedclip import info as describe
    from fedclip.cli.console import show_info

    show_info(describe(target, changes, best=best), as_json)


for _command in (cli_use.evaluate, cli_use.predict, cli_use.serve, cli_use.card, cli_use.push):
    app.command()(_command)
for _start in (init, configs, schema, doctor):
    app.command()(_start)
app.command()(report)
app.command()(audit)


@app.command()
def bench(
    name: Annotated[str | None, typer.Argument(metavar="GRID", hidden=True)] = None,
    grid: Annotated[
        Path | None, typer.Option("--grid", metavar="FILE", help="A grid file of your own.")
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work", metavar="DIR", help="Folder of the runs [default: runs/bench/GRID]."
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", help="Runs at a time [default: as cores and memory allow]."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="With what the grid has under full.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="ARM", help="Only this arm; repeatable.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="A,B,C", help="Other seeds, comma-separated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs; run none.")] = False,
    as_json: AsJson = False,
    result: Annotated[
        Path | None, typer.Option("--result", metavar="FILE", help="Also write the result here.")
    ] = None,
) -> None:
    """Compare strategies or ranks fairly.

    GRID is strategies, ranks, attacks (hostile clients against robust rules), or another ready one;
    `fedclip configs` lists them. Each arm of the grid is tuned by validation loss, with the same
    budget, then runs all seeds on one test set. Finished runs are read, started ones resumed: the
    same command goes on after a stop.
    """
    if (name is None) == (grid is None):
        raise UsageError(
            "fedclip bench takes one grid: a ready one, such as strategies, ranks or attacks, or a "
            "file by --grid FILE"
        )
    if jobs is not None and not 1 <= jobs <= 10_000:
        raise UsageError(f"--jobs must be at least 1, and at most 10,000, got {jobs}")
    from fedclip.experiment.bench import command

    file = grid or command.find_grid(str(name))
    code = command.bench(
        file,
        work or Path("runs/bench") / file.stem,
        jobs=jobs,
        full=full,
        only=only or (),
        seeds=_seeds(seeds),
        dry_run=dry_run,
        as_json=as_json,
        result_file=result,
    )
    raise typer.Exit(code)


def _seeds(text: str | None) -> list[int]:
    """Seeds of a comma-separated list."""
    seeds = [] if text is None else text.split(",")
    if not all(seed.strip().isdecimal() and len(seed) < 19 for seed in seeds):
        raise UsageError(f'--seeds must be whole numbers separated by commas, got "{text}"')
    return [int(seed) for seed in seeds]


app.command()(cli_adapters.export)
app.command()(cli_adapters.merge)
app.command()(cli_deploy.coordinate)
app.command()(cli_deploy.site)
app.add_typer(cli_keys.app)
app.command()(cli_log.status)
app.command("verify")(cli_log.verify_adapter)
app.add_typer(cli_log.app)


def _load(file: str, overrides: list[str]) -> Config:
    from fedclip.catalog import KINDS, is_given
    from fedclip.config.loading import load_config
    from fedclip.config.lookup import given_object

    config = load_config(Path(file), overrides)
    for kind, name in (("data_sets", config.data.name), ("strategies", config.federation.strategy)):
        if is_given(kind, name):  # which only the configuration of a run folder may name
            given_object(kind, name, KINDS[kind].key)
    return config


def main() -> None:
    """Run the command line, and end the process with the exit code that fits."""
    from fedclip.cli import signals
    from fedclip.cli.endings import exit_code_of
    from fedclip.device import keep_freed_memory

    keep_freed_memory()  # before the first threads
    signals.end_like_interrupt()
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names that are not UTF-8 keep their bytes
        sys.stdout.reconfigure(errors="surrogateescape")
    raise SystemExit(signals.exit_code(exit_code_of(lambda: app(standalone_mode=False))))


if __name__ == "__main__":
    main()
