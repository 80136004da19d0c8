"""Makes the packages of this repository importable by name, without its root on sys.path.

The root is itself the pack, and its folder `nodes` would hide the host's nodes.py from everything that imports it.
"""
import importlib.util
import os
import sys
from pathlib import Path

from hypothesis import settings

settings.register_profile("repository", deadline=None, derandomize=True)     # a busy machine is slow, and a red test must be red again
settings.load_profile("repository")

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep: with busy cores small models run ten times as fast
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != ROOT]  # `python -m pytest` puts it there


def register(name: str, folder: Path):
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


register("pack", ROOT)
for package in ("testbed", "devtools", "benchmarks"):
    if (ROOT / package / "__init__.py").is_file():
        register(package, ROOT / package)
