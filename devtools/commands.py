"""The commands of dev.py. Each takes the rest of the command line and returns an exit code."""
from __future__ import annotations

import errno
import os
import signal
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

from .environment import emoji, environment
from .process import Failure, interrupt_on_endings, run, say
from .server import ROOT, serving, usable


def demo(arguments: list[str]) -> int:
    parser = ArgumentParser(prog="dev.py demo", description="Runs every workflow with and without Reprise.")
    parser.add_argument("--out", type=Path, default=ROOT / "demo-output", help="folder for the pictures and report.json")
    parser.add_argument("--only", metavar="NAME", help="run the workflows with NAME in their file name")
    parser.add_argument("--thumbnails", action="store_true", help="also write the picture of each trained model beside its workflow, for the template list")
    return on_a_server("testbed.demo", parser, arguments)


def captions(arguments: list[str]) -> int:
    parser = ArgumentParser(prog="dev.py captions", description="Has each trained model draw the sixteen captions of the demo, on one sheet.")
    parser.add_argument("--out", type=Path, default=ROOT / "demo-output" / "captions.png", help="file for the sheet")
    parser.add_argument("--blind", action="store_true", help="shuffle, number instead of caption, write the key as JSON")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="order of a blind sheet")
    return on_a_server("testbed.captions_sheet", parser, arguments)


def on_a_server(module: str, parser: ArgumentParser, arguments: list[str]) -> int:
    """Runs a program of the test bed on a server of its own. The parser has the program's options, so that a wrong one is told before minutes go by."""
    parser.add_argument("--workflows", type=Path, default=ROOT / "workflows", metavar="DIR", help="folder of the workflows")
    options = vars(parser.parse_args(arguments))
    out, workflows = options.pop("out").resolve(), options.pop("workflows").resolve()
    only = options.get("only") or ""
    if not any(only.lower() in file.stem.lower() for file in workflows.glob("*.json")):
        raise Failure(f"no workflow in {workflows}" + (f" has '{only}' in its name" if only else ""))
    more = [str(part) for name, value in options.items() if value not in (None, False) for part in ([f"--{name}"] if value is True else [f"--{name}", value])]
    env = environment()
    with serving(env) as server:
        command = [env.python, "-m", module, "--server", server.address, "--out", out, "--workflows", workflows, *more]
        code = run(command, watch=server.check, cwd=ROOT, env=env.variables())
        if code:
            server.check()  # a dead server explains more than a lost connection does
    return code


def test(arguments: list[str]) -> int:
    env = environment()
    where = {"cwd": ROOT, "env": env.variables()}
    chosen = any(argument.startswith("tests") for argument in arguments)
    tests = [] if chosen else ["tests", *side_by_side()]
    style = run([env.python, "-m", "ruff", "check", "."], **where)
    gently = {"ask": signal.SIGINT, "patience": 15}  # pytest then ends the servers that its fixtures started
    return run([env.python, "-m", "pytest", *tests, *arguments], **gently, **where) or style


def side_by_side() -> list[str]:
    """pytest's arguments to run whole files on several cores. A worker takes up to 2 GB, and more than four wait for the longest file."""
    workers = min(os.cpu_count() or 1, 4)
    return ["--numprocesses", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"] if workers > 1 else []


def serve(arguments: list[str]) -> int:
    parser = ArgumentParser(prog="dev.py serve", description="Leaves ComfyUI up with Reprise and the demo models, until Ctrl-C.")
    parser.add_argument("--port", type=int, help="on 127.0.0.1; a free one is found when it is left out")
    options = parser.parse_args(arguments)
    usable(options.port)    # before minutes go into a build
    with serving(environment(tests=False), options.port) as server:
        say(f"ComfyUI is at {server.address} until Ctrl-C; its log is {server.log}")
        while True:
            server.check()
            time.sleep(0.2)


def bench(arguments: list[str]) -> int:
    known = sorted(file.stem.replace("_", "-") for file in (ROOT / "benchmarks").glob("[a-z]*.py"))
    if not arguments or arguments[0] not in known:
        raise Failure(f"which benchmark? known: {', '.join(known)}")
    name, *more = arguments
    env = environment(tests=False)      # so that a user's own ComfyUI will do
    return run([env.python, "-m", f"benchmarks.{name.replace('-', '_')}", *more], cwd=ROOT, env=env.variables())


def train(arguments: list[str]) -> int:
    env = environment()
    pictures = [] if "zimage-drawn" in arguments else ["--emoji", emoji()]
    return run([env.python, "-m", "testbed.train", *arguments, *pictures], cwd=ROOT, env=env.variables())


COMMANDS = {command.__name__: command for command in (demo, captions, test, serve, bench, train)}


def main(arguments: list[str], usage: str) -> int:
    interrupt_on_endings()
    name, *rest = arguments or ["--help"]
    try:
        if name in ("-h", "--help"):
            print(usage.strip())
            return 0
        if name not in COMMANDS:
            raise Failure(f"no command is called '{name}'; known: {', '.join(COMMANDS)}")
        return COMMANDS[name](rest)
    except KeyboardInterrupt:
        say("interrupted; nothing is left running")
        return 130
    except Failure as failure:
        for line in failure.lines:
            print(f"  | {line}", file=sys.stderr)
        print(f"reprise: {failure}", file=sys.stderr)
    except OSError as error:
        print("reprise: the disk is full" if error.errno == errno.ENOSPC else f"reprise: {error}", file=sys.stderr)
    return 1
