"""Names to choose from. Menus, tests and benchmarks iterate over these."""
from .knob import shown


class Registry(dict):
    """Entries by name, in the order of the menu."""

    def __init__(self, kind: str, *entries):
        super().__init__()
        self.kind = kind
        for entry in entries:
            self.add(entry)

    def add(self, entry) -> None:
        if entry.name in self:
            raise ValueError(f"{self.kind} '{entry.name}' is registered twice")
        self[entry.name] = entry

    def __missing__(self, name):
        raise ValueError(f"unknown {self.kind} '{shown(name)}'; known: {', '.join(self)}")
