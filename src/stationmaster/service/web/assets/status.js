// Keeps the page up to date from api/events. Whatever comes from there is text: it goes through textContent only.
"use strict";

const NAMED = 200; // so many stations are shown by name; more are squares
const KEPT_REPORTS = 50;
const SIGNS = { s: "✓", n: "–", f: "×", t: "◷", m: "?", r: "!" };
const WORDS = {
  succeeded: "succeeded", noOutput: "no output", failed: "failed",
  timedOut: "timed out", missing: "missing", rejected: "rejected",
};
const $$ = (id) => document.getElementById(id);

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children); // strings become text nodes
  return element;
}

function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// ------------------------------------------------------------------------------------------------ state and figures

function showTiles(tiles) {
  const list = $$("tiles");
  if (list.children.length !== tiles.length) {
    list.replaceChildren(...tiles.map(() =>
      make("div", "tile", make("dt"), make("dd", "", make("strong"), make("span")))));
  }
  tiles.forEach(([heading, figure, note], at) => {
    const tile = list.children[at];
    say(tile.querySelector("dt"), heading);
    say(tile.querySelector("strong"), figure);
    say(tile.querySelector("span"), note);
  });
}

function showList(list, rows, build) {
  const key = JSON.stringify(rows); // a screen reader should not hear again what did not change
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(...rows.map(build));
}

const checkItem = (check) => make("li", check.ok ? "good" : "bad", make("b", "", check.name), " ",
  make("span", "word", check.ok ? "fine" : "not fine"), " ", make("span", "", check.detail));
const troubleItem = (one) => make("li", "", make("b", "", one.name), " ", make("span", "", one.detail));

const batchItems = new Map();

function batchItem() {
  const answers = make("progress", "answers");
  answers.setAttribute("aria-label", "stations that answered");
  const time = make("progress", "time");
  time.setAttribute("aria-label", "time to the deadline");
  const item = make("li", "", make("span", "id"), make("span", "figures"), answers, time);
  return { item, id: item.children[0], figures: item.children[1], answers, time };
}

function showBatches(batches, more) {
  const list = $$("batches");
  const seen = new Set(batches.map((batch) => batch.batchId));
  for (const [id, row] of batchItems) {
    if (!seen.has(id)) { row.item.remove(); batchItems.delete(id); }
  }
  batches.forEach((batch, at) => {
    let row = batchItems.get(batch.batchId);
    if (!row) { row = batchItem(); batchItems.set(batch.batchId, row); }
    const limit = batch.deadlineSeconds;
    const seconds = Math.min(batch.seconds, limit);
    say(row.id, batch.batchId);
    row.id.title = batch.batchId;
    const stage = batch.stage === "uploading" ? "uploading, " : "";
    say(row.figures, `${stage}${batch.answered}/${batch.expected} stations, ${seconds.toFixed(1)} of ${limit} s`);
    row.answers.max = Math.max(batch.expected, 1);
    row.answers.value = batch.answered;
    row.time.max = limit;
    row.time.value = seconds;
    row.item.classList.toggle("late", batch.stage === "collecting" && seconds > 0.8 * limit);
    if (list.children[at] !== row.item) list.insertBefore(row.item, list.children[at] || null);
  });
  while (list.children.length > batches.length) list.lastChild.remove();
  if (!batches.length) list.append(make("li", "nothing", "No batch is open."));
  say($$("more"), more > 0 ? `and ${more} more` : "");
}

// ----------------------------------------------------------------------------------------------------------- reports

const reportRows = new Map();

function showReport(report) {
  const named = report.unsuccessful.map((one) => `${one.stationId} ${WORDS[one.outcome]}`).join(", ");
  const more = report.unsuccessfulMore ? ` and ${report.unsuccessfulMore} more` : "";
  const cells = [report.closedAt.slice(11, 19), report.batchId, report.closedBy, `${report.seconds.toFixed(2)} s`,
    `${report.succeeded}/${report.expected}`, report.upload];
  const row = make("tr", `by-${report.closedBy}`, ...cells.map((cell) => make("td", "", cell)));
  if (named) row.children[1].append(make("small", "", named + more));
  const old = reportRows.get(report.number);
  if (old) old.replaceWith(row);
  else $$("reports").prepend(row);
  reportRows.set(report.number, row);
  while (reportRows.size > KEPT_REPORTS) {
    const [number, oldest] = reportRows.entries().next().value;
    oldest.remove();
    reportRows.delete(number);
  }
}

// ---------------------------------------------------------------------------------------------------------- stations

let ids = [];
let codes = [];
let outcomes = {};
let only = ""; // the letter of the one outcome that is shown
let drawn = []; // the slots on the canvas, in order
let columns = 1;
let pitch = 1;
let cursor = -1;
let due = false;

const matches = () => {
  const wanted = $$("filter").value.toLowerCase();
  const found = [];
  for (let slot = 0; slot < ids.length; slot++) {
    if (ids[slot] !== undefined && (!only || codes[slot] === only) &&
        (!wanted || ids[slot].toLowerCase().includes(wanted))) found.push(slot);
  }
  return found;
};

