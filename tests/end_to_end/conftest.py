"""The trained models of the test bed, in the host's own classes, without its server."""
import os

import pytest


def pytest_collection_modifyitems(items):
    if not os.environ.get("COMFYUI_DIR"):
        for item in items:
            if "end_to_end" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="COMFYUI_DIR names no ComfyUI; 'python3 dev.py test' sets it"))


@pytest.fixture(scope="session")
def bench():
    """benchmarks/_pictures.py, with the host behind it."""
    from testbed import inprocess

    inprocess.start(threads=1)
    from benchmarks import _pictures

    return _pictures
