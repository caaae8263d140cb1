"use strict";
const page = JSON.parse(document.getElementById("page").textContent);
const form = document.querySelector(".controls");
const choices = ["lines", "measure", "x", "y", "focus", "nfe"].filter((name) => form.elements[name]);
const checks = ["problem", "grid", "solver"];
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
// what a chart has to be drawn anew for: a linear axis of errors ends at the largest one shown
const scales = () => [value("x"), value("y"), ...(value("y") === "linear" ? [value("lines"), value("measure"), ...values("solver", false), ...without()] : [])].join("|");

// A chart without the solver is not faded.
const focusOf = (chart, solver) => (chart.runs.some((r) => r.solver === solver) ? solver : "");

function signals(chart) {
  const measure = chart.kind === "trajectory" ? value("measure") : "sliced_w2";
  return { grid: gridOf(chart), measure, hidden: values("solver", false), without: without(), focus: focusOf(chart, value("focus")) };
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
    && (grid === "all" || r.grid === grid || r.grid === "adaptive" || (grid === "best" && r.best)));
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
  const runs = drawn(chart).filter((r) => "picture" in r && r.budget && (grid !== "all" || r.best));
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
  return table(["solver", "grid", "calls", ...names, "wall, ms", ""], runs.map((r) =>
    [r.solver, r.grid, digits(r.calls), ...names.map((n) => digits(r[n])), digits(r.wall_ms), r.message ?? ""]));
}

function fill(details) {
  const chart = page.charts.find((c) => c.id === details.dataset.chart);
  details.querySelector(".scroll").replaceChildren((details.matches(".gallery") ? gallery : figures)(chart));
}

const order = new Map([...document.querySelectorAll(".ranking tbody")].map((body) => [body, [...body.rows]]));
function rank() {
  const hidden = values("solver", false);
  for (const entry of document.querySelectorAll(".swatches li")) entry.hidden = hidden.includes(entry.dataset.solver);
  for (const [body, listed] of order) {
    const heads = [...body.parentElement.tHead.rows[0].cells];
    const column = heads.findIndex((h) => h.dataset.nfe && h.dataset.nfe === value("nfe"));
    const place = (row) => Number(row.cells[column].dataset.rank ?? Infinity);
    body.append(...(column < 0 ? listed : [...listed].sort((a, b) => (place(a) === place(b) ? 0 : place(a) - place(b)))));
    heads.forEach((h, i) => (i === column ? h.setAttribute("aria-sort", "ascending") : h.removeAttribute("aria-sort")));
    for (const row of listed) row.hidden = hidden.includes(row.dataset.solver);
  }
}

// ---- Events

function update() {
  const problems = values("problem", true);
  for (const section of document.querySelectorAll(".problem")) section.hidden = !problems.includes(section.id.slice("problem-".length));
  for (const box of boxes("grid")) box.disabled = value("lines") === "default";
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
form.addEventListener("change", ({ target }) => {
  // a solver may be in the legend of both kinds
  if (target.name === "solver") for (const box of boxes("solver")) if (box.value === target.value) box.checked = target.checked;
  changed();
});
document.addEventListener("click", ({ target }) => {
  const button = target.closest?.("button");
  if (!button) return;
  const { check, kind, on, nfe } = button.dataset;
  if (check) {
    const mine = boxes(check).filter((b) => !kind || b.dataset.kind === kind).map((b) => b.value);
    for (const box of boxes(check)) if (mine.includes(box.value)) box.checked = Boolean(on);
    if (check === "grid" && value("lines") === "default") form.elements.lines.value = "all";
  } else if (nfe) form.elements.nfe.value = value("nfe") === nfe ? "" : nfe;
  else if (button.id === "first-view") form.reset();
  else return;
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
