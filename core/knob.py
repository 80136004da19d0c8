"""A setting the user may turn, told once: the dataclass field is the default, the widget and its help."""
from collections.abc import Callable
from dataclasses import Field, field, fields
from difflib import get_close_matches

SEVERAL = 12    # names that fit into one sentence
DIGITS = 6      # of a number in a text
LONG = 100      # characters of a wrong text that an error quotes


def knob(default, help: str, low=None, high=None, step=None, choices: tuple[str, ...] | None = None, wrong: Callable[[str], str] | None = None):
    """A dataclass field with what a widget needs to know.

    Numbers want `low` and `high`. Texts want `choices`, or, where they are free, `wrong`: it says in half a sentence
    what a text should be ("expected ..."), or nothing when the text will do.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high, "step": step, "choices": choices, "wrong": wrong})


def shown(text: object) -> str:
    """As it came, but no longer than a sentence can bear."""
    text = str(text)
    return text if len(text) <= LONG else f"{text[:LONG]}..."


def whole_numbers(text: str) -> tuple[int, ...]:
    """The numbers of "1, 0, 2"; none where the text is something else, or a number has more than DIGITS."""
    parts = [part.strip() for part in text.split(",")]
    return tuple(int(part) for part in parts) if all(part.isdecimal() and len(part) <= DIGITS for part in parts) else ()


def knobs(entry) -> list[Field]:
    """The knobs of a dataclass or of an instance of one, in order."""
    return [f for f in fields(entry) if "help" in f.metadata]


def settings(entry) -> dict:
    """{knob: value} of an instance."""
    return {f.name: getattr(entry, f.name) for f in knobs(entry)}


def offered(value: str, choices: tuple[str, ...]) -> str:
    """The choices as text; of many, how many and those that are most like `value`."""
    if len(choices) <= SEVERAL:
        return ", ".join(choices)
    return f"{len(choices)}, such as {', '.join(get_close_matches(value, choices, 4, 0.0))}"


def checked(entry):
    """`entry`, or a ValueError that names the knob which is out of its range."""
    for f in knobs(entry):
        value, limits = getattr(entry, f.name), f.metadata
        if limits["choices"] is not None and value not in limits["choices"]:
            raise ValueError(f"{entry.name}: {f.name} is '{shown(value)}'; choose one of {offered(shown(value), limits['choices'])}")
        if limits["low"] is not None and not limits["low"] <= value <= limits["high"]:
            raise ValueError(f"{entry.name}: {f.name} is {value}; it must lie between {limits['low']} and {limits['high']}")
        if limits["wrong"] is not None and (fault := limits["wrong"](value)):
            raise ValueError(f"{entry.name}: {f.name} is '{shown(value)}'; {fault}")
    return entry
