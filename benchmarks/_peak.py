"""The most anonymous memory of this process while something ran."""
import re
import threading
from pathlib import Path


def anonymous() -> float:
    """MiB of this process that no file backs; 0 where the system does not tell."""
    try:
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    except OSError:
        return 0.0


class Peak:
    """The most anonymous memory while a block ran, MiB above what it left behind."""

    def __enter__(self):
        self.before = self.most = anonymous()
        self.over = threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self):
        while not self.over.wait(0.002):
            self.most = max(self.most, anonymous())

    def __exit__(self, *ended):
        self.over.set()
        self.watcher.join()
        self.extra = max(0.0, self.most - anonymous())
