"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const darkTheme = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches;
const byKey = Object.fromEntries(data.figures.map((figure) => [figure.key, figure]));
const datasets = document.getElementById("dataset");
const MANY_POINTS = 40;
const BAR = { responsive: true, displaylogo: false, showSendToCloud: false,
  modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };

/* Plotly reads tags and entities in texts; those of runs are shown as they are. */
function plain(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;")
    .replace(/\+-/g, "\u00b1").replace(/\n/g, "<br>");
}

function theme() {
  const css = getComputedStyle(document.documentElement);
  const read = (name) => css.getPropertyValue(name).trim();
  return { text: read("--text"), muted: read("--muted"), card: read("--card"), line: read("--line"),
    colors: darkTheme.matches ? data.dark : data.light };
}

function band(series, color) {
  const known = series.x.map((x, i) => [x, series.y[i], series.y_std[i]]).filter((point) => point[2] !== null);
  const back = [...known].reverse();
  return { type: "scatter", mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: color + "28",
    hoverinfo: "skip",
    x: [...known, ...back].map((point) => point[0]),
    y: [...known.map((point) => point[1] + point[2]), ...back.map((point) => point[1] - point[2])] };
}

function errorBars(values, color) {
  const visible = values.some((value) => value !== null);
  return { type: "data", array: values, color, thickness: 1.2, width: 3, visible };
}

function traces(series, look) {
  const base = { type: "scatter", x: series.x.map((x) => (typeof x === "string" ? plain(x) : x)), y: series.y };
  if (series.kind === "front") {
    return [{ ...base, mode: "lines", line: { color: look.muted, width: 1.5 }, hoverinfo: "skip" }];
  }
  const color = look.colors[series.style.color];
  const symbol = data.symbols[series.style.symbol] + (series.style.hollow ? "-open" : "");
  const common = { ...base, text: series.notes.map(plain), hoverinfo: "text", marker: { color, symbol, size: 6 } };
  if (series.kind === "points") {
    return [{ ...common, mode: "markers", marker: { color, symbol, size: 10 },
      error_x: errorBars(series.x_std, color), error_y: errorBars(series.y_std, color) }];
  }
  const line = { ...common, mode: series.x.length > MANY_POINTS ? "lines" : "lines+markers",
    line: { color, width: 1.6, dash: data.dashes[series.style.dash] } };
  return series.y_std.some((value) => value !== null) ? [band(series, color), line] : [line];
}

function layout(figure, view, look) {
  const axis = (text) => ({ title: { text: plain(text), standoff: 6 }, gridcolor: look.line, linecolor: look.line,
    zeroline: false, automargin: true, exponentformat: "SI" });
  const x = axis(view.x_title);
  const y = axis(figure.small ? "" : view.y_title);
  if (view.categories.length) {
    const names = view.categories.map(plain);
    Object.assign(x, { type: "category", categoryorder: "array", categoryarray: names, tickfont: { size: 10 } });
    y.rangemode = "tozero";
  } else {
    Object.assign(x, view.log_x ? { type: "log", dtick: "D2" } : { type: "linear" }); // D2: labels at 1, 2 and 5
  }
  return { xaxis: x, yaxis: y, paper_bgcolor: look.card, plot_bgcolor: look.card, font: { color: look.text, size: 12 },
    margin: { l: 48, r: 10, t: 30, b: 40 }, showlegend: false, hovermode: "closest", dragmode: touch ? false : "zoom",
    hoverlabel: { bgcolor: look.card, bordercolor: look.line, font: { color: look.text, size: 12 }, align: "left" },
    uirevision: `${view.dataset} ${view.key}` };
}

const OUTLINES = {
  circle: "M6 1A5 5 0 1 0 6 11A5 5 0 1 0 6 1Z", square: "M1.5 1.5H10.5V10.5H1.5Z",
  diamond: "M6 0.5L11.5 6L6 11.5L0.5 6Z", "triangle-up": "M6 1L11.5 10.5H0.5Z",
  "triangle-down": "M6 11L11.5 1.5H0.5Z", x: "M3 1L6 4L9 1L11 3L8 6L11 9L9 11L6 8L3 11L1 9L4 6L1 3Z",
  star: "M6 0.5L7.4 4.3L11.5 4.5L8.3 7L9.4 11L6 8.7L2.6 11L3.7 7L0.5 4.5L4.6 4.3Z",
};
const STROKES = { solid: "", dash: "6 4", dot: "2 3", dashdot: "7 3 2 3" };

