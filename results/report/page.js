"use strict";
// Sorting, the runs of a row on demand, and the charts. No framework; nothing is loaded.
let data; // of `make_page`

// --- tables ---

// A table that is sorted by its headers' buttons, and shows a part of its rows, in groups.
class Table {
  constructor(table) {
    this.body = table.tBodies[0];
    this.rows = [...this.body.rows];
    this.order = this.rows;
    this.shows = () => true;
    this.groupOf = null;
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => header.querySelector("button").addEventListener("click", () => {
      const descending = header.getAttribute("aria-sort") === "ascending";
      for (const other of headers) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      this.sort(column, descending);
    }));
  }

  sort(column, descending) {
    const keyed = this.rows.map((row) => {
      const value = row.cells[column].dataset.v, number = Number(value);
      return { row, value: value === undefined || value === "" ? null : Number.isNaN(number) ? value : number };
    });
    keyed.sort((a, b) => {
      if (a.value === null || b.value === null) return (a.value === null) - (b.value === null); // always last
      return descending ? -compare(a.value, b.value) : compare(a.value, b.value);
    });
    this.order = keyed.map((entry) => entry.row);
    this.lay();
  }

  lay() {
    const groups = new Map(), lines = [];
    for (const row of this.order.filter(this.shows)) {
      const name = this.groupOf ? this.groupOf(row) : "";
      groups.has(name) ? groups.get(name).push(row) : groups.set(name, [row]);
    }
    for (const [name, rows] of [...groups].sort((a, b) => compare(a[0], b[0]))) {
      if (this.groupOf) lines.push(this.heading(name, rows.length));
      lines.push(...rows);
    }
    this.body.replaceChildren(...lines);
  }

  heading(name, count) {
    const line = document.createElement("tr"), cell = element("th", "", line);
    line.className = "group";
    cell.scope = "rowgroup";
    cell.colSpan = this.rows[0].cells.length;
    element("span", `${name} · ${rowCount(count)}`, cell);
    return line;
  }
}

function compare(a, b) {
  const numbers = typeof a === "number" && typeof b === "number";
  return numbers ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
}

function rowCount(count) {
  return `${count.toLocaleString("en")} row${count === 1 ? "" : "s"}`;
}

const tables = [...document.querySelectorAll("table.sortable")].map((table) => new Table(table));

// What is wider than its place scrolls, says so and can be reached by keyboard.
const watch = new ResizeObserver((entries) => {
  for (const place of new Set(entries.map((entry) => entry.target.closest(".scroll")))) {
    const cut = place.scrollWidth > place.clientWidth + 1;
    place.classList.toggle("cut", cut);
    if (cut || place.scrollHeight > place.clientHeight + 1) place.tabIndex = 0;
    else place.removeAttribute("tabindex");
  }
});
for (const place of document.querySelectorAll(".scroll")) for (const seen of [place, ...place.children]) watch.observe(seen);

// Choices by what rows have in several values; they hold for the table, the charts and the runs.
function addFilters(panels) {
  const form = document.querySelector(".filters");
  if (!form || data.rows.length < 6) return;
  const at = new Map(tables[0].rows.map((row, i) => [row, data.rows[i]])), chosen = new Map();
  const fields = data.facets.map((name, j) => ({ name, j, values: [...new Set(data.rows.map((row) => row[j]))].sort(compare) }))
    .filter(({ values }) => values.length > 1);
  if (!fields.length) return;
  const notes = [...document.querySelectorAll("#comparison .notes li")];
  notes.forEach((note, i) => { note.value = i + 1; }); // whichever are shown
  const choice = (name, first, words, changed) => {
    const label = element("label", `${name} `, form), select = element("select", "", label);
    for (const word of [first, ...words]) element("option", word, select).value = word === first ? "" : word;
    select.addEventListener("change", () => { changed(select.value); apply(); });
  };
  const matches = (row) => [...chosen].every(([j, value]) => value === "" || String(row[j]) === value);
  function apply() {
    tables[0].lay();
    const shown = data.rows.filter(matches), labels = new Set(shown.map((row) => `${row[2]}: ${row.at(-1)}`));
    count.textContent = shown.length < data.rows.length ? `${shown.length.toLocaleString("en")} of ${rowCount(data.rows.length)}` : "";
    const cited = new Set([...document.querySelectorAll("header sup a, #comparison th a, #comparison td a")].map((link) => link.hash));
    for (const note of notes) note.hidden = !cited.has(`#${note.id}`);
    for (const panel of panels) panel.keep(labels);
    for (const details of document.querySelectorAll("details.row")) details.hidden = !matches(data.rows[details.dataset.row]);
  }
  for (const { name, j, values } of fields) choice(name, "all", values, (value) => chosen.set(j, value));
  choice("group by", "nothing", fields.map(({ name }) => name), (name) => {
    const field = fields.find((each) => each.name === name);
    tables[0].groupOf = field ? (row) => at.get(row)[field.j] : null;
  });
  const count = element("output", "", form);
  tables[0].shows = (row) => matches(at.get(row));
  form.hidden = false;
}

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
    watch.observe(table);
  });

