"""A registry as a node input: one option per entry, with the entry's own knobs below it."""
from ..core.knob import checked, knobs, offered, shown
from ..core.registry import Registry
from ._api import io


def choice(name: str, registry: Registry, tooltip: str):
    """A DynamicCombo; API prompts may leave it, and every knob in it, out."""
    options = [io.DynamicCombo.Option(key, [widget(field) for field in knobs(entry)]) for key, entry in registry.items()]
    return io.DynamicCombo.Input(name, options=options, tooltip=tooltip, optional=True)


def widget(field):
    told = field.metadata
    common = {"default": field.default, "tooltip": told["help"], "optional": True}
    if told["choices"]:
        return io.Combo.Input(field.name, options=list(told["choices"]), **common)
    if told["wrong"]:
        return io.String.Input(field.name, **common)
    if isinstance(field.default, bool):
        return io.Boolean.Input(field.name, **common)
    kind = io.Int if isinstance(field.default, int) else io.Float
    return kind.Input(field.name, min=told["low"], max=told["high"], step=told["step"], **common)


def check_choices(node: type[io.ComfyNode], **sent: str) -> None:
    """Raise for what is not in the menu of the input of its name; a script's call does not pass through the host's check."""
    menus = {entry.id: entry.options for entry in node.define_schema().inputs if isinstance(entry, io.Combo.Input)}
    for name, value in sent.items():
        if value not in menus[name]:
            raise ValueError(f"{name} is '{shown(value)}'; choose one of {offered(shown(value), menus[name])}")


def check_sent(name: str, registry: Registry, sent: dict) -> None:
    """Raise for an entry or a knob that does not exist in what a prompt sent: {"policy": ..., "policy.tolerance": ...}.

    The host leaves such inputs out of the call without a word, and the defaults would run in their place.
    """
    if name not in sent:
        if stray := [key for key in sent if key.startswith(f"{name}.")]:
            raise ValueError(f"'{shown(stray[0])}' was sent without '{name}'; send '{name}' too, one of {', '.join(registry)}")
        return
    check_settings(registry[str(sent[name])], [key.partition(".")[2] for key in sent if key.startswith(f"{name}.")])


def check_settings(entry, names) -> None:
    """Raise for the names that are no knobs of `entry`."""
    known = [field.name for field in knobs(entry)]
    unknown = sorted(set(names).difference(known))
    if unknown:
        raise ValueError(f"{entry.name} has no setting '{shown(', '.join(unknown))}'; it has: {', '.join(known) or 'none'}")


def chosen(name: str, registry: Registry, value: dict | None):
    """The entry that `value`, which is what a DynamicCombo hands to execute, names, built with the user's settings.

    Without a value it is the first of the menu. A setting that the entry does not know is one sentence of error.
    """
    if value is None:
        return next(iter(registry.values()))()
    settings = {key: setting for key, setting in value.items() if key != name and setting is not None}
    entry = registry[value[name]]
    check_settings(entry, settings)
    return checked(entry(**settings))