function swatch(series, look) {
  const color = series.style ? look.colors[series.style.color] : look.muted;
  const stroke = series.style ? STROKES[data.dashes[series.style.dash]] : "";
  const line = series.kind === "points" ? "" :
    `<path d="M0 6H34" stroke="${color}" stroke-width="2" stroke-dasharray="${stroke}" fill="none"/>`;
  const mark = series.style ? `<path transform="translate(11 0)" d="${OUTLINES[data.symbols[series.style.symbol]]}" ` +
    `stroke="${color}" fill="${series.style.hollow ? look.card : color}"/>` : "";
  return `<svg width="34" height="12" aria-hidden="true">${line}${mark}</svg>`;
}

/* A legend and the plots it belongs to. */
class Panel {
  constructor(element) {
    this.legend = element.querySelector(".legend");
    this.plots = [...element.querySelectorAll(".plot")];
    this.select = element.querySelector("select");
    this.element = element;
    this.hidden = new Set();
    if (this.select) this.select.addEventListener("change", () => this.draw());
  }

  views(plot) {
    const views = byKey[plot.dataset.figure].views;
    return datasets ? views.filter((view) => view.dataset === datasets.value) : views;
  }

  choose() {
    this.element.hidden = this.plots.every((plot) => !this.views(plot).length);
    if (this.select) {
      const views = this.views(this.plots[0]);
      this.select.replaceChildren(...views.map((view, index) => new Option(view.name, index)));
      this.select.closest("p").hidden = views.length < 2;
    }
    this.draw();
  }

  draw() {
    const look = theme();
    const entries = new Map();
    for (const plot of this.plots) {
      const view = this.views(plot)[this.select ? Number(this.select.value) : 0];
      const box = plot.closest("figure");
      if (box !== this.element) box.hidden = !view;
      if (!view) continue;
      for (const series of view.series) entries.set(series.label, series);
      const shown = view.series.filter((series) => !this.hidden.has(series.label));
      const frame = layout(byKey[plot.dataset.figure], view, look);
      Plotly.react(plot, shown.flatMap((series) => traces(series, look)), frame, BAR);
    }
    this.list(entries, look);
  }

  list(entries, look) {
    const focused = this.legend.contains(document.activeElement) ? document.activeElement.dataset.label : null;
    const buttons = [...entries.values()].map((series) => this.button(series.label, swatch(series, look), () => {
      if (!this.hidden.delete(series.label)) this.hidden.add(series.label);
    }, !this.hidden.has(series.label)));
    if (buttons.length > 2) {
      const anyHidden = [...entries.keys()].some((label) => this.hidden.has(label));
      buttons.push(this.button(anyHidden ? "show all" : "hide all", "", () => {
        this.hidden = new Set(anyHidden ? [] : entries.keys());
      }));
    }
    this.legend.replaceChildren(...buttons);
    buttons.find((button) => button.dataset.label === focused)?.focus();
  }

  button(label, picture, act, pressed) {
    const button = document.createElement("button");
    button.type = "button";
    button.innerHTML = picture;
    button.append(label);
    button.dataset.label = label;
    if (pressed === undefined) button.className = "all";
    else button.setAttribute("aria-pressed", pressed);
    button.addEventListener("click", () => { act(); this.draw(); });
    return button;
  }
}

const panels = [...document.querySelectorAll("[data-legend]")].map((element) => new Panel(element));
if (datasets) datasets.addEventListener("change", () => panels.forEach((panel) => panel.choose()));
darkTheme.addEventListener("change", () => panels.forEach((panel) => panel.draw()));
panels.forEach((panel) => panel.choose());

function sortTable(header) {
  const up = header.getAttribute("aria-sort") !== "ascending";
  const body = header.closest("table").tBodies[0];
  for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  const order = (a, b) => {
    const [one, two] = [a, b].map((row) => row.cells[header.cellIndex]);
    if (!header.classList.contains("num")) return (up ? 1 : -1) * one.textContent.localeCompare(two.textContent);
    const [first, second] = [one.dataset.value, two.dataset.value];
    if (!first || !second) return !first - !second; // those without a number last
    return (up ? 1 : -1) * (first - second);
  };
  body.append(...[...body.rows].sort(order));
}
document.querySelectorAll("th button").forEach((button) =>
  button.addEventListener("click", () => sortTable(button.closest("th"))));
