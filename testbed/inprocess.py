"""The host's classes in this process, without its server: for benchmarks and for tests.

Import this before anything of `comfy`. COMFYUI_DIR names the host's tree.
"""
import importlib.util
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def package(name: str, folder: Path):
    """Import `folder` as the package `name`, whatever the folder is called and without putting it on the path."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def leave_root() -> None:
    """Take the repository root off the path: its `nodes` would hide the host's from everything that imports that."""
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != ROOT]


def start(threads: int | None = None, cpu: bool = False) -> None:
    """Put the host on the path, without the repository root, and register the pack as `pack`. `cpu` leaves a GPU alone."""
    host = os.environ.get("COMFYUI_DIR")
    if not host or not (Path(host) / "comfy").is_dir():
        raise SystemExit(f"COMFYUI_DIR is '{host or ''}', which holds no ComfyUI; run this through `python3 dev.py bench` or `python3 dev.py test`")
    leave_root()
    if host not in sys.path:
        sys.path.insert(0, host)
    import comfy.options

    arguments, sys.argv = sys.argv, [sys.argv[0], "--use-pytorch-cross-attention", *(["--cpu"] if cpu or not torch.cuda.is_available() else [])]
    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401 - reads the arguments now

    sys.argv = arguments
    if threads:
        torch.set_num_threads(threads)
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    package("pack", ROOT)
