"""The runs that ended on a model: each report beside the execution that sampled it."""
from collections import deque
from collections.abc import Callable, Container
from typing import NamedTuple

from .report import Report

KEPT = 64   # a node that samples in tiles makes a run of each


class Execution(NamedTuple):
    """One call of a node by the host."""

    prompt_id: str
    node_id: str
    list_index: int | None


class Runs:
    """Lives as long as the model that carries it, and all clones of that model share it.

    The host may serve a sampler from its cache; then the report of its last execution is still the picture's. A new
    execution of the same node puts the reports of the one before aside.
    """

    def __init__(self):
        self.ended: deque[tuple[Execution | None, Report]] = deque(maxlen=KEPT)

    def __deepcopy__(self, memo):
        return self     # a node may copy all options of a model

    def add(self, report: Report, execution: Execution | None) -> None:
        """Keep a run that just ended; outside a server no execution is known."""
        if execution is not None:
            self.ended = deque((kept for kept in self.ended if not outdated(kept[0], execution)), maxlen=KEPT)
        self.ended.append((execution, report))

    def of(self, sampler: Callable[[str], bool], list_index: int | None = None) -> list[Report]:
        """Reports of what the nodes of this kind sampled, oldest first. Where a list was sampled item by item: those of that item."""
        found = [(execution, report) for execution, report in self.ended if execution is not None and sampler(execution.node_id)]
        of_item = [(execution, report) for execution, report in found if execution.list_index == list_index]
        return [report for _, report in of_item or found]

    def strays(self, graph: Container[str]) -> list[Report]:
        """Reports of runs that belong to no node of `graph`: made by a script, or by a node that has another number now."""
        return [report for execution, report in self.ended if execution is None or execution.node_id not in graph]


def outdated(before: Execution | None, now: Execution) -> bool:
    """Whether `now` samples what `before` sampled for an earlier prompt."""
    return before is not None and before[1:] == now[1:] and before.prompt_id != now.prompt_id
