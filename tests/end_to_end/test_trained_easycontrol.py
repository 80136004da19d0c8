"""The trained EasyControl adapter on the trained FLUX, through the pack's own reference cache: it steers the picture by edges."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import _pictures as bench
from pack.core.reference.bank import Bank
from pack.core.reference.easycontrol import EasyControl, read_adapter
from pack.core.reference.handle import Handle, Reference, with_references
from pack.core.reference.injector import attach_references
from testbed import train
from testbed.easycontrol import published
from testbed.edges import agreement, edges
from testbed.nodes.pictures import heart
from testbed.nodes.text import encode
from testbed.taesd import TAESD

MODELS = Path(__file__).resolve().parent.parent.parent / "testbed" / "models"
FILE = "easycontrol_tiny.safetensors"
CAPTIONS, STEPS = ("red heart", "blue heart", "yellow heart") * 2, 12


@pytest.fixture(scope="module")
def flux():
    return bench.SUBJECTS[0].load()


@pytest.fixture(scope="module")
def adapter():
    return read_adapter(load_file(MODELS / FILE), "tiny", FILE)


@pytest.fixture(scope="module")
def taesd() -> TAESD:
    net = TAESD()
    net.load_state_dict({name: tensor.float() for name, tensor in load_file(MODELS / "taef1_tiny.safetensors").items()})
    return net


@pytest.fixture(scope="module")
def pictures() -> tuple[Tensor, list[str]]:
    """Hearts of other sizes, places and angles than the model has learnt, drawn from a formula, and their captions."""
    right, up, size, turn = (torch.rand(4, len(CAPTIONS), generator=torch.Generator().manual_seed(4242)) - 0.5).tolist()
    shown = [heart(128, 0.8 * right[i], 0.8 * up[i], 0.45 + 0.2 * size[i], 0.8 * turn[i]) for i in range(len(CAPTIONS))]
    return torch.stack(shown), list(CAPTIONS)


def condition(adapter, picture: Tensor) -> EasyControl:
    """picture: [3, H, W]"""
    return EasyControl(adapter, bench.VAE.encode(edges(picture[None]).movedim(1, -1)))


def drawn(flux, taesd, caption: str, recipe: EasyControl | None, seed: int, steps: int = STEPS, bank: Bank | None = None) -> tuple[Tensor, Tensor]:
    """The latent, and the picture [1, 3, 128, 128] in it."""
    positive, negative = bench.conditions([caption])
    if recipe is not None:
        flux = attach_references(flux, bank=Bank() if bank is None else bank)
        positive = with_references(positive, Handle((Reference(recipe),)))
    noise = torch.randn((1, 16, 16, 16), generator=torch.Generator().manual_seed(seed))
    latent = bench.sample_under(flux, (positive, negative), noise, steps, 1.0, "euler")
    with torch.inference_mode():
        return latent, taesd.taesd_decoder((latent - bench.VAE.shift) * bench.VAE.scale).clamp(0, 1)


def test_a_picture_keeps_to_the_edges_of_its_condition_and_not_to_those_of_another(flux, adapter, taesd, pictures):
    shown, captions = pictures
    lines = edges(shown)
    steered = torch.cat([drawn(flux, taesd, caption, condition(adapter, shown[i]), 60 + i)[1] for i, caption in enumerate(captions)])
    free = torch.cat([drawn(flux, taesd, caption, None, 60 + i)[1] for i, caption in enumerate(captions)])
    own, other, without = (agreement(edges(a), b).mean().item() for a, b in ((steered, lines), (steered, lines.roll(1, 0)), (free, lines)))
    print(f"agreement of edges: {own:.2f} with the own condition, {other:.2f} with another's, {without:.2f} without the adapter")
    assert own > other + 0.25 and own > without + 0.25


def test_the_training_code_computes_what_the_nodes_compute(flux, adapter, taesd, pictures):
    """testbed/easycontrol.py was trained; the host's FLUX with an entry of the bank is what runs: the same function of the same weights."""
    shown, [caption, *_] = pictures
    net = train.build("easycontrol")
    weights = load_file(MODELS / FILE)
    assert {published(name) for name in net.state_dict()} == set(weights)
    net.load_state_dict({name: weights[published(name)].float() for name in net.state_dict()})
    noise = torch.randn((1, 16, 16, 16), generator=torch.Generator().manual_seed(61))
    latent, _ = drawn(flux, taesd, caption, condition(adapter, shown[0]), 61, steps=1)
    tokens, pooled = encode(caption)
    with torch.inference_mode():
        ours = net(noise, torch.ones(1), tokens, pooled, bench.VAE.to_model_space(edges(shown[:1])))
    theirs = noise - (latent - bench.VAE.shift) * bench.VAE.scale     # of one step from sigma 1 to 0
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_a_kept_entry_gives_the_picture_of_the_one_encoded_in_the_run_bit_for_bit(flux, adapter, taesd, pictures):
    bank, recipe = Bank(), condition(adapter, pictures[0][0])
    first, second = (drawn(flux, taesd, pictures[1][0], recipe, 62, bank=bank)[0] for _ in range(2))
    assert len(bank) == 1 and torch.equal(first, second)
