"use strict";
const page = JSON.parse(document.getElementById("page").textContent);
const form = document.querySelector(".controls");
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const views = new Map();

// What is shown lives in the address, so that it can be linked to and survives a reload.
const state = { grid: "default", measure: "median", hidden: [] };
for (const [key, value] of new URLSearchParams(location.hash.startsWith("#view?") ? location.hash.slice(6) : ""))
  if (key === "hidden") state.hidden.push(value);
  else if (form.elements[key] && [...form.elements[key].options].some((o) => o.value === value)) state[key] = value;

function gridOf(chart) {
  return state.grid === "default" ? chart.grid || "best" : state.grid;
}

function theme() {
  const [ink, line] = dark.matches ? ["#c9ced4", "#2c3138"] : ["#3c4148", "#e6e8eb"];
  return {
    background: null,
    view: { stroke: null },
    axis: { labelColor: ink, titleColor: ink, gridColor: line, domainColor: ink, tickColor: ink, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500 },
  };
}

async function draw(chart) {
  const spec = structuredClone(chart.spec);
  spec.config = theme();
  spec.datasets = { ...spec.datasets, runs: chart.runs };
  for (const parameter of spec.params) {
    if (parameter.name === "grid") parameter.value = gridOf(chart);
    if (parameter.name === "hidden") parameter.value = state.hidden;
    if (parameter.name === "measure" && parameter.value !== "sliced_w2") parameter.value = state.measure;
  }
  views.get(chart.id)?.finalize();
  const actions = { export: true, source: false, compiled: false, editor: false };
  views.set(chart.id, await vegaEmbed(document.getElementById(chart.id), spec, { actions, renderer: "svg" }));
}

function update() {
  for (const chart of page.charts) {
    const view = views.get(chart.id)?.view;
    if (!view) continue;
    view.signal("grid", gridOf(chart)).signal("hidden", state.hidden);
    if (view.signal("measure") !== "sliced_w2") view.signal("measure", state.measure);
    view.runAsync();
  }
  for (const name of ["grid", "measure"]) form.elements[name].value = state[name];
  for (const button of form.querySelectorAll("[data-solver]"))
    button.setAttribute("aria-pressed", String(!state.hidden.includes(button.dataset.solver)));
  document.querySelectorAll(".gallery[open]").forEach(fill);
}

function changed() {
  const query = new URLSearchParams({ grid: state.grid, measure: state.measure });
  for (const solver of state.hidden) query.append("hidden", solver);
  history.replaceState(null, "", "#view?" + query);
  update();
}

// The pictures of the chosen grid: a row a solver, a column a budget.
function fill(gallery) {
  const chart = page.charts.find((c) => c.id === gallery.dataset.chart);
  const grid = gridOf(chart);
  const runs = chart.runs.filter((r) => r.preview && r.budget && (r.grid === grid || (["best", "all"].includes(grid) && r.best)));
  const budgets = [...new Set(runs.map((r) => r.budget))].sort((a, b) => a - b);
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  for (const text of ["calls", ...budgets]) head.append(Object.assign(document.createElement("th"), { textContent: text, scope: "col" }));
  const body = table.createTBody();
  for (const solver of new Set(runs.map((r) => r.solver))) {
    if (state.hidden.includes(solver)) continue;
    const row = body.insertRow();
    row.append(Object.assign(document.createElement("th"), { textContent: solver, scope: "row" }));
    for (const budget of budgets) {
      const cell = row.insertCell();
      const run = runs.find((r) => r.solver === solver && r.budget === budget);
      if (run) cell.append(Object.assign(new Image(), { src: run.preview, alt: `${solver}, ${budget} calls, ${run.grid} grid`, title: `${run.grid} grid, ${run.calls} calls` }));
    }
  }
  gallery.querySelector(".scroll").replaceChildren(table);
}

form.addEventListener("change", (event) => {
  state[event.target.name] = event.target.value;
  changed();
});
form.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const names = button.dataset.solver
    ? [button.dataset.solver]
    : page.solvers.filter((s) => s.kind === button.dataset.kind).map((s) => s.name);
  const hide = button.dataset.solver ? !state.hidden.includes(names[0]) : button.classList.contains("none");
  state.hidden = state.hidden.filter((s) => !names.includes(s)).concat(hide ? [...new Set(names)] : []);
  changed();
});
for (const [type, leave] of [["pointerover", false], ["focusin", false], ["pointerout", true], ["focusout", true]])
  form.addEventListener(type, (event) => {
    const solver = event.target.closest("[data-solver]")?.dataset.solver;
    if (solver) for (const { view } of views.values()) view.signal("focus", leave ? "" : solver).runAsync();
  });
for (const gallery of document.querySelectorAll(".gallery")) {
  const picture = gallery.querySelector("img");
  const points = () => gallery.classList.toggle("points", picture.naturalWidth === picture.naturalHeight);
  picture.complete ? points() : picture.addEventListener("load", points);
  gallery.addEventListener("toggle", () => gallery.open && fill(gallery));
}
dark.addEventListener("change", () => page.charts.forEach(draw));
Promise.all(page.charts.map(draw)).then(update);
