"""Numbers that the host does not look at: in its checks a NaN is neither too small nor too large, and a script has no checks at all."""
from numbers import Real

from ..core.knob import shown
from ._api import io


def check_numbers(node: type[io.ComfyNode], **sent: float) -> None:
    """Raise for a number that does not lie in the range of the input of its name."""
    inputs = {entry.id: entry for entry in node.define_schema().inputs}
    for name, value in sent.items():
        low, high = inputs[name].min, inputs[name].max
        if not isinstance(value, Real) or not low <= value <= high:
            raise ValueError(f"{name} is {shown(value) or repr(value)}; it must lie between {low} and {high}")
        if isinstance(inputs[name], io.Int.Input) and value != int(value):
            raise ValueError(f"{name} is {value}; it must be a whole number between {low} and {high}")
