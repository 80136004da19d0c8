"""Step Cache runs again when the profile that it names changed on disk, and for nothing else that it does not see."""
import asyncio
import os

import execution
import folder_paths
import pytest
import torch
from comfy_execution.caching import to_hashable
from comfy_execution.graph import DynamicPrompt

import nodes as host_nodes

from pack.core.stepcache.calibrate import profiles_folder
from pack.core.stepcache.policies import POLICIES
from pack.nodes.step_cache import StepCache

SUFFIXES = (".json", ".safetensors")
SENT = {"preset": "custom", "policy": "profile", "policy.profile": "p", "policy.target": "2.0x"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """With the two files of profile 'p' and of another one in it."""
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, "Reprise_StepCache", StepCache)
    profiles_folder().mkdir(parents=True)
    for name in ("p", "q"):
        for suffix in SUFFIXES:
            (profiles_folder() / f"{name}{suffix}").write_bytes(b"content")
    return profiles_folder()


def fingerprint(sent: dict):
    """What the host adds to its key for a node that was sent so; it asks in its own way, before anything ran."""
    prompt = DynamicPrompt({"7": {"class_type": "Reprise_StepCache", "inputs": {"model": ["1", 0], **sent}}})
    told = asyncio.run(execution.IsChangedCache("prompt", prompt, None).get("7"))
    assert told == told, "the host takes an exception for a node that changes always"     # it is NaN then
    hash(to_hashable(told))
    return told


def touch(path) -> None:
    """Another time of change, as a copy has it."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000))


CHANGES = {
    "another content": lambda path: path.write_bytes(b"another content"),
    "a copy of the same size": touch,
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_profile_that_changed_on_disk_is_noticed(folder, suffix, change):
    before = fingerprint(SENT)
    assert fingerprint(SENT) == before, "nothing changed"
    CHANGES[change](folder / f"p{suffix}")
    after = fingerprint(SENT)
    assert after != before and fingerprint(SENT) == after
    if change == "gone":
        (folder / f"p{suffix}").write_bytes(b"content")
        assert fingerprint(SENT) != after, "it is there again"


def test_the_name_that_is_left_out_is_the_default_one(folder):
    sent = {name: value for name, value in SENT.items() if name != "policy.profile"}
    before = fingerprint(sent)
    (folder / "calibrated.json").write_bytes(b"content")
    assert fingerprint(sent) != before


@pytest.mark.parametrize("sent", [
    *({**SENT, "policy": policy} for policy in POLICIES if policy != "profile"), {**SENT, "preset": "fast"}, {**SENT, "enabled": False},
    {name: value for name, value in SENT.items() if name != "preset"}, {}, {"preset": "custom"}], ids=str)
def test_who_uses_no_profile_runs_for_none(folder, sent):
    before = fingerprint(sent)
    for suffix in SUFFIXES:
        touch(folder / f"p{suffix}")
        (folder / f"calibrated{suffix}").write_bytes(b"content")
    assert fingerprint(sent) == before


def test_another_profile_and_a_folder_that_grows_are_of_no_concern(folder):
    before = fingerprint(SENT)
    touch(folder / "q.json")
    (folder / "r.json").write_bytes(b"content")
    assert fingerprint(SENT) == before


@pytest.mark.parametrize("sent", [
    {"enabled": ["2", 0]}, {"preset": ["2", 0]}, {"policy": ["2", 0]}, {"policy.profile": ["2", 0]}, {"policy.target": ["2", 0]}, {"policy": "teacach"},
    {"policy": 5}, {"policy": None}, {"policy.profile": None}, {"policy.profile": 5}, {"policy.profile": "../p"}, {"policy.profile": "x" * 3_000_000},
    {"policy.profile": "a\0b"}, {"preset": "turbo"}, {"preset": 5}, {"stray": 1}], ids=lambda sent: str(sent)[:60])
def test_links_and_nonsense_never_make_the_host_believe_in_a_change(sent):
    assert fingerprint({**SENT, **sent}) == fingerprint({**SENT, **sent})


@pytest.mark.parametrize("inputs", [
    {}, {"policy": {}}, {"policy": "profile"}, {"policy": {"policy": "profile", "profile": torch.zeros(2)}}, {"policy": {"policy": ["profile"]}},
    {"preset": torch.zeros(2), "enabled": torch.zeros(2), "policy": {"policy": "profile", "profile": "p"}}, {"model": object(), "preset": object()}],
    ids=lambda inputs: str(inputs).partition(" at 0x")[0])     # the same in every process
def test_whatever_comes_is_answered_without_an_error(inputs):
    hash(to_hashable(StepCache.fingerprint_inputs(**{"preset": "custom", **inputs})))


def test_a_name_that_is_linked_or_a_preset_that_is_linked_still_names_the_profile(folder):
    """What a link will bring is not known yet; with a preset that may be custom the profile counts."""
    before = fingerprint({**SENT, "preset": ["2", 0]})
    touch(folder / "p.json")
    assert fingerprint({**SENT, "preset": ["2", 0]}) != before


def test_a_file_is_never_opened(folder, monkeypatch):
    os.mkfifo(folder / "pipe.json") if hasattr(os, "mkfifo") else (folder / "pipe.json").touch()
    monkeypatch.setattr("pathlib.Path.open", lambda *arguments, **options: pytest.fail("opened"))
    monkeypatch.setattr("builtins.open", lambda *arguments, **options: pytest.fail("opened"))
    assert StepCache.fingerprint_inputs(preset="custom", policy={"policy": "profile", "profile": "pipe"})
