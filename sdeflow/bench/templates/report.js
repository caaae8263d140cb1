"use strict";
const page = JSON.parse(document.getElementById("page").textContent);
const form = document.querySelector(".controls");
const choices = ["lines", "measure", "x", "y", "focus", "nfe", "theme"].filter((name) => form.elements[name]);
const checks = ["problem", "grid", "run", "solver"];
const views = new Map(); // by chart: the view, and the scales it was drawn with
let place = ""; // the section the address names
let drawing = Promise.resolve();

// ---- What is shown is what the form says; the address holds a copy, which can be linked to.

const value = (name) => form.elements[name]?.value ?? "";
const boxes = (name) => [...form.querySelectorAll(`input[name="${name}"]`)];
const values = (name, on) => [...new Set(boxes(name).filter((b) => b.checked === on).map((b) => b.value))];

function read() {
  const [anchor, query] = location.hash.slice(1).split("?");
  place = anchor;
  if (query === undefined) return Boolean(anchor); // a link to a section, which says nothing of the rest
  form.reset();
  const wanted = new URLSearchParams(query);
  for (const name of choices)
    if ([...form.elements[name].options].some((o) => o.value === wanted.get(name))) form.elements[name].value = wanted.get(name);
  for (const name of checks) {
    const only = wanted.getAll(name), without = wanted.getAll("-" + name);
    for (const box of boxes(name)) box.checked = only.length ? only.includes(box.value) : !without.includes(box.value);
  }
  return true;
}

function write() {
  const query = new URLSearchParams();
  for (const name of choices) {
    const first = [...form.elements[name].options].find((o) => o.defaultSelected).value;
    if (value(name) !== first) query.set(name, value(name));
  }
  for (const name of checks) {
    const on = values(name, true), off = values(name, false);
    if (on.length > off.length) for (const each of off) query.append("-" + name, each);
    else if (off.length) for (const each of on.length ? on : [""]) query.append(name, each);
  }
  const text = query.toString();
  history.replaceState(null, "", "#" + place + (text && "?" + text));
}

// ---- Charts

const gridOf = (chart) => (value("lines") === "default" ? chart.grid || "best" : value("lines"));
const without = () => (value("lines") === "default" ? [] : values("grid", false));
const anyGrid = ["adaptive", "its own"]; // a choice of grid says nothing of these
// Solvers that are not shown: themselves, or their run.
function hiddenSolvers() {
  const off = values("run", false);
  return [...new Set([...values("solver", false), ...page.solvers.filter((s) => off.includes(String(s.run))).map((s) => s.name)])];
}
// what a chart has to be drawn anew for: a linear axis of errors ends at the largest one shown
const scales = () => [value("x"), value("y"), ...(value("y") === "linear" ? [value("lines"), value("measure"), ...hiddenSolvers(), ...without()] : [])].join("|");

// A chart without the solver is not faded.
const focusOf = (chart, solver) => (chart.runs.some((r) => r.solver === solver) ? solver : "");

function signals(chart) {
  const measure = chart.kind === "trajectory" ? value("measure") : "sliced_w2";
  return { grid: gridOf(chart), measure, hidden: hiddenSolvers(), without: without(), focus: focusOf(chart, value("focus")) };
}

// The runs, the best of the chosen grids marked: failed ones last, then by error.
function rows(chart) {
  const off = without(), best = new Map();
  const error = (r) => (r.status === "ok" ? r.median ?? r.sliced_w2 ?? Infinity : Infinity);
  for (const run of chart.runs) {
    if (run.budget === null || off.includes(run.grid)) continue;
    const key = run.solver + "|" + run.budget;
    if (!best.has(key) || error(run) < error(best.get(key))) best.set(key, run);
  }
  return chart.runs.map((run) => ({ ...run, best: run.budget === null || best.get(run.solver + "|" + run.budget) === run }));
}

// The runs that the chart draws.
function drawn(chart) {
  const { grid, hidden } = signals(chart), off = without();
  return rows(chart).filter((r) => !hidden.includes(r.solver) && !off.includes(r.grid)
    && (grid === "all" || r.grid === grid || anyGrid.includes(r.grid) || (grid === "best" && (r.best || r.status !== "ok"))));
}

function linear(channel, most) {
  channel.scale.type = "linear";
  channel.scale.domain = [0, Math.min(channel.scale.domain[1], 1.05 * (most || Infinity))];
  if (channel.axis) {
    delete channel.axis.values;
    channel.axis.format = "~g";
  }
}

// Vega writes what a run does not have as a word.
function tip(figures, escape) {
  const known = Object.entries(figures).filter(([, text]) => !["null", "undefined", "NaN"].includes(text));
  return `<table>${known.map(([key, text]) => `<tr><td class="key">${escape(key)}</td><td class="value">${escape(text)}</td></tr>`).join("")}</table>`;
}

