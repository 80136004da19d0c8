"""Constants that others measured and published, by name: read from `data`, where each has its source."""
import json
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
AUTOMATIC = "automatic"     # the set of the model's own family


@dataclass(frozen=True)
class Published:
    """Named sets of constants. At most one set of a family is its default; where models of a family differ too much, none is."""

    knob: str       # the one that names a set
    sets: dict[str, dict]

    @classmethod
    def read(cls, file: str, knob: str) -> "Published":
        return cls(knob, json.loads((DATA / file).read_text(encoding="utf-8"))["sets"])

    @property
    def choices(self) -> tuple[str, ...]:
        return AUTOMATIC, *self.sets

    def pick(self, choice: str, family: str) -> dict | None:
        """The constants for a model of `family`, or None."""
        if choice != AUTOMATIC:
            return self.sets[choice]
        return next((entry for entry in self.of(family).values() if entry.get("default")), None)

    def missing(self, choice: str, family: str) -> str:
        """Why there are no constants for a model of `family`; empty when there are."""
        if self.pick(choice, family) is not None:
            return ""
        if own := self.of(family):
            return f"models of family {family} have {self.knob} of their own and cannot be told apart (set {self.knob} to one of {', '.join(own)})"
        models = f"models of family {family}" if family else "models of no known family"
        return f"{models} have no published {self.knob} (name the {self.knob} of another model, or choose another policy)"

    def of(self, family: str) -> dict[str, dict]:
        return {name: entry for name, entry in self.sets.items() if entry["family"] == family}
