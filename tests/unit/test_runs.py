"""The runs that a model remembers: the right ones, of the last execution, and not without end."""
import copy

import pytest

from pack.core.report import Report
from pack.core.runs import KEPT, Execution, Runs


def runs(*executions) -> Runs:
    """Runs whose reports carry the place in the list as their steps."""
    kept = Runs()
    for number, execution in enumerate(executions):
        kept.add(Report(steps=number), execution and Execution(*execution))
    return kept


def steps(reports) -> list[int]:
    return [report.steps for report in reports]


def test_a_node_s_new_execution_takes_the_place_of_its_last_one_and_of_no_other():
    kept = runs(("p1", "3", 0), ("p1", "5", 0), ("p2", "3", 0))
    assert steps(kept.of("3".__eq__)) == [2] and steps(kept.of("5".__eq__)) == [1] and steps(kept.of(lambda node: True)) == [1, 2]


def test_all_runs_of_one_execution_are_kept_in_order():
    kept = runs(("p1", "3", 0), ("p2", "3", 0), ("p2", "3", 0), ("p2", "3", 0))
    assert steps(kept.of("3".__eq__)) == [1, 2, 3]


def test_of_a_list_sampled_item_by_item_each_item_has_its_own():
    kept = runs(("p1", "3", 0), ("p1", "3", 1), ("p2", "3", 1))
    assert steps(kept.of("3".__eq__, 0)) == [0] and steps(kept.of("3".__eq__, 1)) == [2]
    assert steps(kept.of("3".__eq__, 7)) == steps(kept.of("3".__eq__)) == [0, 2], "not made item by item"


def test_strays_are_runs_without_a_node_of_the_graph():
    kept = runs(None, ("p1", "3", 0), ("p1", "5", 0))
    assert steps(kept.strays({"3"})) == [0, 2] and steps(kept.strays(())) == [0, 1, 2] and steps(kept.of(lambda node: True)) == [1, 2]


@pytest.mark.parametrize("executions", [[None] * 3 * KEPT, [("p", "3", 0)] * 3 * KEPT, [("p", str(n), 0) for n in range(3 * KEPT)]])
def test_a_model_that_is_sampled_without_end_keeps_the_newest(executions):
    assert steps(runs(*executions).strays(())) == list(range(2 * KEPT, 3 * KEPT))


def test_a_deep_copy_of_a_model_s_options_shares_its_runs():
    kept = runs(("p1", "3", 0))
    assert copy.deepcopy({"options": [kept]})["options"][0] is kept
