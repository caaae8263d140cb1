"""Reports: serialised, printed and raised as they were found."""

import json
import math

import pytest

from sdeflow.testing import CheckError, Finding, Report
from sdeflow.testing.report import merged

GOOD = Finding.of("mass", "int p dx = 1", 1e-12, 1e-9, {"t": 0.5})
BAD = Finding.of("score [claimed]", "s = grad log p [in x]", 0.25, 1e-9, {"x": [1.0, -0.5], "t": 0.1}, "a factor?")
WORSE = Finding.of("flow", "d_t log p + div v = 0", math.nan, 1e-9)
SKIPPED = Finding.skipped("law", "FP(p) = 0", "no law [of p] is known")


def report(*findings, **rest) -> Report:
    return Report("an SDE [bold]", tuple(findings), **rest)


def test_verdicts():
    assert [f.verdict for f in (GOOD, BAD, WORSE, SKIPPED)] == ["pass", "fail", "fail", "not tested"]
    assert Finding.of("a", "b", math.inf, 1.0).verdict == "fail"
    assert Finding.of("a", "b", -math.inf, 1.0).verdict == "fail"
    assert Finding.of("a", "b", 1e-9, 1e-9).verdict == "pass"  # the tolerance itself passes
    assert Finding.of("a", "b", 0.0, 0.0).verdict == "pass"


def test_ok_needs_a_pass_and_no_failure():
    assert report(GOOD).ok
    assert report(GOOD, SKIPPED).ok
    assert not report(GOOD, BAD).ok
    assert not report(SKIPPED).ok
    assert not report().ok


def test_json_round_trip_with_null_for_what_is_no_number():
    whole = report(GOOD, BAD, WORSE, SKIPPED, facts={"noise": "diagonal"}, warnings=("prior: too wide",))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    read = json.loads(whole.to_json(), parse_constant=refuse)
    assert read == whole.to_dict()
    assert read["subject"] == "an SDE [bold]"
    assert read["ok"] is False
    assert read["facts"] == {"noise": "diagonal"}
    assert read["warnings"] == ["prior: too wide"]
    by_name = {f["identity"]: f for f in read["findings"]}
    assert list(by_name) == ["mass", "score [claimed]", "flow", "law"]
    assert by_name["score [claimed]"]["where"] == {"x": [1.0, -0.5], "t": 0.1}
    assert by_name["score [claimed]"]["residual"] == 0.25
    assert by_name["flow"]["residual"] is None
    assert by_name["law"]["residual"] is None
    assert by_name["law"]["tolerance"] is None


def test_numbers_inside_places_become_null_too():
    found = Finding.of("a", "b", math.inf, 1.0, {"x": [math.nan, 1.0], "inner": {"t": math.inf}, "pair": (1, 2)})
    where = json.loads(report(found).to_json())["findings"][0]["where"]
    assert where == {"x": [None, 1.0], "inner": {"t": None}, "pair": [1, 2]}


def test_brackets_survive_printing():
    text = str(report(GOOD, BAD, SKIPPED, warnings=("sub-VP [x]: y",), facts={"span": "[0, 1]"}))
    squeezed = "".join(ch for ch in text if ch not in " \n│┃")
    for part in ("anSDE[bold]", "score[claimed]", "s=gradlogp[inx]", "sub-VP[x]:y", "[0,1]", "nolaw[ofp]isknown"):
        assert part in squeezed
    assert "[red]" not in text
    assert "[dim]" not in text


def test_verify_returns_the_report_or_raises_with_the_worst_place():
    good = report(GOOD)
    assert good.verify() is good
    bad = report(GOOD, BAD, SKIPPED)
    with pytest.raises(CheckError) as caught:
        bad.verify()
    assert caught.value.report is bad
    assert isinstance(caught.value, AssertionError)
    text = str(caught.value)
    assert text == bad.failures()
    assert "x = [1, -0.5], t = 0.1" in text
    assert "2.50e-01 > 1.0e-09" in text


def test_failures_names_each_failed_identity_once():
    text = report(GOOD, BAD, WORSE, SKIPPED).failures()
    assert text.splitlines()[0] == "an SDE [bold]: 2 of 4 identities fail"
    assert len(text.splitlines()) == 3
    assert "score [claimed]: s = grad log p [in x]" in text
    assert "(a factor?)" in text
    assert "mass" not in text
    assert "law" not in text


def test_nothing_tested_is_not_a_pass():
    with pytest.raises(CheckError, match="no identity could be tested"):
        report(SKIPPED).verify()


def test_findings_by_name():
    whole = report(GOOD, BAD)
    assert whole["mass"] is GOOD
    with pytest.raises(KeyError, match="there are mass, score"):
        whole["entropy"]


def test_merged_reports_keep_everything():
    whole = merged("both", [report(GOOD, facts={"a": "1"}), report(BAD, warnings=("w",))])
    assert whole.subject == "both"
    assert whole.findings == (GOOD, BAD)
    assert whole.facts == {"a": "1"}
    assert whole.warnings == ("w",)
