"""What every verb does around its work: errors as one sentence, progress on stderr."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

import typer

from normsurgery.errors import NormsurgeryError

PATIENCE = 2.0  # seconds that pass before a person wants to know what takes so long


def note(text: str) -> None:
    """Say something beside the result: on stderr, so that a pipe gets the result alone."""
    print(text, file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Keep off stderr what libraries say to their developers, and progress bars beside ours.

    Whoever sets HF_HUB_DISABLE_PROGRESS_BARS, or asks Python for warnings, gets them. To be called
    before transformers is imported, which reads the variable then.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)


@contextmanager
def one_sentence_errors(debug: bool) -> Iterator[None]:
    """Turn an error into one sentence on stderr and its exit code; with `debug` let it through."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):
        raise
    except NormsurgeryError as error:
        if debug:
            raise
        note(f"error: {error}")
        raise typer.Exit(error.exit_code) from None
    except Exception as error:
        if debug:
            raise
        first_line = next(iter(str(error).splitlines()), "no message")
        note(f"error: {type(error).__name__}: {first_line} (run with --debug for the traceback)")
        raise typer.Exit(3) from None


@contextmanager
def progress(doing: str) -> Iterator[None]:
    """Say on stderr what is being done, once it has taken long, and again as time doubles."""
    done = Event()
    speaker = Thread(target=_speak, args=(doing, done), daemon=True)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()


def _speak(doing: str, done: Event) -> None:
    start, pause = time.monotonic(), PATIENCE
    while not done.wait(pause):
        elapsed = time.monotonic() - start
        note(f"{doing} ... ({elapsed:.0f} s)")
        pause = elapsed


@contextmanager
def bars(beginning: str) -> Iterator[Callable[[str, int, int], None]]:
    """Bars on stderr for work that can be counted; nothing at all where that is no terminal.

    The function in between takes what is being done, how much of it is done, and of how much.
    `beginning` is what is done before it is first called.
    """
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as shown:
        before = shown.add_task(beginning, total=None)
        tasks = {}

        def advance(what: str, done: int, total: int) -> None:
            shown.update(before, visible=False)
            if what not in tasks:
                tasks[what] = shown.add_task(what)
            shown.update(tasks[what], completed=done, total=total)

        yield advance
