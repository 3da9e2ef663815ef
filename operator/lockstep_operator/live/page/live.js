// What the operator says, shown as it comes. Every text from the cluster is put in as text, never as markup.
"use strict";

const STALE_SECONDS = 12; // there is a sign of life every 5
const STILL_SECONDS = 2; // with requests at work and without a step, a group stands still
const HOLD_SECONDS = 2.5; // a rank that stopped is shown so for as long, however quickly it was repaired
const UNFOLDED_SECONDS = 60; // the phases of a repair stay beside their group
const MOODS = { "": "All", ready: "Ready", healing: "Healing", moving: "Starting", stalled: "Needs a person" };
const PHASES = { detect: "detect", abort: "abort", recycle: "recycle", respawn: "respawn", rebuild: "rebuild", verify: "verify", firstToken: "first token" };

const at = (id) => document.getElementById(id);
const view = Object.fromEntries(["text", "mood", "page"].map((name) => [name, new URLSearchParams(location.search).get(name) || ""]));
const models = new Map(); // id → card
const faults = new Map(); // id → card, with `seen`: when this page first heard of it
const rows = new Map(); // id → ModelRow
let ids = [], faultIds = [], source = null, heard = 0, tried = 0, skew = 0;
if (!(view.mood in MOODS)) view.mood = "";
if (!/^[1-9][0-9]{0,8}$/.test(view.page)) view.page = "";

