"""dev.py and devtools: what they promise about the environment, the processes they start and their words to the user."""
import ast
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from devtools import commands, environment, process, server
from devtools.environment import Environment
from devtools.process import Failure

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name == "nt", reason="signals and process groups")

FAKE_COMFYUI = """
import http.server, sys
print({log!r}, flush=True)
if {dies}:
    sys.exit(3)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer).serve_forever()
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPRISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reprise"


@pytest.fixture
def comfyui(tmp_path, monkeypatch):
    """Writes a ComfyUI that is a web server of ten lines, and returns its environment."""
    def write(log="", dies=False) -> Environment:
        folder = tmp_path / "ComfyUI"
        folder.mkdir()
        (folder / "main.py").write_text(FAKE_COMFYUI.format(log=log, dies=dies))
        (folder / "requirements.txt").touch()
        return Environment(Path(sys.executable), folder, borrowed=True)

    monkeypatch.setenv("REPRISE_CPU", "1")
    return write


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.is_file() and ") Z " in status.read_text())  # a zombie whose new parent has not looked yet


def soon(condition, seconds=10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


# The files

def test_dev_py_can_be_read_by_a_python_that_is_too_old():
    ast.parse((ROOT / "dev.py").read_text(), feature_version=(3, 6))


@pytest.mark.parametrize("file", [ROOT / "dev.py", *sorted((ROOT / "devtools").glob("*.py"))], ids=lambda file: file.name)
def test_only_the_standard_library_is_imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            assert all(alias.name.partition(".")[0] in sys.stdlib_module_names for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.partition(".")[0] in {*sys.stdlib_module_names, "devtools"}


# The environment

def test_the_key_depends_on_every_pin_and_on_the_host(monkeypatch):
    keys = {environment.key("a"), environment.key("b")}
    for name, value in (("TORCH", ["torch==1"]), ("TEST_ONLY", []), ("FORMAT", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(environment, name, value)
            keys.add(environment.key("a"))
    assert len(keys) == 5
    assert environment.key("a") == environment.key("a")


def test_a_finished_folder_is_made_once(cache):
    made = []
    for _ in range(2):
        folder = environment.ready("thing", lambda folder, log: made.append(folder))
    assert len(made) == 1
    assert folder == cache / "thing"


@pytest.mark.parametrize("end", [KeyboardInterrupt(), Failure("no"), OSError("disk")], ids=repr)
def test_an_interrupted_build_leaves_nothing_and_the_next_one_starts_afresh(cache, end):
    def broken(folder, log):
        (folder / "half").touch()
        raise end

    with pytest.raises(type(end)):
        environment.ready("thing", broken)
    assert not list(cache.glob("thing*"))
    assert sorted(path.name for path in environment.ready("thing", lambda folder, log: None).iterdir()) == ["complete"]


def test_leftovers_of_killed_builds_are_removed(cache):
    for name in ("other.x.partial", "thing"):  # neither has the marker
        (cache / name).mkdir(parents=True)
        (cache / name / "half").touch()
    environment.ready("thing", lambda folder, log: None)
    assert not (cache / "other.x.partial").exists()
    assert not (cache / "thing" / "half").exists()


def test_a_second_process_waits_for_the_lock_and_says_so(tmp_path, capsys, monkeypatch):
    with open(tmp_path / "lock", "a+b") as first:
        assert environment.try_lock(first)
        monkeypatch.setattr(environment.time, "sleep", lambda seconds: first.close())  # the other process ends meanwhile
        with environment.locked(tmp_path / "lock"):
            assert "waiting" in capsys.readouterr().out


@posix
def test_an_environment_whose_python_was_uninstalled_is_built_again(cache):
    def build(folder, log):
        (folder / "venv" / "bin").mkdir(parents=True)
        (folder / "venv" / "bin" / "python").symlink_to(sys.executable)

    folder = environment.ready("thing", build)
    python = folder / "venv" / "bin" / "python"
    python.unlink()
    python.symlink_to(folder / "gone")
    assert not environment.finished(folder)
    environment.ready("thing", build)
    assert python.exists()


def test_too_little_room_is_said_before_anything_is_built(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2e9))
    with pytest.raises(Failure, match=r"needs \d+ GB .* 2\.0 GB left"):
        environment.make_venv(tmp_path, tmp_path / "log")
    assert not list(tmp_path.iterdir())


def test_pip_checks_the_hash_before_it_runs_anything_of_the_archive(tmp_path, monkeypatch):
    def pip(command, log, **options):
        assert "--require-hashes" in command
        assert environment.SDIST_SHA256 in Path(command[command.index("--requirement") + 1]).read_text()
        sdist = Path(command[command.index("--dest") + 1])
        sdist.mkdir()
        (sdist / "archive").touch()
        return 0

    monkeypatch.setattr(environment, "run_logged", pip)
    (tmp_path / "tmp").mkdir()
    assert environment.download(tmp_path, tmp_path / "log").name == "archive"


@pytest.mark.parametrize(("output", "sentence"), [
    ("ERROR: Could not install: [Errno 28] No space left on device", "the disk is full"),
    ("WARNING: Retrying (Retry(total=0)) after connection broken by ...", "is there a network"),
    ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "checksum wrong"),
    ("ERROR: No matching distribution found", "pip could not install"),
])
def test_a_failing_pip_is_explained_in_one_sentence_with_its_last_lines(tmp_path, monkeypatch, output, sentence):
    def pip(command, log, **options):
        log.write_text("early\n" * 30 + output)
        return 1

    monkeypatch.setattr(environment, "run_logged", pip)
    with pytest.raises(Failure, match=sentence) as failure:
        environment.pip(tmp_path, tmp_path / "log", "install")
    assert len(failure.value.lines) == 20
    assert failure.value.lines[-1] == output


def archive(path: Path, *members: tarfile.TarInfo | str) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for member in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = 4 if info.isreg() else 0
            file.addfile(info, io.BytesIO(b"text") if info.isreg() else None)
    return path


def trusted(path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(environment, "SDIST_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_a_wrong_checksum_is_an_error_before_unpacking(tmp_path):
    with pytest.raises(Failure, match="checksum wrong"):
        environment.unpack(archive(tmp_path / "a.tgz", "p/vendor/ComfyUI/main.py"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_plain_files_of_comfyui_are_unpacked(tmp_path, monkeypatch):
    symlink = tarfile.TarInfo("p/vendor/ComfyUI/link")
    symlink.type, symlink.linkname = tarfile.SYMTYPE, "/etc/passwd"
    made = archive(tmp_path / "a.tgz", "p/setup.py", "p/vendor/other/x.py", "p/vendor/ComfyUI/main.py", "p/vendor/ComfyUI/comfy/ops.py", symlink)
    environment.unpack(trusted(made, monkeypatch), tmp_path / "out")
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if not path.is_dir())
    assert files == ["comfy/ops.py", "main.py"]


def test_a_path_that_leads_outside_is_refused(tmp_path, monkeypatch):
    made = archive(tmp_path / "a.tgz", "p/vendor/ComfyUI/../../escaped.py")
    with pytest.raises(Failure, match="outside"):
        environment.unpack(trusted(made, monkeypatch), tmp_path / "deep" / "er" / "out")
    assert not list(tmp_path.rglob("escaped.py"))


def test_a_comfyui_dir_without_comfyui_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    with pytest.raises(Failure, match="no ComfyUI there"):
        environment.environment()


def test_a_borrowed_comfyui_without_a_python_gets_a_private_one_and_is_not_touched(comfyui, cache, monkeypatch):
    host = comfyui().comfyui
    before = sorted(host.rglob("*"))
    monkeypatch.setenv("COMFYUI_DIR", str(host))
    monkeypatch.setattr(environment, "has_modules", lambda python, modules: False)
    monkeypatch.setattr(environment, "build_venv", lambda folder, requirements, log: (folder / requirements.name).touch())
    env = environment.environment()
    assert env.python.is_relative_to(cache)
    assert env.comfyui == host
    assert sorted(host.rglob("*")) == before


def test_programs_never_see_the_callers_pythonpath(comfyui, cache, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    variables = comfyui().variables()
    assert "PYTHONPATH" not in variables
    assert variables["PYTHONPYCACHEPREFIX"].startswith(str(cache))  # a borrowed ComfyUI stays as it is


# Processes

@posix
@pytest.mark.parametrize("deaf", [False, True], ids=["obedient", "ignores SIGTERM"])
def test_a_program_ends_with_its_block_and_takes_its_children_along(deaf):
    trap = "trap '' TERM; " if deaf else ""
    with process.started(["sh", "-c", f"{trap}sleep 60 & echo $!; wait; wait"], patience=0.3, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert alive(child)
    assert parent.returncode is not None
    assert soon(lambda: not alive(child))


@posix
def test_what_the_watch_raises_ends_the_program(tmp_path):
    def watch():
        raise Failure("enough")

    start = time.monotonic()
    with pytest.raises(Failure, match="enough"):
        process.run(["sleep", "60"], watch)
    assert time.monotonic() - start < 10


# The server

def test_the_server_is_up_inside_its_block_and_gone_after_it(comfyui):
    with server.serving(comfyui()) as running:
        assert running.answers()
        base = running.log.parent
        assert (base / "custom_nodes" / "reprise" / "dev.py").is_file()
        assert (base / "custom_nodes" / "reprise_testbed").is_dir()
        models = {path.name for path in (base / "models").rglob("*.safetensors")}
        assert models == {path.name for path in (ROOT / "testbed" / "models").glob("*.safetensors")}
    assert not running.answers()
    assert not base.exists()
    assert (ROOT / "dev.py").is_file()  # the links were removed, not what they led to


def test_a_server_that_dies_is_reported_with_its_last_words(comfyui):
    with pytest.raises(Failure, match="the server died") as failure, server.serving(comfyui(log="out of luck", dies=True)):
        pass
    assert failure.value.lines == ["out of luck"]


def test_a_pack_that_does_not_load_is_an_error(comfyui):
    log = "   0.1 seconds (IMPORT FAILED): /base/custom_nodes/reprise"
    with pytest.raises(Failure, match="could not load reprise"), server.serving(comfyui(log=log)):
        pass


def test_a_taken_port_is_one_sentence(comfyui):
    with server.socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(Failure, match=f"port {number} cannot be used .*--port"), server.serving(comfyui(), number):
            pass


@posix
@pytest.mark.skipif(find_spec("torch") is None, reason="dev.py borrows a Python only if it has torch")
def test_ctrl_c_ends_serve_and_the_server_with_it(comfyui, cache):
    variables = os.environ | {"COMFYUI_DIR": str(comfyui().comfyui)}
    serve = subprocess.Popen([sys.executable, str(ROOT / "dev.py"), "serve"], env=variables, cwd="/", stdout=subprocess.PIPE, text=True)
    log = next(line for line in serve.stdout if "its log is" in line).split()[-1]
    serve.send_signal(signal.SIGINT)
    assert serve.wait(20) == 130
    assert not Path(log).exists()
    assert "nothing is left running" in serve.stdout.read()


# The commands

@pytest.mark.parametrize(("arguments", "sentence"), [
    (["dmeo"], "no command is called 'dmeo'; known: demo, captions, test"),
    (["bench", "nothing"], "which benchmark?"),
])
def test_a_mistyped_command_line_is_one_sentence(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr(commands, "interrupt_on_endings", lambda: None)
    assert commands.main(arguments, "usage") == 1
    errors = capsys.readouterr().err
    assert sentence in errors
    assert errors.count("\n") == 1


SERVED = {"demo": "testbed.demo", "captions": "testbed.captions_sheet"}


@pytest.mark.parametrize("command", ["serve", *SERVED])
@pytest.mark.parametrize("wrong", [["--bogus"], ["more"], ["--shuffle", "one"], ["--only"]], ids=str)
def test_arguments_are_looked_at_before_anything_is_built_or_started(command, wrong, capsys, monkeypatch):
    monkeypatch.setattr(commands, "interrupt_on_endings", lambda: None)
    monkeypatch.setattr(commands, "environment", lambda **options: pytest.fail("built"))
    with pytest.raises(SystemExit) as ended:
        commands.main([command, *wrong], "usage")
    assert ended.value.code == 2 and f"usage: dev.py {command}" in capsys.readouterr().err


@pytest.mark.parametrize("command", SERVED)
def test_a_program_is_called_on_the_server_with_what_it_was_asked_for(command, tmp_path, monkeypatch):
    @contextmanager
    def serving(env):
        yield SimpleNamespace(address="http://here", check=lambda: None)

    called = []
    monkeypatch.setattr(commands, "interrupt_on_endings", lambda: None)
    monkeypatch.setattr(commands, "environment", lambda: Environment(Path("python"), tmp_path))
    monkeypatch.setattr(commands, "serving", serving)
    monkeypatch.setattr(commands, "run", lambda parts, **options: called.append([str(part) for part in parts]) or 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "A FLUX.json").write_text("{}")
    more = {"demo": ["--only", "flux", "--thumbnails"], "captions": ["--blind", "--shuffle", "3"]}[command]
    assert commands.main([command], "usage") == commands.main([command, "--out", "here", "--workflows", "there", *more], "usage") == 0
    plain, all_of_it = called
    assert plain[:5] == all_of_it[:5] == ["python", "-m", SERVED[command], "--server", "http://here"]
    assert plain[5] == "--out" and Path(plain[6]).is_absolute() and plain[7:] == ["--workflows", str(ROOT / "workflows")]
    assert all_of_it[5:] == ["--out", str(tmp_path / "here"), "--workflows", str(tmp_path / "there"), *more]


@pytest.mark.parametrize(("command", "wrong"), [
    ("demo", ["--only", "nothing_such"]), ("demo", ["--workflows", "nowhere"]), ("captions", ["--workflows", "nowhere"])])
def test_that_there_is_no_such_workflow_is_told_before_anything_is_started(command, wrong, capsys, monkeypatch):
    monkeypatch.setattr(commands, "interrupt_on_endings", lambda: None)
    monkeypatch.setattr(commands, "environment", lambda: pytest.fail("it was started"))
    assert commands.main([command, *wrong], "usage") and "no workflow in" in capsys.readouterr().err


@pytest.mark.parametrize("command", SERVED)
def test_every_option_of_a_program_is_one_of_its_command(command, capsys, monkeypatch):
    monkeypatch.setattr(commands, "interrupt_on_endings", lambda: None)
    with pytest.raises(SystemExit):
        commands.main([command, "--help"], "usage")
    known = set(re.findall(r"--[a-z]+", capsys.readouterr().out)) - {"--help"}
    source = (ROOT / f"{SERVED[command].replace('.', '/')}.py").read_text(encoding="utf-8")
    assert known | {"--server"} == set(re.findall(r'add_argument\("(--[a-z]+)"', source))


def test_every_command_is_in_the_usage():
    usage = ast.get_docstring(ast.parse((ROOT / "dev.py").read_text()))
    assert all(f"dev.py {name}" in usage for name in commands.COMMANDS)
