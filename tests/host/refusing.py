"""For the tests of what is refused: a reference of every system, the two places that refuse it, and what a sentence must be."""
import copy
from types import SimpleNamespace

import pytest
import torch
import tryon
from harness import model, sample
from template_files import scalar_weights, template
from test_easycontrol import condition

from pack.core.reference.bank import Bank
from pack.core.reference.files import read, write
from pack.core.reference.handle import Handle, Reference, with_references
from pack.core.reference.injector import attach_references
from pack.core.reference.inspect import stored
from pack.core.reference.ready import Ready
from pack.core.reference.run import Keeping, Run
from pack.core.reference.templates.merge import referred
from pack.nodes.references import ApplyReferenceCache
from testbed import tiny

FLUX = model("flux").model.diffusion_model
LOST = float("nan")


def refused(call, said: str) -> None:
    with pytest.raises(ValueError) as caught, torch.inference_mode():
        call()
    sentence = str(caught.value)
    assert said in sentence, sentence
    assert "\n" not in sentence and 40 < len(sentence) < 450 and "; " in sentence, sentence


def one(recipe) -> Handle:
    return Handle((Reference(recipe),))


def text_for(patcher) -> list:
    return [[torch.zeros(1, 4, 16), {"pooled_output": torch.zeros(1, 16)}]]


def at_the_node(patcher, handle):
    ApplyReferenceCache.execute(patcher, text_for(patcher), text_for(patcher), handle)


def at_the_sampler(patcher, handle):
    conds = {"positive": [more for _, more in with_references(text_for(patcher), handle)]}
    Run(Keeping(), Bank(), patcher).claim(conds)


DOORS = (at_the_node, at_the_sampler)


def with_network(network):
    return SimpleNamespace(model=SimpleNamespace(diffusion_model=network))


def flux_of(**size):
    return with_network(tiny.flux(tiny.comfy.ops.disable_weight_init, **size))


def fill_variant():
    net = copy.copy(FLUX)
    net.in_channels = 384
    return with_network(net)


def of_every_system(folder) -> dict[str, Handle]:
    """A reference of every system."""
    attached, single = attach_references(model("flux"), bank=Bank()), one(condition(FLUX))
    sample(attached, "flux", cfg=1.0, steps=1, positive=with_references(tiny.conditioning("flux", 11), single))
    write(folder, "saved", stored(attached, single))
    bank = Bank()
    tryon.by_pack(tryon.fastfit(), tryon.handle(tryon.garment()), bank=bank)
    return {
        "EasyControl": single, "FastFit": one(tryon.garment()), "template": referred(template(folder, scalar_weights(), "bright").entry((0.7,))),
        "saved": one(read(folder, "saved")[0]), "saved garment": one(Ready(next(iter(bank.entries.values())), "unet")),
    }