const stationItem = (slot) => {
  const sign = make("i", "", SIGNS[codes[slot]]);
  sign.setAttribute("aria-hidden", "true");
  const item = make("li", `o-${codes[slot]}`, sign, make("bdi", "", ids[slot]), " ",
    make("span", "out", WORDS[outcomes[codes[slot]]]));
  item.title = ids[slot];
  return item;
};

function showStations() {
  due = false;
  const found = matches();
  const few = found.length <= NAMED;
  const named = few ? found : found.filter((slot) => codes[slot] !== "s").slice(0, NAMED);
  const list = $$("stations");
  const key = named.map((slot) => codes[slot] + ids[slot]).join("\n");
  if (list.dataset.key !== key) {
    list.dataset.key = key;
    list.replaceChildren(...named.map(stationItem));
  }
  const filtered = only || $$("filter").value;
  say($$("matches"), filtered ? `${found.length} of ${ids.length} stations match` :
    few ? "" : `${found.length} stations; by name: those that did not succeed`);
  $$("grid").hidden = few;
  if (few) { say($$("cursor"), ""); cursor = -1; } else draw(found);
}

function later() {
  if (!due) { due = true; requestAnimationFrame(showStations); }
}

function draw(found) {
  drawn = found;
  const canvas = $$("grid");
  const style = getComputedStyle(document.documentElement);
  const colour = {};
  for (const code of Object.keys(outcomes)) colour[code] = style.getPropertyValue(`--o-${code}`);
  const width = canvas.clientWidth;
  pitch = found.length > 8000 ? 6 : found.length > 1500 ? 9 : 13;
  columns = Math.max(1, Math.floor(width / pitch));
  const height = Math.ceil(found.length / columns) * pitch;
  const scale = window.devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  found.forEach((slot, at) => {
    const code = codes[slot];
    const gap = code === "s" ? pitch / 4 : 0.5; // told by size, too, not by colour alone
    const side = pitch - 2 * gap;
    const x = (at % columns) * pitch + gap;
    const y = Math.floor(at / columns) * pitch + gap;
    context.fillStyle = colour[code];
    context.fillRect(x, y, side, side);
    if (at === cursor) {
      context.strokeStyle = style.getPropertyValue("--focus");
      context.lineWidth = 2;
      context.strokeRect(x - gap + 1, y - gap + 1, pitch - 2, pitch - 2);
    }
  });
  const told = Object.entries(outcomes).map(([code, outcome]) =>
    `${found.filter((slot) => codes[slot] === code).length} ${WORDS[outcome]}`).join(", ");
  canvas.setAttribute("aria-label", `Grid of stations: ${told}. Arrow keys name single ones.`);
}

function point(at) {
  if (at < 0 || at >= drawn.length) return;
  cursor = at;
  say($$("cursor"), `${ids[drawn[at]]}: ${WORDS[outcomes[codes[drawn[at]]]]}`);
  later();
}

function showCounts(counts) {
  for (const button of $$("outcomes").children) {
    say(button.querySelector("b"), String(counts[outcomes[button.dataset.code]] || 0));
  }
}

function listen() {
  $$("filter").addEventListener("input", () => { cursor = -1; later(); });
  $$("outcomes").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    only = only === button.dataset.code ? "" : button.dataset.code;
    cursor = -1;
    for (const each of $$("outcomes").children) each.setAttribute("aria-pressed", String(each.dataset.code === only));
    later();
  });
  $$("grid").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (!step) return;
    event.preventDefault();
    point(cursor < 0 ? 0 : cursor + step);
  });
  $$("grid").addEventListener("mousemove", (event) => {
    const column = Math.floor(event.offsetX / pitch);
    if (column < columns) point(Math.floor(event.offsetY / pitch) * columns + column);
  });
  window.addEventListener("resize", later);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", later);
}

// ------------------------------------------------------------------------------------------------------------ events

const readers = {
  whole(shape) {
    outcomes = shape.outcomes;
    ids = new Array(shape.slots);
    codes = new Array(shape.slots);
    reportRows.clear();
    $$("reports").replaceChildren();
    later();
  },
  state(now) {
    const state = $$("state");
    say(state, now.state);
    state.className = `pill ${now.tone}`;
    showTiles(now.tiles);
    showList($$("checks"), now.checks, checkItem);
    showList($$("troubles"), now.troubles, troubleItem);
    showBatches(now.batches, now.more);
    showCounts(now.outcomes);
    document.title = `${now.tone === "good" ? "" : "▲ "}stationmaster`;
  },
  reports(reports) { reports.forEach(showReport); },
  stations(content) {
    if (content.slots) {
      for (const [slot, id, code] of content.slots) { ids[slot] = id; codes[slot] = code; }
    } else {
      content.ids.forEach((id, at) => { ids[content.first + at] = id; codes[content.first + at] = content.codes[at]; });
    }
    later();
  },
};

function follow() {
  const source = new EventSource("api/events");
  const link = $$("link");
  for (const [name, read] of Object.entries(readers)) {
    source.addEventListener(name, (event) => read(JSON.parse(event.data)));
  }
  source.onopen = () => { say(link, "live"); link.className = "quiet"; };
  source.onerror = () => {
    say(link, "no connection: what is shown is old");
    link.className = "quiet lost";
    if (source.readyState === EventSource.CLOSED) setTimeout(follow, 5000); // it was refused: by itself it would not try again
  };
}

listen();
follow();
