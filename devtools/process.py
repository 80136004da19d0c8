"""Talking to the user, and running other programs so that none of them outlives dev.py."""
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ENDINGS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Failure(Exception):
    """One sentence for the user; the last lines of `log`, where there is one, are shown with it."""

    def __init__(self, sentence: str, log: Path | None = None):
        super().__init__(sentence)
        self.lines = read(log).splitlines()[-20:] if log else []


def read(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return re.sub(r"\x1b\[[\d;]*m", "", text)  # without the colours


def say(text: str) -> None:
    print(f"reprise: {text}", flush=True)


@contextmanager
def stage(text: str):
    say(text)
    start = time.monotonic()
    yield
    say(f"  done in {time.monotonic() - start:.0f} s")


def interrupt_on_endings() -> None:
    """Being told to end is like Ctrl-C: every `finally` runs. A hang-up that `nohup` had us ignore stays ignored."""
    for ending in ENDINGS:
        if ending == signal.SIGINT or signal.getsignal(ending) != signal.SIG_IGN:
            signal.signal(ending, signal.default_int_handler)


@contextmanager
def uninterrupted():
    """Clean-up that a second Ctrl-C does not cut short."""
    before = {ending: signal.signal(ending, signal.SIG_IGN) for ending in ENDINGS}
    try:
        yield
    finally:
        for ending, handler in before.items():
            signal.signal(ending, handler)


@contextmanager
def started(command: list, ask: int = signal.SIGTERM, patience: float = 5, **options):
    """A program in a process group of its own: signals reach it from here only, and its own children end with it."""
    group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
    process = subprocess.Popen([str(part) for part in command], **group, **options)
    try:
        yield process
    finally:
        with uninterrupted():
            stop(process, ask, patience)


def stop(process: subprocess.Popen, ask: int, patience: float) -> None:
    """Asks the program to end, gives it `patience` seconds, then kills what is left of its group."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], check=False, capture_output=True)
    else:
        if process.poll() is None:
            signal_group(process, ask)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                pass
        signal_group(process, signal.SIGKILL)
    process.wait()


def signal_group(process: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):  # the group is empty; macOS says EPERM for one of zombies
        pass


def run(command: list, watch=lambda: None, **options) -> int:
    """Runs a program to its end. `watch` is called five times a second; what it raises ends the program too."""
    with started(command, **options) as process:
        while process.poll() is None:
            watch()
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
    if process.returncode < 0:
        raise Failure(f"{' '.join(map(str, command[1:4]))} was ended by signal {-process.returncode}")
    return process.returncode


def run_logged(command: list, log: Path, **options) -> int:
    """Runs a program whose errors go to `log`. Its progress is shown on a terminal and goes to `log` elsewhere."""
    terminal = sys.stdout.isatty()
    with open(log, "ab") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": None if terminal else file, "stderr": file}
        try:
            return run(command, **streams, **options)
        finally:
            if terminal and os.name != "nt":
                print("\033[?25h", end="", flush=True)  # a progress bar that was cut short leaves the cursor hidden
