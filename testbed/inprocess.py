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


def start(threads: int | None = None) -> None:
    """Put the host on the path and register the pack as `pack`.

    The repository root leaves the path: its `nodes` would hide the host's.
    """
    host = os.environ.get("COMFYUI_DIR")
    if not host or not (Path(host) / "comfy").is_dir():
        raise SystemExit(f"COMFYUI_DIR is '{host or ''}', which holds no ComfyUI; run this through `python3 dev.py bench` or `python3 dev.py test`")
    sys.path[:] = [host, *(entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, Path(host).resolve()))]
    import comfy.options

    arguments, sys.argv = sys.argv, [sys.argv[0], "--use-pytorch-cross-attention", *([] if torch.cuda.is_available() else ["--cpu"])]
    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401 - reads the arguments now

    sys.argv = arguments
    if threads:
        torch.set_num_threads(threads)
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    package("testbed", ROOT / "testbed")
    package("pack", ROOT)