// A link to a row opens it.
for (const link of document.querySelectorAll('a[href^="#row-"]'))
  link.addEventListener("click", () => { document.querySelector(link.getAttribute("href")).open = true; });

// --- charts ---

const SHAPES = {
  circle: "M31 6m-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0", square: "M26.5 1.5H35.5V10.5H26.5Z",
  "triangle-up": "M31 1L36.5 10.5H25.5Z", diamond: "M31 0L36 6L31 12L26 6Z",
};

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

async function embed(place, spec) {
  const name = place.getAttribute("aria-label"); // which Vega takes away
  const result = await vegaEmbed(place, {
    ...spec, width: "container", height: "container", autosize: { type: "fit", contains: "padding" },
  }, {
    mode: "vega-lite", renderer: "svg", actions: false, defaultStyle: false, config: colours(),
    logLevel: 1, // errors alone: to hide every row is no reason to warn
    tooltip: { disableDefaultStyle: true, theme: "own" },
  });
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", name);
  place.removeAttribute("aria-roledescription");
  place.querySelector("svg").setAttribute("aria-hidden", "true"); // its groups have roles and no names
  place.querySelector("form")?.remove(); // of Vega's, always empty
  return result;
}

// The charts of a data set or a sweep. Where it has rows, each has a button that hides it.
class Panel {
  constructor(section) {
    this.section = section;
    this.panel = data.panels[section.dataset.panel];
    this.views = [];
    this.hidden = new Set();
    this.left = new Set(); // rows that the filters leave out
    this.chips = new Map();
    this.at = 0;
    for (const [name, style] of Object.entries(this.panel.rows)) this.addChip(name, ...style);
  }

  addChip(name, colour, dash, shape) {
    const chip = element("button", "", this.section.querySelector(".chips"));
    chip.type = "button";
    chip.setAttribute("aria-pressed", "true");
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    for (const [key, value] of Object.entries({ // its line in the curves, its shape in the charts of cost
      line: { d: "M0 6H15", stroke: colour, "stroke-width": 3, "stroke-dasharray": dash[1] ? dash.join(" ") : "none" },
      point: { d: SHAPES[shape], fill: colour },
    })) {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      for (const name in value) path.setAttribute(name, value[name]);
      path.dataset.of = key;
      svg.append(path);
    }
    svg.setAttribute("aria-hidden", "true");
    chip.append(svg);
    element("span", name, chip);
    this.chips.set(name, element("b", "", chip));
    chip.addEventListener("click", () => {
      this.hidden.has(name) ? this.hidden.delete(name) : this.hidden.add(name);
      chip.setAttribute("aria-pressed", String(!this.hidden.has(name)));
      this.hide();
    });
    for (const event of ["pointerenter", "focus"])
      chip.addEventListener(event, () => this.signal("lit", this.hidden.has(name) ? null : name));
    for (const event of ["pointerleave", "blur"]) chip.addEventListener(event, () => this.signal("lit", null));
  }

  keep(labels) {
    if (!this.chips.size) return; // of a sweep
    const drawn = Object.values(this.panel.datasets).flat().map((value) => value.row);
    this.left = new Set([...this.chips.keys(), ...drawn].filter((name) => !labels.has(`${this.panel.title}: ${name}`)));
    for (const [name, place] of this.chips) place.parentNode.hidden = this.left.has(name);
    this.hide();
  }

  hide() {
    this.signal("hidden", [...this.hidden, ...this.left]);
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
      if (this.hidden.size + this.left.size) view.signal("hidden", [...this.hidden, ...this.left]).run();
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
      const error = curve.mean[curve.epoch.indexOf(epoch)];
      if (error !== undefined && !(curve.unfinished && errors.has(curve.row))) errors.set(curve.row, error);
    }
    for (const [name, place] of this.chips) place.textContent = errors.has(name) ? errors.get(name).toFixed(2) : "";
  }
}

async function unpack(id) {
  const packed = document.getElementById(id);
  if (!packed) return "";
  const bytes = Uint8Array.from(atob(packed.textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  packed.remove();
  return new Response(stream).text();
}

async function main() {
  data = JSON.parse(await unpack("data"));
  element("script", await unpack("vega"), document.head);
  const panels = [...document.querySelectorAll("[data-panel]")].map((section) => new Panel(section));
  addFilters(panels);
  const draw = async () => { for (const panel of panels) await panel.draw(); };
  await draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  document.documentElement.dataset.ready = "yes";
}
main();
