"""Cells measured by several processes of one thread each. A worker reads a task per line and writes a row per line.

The parent alone writes the table. It says on stderr how far it is.
"""
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Queue

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "benchmarks.step_cache", "--worker"]
QUIET = 30      # seconds between two lines of progress where there is no terminal


class Progress:
    """A bar on a terminal, now and then a line elsewhere. `total` and what is added are costs in any one unit."""

    def __init__(self, total: float, rows: int):
        self.total, self.rows, self.done, self.count = max(total, 1e-9), rows, 0.0, 0
        self.begun = self.told = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def add(self, cost: float, label: str) -> None:
        self.done, self.count = self.done + cost, self.count + 1
        now = time.monotonic()
        if self.terminal or now - self.told > QUIET or self.count == self.rows:
            self.told = now
            print(self.line(label, now), end="\x1b[K\r" if self.terminal and self.count < self.rows else "\n", file=sys.stderr, flush=True)

    def line(self, label: str, now: float) -> str:
        share = min(self.done / self.total, 1.0)
        left = (now - self.begun) * (1 / share - 1) if share else 0.0
        bar = "#" * round(24 * share) + "." * (24 - round(24 * share))
        return f"[{bar}] {self.count} of {self.rows} rows, {time.strftime('%H:%M:%S', time.gmtime(left))} left, {label}"


class Broken(RuntimeError):
    """A worker ended before its time."""


def spread(tasks: list[dict], processes: int) -> "iter":
    """The rows of all tasks, in the order in which they get ready. Workers end with this generator, however it ends."""
    waiting, rows = deque(tasks), Queue()
    workers = [Worker(waiting, rows) for _ in range(min(processes, len(tasks)))]
    try:
        for worker in workers:
            worker.thread.start()
        running = len(workers)
        while running:
            try:
                row = rows.get(timeout=0.5)
            except Empty:
                continue
            if isinstance(row, Exception):
                raise row
            if row is None:
                running -= 1
            else:
                yield row
    finally:
        for worker in workers:
            worker.end()


class Worker:
    """A process, and the thread of ours that feeds it."""

    def __init__(self, waiting: deque, rows: Queue):
        self.waiting, self.rows = waiting, rows
        variables = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(COMMAND, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.thread = threading.Thread(target=self.feed, daemon=True)

    def feed(self) -> None:
        while self.waiting:
            try:
                task = self.waiting.popleft()
            except IndexError:      # another thread was faster
                break
            try:
                self.process.stdin.write(json.dumps(task) + "\n")
                self.process.stdin.flush()
            except BrokenPipeError:
                pass                # it has died; its closed output says so below
            for line in self.process.stdout:
                if (row := json.loads(line)) is None:
                    break
                self.rows.put(row)
            else:
                self.rows.put(Broken(f"a worker ended with code {self.process.wait()} in the middle of its work; what it had to say stands above"))
                return
        self.rows.put(None)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


def serve(answer: Callable[[dict], "iter"]) -> None:
    """The worker's side. What the host prints goes to stderr, so that stdout carries rows alone."""
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        for row in answer(json.loads(line)):
            print(json.dumps(row), file=out, flush=True)
        print("null", file=out, flush=True)
