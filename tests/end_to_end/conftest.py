"""The trained models of the test bed, in the host's own classes, without its server. COMFYUI_DIR says where the host is."""
import os
import warnings

from testbed import inprocess

if os.environ.get("COMFYUI_DIR"):
    inprocess.start(threads=1, cpu=True)
else:
    warnings.warn("COMFYUI_DIR names no ComfyUI: the tests of the trained models are left out", stacklevel=1)
    collect_ignore_glob = ["test_*.py"]
