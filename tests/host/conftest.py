"""The host's own classes, on the CPU and in this process. COMFYUI_DIR says where the host is."""
import os
import sys
import warnings
from pathlib import Path

from testbed import inprocess

if os.environ.get("COMFYUI_DIR"):
    inprocess.start(threads=1, cpu=True)
    sys.path.append(str(Path(__file__).resolve().parent))   # for harness.py
else:
    warnings.warn("COMFYUI_DIR names no ComfyUI: the tests against the host's classes are left out", stacklevel=1)
    collect_ignore_glob = ["test_*.py"]
