"""References under torch.compile: the injector works outside of what is compiled, and its patch is one object for a whole run."""
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from harness import model, sample
from test_references import conds, handle, used


class Graphs:
    """A backend of torch.compile that runs graphs as they are, and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def blocks() -> list[str]:
    network = model("flux").model.diffusion_model
    return [f"diffusion_model.{stack}.{i}" for stack in ("double_blocks", "single_blocks") for i in range(len(getattr(network, stack)))]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("first", [True, False], ids=["compiled first", "compiled last"])
@pytest.mark.parametrize("keys", [["diffusion_model"], blocks()], ids=["whole", "each block"])
def test_a_compiled_model_reads_references_and_gives_the_same_picture(keys, first):
    graphs, patcher = Graphs(), model("flux").clone()
    if first:
        set_torch_compile_wrapper(patcher, backend=graphs, keys=keys)
    patcher = used(patcher)
    if not first:
        set_torch_compile_wrapper(patcher, backend=graphs, keys=keys)
    wanted = sample(used(model("flux")), "flux", **conds(handle()))
    got = sample(patcher, "flux", **conds(handle()))
    assert graphs.count and (got - wanted).abs().max() <= 1e-4
    count = graphs.count
    sample(patcher, "flux", seed=9, **conds(handle()))
    assert graphs.count <= count + len(keys), "a second run compiles each piece anew at most once"
