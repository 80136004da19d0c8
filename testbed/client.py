"""Runs a prompt on a ComfyUI server and waits for what comes of it."""
import asyncio
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO

import aiohttp
from PIL import Image

from .workflow import SAMPLERS

TEXT = 3        # kind of a binary message: a line for a node
SILENCE = 300  # seconds without a word from the server, after which a run is given up


class ServerError(RuntimeError):
    """What the server said, in words for a person."""


@dataclass
class Outcome:
    """What came of one prompt."""

    images: list[Image.Image] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)  # what nodes show as text, by node
    lines: dict[str, str] = field(default_factory=dict)  # the last line that a node had under it, by node
    reports: list[dict] = field(default_factory=list)  # one record for each sampling run that Reprise saw
    sampling: float = 0.0  # seconds that sampler nodes were executing


class Server:
    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def get(self, path: str):
        """The JSON at `path`."""
        return asyncio.run(self._get(path))

    def run(self, prompt: dict) -> Outcome:
        """Executes `prompt` and returns when it is through; samplers always run, whatever the server remembers."""
        return asyncio.run(self._run(afresh(prompt)))

    async def _get(self, path: str):
        with self._alive():
            async with aiohttp.ClientSession(self.url) as session, session.get(path) as response:
                if response.status != 200:
                    raise ServerError(f"{self.url}{path} answers {response.status} {response.reason}")
                return await response.json()

    async def _run(self, prompt: dict) -> Outcome:
        client, outcome = uuid.uuid4().hex, Outcome()
        with self._alive():
            async with aiohttp.ClientSession(self.url) as session, session.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as socket:
                async with session.post("/prompt", json={"prompt": prompt, "client_id": client}) as response:
                    answer = await response.json()
                if response.status != 200 or answer.get("node_errors"):
                    raise ServerError(rejection(answer, prompt))
                outputs = await self._follow(socket, prompt, answer["prompt_id"], outcome)
                for image in outputs:
                    async with session.get("/view", params=image) as response:
                        outcome.images.append(Image.open(BytesIO(await response.read())).convert("RGB"))
        return outcome

    async def _follow(self, socket: aiohttp.ClientWebSocketResponse, prompt: dict, prompt_id: str, outcome: Outcome) -> list[dict]:
        """Reads events until the prompt has ended; returns where its images are."""
        images, sampling_since = [], None
        while True:
            message = await socket.receive(timeout=SILENCE)
            if message.type is aiohttp.WSMsgType.BINARY:  # a preview, or a line for a node
                outcome.lines |= line_of(message.data)
                continue
            if message.type is not aiohttp.WSMsgType.TEXT:
                raise ServerError(f"the server at {self.url} ended while it ran the prompt")
            event = json.loads(message.data)
            kind, data = event["type"], event["data"]
            if kind == "reprise.report":
                outcome.reports.append(data)
            elif data.get("prompt_id") != prompt_id:
                continue
            elif kind == "execution_error":
                raise ServerError(f"node {data['node_id']} ({data['node_type']}) failed: {data['exception_message'].strip()}")
            elif kind == "execution_interrupted":
                raise ServerError("the run was interrupted")
            elif kind == "executed":
                output = data["output"] or {}
                images += output.get("images", [])
                if "text" in output:
                    outcome.texts[data["node"]] = "".join(output["text"])
            elif kind == "executing":
                if sampling_since is not None:
                    outcome.sampling += time.perf_counter() - sampling_since
                    sampling_since = None
                if data["node"] is None:
                    return images
                if data["node"] in prompt and prompt[data["node"]]["class_type"].startswith(SAMPLERS):
                    sampling_since = time.perf_counter()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except asyncio.TimeoutError as error:
            raise ServerError(f"no word from the server at {self.url} in {SILENCE} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(f"no server answers at {self.url}; start one with 'python3 dev.py serve'") from error


def line_of(message: bytes) -> dict[str, str]:
    """{node: line} of a binary message, empty where it is of another kind. Four bytes tell the kind, four more how long the node's id is."""
    kind, length = (int.from_bytes(message[at:at + 4], "big") for at in (0, 4))
    return {message[8:8 + length].decode("utf-8"): message[8 + length:].decode("utf-8")} if kind == TEXT else {}


def afresh(prompt: dict) -> dict:
    """The prompt with a mark on each sampler that no run had before.

    The server answers from its cache when all inputs of a node are as before. It counts inputs that the node does
    not declare, but never passes them on, so a mark makes it sample again without changing or unloading anything.
    """
    mark = uuid.uuid4().hex
    return {
        key: {**node, "inputs": {**node["inputs"], "run": mark}} if node["class_type"].startswith(SAMPLERS) else node
        for key, node in prompt.items()
    }


def rejection(answer: dict, prompt: dict) -> str:
    """One line for each thing that the server did not like about a prompt."""
    error = answer.get("error") or {"message": "the prompt is not valid"}
    lines = [f"the server rejects the prompt: {sentence(error)}"]
    for key, node in (answer.get("node_errors") or {}).items():
        lines += [f"  node {key} ({prompt[key]['class_type']}): {sentence(fault)}" for fault in node["errors"]]
    return "\n".join(lines)


def sentence(error: dict) -> str:
    return ": ".join(part for part in (error["message"], error.get("details")) if part)
