// What axe-core's rules find in a page of tables, charts, fields and text, as far as they concern this one: a list of faults.
(() => {
  const found = [], all = (words) => [...document.querySelectorAll(words)];
  const seen = (e) => e.getClientRects().length > 0 && getComputedStyle(e).visibility === "visible";
  const nameOf = (e) => (e.getAttribute("aria-label") || e.textContent || e.title || "").trim();
  const fault = (rule, e) => found.push(`${rule}: ${e.outerHTML.slice(0, 160)}`);
  if (!document.documentElement.lang) found.push("html has no lang");
  if (!document.title) found.push("no title");
  const ids = all("[id]").map((e) => e.id);
  for (const id of new Set(ids)) if (ids.filter((other) => other === id).length > 1) found.push(`id ${id} twice`);
  for (const e of all("svg,canvas,img")) {
    const image = e.closest("[role=img]");
    if (!e.closest("[aria-hidden=true]") && !(image && nameOf(image)) && !e.alt) fault("image without an alternative", e);
  }
  for (const e of all("[role^=graphics]")) if (!e.closest("[aria-hidden=true]") && !nameOf(e)) fault("no name", e);
  for (const e of all("[role=img],[role=region],[role=group],form")) if (!e.getAttribute("aria-label")) fault("no name", e);
  for (const e of all("input,select,textarea")) if (!e.labels.length && !e.getAttribute("aria-label")) fault("no label", e);
  for (const e of all("a,button,summary")) if (seen(e) && !nameOf(e)) fault("no name", e);
  const levels = all("h1,h2,h3,h4").map((e) => Number(e.tagName[1]));
  if (levels.filter((level) => level === 1).length !== 1 || levels[0] !== 1) found.push(`h1: ${levels}`);
  levels.forEach((level, i) => { if (i && level > levels[i - 1] + 1) found.push(`h${level} after h${levels[i - 1]}`); });
  for (const words of ["main", "header", "footer"]) if (all(`body > ${words}`).length !== 1) found.push(`not one ${words}`);
  for (const e of document.body.children)
    if (!e.matches("main,header,footer,script,#vg-tooltip-element") && seen(e)) fault("beside the landmarks", e);
  for (const table of all("table")) {
    if (!table.querySelector("th[scope]")) fault("a table without headers", table);
    for (const e of table.querySelectorAll("thead th, thead td")) if (!nameOf(e)) fault("an empty header", e);
  }
  for (const e of all("[role=list],ul,ol,dl")) for (const child of e.children)
    if (!child.matches(e.tagName === "DL" ? "dt,dd,div" : "li")) fault("not an item", child);
  for (const e of all("*")) {
    const wide = e.scrollWidth > e.clientWidth + 1 && /auto|scroll/.test(getComputedStyle(e).overflowX);
    const tall = e.scrollHeight > e.clientHeight + 1 && /auto|scroll/.test(getComputedStyle(e).overflowY);
    if (seen(e) && (wide || tall) && e.tabIndex < 0 && !e.querySelector("a,button,select")) fault("scrolls by no key", e);
    if (e.tabIndex > 0) fault("a tab order of its own", e);
  }
  // contrast: WCAG 2.2, 1.4.3
  const rgba = (text) => {
    const parts = text.match(/[\d.]+/g).map(Number);
    return [parts[0], parts[1], parts[2], parts[3] ?? 1];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = (e) => {
    if (!e) return [255, 255, 255, 1];
    const own = rgba(getComputedStyle(e).backgroundColor);
    return own[3] === 1 ? own : over(own, behind(e.parentElement));
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  for (const e of all("body *:not(script):not(style)")) {
    const words = [...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!words || !seen(e)) continue;
    const style = getComputedStyle(e), drawn = e instanceof SVGElement;
    const ink = rgba(drawn ? style.fill : style.color), ground = behind(drawn ? e.closest("figure,.chips,section") : e);
    for (let up = e; up && up !== document.body; up = up.parentElement) ink[3] *= Number(getComputedStyle(up).opacity);
    if (ink[3] === 0) continue; // a label that Vega leaves out
    const [high, low] = [light(over(ink, ground)), light(ground)].sort((a, b) => b - a), ratio = (high + 0.05) / (low + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) fault(`contrast ${ratio.toFixed(2)}`, e);
  }
  return found;
})()
