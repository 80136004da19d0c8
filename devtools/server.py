"""A ComfyUI server on the loopback address, with this clone, the fixture nodes and the demo models in it."""
from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .environment import Environment
from .process import Failure, read, stage, started

ROOT = Path(__file__).resolve().parent.parent
PACKS = {"reprise": ROOT, "reprise_testbed": ROOT / "testbed"}
MODEL_FOLDERS = {"taef": "vae", "easycontrol": "loras"}     # by how the file's name begins; the others are diffusion models
START_SECONDS = 120
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business on the loopback


@dataclass(frozen=True)
class Server:
    address: str
    process: subprocess.Popen
    log: Path

    def check(self) -> None:
        if self.process.poll() is not None:
            raise Failure("the server died", self.log)

    def answers(self) -> bool:
        try:
            with DIRECT.open(f"{self.address}/system_stats", timeout=5):
                return True
        except OSError:
            return False

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            self.check()
            if time.monotonic() > deadline:
                raise Failure(f"the server did not answer within {START_SECONDS} s", self.log)
            time.sleep(0.1)
        if failed := re.findall(r"\(IMPORT FAILED\): (.+)", read(self.log)):
            raise Failure(f"ComfyUI could not load {' and '.join(Path(pack.strip()).name for pack in failed)}", self.log)


@contextmanager
def serving(environment: Environment, port: int | None = None):
    """A Server that is up; it ends, with all it started, when the block does. Without `port` a free one is taken."""
    port = usable(port)
    graphics = [] if has_gpu(environment) else ["--cpu"]
    with base_directory() as base, open(base / "server.log", "wb") as log:
        command = [environment.python, environment.comfyui / "main.py", *graphics, "--listen", "127.0.0.1", "--port", port,
                   "--base-directory", base, "--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes",
                   "--use-pytorch-cross-attention", "--disable-all-custom-nodes", "--whitelist-custom-nodes", *PACKS]
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        with started(command, cwd=base, env=environment.variables(), **streams) as process:
            server = Server(f"http://127.0.0.1:{port}", process, base / "server.log")
            with stage(f"starting ComfyUI on the {'CPU' if graphics else 'GPU'}"):
                server.wait_until_up()
            yield server


def usable(port: int | None) -> int:
    if port is not None and not 0 < port < 65536:
        raise Failure(f"port {port} cannot be used; it must lie between 1 and 65535")
    with socket.socket() as probe:
        if os.name != "nt":  # there it would let two programs share a port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port or 0))
        except OSError as error:
            raise Failure(f"port {port} cannot be used ({error.strerror}); choose another with --port, or leave it out") from None
        return probe.getsockname()[1]


def has_gpu(environment: Environment) -> bool:
    if os.environ.get("REPRISE_CPU"):
        return False
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    command = [str(environment.python), "-c", question]
    return subprocess.run(command, check=False, capture_output=True, env=environment.variables()).returncode == 0


@contextmanager
def base_directory():
    """ComfyUI's own kind of folder, in a temporary place: links to this clone instead of copies in a shared ComfyUI."""
    base = Path(tempfile.mkdtemp(prefix="reprise-"))
    try:
        for folder in ("custom_nodes", "models/diffusion_models", "models/vae", "models/loras", "input", "output", "user"):
            (base / folder).mkdir(parents=True)
        for name, source in PACKS.items():
            link(base / "custom_nodes" / name, source)
        for model in sorted((ROOT / "testbed" / "models").glob("*.safetensors")):
            folder = next((folder for begin, folder in MODEL_FOLDERS.items() if model.name.startswith(begin)), "diffusion_models")
            link(base / "models" / folder / model.name, model)
        yield base
    finally:
        shutil.rmtree(base, ignore_errors=True)


def link(place: Path, source: Path) -> None:
    try:
        place.symlink_to(source, target_is_directory=source.is_dir())
    except (OSError, NotImplementedError):  # Windows without the right to make links
        if source.is_dir():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns(".git", "demo-output", "__pycache__"))
        else:
            shutil.copy2(source, place)