async function draw(chart) {
  if (views.get(chart.id)?.scales === scales()) return;
  const spec = structuredClone(chart.spec), wanted = signals(chart), now = scales();
  // colours that differ in the dark and in print are in the style sheet
  spec.config = { background: null, view: { stroke: null }, axis: { labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500 } };
  spec.datasets = { ...spec.datasets, runs: rows(chart) };
  for (const parameter of spec.params) parameter.value = wanted[parameter.name];
  const most = { y: Math.max(...drawn(chart).map((r) => Math.max(r[wanted.measure] ?? 0, r.high ?? 0))) };
  for (const { encoding } of spec.layer)
    for (const axis of ["x", "y"]) if (value(axis) === "linear" && encoding[axis]?.scale) linear(encoding[axis], most[axis]);
  views.get(chart.id)?.finalize();
  const tooltip = { formatTooltip: tip };
  const actions = { export: true, source: false, compiled: false, editor: false };
  const result = await vegaEmbed(document.getElementById(chart.id), spec, { actions, tooltip, renderer: "svg" });
  result.view.addEventListener("click", (_, item) => {
    const solver = item?.datum?.solver;
    form.elements.focus.value = solver && solver !== value("focus") ? solver : "";
    changed();
  });
  views.set(chart.id, { view: result.view, scales: now, finalize: () => result.finalize() });
  show(chart); // what was chosen while it was drawn
}

function show(chart) {
  const { view } = views.get(chart.id);
  for (const [name, wanted] of Object.entries(signals(chart))) view.signal(name, wanted);
  return view.data("runs", rows(chart)).runAsync();
}

function highlight(solver) {
  for (const chart of page.charts) views.get(chart.id)?.view.signal("focus", focusOf(chart, solver)).runAsync();
}

// ---- Tables

function element(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}

function table(head, lines) {
  const made = element("table");
  made.createTHead().insertRow().append(...head.map((text) => element("th", { textContent: text, scope: "col" })));
  const body = made.createTBody();
  for (const [first, ...rest] of lines) {
    const row = body.insertRow();
    row.append(element("th", { textContent: first, scope: "row" }));
    for (const content of rest) row.insertCell().append(content ?? "");
  }
  return made;
}

// The pictures of the chosen grid: a row a solver, a column a budget.
function gallery(chart) {
  const grid = gridOf(chart);
  const runs = drawn(chart).filter((r) => "picture" in r && r.budget && (r.best || !["best", "all"].includes(grid)));
  const budgets = [...new Set(runs.map((r) => r.budget))].sort((a, b) => a - b);
  const picture = (run) => run && element("img", {
    src: page.pictures[run.picture], title: `${run.grid} grid, ${run.calls} calls`,
    alt: `${run.solver}, ${run.budget} calls, ${run.grid} grid`,
  });
  const solvers = [...new Set(runs.map((r) => r.solver))];
  return table(["calls", ...budgets],
    solvers.map((s) => [s, ...budgets.map((b) => picture(runs.find((r) => r.solver === s && r.budget === b)))]));
}

function figures(chart) {
  const names = chart.kind === "trajectory" ? ["median", "q90", "rms", "flip_rate"] : ["sliced_w2", "low", "high"];
  const digits = (number) => (typeof number === "number" ? String(+number.toPrecision(6)) : "");
  const runs = drawn(chart).sort((a, b) => (a.calls ?? a.budget) - (b.calls ?? b.budget) || (a[names[0]] ?? Infinity) - (b[names[0]] ?? Infinity));
  const titles = names.map((n) => ({ flip_rate: "flipped", sliced_w2: "sliced W2", low: "95% from", high: "to" })[n] ?? n);
  return table(["solver", "grid", "calls", ...titles, "wall, ms", ""], runs.map((r) =>
    [r.solver, r.grid, digits(r.calls), ...names.map((n) => digits(r[n])), digits(r.wall_ms), r.message ?? ""]));
}

function fill(details) {
  const chart = page.charts.find((c) => c.id === details.dataset.chart);
  details.querySelector(".scroll").replaceChildren((details.matches(".gallery") ? gallery : figures)(chart));
}

// Two digits, the exponent as short as it is: 7.9e-3.
const short = (error) => error.toExponential(1).replace("e+", "e");
const errorOf = (run) => (run.status === "ok" ? run.median ?? run.sliced_w2 ?? null : null);

