"""What the report should say, worked out from the results alone, without the code that makes it."""

import math
import re

ANY_GRID = ("adaptive", "its own")


def sections(results):
    """The results of each chart, by its id: a problem and a kind."""
    parts = {}
    for r in results:
        name = re.sub(r"[^\w.-]+", "-", r.problem)
        parts.setdefault(f"problem-{name}-{r.kind}", []).append(r)
    return parts


def error_of(result):
    value = result.median if result.kind == "trajectory" else result.sliced_w2
    return math.inf if result.status != "ok" or value is None else value


def chosen(part, grids=None, hidden=(), *, every=False):
    """The results that a plot of a problem shows on these grids, the best of them for each solver and budget."""
    kept = [r for r in part if r.solver not in hidden and (grids is None or r.grid in (*grids, *ANY_GRID))]
    if every:
        return kept
    best = {}
    for r in kept:
        key = (r.solver, r.budget, r.tolerance)
        if key not in best or error_of(r) < error_of(best[key]):
            best[key] = r
    return list(best.values())


def drawn(part, grids=None, hidden=()):
    """The same with the failed runs of these grids: the best of several grids hides no failure."""
    best = chosen(part, grids, hidden)
    failed = [r for r in chosen(part, grids, hidden, every=True) if r.status != "ok" and not any(r is b for b in best)]
    return best + failed


def short(value):
    """Two digits: 7.9e-3."""
    mantissa, power = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(power)}"


def letters(part):
    """The first letters that tell its grids apart."""
    names = {r.grid for r in part if r.budget is not None}
    size = next(n for n in range(1, 20) if len({name[:n] for name in names}) == len(names))
    return {name: name[:size] for name in names}


def ranking(part, shown):
    """Its rows: a solver and its cells; and the places of each budget, as the page prints them."""
    abbreviations = letters(part)
    budgets = sorted({r.budget for r in part if r.budget is not None})
    at = {(r.solver, r.budget): r for r in shown if r.budget is not None}
    rows = []
    for solver in dict.fromkeys(r.solver for r in part):
        if any((solver, b) in at for b in budgets):
            rows.append([solver, *(cell(at.get((solver, b)), abbreviations) for b in budgets)])
    columns = [
        sorted((r for (_, n), r in at.items() if n == b and error_of(r) < math.inf), key=error_of) for b in budgets
    ]
    return rows, [[r.solver for r in column] for column in columns]


def cell(result, abbreviations):
    if result is None:
        return ""
    if error_of(result) == math.inf:
        return "failed"
    return f"{short(error_of(result))} {'' if result.steps == 1 else abbreviations[result.grid]}".strip()


def same_as_shown(text, value, *, digits):
    """Whether `text` is `value` as it would be printed with so many digits; 7 are kept of what does not rank."""
    if value is None:
        return text in ("null", "undefined", "NaN", "")
    shown = float(text)
    if shown == 0 or value == 0:
        return shown == value
    last = 10.0 ** (math.floor(math.log10(abs(value))) - digits + 1)
    return abs(shown - value) <= 0.56 * last


def find(part, of):
    """The one result that the words of a mark or of a tooltip are of."""

    def agrees(r):
        return (
            (r.solver, r.grid) == (of["solver"], of["grid"])
            and of.get("budget", "null") in (str(r.budget), "null" if r.budget is None else str(r.budget))
            and (r.tolerance is None or float(of["tolerance"]) == r.tolerance)
        )

    found = [r for r in part if agrees(r)]
    assert len(found) == 1, (of, len(found))
    return found[0]


MEASURES = {
    "median": ("median", 6), "q90": ("q90", 6), "rms": ("rms", 6),
    "sliced W2": ("sliced_w2", 6), "95% from": ("low", 6), "to": ("high", 6),
}  # fmt: skip


def wall_ms(result):
    return None if result.wall_seconds is None else 1000 * result.wall_seconds


def check_words(of, result, *, missing="undefined"):
    """The figures of a mark or of a tooltip are those of the result."""
    checked = 0
    for words, (name, digits) in MEASURES.items():
        value = getattr(result, name)
        if words in of or value is not None:
            assert same_as_shown(of.get(words, missing), value, digits=digits), (words, of, value)
            checked += value is not None
    assert same_as_shown(of.get("calls, counted", "undefined"), result.nfe, digits=4), (of, result.nfe)
    assert same_as_shown(of.get("wall, ms", missing), wall_ms(result), digits=3), (of, result.wall_seconds)
    if result.flip_rate is not None:
        assert of["flipped"] == f"{100 * result.flip_rate:.1f}%"
    if result.message:
        assert result.message in of["message"]
    return checked


def charts(results):
    return sections(results).items()


def check_marks(page, results, shown):
    """Every result that is shown is one mark with its figures, in the layer of its fate; nothing else is drawn."""
    figures = 0
    for chart, part in charts(results):
        wanted, marks = shown(part), page.marks(chart)
        assert len(marks) == len(wanted)
        found = [find(part, mark["of"]) for mark in marks]
        assert {id(r) for r in found} == {id(r) for r in wanted}
        layers = {}
        for mark, result in zip(marks, found, strict=True):
            figures += check_words(mark["of"], result)
            layers.setdefault(mark["layer"], []).append(result)
        # the crosses are a layer of their own
        for layer in layers.values():
            assert len({r.status for r in layer}) == 1
    return figures


def state(page):
    return page.js(
        "() => [[...document.querySelectorAll('select')].map((s) => s.value),"
        " [...document.querySelectorAll('.controls input[type=checkbox]')].map((b) => b.checked)]"
    )
