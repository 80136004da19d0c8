"""A real ComfyUI server with this clone and the tiny models in it, started once for all tests of this folder."""
import os
import sys
from pathlib import Path

import pytest

from devtools.environment import Environment
from devtools.server import ROOT, serving
from testbed.client import Server
from testbed.workflow import LOADER, STEP_CACHE, read_workflow


def having(node: str, files: list[Path]) -> list[Path]:
    return [file for file in files if f'"{node}"' in file.read_text(encoding="utf-8")]


WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
LOADERS = having(LOADER, WORKFLOWS)
STEP_CACHES = having(STEP_CACHE, [file for file in WORKFLOWS if file not in LOADERS])
REFERENCES = [file for file in WORKFLOWS if file not in (*LOADERS, *STEP_CACHES)]


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


@pytest.fixture(scope="session", params=LOADERS, ids=lambda file: file.stem)
def loader_prompt(request, object_info) -> dict:
    """Each workflow with the quantized loader in turn, over the tiny models. Shared: copy before changing it."""
    return read_workflow(request.param, object_info)
