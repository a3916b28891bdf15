"""The entry point: the commands, and the one error boundary around them."""

from __future__ import annotations

import errno
import os
import signal
import sys
from contextlib import suppress
from io import TextIOWrapper

import typer

from acip_export.cli import (
    build,
    cache,
    calibrate,
    chat,
    check,
    convert,
    devices,
    export,
    formats,
    imatrix,
    inspect,
    materialize,
    plan,
    push,
    rank,
    report,
    serve,
    verify,
)
from acip_export.cli import output as console
from acip_export.cli.help import Command, Group
from acip_export.cli.options import ErrorBoundary
from acip_export.cli.usage import explained
from acip_export.errors import AcipError, OutputError
from acip_export.interrupted import EXIT_INTERRUPTED, end_at_once
from acip_export.io.hub import hide_bars
from acip_export.io.interruptions import Interruption, ignore_requests
from acip_export.io.processes import let_threads_sleep

# As a shell says of a program that wrote into a pipe that nobody read any more.
EXIT_CLOSED_PIPE = 141

app = typer.Typer(
    name="acip-export",
    cls=Group,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.callback(invoke_without_command=True)(export.export)
for command in (
    rank.rank,
    plan.plan,
    build.build,
    materialize.materialize,
    convert.convert,
    verify.verify,
    chat.chat,
    serve.serve,
    imatrix.imatrix,
    report.report,
    push.push,
    inspect.inspect,
    check.check,
    devices.devices,
    calibrate.calibrate,
    formats.formats,
    cache.cache,
):
    app.command(cls=Command)(command)


def main(own_process: bool = False) -> None:
    """Entry point with the one error boundary.

    Args:
        own_process: nothing follows, so that a signal may end the process at once when the command is done.
    """
    boundary = ErrorBoundary()
    console.start(as_json="--json" in sys.argv[1:])
    console.print_warnings()
    let_threads_sleep()  # for whoever comes another way than __main__.py; too late for numpy
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    hide_bars()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A console without UTF-8 shows question marks; it is no reason to fail.
            stream.reconfigure(errors="replace")
    interruption = Interruption()
    code, error = 0, None
    try:
        # Unwinding removes half-written output; the default action of SIGTERM would leave it.
        signal.signal(signal.SIGTERM, interruption)
        signal.signal(signal.SIGINT, interruption)
        # A terminal that is closed; nohup has it ignored.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, interruption)
        # Not "standalone", so that errors of the parser come here, too.
        code = app(obj=boundary, prog_name="acip-export", standalone_mode=False) or 0
        sys.stdout.flush()
    except BaseException as raised:
        error = raised
    if interruption.happened or isinstance(error, KeyboardInterrupt):
        ignore_requests()
        _end_interrupted()
    # What Python does at its end takes no exception.
    if own_process:
        end_at_once(words=False)
    if isinstance(error, BrokenPipeError | console.ClosedPipeError):
        _drop_output()
        sys.exit(EXIT_CLOSED_PIPE)
    if error is None:
        sys.exit(code)
    if boundary.debug or not isinstance(error, Exception):
        raise error
    if hasattr(error, "format_message"):  # of the parser, whose classes typer keeps to itself
        error = explained(error)
    # Of files, io/atomic.py has made sentences.
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        _drop_output()
        error = OutputError(f"the results cannot be written to the standard output: {error.strerror}")
    if not isinstance(error, AcipError):
        error = AcipError(f"this is a bug: {error!r}\nRun again with --debug and report the traceback")
    console.print_error(error)
    sys.exit(error.exit_code)


def _end_interrupted() -> None:
    """Say that the user stopped the command, and leave without Python's own end.

    Threads that an interruption left behind in C code would be waited for there, or take the process down with them
    when they ask for the interpreter.
    """
    with suppress(OSError, ValueError, console.ClosedPipeError):  # the terminal may be gone
        console.interrupted(EXIT_INTERRUPTED)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(EXIT_INTERRUPTED)


def _drop_output() -> None:
    """Send what is left of the standard output nowhere, so that Python does not complain of it at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
