"""`sdeflow report A B`: which result is of which run, the ratios between runs, and files that are no results."""

import dataclasses
import json
import re

import pytest
from typer.testing import CliRunner

pytest.importorskip("altair")
pytest.importorskip("vl_convert")
pytest.importorskip("jinja2")

from sdeflow.bench import merged
from sdeflow.bench.merged import compare, gather, numbered
from sdeflow.bench.page import report
from sdeflow.bench.results import Result, read, write
from sdeflow.cli import app

HERE = {
    "command": "sdeflow bench --out a", "started": "2026-01-02T03:04:05Z", "sdeflow": "0.1", "commit": "aaaa11112222",
    "torch": "2.9.1", "cpu": "One CPU", "cores": 4,
}  # fmt: skip
THERE = HERE | {"commit": "bbbb33334444", "started": "2026-02-03T04:05:06Z", "cpu": "Another CPU", "torch": "2.10.0"}
SOLVERS, GRIDS, BUDGETS = ("Heun", "DDIM"), ("power", "karras"), (5, 10)


def results(environment=HERE, factor=1.0, seconds=0.5):
    """Eight results of one problem; `factor` times the errors of Heun."""
    about = {"title": "A problem", "process": "VP()", "shape": [2], "default_grid": "power", "truth": "RK45"}
    made = []
    for i, (s, g, b) in enumerate((s, g, b) for s in SOLVERS for g in GRIDS for b in BUDGETS):
        error = (i + 1) * 1e-3 * (factor if s == "Heun" else 1.0)
        made.append(
            Result(
                "p", s, g, "trajectory", budget=b, nfe=b, steps=b, samples=8, median=error, q90=error, rms=error,
                flip_rate=0.0, scale=1.0, wall_seconds=seconds, model_seconds=0.1, about=about, environment=environment,
            )
        )  # fmt: skip
    return made


@pytest.fixture
def two(tmp_path):
    """Files of two runs, the second 1.5 times less exact with Heun and twice as slow."""
    write(results(), tmp_path / "a.jsonl")
    write(results(THERE, 1.5, 1.0), tmp_path / "b.jsonl")
    return tmp_path / "a.jsonl", tmp_path / "b.jsonl"


