"""A profiler that knows two owners: the engine (core/ and kernels/) and everybody else.

A frame of the engine's files belongs to the engine, one of the host's or of the benchmark to the host; any other, torch's
for one, to whoever called it. Time goes to the owner of the frame that runs, without the time that the profiler takes.
What a frame leaves behind is freed after it has returned, which for the tensors of a block takes as long as a small kernel;
so the meter holds on to the frame until the next event and charges that to the owner of the frame, not to whoever called it.
On a GPU it waits for the device wherever the owner changes, so that kernels are charged to who launched them.
"""
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parent.parent
ENGINE, HOST = "engine", "host"


class Meter:
    """`with Meter(host) as meter:` ... `meter.spent[ENGINE]`, in seconds, on this thread."""

    def __init__(self, host: Path, wait: Callable[[], None] = lambda: None, engine: tuple[Path, ...] = (ROOT / "core", ROOT / "kernels")):
        self.folders = [(str(folder.resolve()), ENGINE) for folder in engine] + [(str(folder.resolve()), HOST) for folder in (host, ROOT)]
        self.wait, self.owners = wait, {}
        self.spent, self.owner, self.stack = {ENGINE: 0.0, HOST: 0.0}, HOST, []
        self.returned = None    # the frame that returned last, and its owner

    def __enter__(self) -> "Meter":
        self.last = perf_counter()
        sys.setprofile(self.event)
        return self

    def __exit__(self, *exception) -> None:
        sys.setprofile(None)
        self.returned = None

    def owner_of(self, code) -> str | None:
        """The owner of a piece of code; None for one that works for its caller."""
        if code not in self.owners:
            file = str(Path(code.co_filename).resolve())
            self.owners[code] = next((owner for folder, owner in self.folders if file.startswith(folder)), None)
        return self.owners[code]

    def event(self, frame, event, argument) -> None:
        begun = perf_counter()
        self.spent[self.owner] += begun - self.last
        if self.returned is not None:
            _, owner = self.returned
            self.returned = _ = None
            self.spent[owner] += perf_counter() - begun
        if event == "return":
            self.returned = frame, self.owner
        if event == "call":
            self.stack.append(self.owner)
            self.change(self.owner_of(frame.f_code) or self.owner)
        elif event == "return" and self.stack:      # the frames that were there before us return too
            self.change(self.stack.pop())
        self.last = perf_counter()

    def change(self, owner: str) -> None:
        if owner != self.owner:
            begun = perf_counter()
            self.wait()
            self.spent[self.owner] += perf_counter() - begun
            self.owner = owner
