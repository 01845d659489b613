"""`bin/report RUN`: what a run did, as one HTML file, as JSON, or its trials as CSV; of one that runs or crashed too.

Covers arguments and where the output goes. What is in it: `scheduler.report`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from scheduler.cli import execution
from scheduler.cli.execution import OK
from scheduler.model import UsageError
from scheduler.model.plain import line

EPILOG = """\b
Examples:
  bin/report runs/phase6a              -> runs/phase6a/report.html
  bin/report runs/phase6a -o out.html
  bin/report runs/phase6a --json | jq .verdict
  bin/report runs/phase6a --csv -o trials.csv
"""


DEFAULT = "Default: RUN/report.html; with --json and --csv standard output."


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help=DEFAULT)
@click.option("--json", "as_json", is_flag=True, help="All that the report says, as one JSON object.")
@click.option("--csv", "as_csv", is_flag=True, help="A row per trial, the columns of results.csv.")
def command(run: Path, output: Path | None, as_json: bool, as_csv: bool) -> int:
    """Make the report of a run: one HTML file that needs no network.

    RUN is the run's folder, or its name below runs/.
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    from scheduler.report import page
    from scheduler.report.records import load_run
    from scheduler.ui import report as results

    folder = folder_of(run)
    if output is None and not as_json and not as_csv:
        try:
            click.echo(page.leave(folder))
        except OSError as error:
            raise _unwritable(error.filename or folder, error) from None
        return OK
    found = load_run(folder)
    if as_csv:
        rows = {name: [results.present(row) for row in each] for name, each in found.rows.items()}
        text = results.to_csv(found.specs, rows)
    else:
        facts = page.facts(found)
        text = page.as_json(facts) + "\n" if as_json else page.as_html(facts)
    if output is None:
        click.echo(text, nl=False)
        return OK
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(output, error) from None
    click.echo(output)
    return OK


def leave(folder: Path) -> str:
    """Make the report at the end of a run; returns a line for the user. Never raises: it is no part of the run."""
    try:
        from scheduler.report import page

        return f"report in {page.leave(folder)}"
    except Exception as error:  # whatever it is, the run has ended as it did
        return f"no report was made ({type(error).__name__}: {line(error, 200)}); bin/report {folder} tries again"


def _unwritable(path: object, error: OSError) -> UsageError:
    return UsageError(f"cannot write {path}: {error.strerror or error}; name another file with -o")


def folder_of(run: Path) -> Path:
    """Return the run's folder: as given, or below runs/ where only its name is."""
    below = Path("runs") / run
    return below if not run.exists() and len(run.parts) == 1 and below.is_dir() else run


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: runs the command and ends the process with its exit code."""
    sys.exit(execute(sys.argv[1:] if arguments is None else arguments))


def execute(arguments: Sequence[str]) -> int:
    """Run the command; every expected error is one line on stderr and its exit code."""
    return execution.execute(command, "bin/report", arguments)


if __name__ == "__main__":
    main()
