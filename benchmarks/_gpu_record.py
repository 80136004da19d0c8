"""What `bench gpu` has found so far, on disk after every row; and the time that is left for the rest.

A row that fails or finds no memory is told, and the next one goes on. Neither paths nor names of users get into the file.
"""
import gc
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from pack.kernels import _triton

PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:|~)?[\\/][^\s'\",;:)]+")    # of the file system; a fraction such as 3/4 stays
MOST_TOLD = 300     # characters of an error
SAY = partial(print, flush=True)
OUT_OF_MEMORY = "out of memory"
FAILURES = (*_triton.FAILURES, ArithmeticError, MemoryError, EOFError)      # of a row: the next one goes on


def scrubbed(value):
    """The same without paths."""
    if isinstance(value, str):
        return PATH.sub("<path>", value)
    if isinstance(value, Mapping):
        return {key: scrubbed(part) for key, part in value.items()}
    return [scrubbed(part) for part in value] if isinstance(value, (list, tuple)) else value


def reason(error: BaseException) -> str:
    """Of a failure, for the file."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    if isinstance(error, MemoryError):
        return f"{OUT_OF_MEMORY} of the host"
    text = " ".join(str(error).split())
    return scrubbed(f"{type(error).__name__}: {text}")[:MOST_TOLD]


class NotWritten(Exception):
    """The result's file cannot be written. No row's failure: nothing more can be kept."""


class Record:
    """The JSON file. judge: what is added to the content each time it is written."""

    def __init__(self, file: Path, facts: dict, judge: Callable[[dict], dict] = lambda content: {}):
        self.file, self.judge = file, judge
        self.content = {**facts, "finished": False, "stopped": "", "seconds": {}, "not_run": []}

    def add(self, section: str, row: dict) -> None:
        self.content.setdefault(section, []).append(row)
        self.write()

    def set(self, **facts) -> None:
        self.content.update(facts)
        self.write()

    def write(self) -> None:
        """Whole or not at all. NotWritten, one sentence, where the disk does not take it."""
        text = json.dumps(scrubbed({**self.content, **self.judge(self.content)}), indent=1) + "\n"
        part = self.file.with_suffix(".part")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
            os.replace(part, self.file)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise NotWritten(f"{self.file} cannot be written ({error.strerror}); make room, or name another file with --out") from error


class Bench:
    """What the sections work with: the record, the meter, the sizes, and the time."""

    def __init__(self, record: Record, meter, sizes, now: Callable[[], float] = time.monotonic, say: Callable[[str], None] = SAY):
        self.record, self.meter, self.sizes, self.now, self.say = record, meter, sizes, now, say
        self.section, self.until, self.longest = "", float("inf"), 0.0

    def begin(self, section: str, until: float) -> None:
        """From here on rows are of `section`; none is begun that would not be through at `until`."""
        self.section, self.until, self.longest = section, until, 0.0

    def tried(self, heading: dict, work: Callable[[], object], expected: float = 0.0):
        """What `work` gives, or None: it failed, or there was no time. expected: its seconds, if more than the longest of the section so far."""
        began = self.now()
        if began + max(expected, self.longest) > self.until:
            self.leave(heading, "the time for this section is used up")
            return None
        failed = ""
        try:
            with torch.inference_mode():
                result = work()
        except FAILURES as error:
            failed = reason(error)
        if failed:      # here nothing holds what the failure held any more
            result = None
            self.release()
            self.record.add(self.section, {**heading, "failed": failed})
            self.say(f"  {told(heading)}: {failed}")
        self.longest = max(self.longest, self.now() - began)
        return result

    def row(self, heading: dict, work: Callable[[], dict], line: Callable[[dict], str], expected: float = 0.0) -> dict | None:
        """A row of the section, told in a line."""
        found = self.tried(heading, work, expected)
        if found is None:
            return None
        row = {**heading, **found}
        self.record.add(self.section, row)
        self.say(f"  {told(heading)}: {line(row)}")
        return row

    def leave(self, heading: dict, why: str) -> None:
        """A row that is not measured."""
        self.record.content["not_run"].append({"section": self.section, **heading, "why": why})
        self.record.write()
        self.say(f"  {told(heading)}: not run, {why}")

    def release(self) -> None:
        """Gives back what nobody holds."""
        gc.collect()
        self.meter.release()


def told(heading: dict) -> str:
    return ", ".join(f"{value}" if isinstance(value, str) else f"{value} {key.replace('_', ' ')}" for key, value in heading.items() if value not in ("", None))
