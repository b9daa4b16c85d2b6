"use strict";
// Sorting, the runs of a row on demand, and the charts. No framework; nothing is loaded.
const data = JSON.parse(document.getElementById("data").textContent);

// --- tables ---

function sortBy(header) {
  const table = header.closest("table"), body = table.tBodies[0];
  const column = [...header.parentNode.children].indexOf(header);
  const descending = header.getAttribute("aria-sort") === "ascending";
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const rows = [...body.rows].map((row) => {
    const value = row.cells[column].dataset.v;
    const number = Number(value);
    return { row, value: value === undefined || value === "" ? null : Number.isNaN(number) ? value : number };
  });
  rows.sort((a, b) => {
    if (a.value === null || b.value === null) return (a.value === null) - (b.value === null); // always last
    const order = typeof a.value === "number" && typeof b.value === "number"
      ? a.value - b.value : String(a.value).localeCompare(String(b.value));
    return descending ? -order : order;
  });
  body.append(...rows.map((entry) => entry.row));
}
for (const header of document.querySelectorAll(".sortable thead th"))
  header.querySelector("button").addEventListener("click", () => sortBy(header));

function element(name, text, parent) {
  const made = document.createElement(name);
  made.textContent = text;
  parent.append(made);
  return made;
}

// A row's runs are written when they are looked at: a page of thousands opens as fast as one of ten.
for (const details of document.querySelectorAll("details.row"))
  details.addEventListener("toggle", () => {
    const place = details.querySelector(".scroll");
    if (!details.open || place.firstChild) return;
    const runs = data.runs[details.dataset.row];
    const used = data.columns.map((_, j) => j).filter((j) => runs.some((run) => run[j] !== "–"));
    const table = element("table", "", place);
    table.className = "runs";
    const head = element("tr", "", element("thead", "", table)), body = element("tbody", "", table);
    for (const j of used) element("th", data.columns[j], head).scope = "col";
    for (const run of runs) {
      const line = element("tr", "", body);
      for (const j of used) element("td", run[j], line);
    }
  });

// A link to a row opens it.
for (const link of document.querySelectorAll('a[href^="#row-"]'))
  link.addEventListener("click", () => { document.querySelector(link.getAttribute("href")).open = true; });

// --- charts ---

function colours() {
  const style = getComputedStyle(document.documentElement);
  const get = (name) => style.getPropertyValue(name).trim();
  return {
    background: null, font: "system-ui,-apple-system,Segoe UI,Roboto,sans-serif", aria: false, view: { stroke: null },
    axis: {
      domainColor: get("--line"), tickColor: get("--line"), gridColor: get("--grid"), labelColor: get("--soft"),
      titleColor: get("--soft"), titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 12, labelSeparation: 6,
    },
    text: { color: get("--ink") }, legend: { disable: true },
    style: { category: { stroke: get("--card"), strokeWidth: 0.8 }, whole: { color: get("--ink") } },
  };
}

function embed(place, spec) {
  return vegaEmbed(place, {
    ...spec, width: "container", height: "container", autosize: { type: "fit", contains: "padding" },
  }, {
    mode: "vega-lite", renderer: "svg", actions: false, defaultStyle: false, config: colours(),
    logLevel: 1, // errors alone: to hide every row is no reason to warn
    tooltip: { disableDefaultStyle: true, theme: "own" },
  });
}

// The charts of a data set or a sweep. Where it has rows, each has a button that hides it.
class Panel {
  constructor(section) {
    this.section = section;
    this.panel = data.panels[section.dataset.panel];
    this.views = [];
    this.hidden = new Set();
    this.chips = new Map();
    this.at = 0;
    for (const [name, style] of Object.entries(this.panel.rows)) this.addChip(name, ...style);
  }

  addChip(name, colour, dash) {
    const chip = element("button", "", this.section.querySelector(".chips"));
    chip.type = "button";
    chip.setAttribute("aria-pressed", "true");
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    for (const [key, value] of Object.entries({
      d: "M0 4H22", stroke: colour, "stroke-width": 3, "stroke-dasharray": dash[1] ? dash.join(" ") : "none",
    })) line.setAttribute(key, value);
    svg.append(line);
    svg.setAttribute("aria-hidden", "true");
    chip.append(svg);
    element("span", name, chip);
    this.chips.set(name, element("b", "", chip));
    chip.addEventListener("click", () => {
      this.hidden.has(name) ? this.hidden.delete(name) : this.hidden.add(name);
      chip.setAttribute("aria-pressed", String(!this.hidden.has(name)));
      this.signal("hidden", [...this.hidden]);
    });
    for (const event of ["pointerenter", "focus"])
      chip.addEventListener(event, () => this.signal("lit", this.hidden.has(name) ? null : name));
    for (const event of ["pointerleave", "blur"]) chip.addEventListener(event, () => this.signal("lit", null));
  }

  signal(name, value) {
    for (const { view } of this.views) view.signal(name, value).runAsync();
  }

  async draw() {
    for (const { result } of this.views) result.finalize();
    this.views = [];
    for (const place of this.section.querySelectorAll(".chart")) {
      const spec = this.panel.charts[place.dataset.chart], ofCurves = spec.data.name === "curves";
      place.replaceChildren();
      const result = await embed(place, { ...spec, datasets: { [spec.data.name]: this.panel.datasets[spec.data.name] } });
      const view = result.view;
      if (this.hidden.size) view.signal("hidden", [...this.hidden]).run();
      this.views.push({ view, result, ofCurves });
      if (ofCurves) this.follow(place, view);
    }
  }

  // The epoch under the pointer: a rule in both charts, and each row's error there in the chips.
  follow(place, view) {
    const at = (event) => {
      const left = place.querySelector("svg").getBoundingClientRect().left + view.origin()[0];
      const scale = view.scale("x"), [first, last] = scale.domain();
      const epoch = Math.round(scale.invert(event.clientX - left));
      this.pointAt(epoch >= first && epoch <= last ? epoch : 0);
    };
    place.onpointermove = at;
    place.onpointerdown = at;
    place.onpointerleave = () => this.pointAt(0);
  }

  pointAt(epoch) {
    if (epoch === this.at) return;
    this.at = epoch;
    for (const { view, ofCurves } of this.views) if (ofCurves) view.signal("at", epoch).runAsync();
    const errors = new Map();
    if (epoch) for (const curve of this.panel.datasets.curves) {
      const error = curve.mean[curve.epoch ? curve.epoch.indexOf(epoch) : epoch - 1];
      if (error !== undefined && !(curve.unfinished && errors.has(curve.row))) errors.set(curve.row, error);
    }
    for (const [name, place] of this.chips) place.textContent = errors.has(name) ? errors.get(name).toFixed(2) : "";
  }
}

async function main() {
  const panels = [...document.querySelectorAll("[data-panel]")].map((section) => new Panel(section));
  const draw = async () => { for (const panel of panels) await panel.draw(); };
  await draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  document.documentElement.dataset.ready = "yes";
}
main();
