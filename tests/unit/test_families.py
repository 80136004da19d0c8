"""Facts of model families: every one can be told apart, and a stack takes a call apart and puts it together again."""
import pytest
import torch

from pack.core.families import FAMILIES, Side, Stack, Unfamiliar, family_of
from pack.core.stepcache.levels.block_range import BlockRange
from pack.core.stepcache.levels.passage import alike

JOINED = Stack("double", inputs=("img", "txt"), stream="img", returns=("img", "txt"), joined=("txt", "img"))
PAIR = Stack("pair", inputs=("x",), packed=("video", "audio"), stream="video", also=("audio",), returns=("video", "audio"), joined=("video",))


def tokens(n: int, width: int = 3) -> torch.Tensor:
    return torch.randn(2, n, width)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_tells_classes_and_stacks_that_can_be_told_apart(family):
    assert family.models and bool(family.stacks) == (family.kind == "transformer") and family.warm_up >= 1
    for stack in family.stacks:
        known = {*stack.inputs, *stack.packed}
        assert {stack.stream, *stack.joined, *stack.also} <= set(stack.returns) <= known
        assert stack.stream in stack.joined and not set(stack.also) & set(stack.joined)
    for model in family.models:
        module, _, name = model.partition(":")
        assert module.startswith("comfy.ldm.") and name.isidentifier()
        made = type(name, (), {"__module__": module, "__qualname__": name})
        assert family.matches(made()) and family_of(made()) is family
        assert not family.matches(type("Child", (made,), {})()) and family_of(object()) is None


@pytest.mark.parametrize("stack", [stack for family in FAMILIES.values() for stack in family.stacks],
                         ids=[f"{name} {stack.attribute}" for name, family in FAMILIES.items() for stack in family.stacks])
@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "by place"])
def test_a_block_that_does_nothing_returns_what_it_took(stack, by_name):
    values = {name: tokens(5) for name in stack.packed or stack.inputs}
    call = {stack.inputs[0]: tuple(values.values())} if stack.packed else values
    args, kwargs = ((), call) if by_name else (tuple(call.values()), {})
    taken = stack.taken(args, kwargs)
    assert set(taken) == set(stack.returns) and all(taken[name] is values[name] for name in taken)
    given = stack.given(stack.passed(taken))
    assert all(given[name] is values[name] for name in taken)


def test_the_image_stands_first_or_last_and_can_be_replaced():
    stream, image = tokens(7), tokens(4)
    last, first = Stack("s", ("x",), "x", ("x",)), Stack("s", ("x",), "x", ("x",), image_first=True)
    assert torch.equal(last.image(stream, 4), stream[:, 3:]) and torch.equal(first.image(stream, 4), stream[:, :4])
    assert torch.equal(last.with_image(stream, image), torch.cat([stream[:, :3], image], 1))
    assert torch.equal(first.with_image(stream, image), torch.cat([image, stream[:, 4:]], 1))
    assert last.with_image(stream, stream) is stream
    with pytest.raises(Unfamiliar, match="has 7 tokens, and the image alone has 8"):
        last.image(stream, 8)


def test_what_is_joined_can_be_parted():
    values = {"img": tokens(4), "txt": tokens(3)}
    whole = JOINED.whole(values)
    assert torch.equal(whole, torch.cat([values["txt"], values["img"]], 1))
    assert all(torch.equal(part, values[name]) for name, part in JOINED.parted(whole, values).items())
    with pytest.raises(Unfamiliar, match="7 tokens where 6 were skipped"):
        JOINED.parted(whole[:, :6], values)
    with pytest.raises(Unfamiliar, match="lacks one of txt, img"):
        JOINED.whole(values | {"txt": None})


WRONG = {
    "a name that is not there": lambda: JOINED.taken((), {"img": tokens(2)}),
    "too few by place": lambda: JOINED.taken((tokens(2),), {}),
    "no tensor": lambda: JOINED.taken((), {"img": "image", "txt": tokens(2)}),
    "no tokens": lambda: JOINED.taken((torch.zeros(3), tokens(2)), {}),
    "one for two": lambda: JOINED.given(tokens(2)),
    "three for two": lambda: JOINED.given((tokens(2),) * 3),
    "no pair": lambda: PAIR.taken((tokens(2),), {}),
    "two for one": lambda: Stack("s", ("x",), "x", ("x",)).given((tokens(2), tokens(2))),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_call_that_is_not_as_told_is_known_as_such(wrong):
    with pytest.raises(Unfamiliar):
        WRONG[wrong]()


def test_a_missing_text_is_no_fault_where_nothing_reads_it():
    assert JOINED.given((tokens(2), None))["txt"] is None       # the last block of some models returns none


def test_a_side_module_that_does_nothing_hands_on_or_adds_nothing():
    x = tokens(3)
    adds, hands, both = Side("a", ("x",), (None,)), Side("a", ("x",), ("x",)), Side("a", ("c", "x"), (None, "c"))
    assert torch.equal(x + adds.passed((x, 1), {}), x) and hands.passed((), {"x": x}) is x
    nothing, c = both.passed((x,), {"x": tokens(1)})
    assert c is x and torch.equal(x + nothing * 0.7, x)


def test_streams_of_unlike_length_weigh_alike_in_a_signal():
    long, short = torch.ones(1, 1000, 4), 3 * torch.ones(1, 7, 2)
    both = alike([long, short])
    assert len(both) == 2 * short.numel() and both.mean() == 2
    assert alike([long]) is long


def test_a_gate_on_the_first_blocks_wants_one_and_an_earlier_gate_none():
    class Gate:
        name, needs_forward = "gate", True

    class Early(Gate):
        signal = "modulated input"

    assert BlockRange(first_blocks=0).resolve(Early).first_blocks == 0
    with pytest.raises(ValueError, match="first_blocks is 0"):
        BlockRange(first_blocks=0).resolve(Gate)


class Named:
    """A network of which only the paths of its modules are asked."""

    def __init__(self, *paths):
        self.paths = paths

    def named_modules(self):
        return [(path, object()) for path in self.paths]


def test_modulations_are_told_by_whole_paths_and_a_star_is_a_number():
    family = FAMILIES["flux"]
    there = ["double_blocks.0.img_mod", "double_blocks.10.txt_mod", "single_blocks.3.modulation", "final_layer.adaLN_modulation"]
    others = ["", "double_blocks.0.img_mod.lin", "double_blocks.x.img_mod", "net.double_blocks.0.img_mod", "double_blocks.0.img_mlp", "single_blocks.3"]
    assert family.modulations(Named(*others, *there)) == there
    assert FAMILIES["unet"].modulations(Named(*there)) == []
