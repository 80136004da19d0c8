"""The host's own classes, on the CPU and in this process. COMFYUI_DIR says where the host is."""
import os
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOST = os.environ.get("COMFYUI_DIR")

if HOST:
    # The root's `nodes` would hide the host's; tests/conftest.py has taken the root out, whoever put it back goes too.
    sys.path[:] = [HOST, *(folder for folder in sys.path if Path(folder).resolve() != HERE.parents[1]), str(HERE)]

    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True

    import comfy.utils
    import torch

    torch.set_num_threads(1)
    comfy.utils.PROGRESS_BAR_ENABLED = False
else:
    warnings.warn("COMFYUI_DIR names no ComfyUI: the tests against the host's classes are left out", stacklevel=1)
    collect_ignore_glob = ["test_*.py"]
