"""Running a command: what went wrong in one line on stderr, without passwords, and the exit code it deserves.

Covers the exit codes too. What a command does is its own module's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from scheduler import masking
from scheduler.model import HeadroomError

COMPLETE = "_HEADROOM_COMPLETE"  # set by the shell's completion function (`completion`)
OK, CLOSED_EARLY, USAGE, NOTHING_FITS, TIMED_OUT, STOPPED = 0, 1, 2, 3, 124, 130


def execute(
    command: click.Command, name: str, arguments: Sequence[str], *, expected: tuple[type[Exception], ...] = ()
) -> int:
    """Run the command and return its exit code. expected: errors of others that are told as a wrong usage."""
    try:
        result = command.main(list(arguments), prog_name=name, standalone_mode=False, complete_var=COMPLETE)
        return result if isinstance(result, int) else OK
    except HeadroomError as error:
        return say(str(error), error.exit_code)
    except click.ClickException as error:
        return say(f"{error.format_message()} (see {name} --help)", USAGE)
    except (click.Abort, KeyboardInterrupt):
        return say("stopped", STOPPED)
    except BrokenPipeError:  # `bin/schedule --dry-run | head`
        sys.stderr.close()
        return OK
    except expected as error:
        return say(str(error), USAGE)


def say(message: str, code: int) -> int:
    """Write one line to stderr; returns the code."""
    click.echo(f"headroom: {' '.join(masking.scrubbed(message).split())}", err=True)
    return code
