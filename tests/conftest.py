"""Makes the packages of this repository importable by name, without its root on sys.path.

The root is itself the pack, and its folder `nodes` would hide the host's nodes.py from everything that imports it.
"""
import logging
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("repository", deadline=None, derandomize=True)     # a busy machine is slow, and a red test must be red again
settings.load_profile("repository")

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep: with busy cores small models run ten times as fast

sys.path.insert(0, str(ROOT))
import benchmarks  # noqa: F401
import devtools  # noqa: F401
from testbed import inprocess

inprocess.leave_root()
inprocess.package("pack", ROOT)


@pytest.fixture(autouse=True)
def what_a_benchmark_silenced_is_heard_again():
    """A command that a test runs in this process asks the log for silence as if the process were its own."""
    levels = {name: logging.getLogger(name).level for name in ("", "reprise")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
