"""The report: one record that the node, the log and the benchmark read."""
import json

import pytest

from pack.core.report import Evaluation, Report


def ran(**more) -> Report:
    each = [Evaluation(1.0, True, 1.0), Evaluation(0.8, True, 1.0, 0.03, 0.02), Evaluation(0.6, False, 0.2, 0.01), Evaluation(0.4, False, 0.2, 0.03),
            Evaluation(0.2, True, 1.0, 0.05, 0.04, why="last step")]
    return Report(model="flux", sampler="euler", steps=5, policy="interval", each=each, seconds=1.5, **more)


def test_evaluations_are_shares_summed_and_steps_are_counted_beside_them():
    record = ran().as_dict()
    assert ran().evaluations == pytest.approx(3.4)
    assert (record["evaluations"], record["baseline_evaluations"], record["computed_steps"], record["skipped_steps"]) == (3.4, 5, 3, 2)


def test_the_record_is_plain_data():
    record = json.loads(json.dumps(ran().as_dict()))
    assert record["each"][2] == {"sigma": 0.6, "computed": False, "share": 0.2, "predicted_error": 0.01, "hindcast_error": None, "ms": 0.0, "why": ""}
    assert record["state"] == "ran" and record["policy"] == "interval"


def test_an_error_that_is_not_finite_does_not_spoil_the_record():
    report = Report(each=[Evaluation(1.0, True, 1.0, float("inf"), float("inf"))])
    json.dumps(report.as_dict(), allow_nan=False)


def test_the_line_tells_what_was_saved_and_how_far_off_it_is():
    line = ran(reason="a reason", estimated_error=0.0214).line()
    assert "\n" not in line and line.startswith("Step Cache: 3.4 of 5 evaluations (1.47x fewer), 3 computed, 2 skipped")
    for part in ("estimated error 2.1% of the latent", "at 2 computed steps a skip was expected to add", "would have added", "1.50 s"):
        assert part in line
    assert line.endswith("(a reason)")


def test_the_line_says_why_nothing_was_skipped():
    forced, left = Evaluation(1.0, True, 1.0, why="warm-up"), Evaluation(0.5, True, 1.0)
    assert Report(policy="interval", each=[forced, left, left]).line().endswith("(policy 'interval' skipped none of the 2 that were left to it)")
    assert "leave none that may be skipped" in Report(each=[forced]).line()
    assert Report(reason="a reason", each=[left]).line().endswith("(a reason)")
    assert Report(each=[left, Evaluation(0.2, False, 0.0)]).why_none == "" == Report().why_none


def test_the_line_tells_what_share_of_the_time_it_took():
    """Against the middle one of the computed evaluations: the first of them may load or compile something."""
    times = [(True, 900.0), (True, 100.0), (False, 10.0), (False, 10.0), (True, 100.0)]
    report = Report(each=[Evaluation(1.0, computed, float(computed), ms=ms) for computed, ms in times], seconds=0.25)
    assert report.time_share == pytest.approx(0.25 / 0.5) and "0.25 s, 50% of the time of computing all" in report.line()
    for untold in (Report(each=report.each[:2], seconds=1.0), Report(each=[Evaluation(1.0, False, 0.0, ms=1.0)], seconds=1.0), ran(), Report()):
        assert untold.time_share is None and "of the time" not in untold.line()


def test_a_run_without_skips_claims_no_saving_and_no_error():
    report = Report(each=[Evaluation(1.0, True, 1.0, 0.1, 0.1)] * 9)
    assert report.line().startswith("Step Cache: 9 of 9 evaluations, 9 computed, 0 skipped") and "fewer" not in report.line()


def test_a_run_that_was_left_alone_says_why():
    report = Report(state="off", reason="the run has 4 steps")
    assert report.line() == "Step Cache is off: the run has 4 steps"
    assert report.as_dict()["evaluations"] is None is report.as_dict()["baseline_evaluations"], "it was not counted, which is not to say that it was free"


def test_a_run_that_was_stopped_at_once_has_a_line():
    assert Report().line().startswith("Step Cache: 0 of 0 evaluations")


@pytest.mark.parametrize(("sigmas", "says"), [
    ([0.1, 0.2, 0.2, 0.5], "sigma rises all the way"), ([0.7] * 4, "sigma stays at 0.7"), ([0.0] * 4, "sigma stays at 0"),
    ([0.5, 0.4, 0.6], "leave none that may be skipped"), ([0.5], "leave none that may be skipped"),
])
def test_a_schedule_on_which_nothing_can_be_skipped_is_told_as_such_and_not_blamed_on_settings(sigmas, says):
    assert says in Report(each=[Evaluation(sigma, True, 1.0, why="last step") for sigma in sigmas]).line()


@pytest.mark.parametrize("knob", ["tolerance", "threshold"])
def test_a_policy_that_is_set_to_zero_is_told_to_be_switched_off(knob):
    each = [Evaluation(0.5, True, 1.0), Evaluation(0.4, True, 1.0)]
    off, on = (Report(policy="p", settings={"policy": {"name": "p", knob: value}}, each=each).line() for value in (0.0, 0.01))
    assert off.endswith(f"({knob} 0 switches policy 'p' off)") and "switches" not in on
