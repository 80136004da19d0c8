"""Registries and knobs, and every entry of every registry."""
from dataclasses import dataclass, fields

import pytest

from pack.core.knob import checked, knob, knobs, settings, whole_numbers
from pack.core.registry import Registry
from pack.core.run import Settings
from pack.core.stepcache.corrections import CORRECTIONS
from pack.core.stepcache.levels import LEVELS, Seam
from pack.core.stepcache.policies import POLICIES
from pack.core.stepcache.policies.schedule import Schedule
from pack.core.stepcache.predictors import PREDICTORS
from pack.core.stepcache.signal import signal_of

REGISTRIES = (POLICIES, PREDICTORS, LEVELS, CORRECTIONS)
ENTRIES = [pytest.param(entry, id=f"{registry.kind}: {name}") for registry in REGISTRIES for name, entry in registry.items()]


@dataclass(frozen=True)
class Entry:
    name = "an entry"
    amount: float = knob(0.5, "Help.", 0.0, 1.0, 0.1)
    kind: str = knob("a", "Help.", choices=("a", "b"))
    free: str = knob("1,2", "Help.", wrong=lambda text: "" if whole_numbers(text) else "expected whole numbers")
    hidden: int = 3


def test_entries_keep_the_order_of_the_menu():
    first, second = type("First", (), {"name": "z"}), type("Second", (), {"name": "a"})
    assert list(Registry("thing", first, second)) == ["z", "a"] and Registry("thing", first)["z"] is first


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="thing 'an entry' is registered twice"):
        Registry("thing", Entry, Entry)


def test_an_unknown_name_is_told_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown thing 'x'; known: an entry"):
        Registry("thing", Entry)["x"]


def test_a_membership_test_is_not_an_error():
    assert "x" not in Registry("thing", Entry) and Registry("thing", Entry).get("x") is None


def test_only_knobs_are_settings():
    assert [field.name for field in knobs(Entry)] == ["amount", "kind", "free"]
    assert settings(Entry(amount=0.2)) == {"amount": 0.2, "kind": "a", "free": "1,2"}


@pytest.mark.parametrize(("wrong", "message"), [
    ({"amount": 1.1}, "an entry: amount is 1.1; it must lie between 0.0 and 1.0"), ({"amount": -0.1}, "amount is -0.1"),
    ({"amount": float("nan")}, "amount is nan"), ({"kind": "c"}, "an entry: kind is 'c'; choose one of a, b"),
    ({"free": "1;2"}, "an entry: free is '1;2'; expected whole numbers"), ({"free": ""}, "free is ''")])
def test_a_wrong_setting_is_named_with_what_it_may_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        checked(Entry(**wrong))


def test_of_many_choices_those_that_are_most_like_what_came_are_told():
    names = tuple(f"{kind}_{size}" for kind in ("flux", "wan", "qwen") for size in range(6))

    @dataclass(frozen=True)
    class Many:
        name = "many"
        kind: str = knob("wan_1", "Help.", choices=names)

    with pytest.raises(ValueError, match="many: kind is 'qwen-3'; choose one of 18, such as qwen_3"):
        checked(Many("qwen-3"))


@pytest.mark.parametrize("right", [{}, {"amount": 0.0}, {"amount": 1.0}, {"kind": "b"}, {"free": "0"}, {"free": " 3, 10"}, {"hidden": 99}])
def test_a_right_setting_passes(right):
    assert checked(Entry(**right)) == Entry(**right)


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_is_built_from_its_defaults_and_its_knobs_are_whole(entry):
    assert checked(entry()) == entry() and entry.__dataclass_params__.frozen
    assert [field.name for field in knobs(entry)] == [field.name for field in fields(entry)], "what is not a knob does not belong in the settings"
    for field in knobs(entry):
        told = field.metadata
        assert told["help"].endswith(".") and len(told["help"]) > 20
        number = told["low"] is not None
        assert number == (told["high"] is not None) == (told["step"] is not None)
        assert [number, told["choices"] is not None, told["wrong"] is not None, isinstance(field.default, bool)].count(True) == 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("level", LEVELS)
def test_settings_are_hashable_plain_and_refuse_a_policy_that_sees_nothing(policy, level):
    parts = POLICIES[policy](), PREDICTORS["automatic"](), LEVELS[level]()
    if POLICIES[policy].needs_forward and not getattr(LEVELS[level], "gates", True):
        with pytest.raises(ValueError, match=f"policy '{policy}' must see the first blocks run, and level '{level}' runs none"):
            Settings(*parts)
    elif signal_of(POLICIES[policy]) == "model input" and getattr(LEVELS[level], "seam", None) is Seam.NETWORK:
        with pytest.raises(ValueError, match=f"policy '{policy}' must see the model's input and output, and level '{level}' works inside"):
            Settings(*parts)
    else:
        hash(Settings(*parts))
        assert Settings(*parts).as_dict()["policy"]["name"] == policy and LEVELS[level]().resolve(parts[0]).seam


@pytest.mark.parametrize("text", ["9" * 5000, "1,9999999", "x" * 3_000_000])
def test_a_text_of_absurd_length_is_refused_in_one_sentence_of_ordinary_length(text):
    assert not whole_numbers(text)
    with pytest.raises(ValueError, match="expected whole numbers") as refused:
        checked(Schedule("custom", text))
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("text", ["999999,1", "5000,5001"])
def test_a_schedule_of_more_steps_than_any_run_has_is_refused_before_it_is_built(text):
    with pytest.raises(ValueError, match="10000 steps in all at most"):
        checked(Schedule("custom", text))