// For each solver the run at each budget that ranks it: of what is drawn, the best grid.
function ranked(chart) {
  const { hidden } = signals(chart), off = without(), named = !["best", "all"].includes(gridOf(chart)) && gridOf(chart);
  const found = new Map();
  for (const run of rows(chart)) {
    if (run.budget === null || hidden.includes(run.solver) || off.includes(run.grid)) continue;
    if (named ? run.grid !== named && !anyGrid.includes(run.grid) : !run.best) continue;
    if (!found.has(run.solver)) found.set(run.solver, new Map());
    const mine = found.get(run.solver), before = mine.get(run.budget);
    if (!before || (errorOf(run) ?? Infinity) < (errorOf(before) ?? Infinity)) mine.set(run.budget, run);
  }
  return found;
}

// The runs of a budget that finished, best first.
const places = (found, budget) => [...found.values()].map((cells) => cells.get(budget)).filter((run) => run && errorOf(run) !== null)
  .sort((a, b) => errorOf(a) - errorOf(b));

function describe(run) {
  return run.message || `${errorOf(run)?.toPrecision(6) ?? ""} on the ${run.grid} grid, ${run.calls ?? 0} calls`;
}

function podium(chart, body, budgets, found) {
  const columns = budgets.map((budget) => places(found, budget));
  body.replaceChildren();
  for (let place = 0; place < Math.min(5, Math.max(...columns.map((c) => c.length))); place++) {
    const row = body.insertRow();
    row.append(element("th", { textContent: place + 1, scope: "row" }));
    for (const run of columns.map((c) => c[place])) {
      const cell = row.insertCell();
      if (!run) continue;
      cell.append(run.solver, element("br"), element("small", { textContent: `${short(errorOf(run))} ${run.single ? "" : chart.letters[run.grid]}` }));
      Object.assign(cell, { title: describe(run), className: run.resolved === false ? "unresolved" : "" });
    }
  }
}

function ranking(chart, body, budgets, found) {
  const columns = new Map(budgets.map((budget) => [budget, places(found, budget)]));
  const at = Number(value("nfe")) || null, place = (cells) => 1 + columns.get(at).indexOf(cells.get(at)) || Infinity;
  const listed = [...found];
  if (columns.has(at)) listed.sort(([, a], [, b]) => (place(a) === place(b) ? 0 : place(a) - place(b)));
  body.replaceChildren();
  for (const [solver, cells] of listed) {
    const row = body.insertRow();
    row.dataset.solver = solver;
    row.append(element("th", { textContent: solver, scope: "row" }));
    for (const budget of budgets) {
      const cell = row.insertCell(), run = cells.get(budget);
      if (!run) continue;
      cell.title = describe(run);
      if (errorOf(run) === null) {
        Object.assign(cell, { className: "failed", textContent: "failed" });
        continue;
      }
      const [leader] = columns.get(budget), unresolved = run.resolved === false;
      cell.className = [leader.resolved !== false && errorOf(run) === errorOf(leader) && "first", unresolved && "unresolved"].filter(Boolean).join(" ");
      cell.dataset.rank = 1 + columns.get(budget).indexOf(run);
      cell.append(short(errorOf(run)) + "\u00a0", element("small", { textContent: run.single ? "" : chart.letters[run.grid] }));
    }
  }
}

// What the plot and the rankings are of, in words.
function cover(chart) {
  const grid = gridOf(chart), known = Object.keys(chart.letters), off = without(), on = known.filter((g) => !off.includes(g));
  const hidden = signals(chart).hidden, mine = new Set(chart.runs.map((r) => r.solver));
  const missing = [...mine].filter((s) => hidden.includes(s)).length;
  const which = !["best", "all"].includes(grid) ? `on the ${grid} grid, the default of this problem`
    : known.length < 2 ? `on the ${known[0] ?? "adaptive"} grid` : off.some((g) => known.includes(g)) ? `at the best of the chosen grids (${on.join(", ") || "none"})` : "at the best of all grids";
  return `Each solver ${which}${missing ? `; ${missing} of ${mine.size} solvers are hidden` : ""}.`;
}

