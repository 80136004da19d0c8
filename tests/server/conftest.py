"""A real ComfyUI server with this clone and the tiny models in it, started once for all tests of this folder."""
import os
import sys
from pathlib import Path

import pytest

from devtools.environment import Environment
from devtools.server import ROOT, serving
from testbed.client import Server
from testbed.workflow import STEP_CACHE, read_workflow

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
STEP_CACHES = [file for file in WORKFLOWS if f'"{STEP_CACHE}"' in file.read_text(encoding="utf-8")]
REFERENCES = [file for file in WORKFLOWS if file not in STEP_CACHES]


@pytest.fixture(scope="session")
def server():
    comfyui = os.environ.get("COMFYUI_DIR")
    if not comfyui:
        pytest.skip("COMFYUI_DIR names no ComfyUI; 'python3 dev.py test' sets it")
    with serving(Environment(Path(sys.executable), Path(comfyui))) as running:
        yield Server(running.address)


@pytest.fixture(scope="session")
def object_info(server) -> dict:
    return server.get("/object_info")


@pytest.fixture(scope="session", params=STEP_CACHES, ids=lambda file: file.stem)
def prompt(request, object_info) -> dict:
    """Each workflow with Step Cache in turn, over the tiny models. Shared: copy before changing it."""
    return read_workflow(request.param, object_info)


@pytest.fixture(scope="session", params=REFERENCES, ids=lambda file: file.stem)
def reference_prompt(request, object_info) -> dict:
    """Each workflow with references in turn, over the tiny models. Shared: copy before changing it."""
    return read_workflow(request.param, object_info)