def call(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def page_of(*files, out):
    done = call(*files, "--out", out)
    assert done.exit_code == 0, done.output
    return out.read_text()


# ---- which run


def test_runs_are_told_apart_by_commit_date_and_machine(two):
    runs = gather(two)
    assert [run.number for run in runs] == [1, 2]
    assert runs[0].label == "commit aaaa11112222, 2026-01-02 03:04:05, torch 2.9.1, One CPU"
    assert runs[1].label == "commit bbbb33334444, 2026-02-03 04:05:06, torch 2.10.0, Another CPU"
    assert {r.solver for r in numbered(runs)} == {"Heun [1]", "Heun [2]", "DDIM [1]", "DDIM [2]"}
    assert len(numbered(runs)) == 16


def test_two_machines_at_the_same_commit_and_second_are_two_runs():
    runs = gather([*results(), *results(HERE | {"cpu": "Another CPU"})])
    assert [run.label.rsplit(", ", 1)[1] for run in runs] == ["One CPU", "Another CPU"]


def test_one_run_keeps_the_names_of_its_solvers(two):
    assert {r.solver for r in numbered(gather(two[:1]))} == set(SOLVERS)


def test_parts_of_one_run_in_several_files_are_one_run(tmp_path):
    write(results()[:3], tmp_path / "a.jsonl")
    write(results()[3:], tmp_path / "b.jsonl")
    [run] = gather([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert len(run.results) == 8


def test_the_page_says_which_run_is_which_and_where_it_was_made(two, tmp_path):
    page = page_of(*two, out=tmp_path / "r.html")
    solvers = re.findall(r'name="solver" value="(.*?)"', page)
    assert sorted(solvers) == ["DDIM [1]", "DDIM [2]", "Heun [1]", "Heun [2]"]
    assert len(re.findall('name="run"', page)) == 2
    end = page[page.index('id="environment"') :]
    for text in ("Run [1]", "Run [2]", "One CPU", "Another CPU", "aaaa11112222", "bbbb33334444", "2.9.1", "2.10.0"):
        assert text in end
    marks = re.findall(r'value="(.*?)" data-kind.*?#shape-([\w-]+)" fill="(.*?)"', page)
    colour = {name: fill for name, _, fill in marks}
    shape = {name: kind for name, kind, _ in marks}
    assert colour["Heun [1]"] == colour["Heun [2]"] != colour["DDIM [1]"]
    assert shape["Heun [1]"] != shape["Heun [2]"]


# ---- ratios


def test_ratios_of_errors_and_times_are_those_of_the_results(two):
    first, second = gather(two)
    found = compare(first, second)["p", "trajectory"]
    assert len(found.ratios) == 8
    for ratio in found.ratios:
        assert ratio.error == pytest.approx(1.5 if ratio.first.solver == "Heun" else 1.0, rel=1e-12)
        assert ratio.time == 2.0
    assert len(found.changed) == 4
    # on the grid that is the best of the first
    assert {r.first.grid for row in found.rows.values() for r in row} == {"power"}
    assert found.differs == []


def test_the_table_on_the_page_has_the_ratios(two, tmp_path):
    page = page_of(*two, out=tmp_path / "r.html")
    table = re.search(r'<table class="ratios".*?</table>', page, re.DOTALL).group()
    rows = re.findall(r"<tr data-pair.*?</tr>", table, re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(\S+) <small>(.*?)&times;", row) for row in rows]
    assert cells == [[("1.50", "2")] * 2, [("1", "2")] * 2]
    assert "8 results of both, 4 with another error" in page


def test_equal_results_have_ratio_1(tmp_path):
    write(results(), tmp_path / "a.jsonl")
    write(results(THERE), tmp_path / "b.jsonl")
    page = page_of(tmp_path / "a.jsonl", tmp_path / "b.jsonl", out=tmp_path / "r.html")
    table = re.search(r'<table class="ratios".*?</table>', page, re.DOTALL).group()
    assert set(re.findall(r"<td[^>]*>(\S+) <small>(.*?)&times;", table)) == {("1", "1")}
    assert "8 results of both, none with another error" in page


def test_a_copy_of_a_file_is_labelled_and_has_ratio_1(tmp_path):
    (tmp_path / "copy").mkdir()
    write(results(), tmp_path / "a.jsonl")
    write(results(), tmp_path / "copy" / "a.jsonl")
    first, second = gather([tmp_path / "a.jsonl", tmp_path / "copy" / "a.jsonl"])
    assert "the same run as [1], from another file (copy/a.jsonl)" in second.label
    assert {r.error for r in compare(first, second)["p", "trajectory"].ratios} == {1.0}


def test_a_failure_in_one_run_is_said_and_in_both_is_no_change():
    broken = {"status": "failed", "message": "ValueError: no", "median": None, "nfe": None, "wall_seconds": None}
    mine, theirs = results(), results(THERE)
    mine[0] = dataclasses.replace(mine[0], **broken)
    theirs[0], theirs[1] = (dataclasses.replace(r, **broken) for r in theirs[:2])
    found = compare(*gather([*mine, *theirs]))["p", "trajectory"]
    assert [r.note for r in found.changed] == ["failed in [2]"]
    assert found.ratios[0].same


def test_what_only_one_has_is_counted_and_other_settings_are_said():
    theirs = [dataclasses.replace(r, seed=1) for r in results(THERE)[:5]]
    found = compare(*gather([*results(), *theirs]))["p", "trajectory"]
    assert found.only == (3, 0)
    assert found.differs == ["seed (0 and 1)"]


def test_a_zero_error_has_no_finite_ratio(tmp_path):
    mine, theirs = results(), results(THERE)
    mine[0] = dataclasses.replace(mine[0], median=0.0)
    found = compare(*gather([*mine, *theirs]))["p", "trajectory"]
    assert found.ratios[0].error == float("inf")
    report([*mine, *theirs], tmp_path / "r.html")
    assert "\N{INFINITY}" in (tmp_path / "r.html").read_text()


# ---- files that are no results


def refused(done, *parts):
    """One line on stderr, no traceback, no file."""
    assert done.exit_code != 0
    text = done.output.strip() or str(done.exception)
    assert len(text.splitlines()) == 1
    assert "Traceback" not in text
    for part in parts:
        assert part in text
    return True


def changed(line, **values):
    return (json.dumps(json.loads(line) | values) + "\n").encode()


BAD = {
    "cut off": lambda line: line.encode()[: len(line) // 2],
    "no JSON": lambda line: b"{}}\n",
    "a list": lambda line: b"[1, 2]\n",
    "a number": lambda line: b"7\n",
    "no UTF-8": lambda line: b"\xff\xfe\x00" + line.encode(),
    "NaN": lambda line: line.replace('"median": 0.001', '"median": NaN').encode(),
    "infinity": lambda line: line.replace('"median": 0.001', '"median": 1e400').encode(),
    "infinity inside": lambda line: line.replace('"cores": 4', '"cores": -1e999').encode(),
    "calls below 0": lambda line: changed(line, nfe=-5),
    "an error below 0": lambda line: changed(line, median=-1e-3),
    "a share above 1": lambda line: changed(line, flip_rate=1.5),
    "no budget": lambda line: changed(line, budget=0),
    "half a call": lambda line: changed(line, budget=2.5),
    "a tolerance of 0": lambda line: changed(line, tolerance=0.0),
    "samples of text": lambda line: changed(line, samples="8"),
    "a seed below 0": lambda line: changed(line, seed=-1),
    "text for a number": lambda line: changed(line, median="small"),
    "a number for text": lambda line: changed(line, solver=3),
    "another kind": lambda line: changed(line, kind="other"),
    "no environment": lambda line: changed(line, environment=None),
    "schema of text": lambda line: changed(line, schema="one"),
    "nested": lambda line: b"[" * 100_000,
    "many digits": lambda line: line.replace('"budget": 5', '"budget": ' + "9" * 5000).encode(),
    "no schema": lambda line: line.replace('"schema": 1, ', "").encode(),
}


@pytest.mark.parametrize("what", BAD)
def test_a_broken_line_is_one_error_with_the_file_and_the_line(two, tmp_path, what):
    good = [r.line() for r in results()]
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(("\n".join(good[1:4]) + "\n").encode() + BAD[what](good[0]))
    said = {"a list": "expected an object, got a list", "calls below 0": "nfe is -5, which no run gives"}
    refused(call(two[0], bad, "--out", tmp_path / "r.html"), "bad.jsonl", "line 4", said.get(what, ""))
    assert not (tmp_path / "r.html").exists()


def test_a_separator_in_a_message_does_not_split_its_line(tmp_path):
    made = [dataclasses.replace(r, message="a\u2028b\x85c") for r in results()]
    write(made, tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl") == made


def test_files_that_cannot_be_compared_are_named(two, tmp_path):
    out = ("--out", tmp_path / "r.html")
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(call(two[0], two[0], *out), "a.jsonl", "given twice")
    refused(call(two[0], tmp_path / "." / "a.jsonl", *out), "given twice")
    refused(call(two[0], tmp_path / "empty.jsonl", *out), "empty.jsonl", "at least one result")
    refused(call(two[0], tmp_path / "missing.jsonl", *out), "missing.jsonl")
    refused(call(two[0], tmp_path, *out), f"{tmp_path} is a folder without results.jsonl")
    twice = tmp_path / "twice.jsonl"
    twice.write_bytes(two[0].read_bytes() * 2)
    refused(call(twice, *out), "twice.jsonl", "twice the same run", "Heun")
    assert not (tmp_path / "r.html").exists()


def test_a_folder_stands_for_its_results(two, tmp_path):
    (tmp_path / "run").mkdir()
    two[0].rename(tmp_path / "run" / "results.jsonl")
    named = page_of(tmp_path / "run" / "results.jsonl", two[1], out=tmp_path / "named.html")
    assert page_of(tmp_path / "run", two[1], out=tmp_path / "r.html") == named
    refused(call(tmp_path / "run", tmp_path / "run" / "results.jsonl", "--out", tmp_path / "r.html"), "given twice")


def test_a_report_is_not_written_over_what_it_is_of(two, tmp_path):
    (tmp_path / "run").mkdir()
    write(results(THERE), tmp_path / "run" / "results.jsonl")
    (tmp_path / "link").symlink_to(two[0])
    before = two[0].read_bytes()
    for out in (two[0], tmp_path / "run" / ".." / "a.jsonl", tmp_path / "link", tmp_path / "run" / "results.jsonl"):
        refused(call(two[1], two[0], tmp_path / "run", "--out", out), f"{out} is read, and would be written over")
    with pytest.raises(ValueError, match="would be written over"):
        report(str(two[0]), two[0])
    assert two[0].read_bytes() == before
    assert len(read(tmp_path / "run" / "results.jsonl")) == 8


def test_a_ratio_is_1_only_where_it_is():
    from sdeflow.bench.page import _ratio

    written = {1.0: "1", 1 + 1e-9: "1", 1.0004: "1.00", 0.5: "0.500", 1234.5: "1.23e+03", None: ""}
    assert {value: _ratio(value) for value in written} == written
    assert merged._change(merged.Ratio(*results()[:2], 0.0, 1.0)) == float("inf")