function rank() {
  const hidden = hiddenSolvers(), off = without(), runsOff = values("run", false);
  for (const chart of page.charts) {
    const found = ranked(chart), text = cover(chart);
    const seen = new Set(drawn(chart).map((r) => r.solver));
    const [first, ...others] = document.querySelectorAll(`[data-part="${chart.id}"] .cover`);
    first.textContent = gridOf(chart) === "all" ? text.replace(/ (at|on) the .*?(;|\.$)/, " on each of its grids$2") : text;
    for (const each of others) each.textContent = text;
    for (const entry of document.querySelectorAll(`[data-part="${chart.id}"] .swatches li`)) entry.hidden = !seen.has(entry.dataset.solver);
    for (const [name, make] of [["podium", podium], ["ranking", ranking]]) {
      const made = document.querySelector(`table.${name}[data-chart="${chart.id}"]`);
      if (!made) continue;
      const heads = [...made.tHead.rows[0].cells];
      make(chart, made.tBodies[0], heads.slice(1).map((h) => Number(h.dataset.nfe)), found);
      if (name === "ranking")
        for (const h of heads) h.dataset.nfe && h.dataset.nfe === value("nfe") ? h.setAttribute("aria-sort", "ascending") : h.removeAttribute("aria-sort");
    }
  }
  for (const row of document.querySelectorAll("[data-pair]")) row.hidden = row.dataset.pair.split("|").some((s) => hidden.includes(s));
  for (const part of document.querySelectorAll("[data-runs]")) part.hidden = part.dataset.runs.split(" ").some((n) => runsOff.includes(n));
  const problems = values("problem", true);
  for (const row of document.querySelectorAll("#failures tbody tr"))
    row.hidden = !problems.includes(row.dataset.anchor.slice("problem-".length)) || hidden.includes(row.dataset.solver) || off.includes(row.dataset.grid);
}

// The solvers that rank first at some budget of what is shown.
function leaders(kind) {
  const first = new Set();
  for (const chart of page.charts.filter((c) => c.kind === kind && !document.getElementById(c.anchor).hidden)) {
    const found = ranked(chart);
    for (const budget of new Set([...found.values()].flatMap((cells) => [...cells.keys()]))) {
      const best = places(found, budget);
      for (const run of best) if (errorOf(run) === errorOf(best[0])) first.add(run.solver);
    }
  }
  return first;
}

// ---- Events

function update() {
  const problems = values("problem", true);
  for (const section of document.querySelectorAll(".problem")) section.hidden = !problems.includes(section.id.slice("problem-".length));
  for (const box of boxes("grid")) box.disabled = value("lines") === "default";
  document.documentElement.dataset.theme = value("theme");
  for (const chart of page.charts) {
    if (document.getElementById(chart.anchor).hidden) continue; // it has no width to be drawn in
    if (views.get(chart.id)?.scales === scales()) show(chart);
    else drawing = drawing.then(() => document.getElementById(chart.anchor).hidden || draw(chart));
  }
  rank();
  document.querySelectorAll("details[data-chart][open]").forEach(fill);
  return drawing;
}

function changed() {
  write();
  return update();
}

form.addEventListener("submit", (event) => event.preventDefault());
function find() {
  const text = value("find").trim().toLowerCase();
  for (const box of boxes("solver")) box.closest("label").hidden = !box.value.toLowerCase().includes(text);
}
form.elements.find?.addEventListener("input", find);
form.addEventListener("change", ({ target }) => {
  if (target.name === "find") return; // it changes what is listed, not what is shown
  // a solver may be in the legend of both kinds
  if (target.name === "solver") for (const box of boxes("solver")) if (box.value === target.value) box.checked = target.checked;
  changed();
});
document.addEventListener("click", ({ target }) => {
  const button = target.closest?.("button");
  if (!button) return;
  const { check, kind, on, nfe, leaders: leading } = button.dataset;
  if (leading) {
    for (const box of boxes("solver")) if (box.dataset.kind === leading) box.checked = true;
    const best = leaders(leading);
    for (const box of boxes("solver")) if (box.dataset.kind === leading) box.checked = best.has(box.value);
  } else if (check) {
    // of the solvers those that were found
    const mine = boxes(check).filter((b) => (!kind || b.dataset.kind === kind) && !b.closest("label").hidden).map((b) => b.value);
    for (const box of boxes(check)) if (mine.includes(box.value)) box.checked = Boolean(on);
    if (check === "grid" && value("lines") === "default") form.elements.lines.value = "all";
  } else if (nfe) form.elements.nfe.value = value("nfe") === nfe ? "" : nfe;
  else if (button.id === "first-view") {
    form.reset();
    find();
  } else return;
  changed();
});
for (const [type, leave] of [["pointerover", false], ["focusin", false], ["pointerout", true], ["focusout", true]])
  form.addEventListener(type, ({ target }) => {
    const solver = target.closest("label")?.querySelector("input[name=solver]")?.value;
    if (solver) highlight(leave ? value("focus") : solver);
  });
for (const details of document.querySelectorAll("details[data-chart]")) {
  details.addEventListener("toggle", () => details.open && fill(details));
  const picture = details.querySelector("img");
  if (!picture) continue;
  const points = () => details.classList.toggle("points", picture.naturalWidth === picture.naturalHeight);
  picture.complete ? points() : picture.addEventListener("load", points);
}
addEventListener("hashchange", () => read() && changed());

if (matchMedia("(max-width: 1000px)").matches) form.querySelector("details").open = false;
read();
changed().then(() => place && document.getElementById(place)?.scrollIntoView());