const local = () => Date.now() / 1000;
const now = () => local() + skew; // by the operator's clock
const took = (seconds) => seconds < 0.9995 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(2)} s`;
const many = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

function make(tag, kind = "", text = "") {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text) node.textContent = text;
  return node;
}

function put(node, text) { if (node.textContent !== text) node.textContent = text; }
function feel(node, mood) { if (node.dataset.mood !== mood) node.dataset.mood = mood; }

// The children of `parent` are those of `keys`, in order; `known` keeps them, so that what stays is not drawn anew.
function arrange(parent, keys, known, create) {
  for (const [key, one] of known) if (!keys.includes(key)) { one.node.remove(); known.delete(key); }
  keys.forEach((key, place) => {
    if (!known.has(key)) known.set(key, create(key));
    const { node } = known.get(key);
    if (parent.children[place] !== node) parent.insertBefore(node, parent.children[place] || null);
  });
}

// --- faults

const held = (fault) => fault.seen !== undefined && local() - fault.seen < HOLD_SECONDS;
const active = (fault) => fault !== undefined && (!fault.recoveredAt || held(fault));
const newest = (model, group) => faultIds.map((id) => faults.get(id)).find((one) => one.model === model && one.group === group);
const where = (fault) => `group ${fault.group}${fault.rank === undefined ? "" : ` rank ${fault.rank}`}`;

function outcome(fault) {
  if (!fault.recoveredAt) return `${fault.rung ? `being repaired by ${fault.rung}` : "being repaired"}, for ${took(Math.max(0, now() - fault.at))}`;
  if (fault.rung === "Drop") return "one request was refused; nothing else happened";
  const kept = fault.resumed ? `; ${many(fault.resumed, "request")} went on` : "";
  return `healed by ${fault.rung} in ${took(Math.max(0, fault.recoveredAt - fault.at))}${kept}`;
}

class PhaseList {
  constructor() { this.node = make("ol", "phases"); this.node.setAttribute("aria-label", "Phases of the repair"); this.items = new Map(); }

  update(fault) {
    const done = Object.keys(PHASES).filter((name) => fault.phases?.[name] !== undefined);
    const last = Object.keys(PHASES).indexOf(done.at(-1));
    const next = fault.recoveredAt ? [] : Object.keys(PHASES).slice(last + 1).filter((name) => name !== "recycle").slice(0, 1);
    arrange(this.node, [...done, ...next], this.items, (name) => ({ node: make("li"), name }));
    [...done, ...next].forEach((name, place) => {
      const { node } = this.items.get(name), over = done.includes(name);
      node.style.setProperty("--place", place);
      node.className = over ? (name === "detect" ? "first" : "") : "next";
      put(node, over ? `${PHASES[name]} ${took(fault.phases[name])}` : `${PHASES[name]} …`);
    });
  }
}

class FaultItem {
  constructor() {
    this.node = make("li", "fault");
    this.head = make("h3");
    this.when = make("p", "soft");
    this.words = make("p", "words");
    this.end = make("p");
    this.phases = new PhaseList();
    this.node.append(this.head, this.when, this.words, this.end, this.phases.node);
  }

  update(fault) {
    this.node.classList.toggle("open", !fault.recoveredAt);
    put(this.head, `${fault.fault}: ${fault.model}`);
    put(this.when, `${new Date(fault.at * 1000).toLocaleTimeString()}, ${where(fault)}`);
    put(this.words, fault.message || "");
    put(this.end, outcome(fault));
    this.phases.update(fault);
  }
}

// --- models

class RankBox {
  constructor() {
    this.node = make("li", "rank");
    this.number = make("span");
    this.number.setAttribute("aria-hidden", "true");
    this.words = make("span", "unseen");
    this.node.append(this.number, this.words);
  }

  update(rank, mood) {
    feel(this.node, mood);
    put(this.number, String(rank.rank));
    const words = `rank ${rank.rank}: ${mood === "stopped" ? "stopped" : mood === "waiting" ? "waits" : rank.state}`;
    put(this.words, words);
    this.node.title = [words, rank.pod, rank.node, rank.message].filter(Boolean).join("\n");
  }
}

class GroupRow {
  constructor() {
    this.node = make("div", "group");
    this.name = make("span", "name");
    this.ranks = make("ol", "ranks");
    this.figures = make("span", "figures");
    this.words = make("p", "words soft");
    this.phases = new PhaseList();
    this.boxes = new Map();
    const row = make("div", "row");
    row.append(this.name, this.ranks, this.figures);
    this.node.append(row, this.words, this.phases.node);
  }

  update(model, card) {
    const fault = newest(model, card.group), mood = this.mood(card, fault);
    feel(this.node, mood);
    put(this.name, `group ${card.group}`);
    this.ranks.setAttribute("aria-label", `Ranks of group ${card.group}`);
    const ranks = card.ranks || [];
    arrange(this.ranks, ranks.map((rank) => rank.rank), this.boxes, () => new RankBox());
    for (const rank of ranks) this.boxes.get(rank.rank).update(rank, this.rankMood(rank, mood, fault));
    put(this.figures, this.numbers(card, ranks));
    put(this.words, this.sentence(card, mood, fault));
    const shown = fault && (active(fault) || local() - fault.seen < UNFOLDED_SECONDS);
    this.phases.node.hidden = !shown;
    if (shown) this.phases.update(fault);
  }

  mood(card, fault) {
    if (active(fault)) return "broken";
    if (card.state !== "Ready") return "moving";
    if (!card.running) return "idle";
    return card.lastStep && now() - card.lastStep > STILL_SECONDS ? "still" : "working";
  }

  rankMood(rank, mood, fault) {
    if (rank.suspect || (mood === "broken" && fault.rank === rank.rank)) return "stopped";
    if (rank.state !== "Ready" && rank.state !== "Loaded") return rank.state === "Failed" ? "stopped" : "away";
    if (mood === "broken" || mood === "still" || rank.state === "Loaded") return "waiting";
    return fault && fault.rank === rank.rank && local() - fault.seen < UNFOLDED_SECONDS ? "mended" : "ready";
  }

  numbers(card, ranks) {
    const more = (card.size || 0) - ranks.length;
    const steps = card.p50 === undefined ? "" : `step p50 ${took(card.p50 / 1000)}, p99 ${took((card.p99 ?? card.p50) / 1000)}`;
    const work = card.running || card.waiting ? `${card.running || 0} running, ${card.waiting || 0} waiting` : "";
    return [more > 0 ? `and ${many(more, "rank")} more` : "", steps, work].filter(Boolean).join(" · ");
  }

  sentence(card, mood, fault) {
    if (mood === "broken") return `${fault.fault}: ${fault.message || where(fault)}; ${outcome(fault)}`;
    if (mood === "still") return `no step for ${took(now() - card.lastStep)}, with ${many(card.running, "request")} at work`;
    return card.state === "Ready" ? "" : [card.state, card.message].filter(Boolean).join(": ");
  }
}

class RankTable {
  constructor() {
    this.node = make("details");
    this.body = make("tbody");
    const table = make("table"), head = make("thead"), row = make("tr");
    for (const title of ["group", "rank", "state", "pod", "node", "p50", "p99", "respawns"]) row.append(make("th", "", title));
    head.append(row);
    table.append(head, this.body);
    this.node.append(make("summary", "", "Ranks"), table);
    this.node.addEventListener("toggle", () => this.update(this.card));
  }

  update(card) {
    this.card = card;
    if (!this.node.open) return;
    this.body.replaceChildren(...(card.groups || []).flatMap((group) => (group.ranks || []).map((rank) => {
      const row = make("tr"), ms = (value) => value === undefined ? "" : took(value / 1000);
      const cells = [group.group, rank.rank, rank.state, rank.pod, rank.node, ms(rank.p50), ms(rank.p99), rank.respawns || 0];
      for (const cell of cells) row.append(make("td", "", String(cell ?? "")));
      return row;
    })));
  }
}

class ModelRow {
  constructor(id) {
    this.id = id;
    this.node = make("article", "model");
    this.name = make("h3");
    this.space = make("span", "soft");
    this.word = make("span", "mood");
    this.count = make("span", "soft");
    this.words = make("p", "words soft");
    this.groups = make("div");
    this.more = make("p", "soft");
    this.table = new RankTable();
    this.kept = new Map();
    const head = make("div", "head");
    head.append(this.name, this.space, this.word, this.count);
    this.node.append(head, this.words, this.groups, this.more, this.table.node);
  }

  update(card) {
    const groups = card.groups || [];
    feel(this.node, card.mood);
    this.node.setAttribute("aria-label", `${card.name} in ${card.namespace}`);
    put(this.name, card.name);
    put(this.space, card.namespace);
    put(this.word, card.mood === "ready" ? "Ready" : `${MOODS[card.mood]}${card.reason ? `: ${card.reason}` : ""}`);
    put(this.count, `ranks ${card.ranks || "?"}${card.recoveries ? `, ${many(card.recoveries, "repair")}` : ""}`);
    put(this.words, card.mood === "ready" ? "" : card.message || "");
    arrange(this.groups, groups.map((group) => group.group), this.kept, () => new GroupRow());
    for (const group of groups) this.kept.get(group.group).update(card.id, group);
    put(this.more, (card.size || 0) > groups.length ? `and ${many(card.size - groups.length, "group")} more` : "");
    this.table.update(card);
  }
}

// --- the page

const items = new Map();

function draw() {
  arrange(at("models"), ids, rows, (id) => new ModelRow(id));
  for (const id of ids) rows.get(id).update(models.get(id));
  arrange(at("faults"), faultIds, items, () => new FaultItem());
  for (const id of faultIds) items.get(id).update(faults.get(id));
  at("no-faults").hidden = faultIds.length > 0;
}

function take(message) {
  skew = message.now - local();
  if (message.ids) ids = message.ids;
  if (message.faultIds) faultIds = message.faultIds;
  for (const card of message.models || []) models.set(card.id, card);
  for (const card of message.faults || []) takeFault(card, message.now);
  for (const id of models.keys()) if (!ids.includes(id)) models.delete(id);
  for (const id of faults.keys()) if (!faultIds.includes(id)) faults.delete(id);
  tally(message);
}

function takeFault(card, present) {
  const known = faults.get(card.id), fresh = present - (card.recoveredAt || present) < 10;
  faults.set(card.id, { ...card, seen: known ? known.seen : fresh ? local() : -Infinity });
  if (fresh && !known) at("said").textContent = `${card.fault} in ${card.model}, ${where(card)}`;
  else if (known && !known.recoveredAt && card.recoveredAt) at("said").textContent = `${card.model}: ${outcome(card)}`;
}

function tally(message) {
  const all = Object.values(message.tally).reduce((sum, count) => sum + count, 0);
  for (const button of at("moods").children) {
    button.setAttribute("aria-pressed", String(button.value === view.mood));
    put(button.lastChild, String(button.value ? message.tally[button.value] || 0 : all));
  }
  at("pages").hidden = message.pages < 2;
  put(at("page"), `${message.page} of ${message.pages} (${message.matching} models)`);
  at("back").disabled = message.page <= 1;
  at("next").disabled = message.page >= message.pages;
  view.page = String(message.page);
  at("empty").hidden = message.matching > 0;
  put(at("empty"), all ? "No model is like that." : "There is no TensorParallelModel yet, or the operator has not read it yet.");
}

function link(state, word) {
  at("link").dataset.state = state;
  document.body.classList.toggle("stale", state === "stale");
  put(at("link-word"), word);
}

function connect() {
  tried = local();
  source?.close();
  const query = new URLSearchParams(Object.entries(view).filter(([, value]) => value));
  source = new EventSource(`feed?${query}`);
  source.onmessage = (event) => { heard = local(); link("live", "live"); take(JSON.parse(event.data)); draw(); };
  source.onerror = () => { // it tries again by itself, unless it was refused
    link("stale", "not connected: this is what was last heard");
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
  };
}

function show(change) {
  Object.assign(view, { page: "" }, change);
  const query = new URLSearchParams(Object.entries(view).filter(([, value]) => value));
  history.replaceState(null, "", query.size ? `?${query}` : location.pathname);
  connect();
}

function tick() {
  const silent = local() - heard;
  if (heard && silent > STALE_SECONDS) link("stale", "stale: nothing is heard of the operator");
  if (Math.min(silent, local() - tried) > STALE_SECONDS) connect();
  put(at("link-age"), at("link").dataset.state === "stale" && heard ? `for ${Math.round(silent)} s` : "");
  draw();
}

for (const [mood, word] of Object.entries(MOODS)) {
  const button = make("button", "", `${word} `);
  button.type = "button";
  button.value = mood;
  button.append(make("b", "", "0"));
  button.addEventListener("click", () => show({ mood }));
  at("moods").append(button);
}
let typed;
at("text").value = view.text;
at("text").addEventListener("input", () => { clearTimeout(typed); typed = setTimeout(() => show({ text: at("text").value }), 250); });
at("back").addEventListener("click", () => show({ page: String(Number(view.page) - 1) }));
at("next").addEventListener("click", () => show({ page: String(Number(view.page) + 1) }));
connect();
setInterval(tick, 500);
