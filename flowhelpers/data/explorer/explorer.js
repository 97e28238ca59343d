// The explorer of a model's flow: one view, for JupyterLab (the default export, by anywidget) and
// for a page on disk (`openPage`). Whatever comes from a suite or a file is shown as text.

const NAMES = { res: "stream", mlp: "MLP", att: "attention" };
const LOOKS = {
  translated: ["●", "circle", "#56B4E9"], processed: ["◆", "diamond", "#E69F00"],
  newborn: ["▲", "triangle-up", "#CC79A7"], unexplained: ["✖", "x", "#8C8C8C"],
  mlp: ["■", "square", "#D55E00"], att: ["★", "star", "#009E73"],
  res: ["○", "circle-open", "#0072B2"],
  alternative: ["○", "circle-open", "#8C8C8C"], direct: ["◇", "diamond-open", "#0072B2"],
};
const READINGS = {
  translated: "passed on: only s(R) is above chance",
  processed: "passed on and changed: s(R) is above chance, and s(M) or s(A)",
  newborn: "born here: s(M) or s(A) is above chance, s(R) is not",
  unexplained: "no score is above chance",
};
const SCORES = { res: "s(R)", mlp: "s(M)", att: "s(A)" };
const SET = "flowhelpers feature set, version 1";
const UNCUT = { res: 0, mlp: 0, att: 0 };
const CHANCE = "Every match is the cosine of two decoder directions, held against the best of random directions: above 99.9 % of these it is above chance.";
const COLOURS = ["#56B4E9", "#E69F00", "#CC79A7", "#8C8C8C", "#009E73", "#D55E00", "#0072B2", "#F0E442"];
const PATTERNS = ["", "/", "x", ".", "\\", "-", "+", "|"];

function el(tag, given = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(given)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key in node && key !== "list") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}
const quiet = (text) => el("p", { className: "fx-quiet" }, text);
const row = (...children) => el("div", { className: "fx-row" }, ...children);
const number = (value, step = 0.25) => el("input", { type: "number", value, step, style: "width:5rem" });
const choice = (texts, selected, onchange = () => {}) => el("select", { onchange }, ...Object.entries(texts).map(
  ([value, text]) => el("option", { value, selected: value === selected }, text)));
const table = (rows, heads) => el("table", {},
  heads ? el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head))) : "",
  ...rows.map(([first, ...cells]) => el("tr", {}, el("th", { scope: "row" }, first), ...cells.map((cell) => el("td", {}, cell)))));
const shade = (share) => (share > 0 ? `background:rgba(230,159,0,${(0.15 + 0.55 * share).toFixed(2)})` : "");
const parse = (name) => {
  const [layer, module, index] = name.split("/");
  return { layer: Number(layer), module, index: Number(index) };
};
const INVISIBLE = { " ": "␣", "\n": "⏎", "\t": "⇥" };
const visible = (text) => text.replaceAll(/[\p{Z}\p{C}]/gu, (c) => INVISIBLE[c] ?? `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
const isBlank = (token) => /^[\p{Z}\p{C}]*$/u.test(token);
const shown = (token) => (isBlank(token) ? visible(token) || "(nothing)" : token.trim());
const count = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
const focusable = (part) => [...part.querySelectorAll("button, input, select, summary, a[href]")].filter((each) => !each.disabled);
const called = (node) => node.getAttribute("aria-label") ?? node.labels?.[0]?.textContent ?? node.textContent;
const inPlotly = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const two = (x) => (x === null || x === undefined ? "–" : x.toFixed(2));
const digits = (x, n) => String(Number(x.toPrecision(n))); // never 1.0e+2
const percent = (x) => `${digits(100 * x, 2)} %`;

// What is known of the features: all of them in a page or of a small suite, else what was asked for.
class Records {
  constructor(about, ask) {
    this.about = about;
    this.ask = ask; // of a kernel: (what, given) → reply; undefined in a page
    this.known = new Map();
    this.centers = new Set(about.seeds); // whose whole chains are at hand
  }
  add(records) {
    for (const [name, record] of Object.entries(records)) {
      if (!this.known.get(name)?.on) this.known.set(name, record);
    }
  }
  get(name) { return this.known.get(name) ?? {}; }
  peaks(name) { return [...new Set((this.get(name).contexts ?? []).map(([row]) => shown(this.about.tokens[row])))]; }
  label(name) {
    const { label, writes } = this.get(name), peaks = this.peaks(name);
    const active = peaks.length ? `active at ${peaks.join(", ")}` : "";
    const written = writes ? `writes ${writes.slice(0, 4).map(shown).join(", ")}` : "";
    return label ?? [active, written].filter(Boolean).join("; ");
  }
  caption(name) {
    const { label, writes } = this.get(name), peaks = this.peaks(name);
    return label?.split("\n")[0] ?? (peaks.length ? peaks : (writes ?? []).slice(0, 3).map(shown)).join(", ");
  }
  labelFrom(name) {
    const { from, contexts, writes } = this.get(name);
    return from ?? [contexts?.length ? "top contexts" : "", writes ? "logit lens" : ""].filter(Boolean).join(" and ");
  }
  null(direction, layer, module) { return this.about.blocks[`${direction} ${layer} ${module}`]?.null ?? null; }
  check(text) {
    const name = text.replaceAll(/\s/g, "");
    if (!/^\d+\/(res|mlp|att)\/\d+$/.test(name)) return [null, `“${text}” is no feature: expected one such as ${Object.keys(this.about.sites)[0]}/0.`];
    const { layer, module, index } = parse(name), sites = Object.keys(this.about.sites);
    const width = this.about.sites[`${layer}/${module}`];
    if (width === undefined) return [null, `No SAE at ${layer}/${module}: there are ${sites.length > 24 ? `${sites[0]} to ${sites.at(-1)}` : sites.join(", ")}.`];
    if (index >= width) return [null, `No feature ${name}: ${layer}/${module} has features 0 to ${width - 1}.`];
    return [`${layer}/${module}/${index}`, null];
  }
  async fetch(name) {
    if (this.about.whole || !this.ask ? this.get(name).on : this.centers.has(name)) return;
    if (this.about.whole || !this.ask) {
      const { seeds, suite } = this.about, command = `flowhelpers explore ${suite} ${name} --html FILE`;
      throw new Error(`${name} is not in this page, which holds what is near ${seeds.join(", ")}. To have it: ${command}`);
    }
    this.add((await this.ask("near", { feature: name })).records);
    this.centers.add(name);
  }
  // The features that stand for a subject, best first.
  standing(subject) { return this.about.subjects[subject.replaceAll(" ", "_")] ?? []; }
  async search(text) {
    const wanted = text.trim().toLowerCase();
    if (!this.about.whole && this.ask) {
      const reply = await this.ask("search", { text });
      this.add(reply.records);
      return Object.keys(reply.records).map((name) => [name, "by label or subject"]);
    }
    const standing = this.standing(wanted), found = standing.map((name, i) => [i - standing.length, name, `stands for ${wanted}`]);
    for (const [name, record] of this.known) {
      if (standing.includes(name)) continue;
      const at = (record.writes ?? []).findIndex((token) => token.trim().toLowerCase() === wanted);
      const peaks = (record.contexts ?? []).map(([row]) => this.about.tokens[row].trim().toLowerCase());
      if (record.label?.toLowerCase().includes(wanted)) found.push([0, name, "label"]);
      else if (peaks.includes(wanted)) found.push([1, name, "most active at it"]);
      else if (at >= 0) found.push([2 + at / 100, name, `writes it, ${at + 1}. of ${record.writes.length}`]);
    }
    return found.sort((a, b) => a[0] - b[0]).slice(0, 60).map(([, name, why]) => [name, why]);
  }
  async listed(view, layer, value) {
    if (!this.about.whole && this.ask) {
      const reply = await this.ask("listed", { view, layer, value });
      this.add(reply.records);
      return Object.keys(reply.records);
    }
    const test = {
      class: (r) => r.class === value, born: (r) => r.born === value,
      life: (r) => r.life && Math.floor(Math.log2(r.life[1] - r.life[0] + 1)) === Math.floor(Math.log2(parseInt(value))),
    }[view];
    return [...this.known].filter(([name, r]) => name.startsWith(`${layer}/res/`) && test(r)).map(([name]) => name);
  }
  // The flow of a feature: its chain back and on by best matches, the modules' best, and with more
  // `ranks` what else each node chose. A chain ends where s(R) is below `cut.res` (CHOICES 26).
  flow(center, cut, ranks, aboveOnly) {
    const nodes = new Map(), edges = [];
    const node = (name, role) => { if (!nodes.has(name)) nodes.set(name, { name, role, ...parse(name) }); };
    const edge = (source, target, kind, score, nullAt, rank, mutual) => {
      if (aboveOnly && rank > 1 && !(score > nullAt)) return false;
      edges.push({ source, target, kind, score, null: nullAt, rank, mutual });
      return true;
    };
    let start = center;
    node(center, "chain");
    if (parse(center).module !== "res") {
      const { layer, module } = parse(center), on = this.get(center).on ?? {};
      (on.to ?? []).slice(0, ranks).forEach((index, i) => {
        const name = `${layer}/res/${index}`;
        if (on.score[i] < cut[module]) return;
        const line = this.null("forward", layer, module);
        if (edge(center, name, module, on.score[i], line, i + 1, i === 0 && on.mutual)) node(name, i ? "alternative" : "chain");
        if (i === 0) start = name;
      });
      if (start === center) return { nodes, edges, cutAt: [] };
    }
    const chain = [start], cutAt = [];
    for (let name = start; ;) { // back
      const { layer } = parse(name), back = this.get(name).back?.res;
      if (!back?.to?.length) break;
      if (back.score[0] < cut.res) { cutAt.push(`before layer ${layer}`); break; }
      const before = `${layer - 1}/res/${back.to[0]}`;
      node(before, "chain");
      edge(before, name, "res", back.score[0], this.null("backward", layer, "res"), 1, back.mutual);
      chain.unshift(name = before);
    }
    for (let name = start; ;) { // on
      const { layer } = parse(name), on = this.get(name).on;
      if (!on?.to?.length) break;
      const next = `${layer + 1}/res/${on.to[0]}`, own = this.get(next).back?.res;
      if (own && own.score[0] < cut.res) { cutAt.push(`after layer ${layer}`); break; }
      node(next, "chain");
      edge(name, next, "res", on.score[0], this.null("forward", layer + 1, "res"), 1, on.mutual);
      chain.push(name = next);
    }
    for (const name of chain) {
      const { layer } = parse(name), record = this.get(name), middle = parse(start).layer;
      for (const [module, back] of Object.entries(record.back ?? {})) {
        if (module === "res" && layer > middle) continue;
        back.to.slice(0, ranks).forEach((index, i) => {
          const source = `${layer - (module === "res")}/${module}/${index}`;
          if (back.score[i] < cut[module] || (module === "res" && i === 0)) return;
          const line = this.null("backward", layer, module), mutual = i === 0 && back.mutual;
          if (edge(source, name, module, back.score[i], line, i + 1, mutual)) node(source, i ? "alternative" : "module");
        });
      }
      if (layer >= middle) (record.on?.to ?? []).slice(1, ranks).forEach((index, i) => {
        const target = `${layer + 1}/res/${index}`, score = record.on.score[i + 1];
        if (score >= cut.res && edge(name, target, "res", score, this.null("forward", layer + 1, "res"), i + 2, false)) node(target, "alternative");
      });
    }
    return { nodes, edges, chain, cutAt };
  }
}

class Explorer {
  constructor(root, records, Plotly, hooks = {}) {
    Object.assign(this, { root, records, Plotly, hooks });
    this.past = []; this.future = []; this.center = null;
    this.cut = { ...UNCUT }; this.ranks = 1; this.direct = false; this.aboveOnly = false;
    this.pins = new Map(); this.setName = ""; // of each pinned feature its label, and who says so
    this.planned = { kind: "add", strength: 1 };
    this.view = "class";
    this.build();
    try { this.readSet(JSON.parse(sessionStorage.getItem(this.storeKey))); } catch { /* none kept */ }
  }
  get about() { return this.records.about; }
  get like() { return this.about.start || `${Object.keys(this.about.sites)[0]}/0`; }
  get storeKey() { return `flowhelpers ${this.about.suite}`; } // so that a cell that is run again has them
  build() {
    const about = this.about;
    this.say = el("p", { className: "fx-say", role: "status", "aria-live": "polite" });
    this.found = el("ul", { className: "fx-found" });
    const find = (event) => { event.preventDefault(); this.attempt(() => this.search()); };
    const onkeydown = (event) => { if (event.key === "Enter") find(event); }; // JupyterLab submits no form
    this.query = el("input", { type: "search", placeholder: `label, token, subject or ${this.like}`, onkeydown });
    const form = el("form", { onsubmit: find }, el("label", {}, "Search", this.query), el("button", {}, "Find"));
    this.back = el("button", { onclick: () => this.travel(this.past, this.future) }, "← Back");
    this.forward = el("button", { onclick: () => this.travel(this.future, this.past) }, "Forward →");
    const home = el("button", { onclick: () => this.attempt(() => this.go(null)) }, "Whole model");
    this.plot = el("div", { className: "fx-plot", role: "img" });
    this.box = el("div", { className: "fx-scroll" }, this.plot);
    this.legend = el("p", { className: "fx-row" }); // apart from the plot, which may be wider than its box
    this.controls = el("div", { className: "fx-row" },
      ...["res", "mlp", "att"].map((module) => this.slider(`cut ${SCORES[module]} below`, 0, 1, 0.01, (x) => { this.cut[module] = x; })),
      this.slider("ranks shown", 1, 5, 1, (x) => { this.ranks = x; }),
      this.tick("direct matches of far layers", (on) => { this.direct = on; return on ? this.askDirect() : null; }),
      this.tick("alternatives above chance only", (on) => { this.aboveOnly = on; }));
    this.table = el("div", { className: "fx-scroll" });
    this.trial = el("section", { className: "fx-pins", "aria-label": "try the feature in the model", hidden: true });
    this.card = el("aside", { className: "fx-card", "aria-label": "the feature" });
    this.pinBox = el("section", { className: "fx-pins", "aria-label": "pinned features" });
    const nav = el("div", { className: "fx-row" }, form, this.back, this.forward, home);
    this.parts = [nav, this.table, this.card, this.pinBox]; // what a redraw takes the focus from
    const seeds = about.seeds.slice(0, 8).join(", ") + (about.seeds.length > 8 ? ", …" : "");
    const part = about.whole || this.records.ask ? "" : `This page holds what is near ${seeds}, not the whole suite.`;
    this.root.classList.add("fx");
    this.root.dataset.lmSuppressShortcuts = "true"; // keys typed here are not JupyterLab's
    this.root.replaceChildren(
      el("h2", {}, `The flow of ${about.suite}`), quiet(part),
      nav, this.say, this.found,
      el("div", { className: "fx-body" }, el("section", {}, this.controls, this.legend, this.box, this.table, this.trial), this.card),
      this.pinBox);
    new ResizeObserver(() => { if (this.drawn && this.wide !== this.box.clientWidth) this.draw(); }).observe(this.box);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }
  slider(name, min, max, step, set) {
    const out = el("output", {}, String(min));
    const input = el("input", { type: "range", min, max, step, value: min, oninput: () => {
      out.textContent = input.value; set(Number(input.value)); this.draw();
    } });
    return el("label", {}, name, input, out);
  }
  tick(name, set) {
    const input = el("input", { type: "checkbox", onchange: () => this.attempt(async () => { await set(input.checked); this.draw(); }) });
    return el("label", {}, input, name);
  }
  tell(text, wrong = false) {
    this.say.textContent = text;
    this.say.classList.toggle("fx-wrong", wrong);
    if (text && !text.endsWith("…")) this.say.scrollIntoView({ block: "nearest" });
  }
  async attempt(work) {
    try { this.tell(""); await work(); } catch (error) { this.tell(error.message, true); }
  }
  button(name, text = name) {
    return el("button", { className: "fx-link", onclick: () => this.attempt(() => this.go(name)) }, text);
  }
  async search() {
    const text = this.query.value.trim();
    this.found.replaceChildren();
    if (!text) throw new Error(`Nothing to search for: type a label, a token, a subject or a feature such as ${this.like}.`);
    if (/^[\d\s]+\/\s*(res|mlp|att)\s*\/[\d\s]+$/.test(text)) {
      const [name, wrong] = this.records.check(text);
      if (wrong) throw new Error(wrong);
      return this.go(name);
    }
    const found = await this.records.search(text), of = Object.keys(this.about.subjects), subject = text.toLowerCase();
    const none = of.includes(subject.replaceAll(" ", "_")) && !this.records.standing(subject).length ? `No feature stands for ${subject}` : "";
    if (!found.length) {
      const some = of.filter((each) => this.records.standing(each).length).join(", ");
      throw new Error(`${none || `No feature has “${text}” as label, token or subject`}.${some && ` Subjects that have one: ${some}.`}`);
    }
    this.tell(`${found.length === 60 ? "the first 60" : found.length} found${none && ` by label or token. ${none}.`}`);
    this.list(found);
  }
  list(found) {
    this.found.replaceChildren(...found.map(([name, why]) => el("li", {},
      this.button(name), ` ${this.records.label(name)} `, el("span", { className: "fx-quiet" }, why))));
    this.found.scrollIntoView({ block: "nearest" });
  }
  travel(from, to) {
    if (!from.length) return;
    to.push(this.center);
    this.attempt(() => this.go(from.pop(), false));
  }
  async go(name, remember = true) {
    const asked = this.asked = {}; // what is asked for later comes first, whichever the kernel answers first
    if (name) await this.records.fetch(name);
    if (asked !== this.asked) return;
    if (remember && this.center !== undefined && name !== this.center && this.drawn) {
      this.past.push(this.center);
      this.future = [];
    }
    this.center = name;
    this.drawn = true;
    this.hooks.keep?.(name, [...this.pins.keys()]);
    this.draw();
    this.askMore().catch(() => {});
    if (name && this.direct) this.askDirect().catch((error) => this.tell(error.message, true));
  }
  async askDirect() { // once the card is there, for the first time takes long
    const name = this.center, record = this.records.get(name);
    if (!name || record.direct || !this.records.ask || parse(name).module !== "res") return;
    this.tell("computing the direct matches …");
    record.direct = (await this.records.ask("direct", { feature: name })).direct;
    this.tell("");
    this.draw();
  }
  async askMore() { // of a large suite: what the features of the graph write, once they are drawn
    if (this.about.whole || !this.records.ask || !this.center) return;
    const drawn = this.records.flow(this.center, UNCUT, 1, false).nodes.keys();
    const features = [...drawn].filter((name) => !this.records.get(name).writes);
    const { writes } = await this.records.ask("writes", { features });
    for (const [name, tokens] of Object.entries(writes)) this.records.get(name).writes = tokens;
    if (Object.keys(writes).length) this.draw();
  }

  // ---- the graph and the overview
  draw() {
    const held = document.activeElement, part = this.parts.find((each) => each.contains(held));
    const name = part && called(held), at = part && focusable(part).indexOf(held);
    this.back.disabled = !this.past.length;
    this.forward.disabled = !this.future.length;
    this.controls.hidden = !this.center;
    this.trial.hidden = !this.center || !this.records.ask;
    this.wide = this.box.clientWidth;
    this.tall = this.wide < 560;
    if (this.center) { this.drawFlow(); this.drawCard(); } else this.drawOverview();
    if (this.pinsChanged ?? true) this.drawPins();
    this.pinsChanged = false;
    if (!part || (held.isConnected && !held.disabled)) return;
    const now = focusable(part); // the same again, or what stands in its place
    (now.find((each) => called(each) === name) ?? now[Math.min(at, now.length - 1)])?.focus({ preventScroll: true });
  }
  paint(traces, layout, label, clicked) {
    const { color: ink, backgroundColor: bg, fontFamily: family } = getComputedStyle(this.root);
    const grid = { gridcolor: "rgba(128,128,128,.25)", zeroline: false };
    const whole = {
      width: this.wide, font: { color: ink, size: 12, family }, paper_bgcolor: bg, plot_bgcolor: bg,
      margin: { l: 62, r: 12, t: 12, b: 40 }, showlegend: true,
      hoverlabel: { bgcolor: bg, font: { color: ink, size: 13 }, align: "left" },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 12 } },
      ...layout, xaxis: { ...grid, ...layout.xaxis }, yaxis: { ...grid, ...layout.yaxis },
    };
    this.plot.setAttribute("aria-label", label);
    this.Plotly.react(this.plot, traces, whole, { displayModeBar: false });
    this.plot.removeAllListeners?.("plotly_click");
    this.plot.on("plotly_click", (event) => clicked(event.points[0]));
  }
  drawFlow() {
    const { nodes, edges, cutAt } = this.records.flow(this.center, this.cut, this.ranks, this.aboveOnly);
    const chance = (layer) => two(this.about.chance[layer]);
    if (this.direct) for (const [layer, index, score] of this.records.get(this.center).direct ?? []) {
      const name = `${layer}/res/${index}`, own = nodes.get(name)?.role === "chain" ? ", the chain's own node" : "";
      const told = `direct match of ${this.center}: ${two(score)}, chance ${chance(layer)}${own}`;
      nodes.set(`direct ${name}`, { name, layer, module: "res", index, role: "direct", told });
    }
    for (const e of edges) {
      const source = nodes.get(e.source), target = nodes.get(e.target);
      const rank = e.rank > 1 ? `, rank ${e.rank}` : "", mutual = e.mutual ? ", mutual" : "";
      const told = `${two(e.score)}, chance ${two(e.null)}${rank}${mutual}`;
      if (target.role === "alternative") Object.assign(target, { rank: e.rank, told: `${told}, from ${e.source}` });
      else Object.assign(source, { rank: e.rank, told: source.told ?? `${told}, to ${e.target}` });
    }
    const all = [...nodes.values()], layers = [...new Set(all.map((n) => n.layer))].sort((a, b) => a - b);
    const bounds = this.place(all, layers);
    this.legend.replaceChildren(...[...new Set(all.map((n) => n.kind))].map((kind) => el("span", {},
      el("span", { style: `color:${LOOKS[kind][2]}` }, `${LOOKS[kind][0]} `), READINGS[kind] ? `stream, ${kind}` : NAMES[kind] ?? kind)));
    this.paint([...this.lines(nodes, edges), ...this.markers(all)], { hovermode: "closest", showlegend: false, ...bounds },
      `the flow graph of ${this.center}, ${all.length} features; the table below lists them`,
      (point) => this.attempt(() => this.go(point.customdata)));
    const seen = `${this.center} ${bounds.width}`;
    if (this.seen !== seen) { // a graph that is wider than its box scrolls to the centre
      const { xaxis } = this.plot._fullLayout, { x } = nodes.get(this.center);
      this.box.scrollLeft = xaxis._offset + xaxis.d2p(x) - this.wide / 2;
      this.seen = seen;
    }
    const ends = this.about.whole || this.records.ask || this.records.centers.has(this.center) ? ""
      : " This page holds not all of its chain: only that of the features it was made for is whole.";
    const cut = cutAt.length ? ` The chain is cut ${cutAt.join(" and ")}.` : "";
    const rows = all.sort((a, b) => a.layer - b.layer).map((n) => [
      this.button(n.name), `${LOOKS[n.kind][0]} ${NAMES[n.kind] ?? n.kind}`, n.told ?? "", this.records.label(n.name)]);
    this.table.replaceChildren(
      quiet(`Lines are thicker where the cosine is higher, dotted where it is not above chance.${cut}${ends}`),
      el("details", { open: this.tableOpen ?? false, ontoggle: (event) => { this.tableOpen = event.target.open; } },
        el("summary", {}, all.length === 1 ? "This feature as a table" : `These ${all.length} features as a table`),
        table(rows, ["feature", "what", "match", "label"])));
  }
  // Gives the nodes their places and texts: layers along, modules across; upright where it is narrow.
  place(nodes, layers) {
    const tall = this.tall, low = layers[0], high = layers.at(-1), far = nodes.some((n) => n.role === "direct");
    const more = this.ranks - 1 + (parse(this.center).module !== "res"), [step, first] = tall ? [0.17, 0.2] : [0.42, 0.3];
    const gap = more ? step * more + first : 0, lane = { res: 0, att: tall && more ? 1.3 : 1, mlp: -1 - gap, direct: -2 - 2 * gap };
    const ends = [(far ? lane.direct : lane.mlp - gap) - (tall ? 0.4 : 0.7), lane.att + gap + (tall && more ? 0.2 : 0.5)];
    const width = Math.max(this.wide, tall ? 48 + 53 * (ends[1] - ends[0]) : 74 + 76 * (high - low + 1.5)); // or it scrolls
    const most = Math.floor(tall ? 15 : (width - 74) / (high - low + 1.5) / 7);
    for (const n of nodes) {
      const isSeed = n.name === this.center && n.module !== "res"; // apart from what its target chose
      const beyond = isSeed ? this.ranks : n.role === "alternative" ? n.rank - 1 : 0;
      const away = beyond ? first + step * beyond : 0; // below the texts of what was chosen first
      const along = n.layer - (n.module === "res" ? 0 : 0.4);
      const across = lane[n.role === "direct" ? "direct" : n.module] + (n.module === "att" ? away : -away);
      [n.x, n.y] = tall ? [across, along] : [along, across];
      n.kind = ["direct", "alternative"].includes(n.role) ? n.role : this.records.get(n.name).class ?? n.module;
      const caption = this.records.caption(n.name), short = caption.length > most ? `${caption.slice(0, most - 1)}…` : caption;
      n.text = n.role === "alternative" ? " " : `${n.index}<br>${inPlotly(short)}`; // plotly loses texts that were empty
      const hover = [n.name, this.records.label(n.name), n.kind, n.told ?? ""].filter(Boolean);
      n.hover = hover.map(inPlotly).join("<br>").replaceAll("\n", "<br>");
    }
    const lanes = ["att", "res", "mlp", ...(far ? ["direct"] : [])];
    const across = {
      tickvals: lanes.map((l) => lane[l]), ticktext: lanes.map((l) => NAMES[l] ?? "direct"), showgrid: false,
      range: ends, side: tall ? "top" : "left", tickangle: 0,
    };
    const along = {
      title: { text: "layer" }, tickvals: layers, ticktext: layers.map(String),
      range: tall ? [high + 0.6, low - 0.7] : [low - 0.9, high + 0.6], tickangle: 0,
    };
    if (!tall) return { width, xaxis: along, yaxis: across, height: 250 + 85 * (lanes.length - 1 + 2 * gap) };
    return { width, xaxis: across, yaxis: along, height: 100 + 92 * (high - low + 1), margin: { l: 40, r: 8, t: 40, b: 0 } };
  }
  lines(nodes, edges) { // one trace for all lines of a look: a shape for each would take as long as all the rest
    const looks = new Map();
    for (const e of edges) {
      const above = e.score > e.null, width = e.rank > 1 ? 1 : 1 + 2 * Math.round(3 * Math.max(e.score, 0));
      const line = { width, color: above ? LOOKS[e.kind][2] : "#8C8C8C", dash: above ? "solid" : "dot" }, key = JSON.stringify(line);
      if (!looks.has(key)) looks.set(key, { type: "scatter", mode: "lines", x: [], y: [], line, hoverinfo: "skip", showlegend: false });
      const { x, y } = looks.get(key), [source, target] = [nodes.get(e.source), nodes.get(e.target)];
      x.push(source.x, target.x, null);
      y.push(source.y, target.y, null);
    }
    return [...looks.values()];
  }
  markers(nodes) {
    const { color: ink, backgroundColor: bg } = getComputedStyle(this.root);
    const shadow = [[-1, -1], [-1, 1], [1, -1], [1, 1]].map(([x, y]) => `${x}px ${y}px 1px ${bg}`).join(", "); // over lines
    return [...new Set(nodes.map((n) => n.kind))].map((kind) => {
      const some = nodes.filter((n) => n.kind === kind), [, symbol, color] = LOOKS[kind];
      const isMarked = (n) => this.pins.has(n.name) || n.name === this.center;
      const ring = symbol.endsWith("open") ? color : bg;
      const size = some.map((n) => (n.name === this.center ? 20 : n.role === "alternative" ? 9 : 13));
      const line = { color: some.map((n) => (isMarked(n) ? ink : ring)), width: some.map((n) => (isMarked(n) ? 3 : 1.5)) };
      return {
        type: "scatter", mode: "markers+text", cliponaxis: false,
        x: some.map((n) => n.x), y: some.map((n) => n.y), customdata: some.map((n) => n.name),
        text: some.map((n) => n.text), textfont: { size: 12, color: ink, shadow },
        textposition: some.map((n) => (this.tall && n.module === "res" ? "bottom right" : "bottom center")),
        hovertext: some.map((n) => n.hover), hoverinfo: "text", marker: { symbol, color, opacity: 1, size, line },
      };
    });
  }
  drawOverview() {
    const { overview, layers, sites, subjects } = this.about;
    this.legend.replaceChildren();
    const bars = Object.entries(overview[this.view]).filter(([, counts]) => counts.some(Boolean));
    const named = (value) => ({ born: `by ${NAMES[value]}`, life: value === "1" ? "1 layer" : `${value} layers` })[this.view] ?? value;
    const traces = bars.map(([value, counts], i) => ({
      type: "bar", name: named(value), x: layers, y: counts, customdata: layers.map((layer) => [layer, value]),
      marker: { color: LOOKS[value]?.[2] ?? COLOURS[i], pattern: { shape: PATTERNS[i] }, line: { width: 0.5 } },
      hovertemplate: `layer %{x}, ${named(value)}: %{y} features<extra></extra>`,
    }));
    const list = (layer, value) => this.attempt(async () => {
      const names = await this.records.listed(this.view, layer, value), first = names.slice(0, 60);
      const all = overview[this.view][value][layers.indexOf(layer)];
      const some = first.length < all ? `; ${first.length} of them are listed` : "";
      this.list(first.map((name) => [name, ""]));
      this.tell(`${count(all, "feature")} of layer ${layer}: ${named(value)}${some}`);
    });
    const axes = { xaxis: { title: { text: "layer" }, dtick: layers.length > 16 ? 4 : 1 }, yaxis: { title: { text: "features" } } };
    this.paint(traces, { barmode: "stack", height: 380, ...axes },
      "bars by layer; the table below has the same numbers", (point) => list(...point.customdata));
    const views = { class: "classes", born: "births", life: "life spans: layers lived" };
    const view = choice(views, this.view, () => { this.view = view.value; this.draw(); });
    const number = (layer, value, n) => (n ? el("button", {
      className: "fx-link", "aria-label": `${count(n, "feature")} of layer ${layer}: ${named(value)}`, onclick: () => list(layer, value),
    }, `${n}`) : "0");
    const rows = layers.map((layer, i) => [`${layer}`, ...bars.map(([value, counts]) => number(layer, value, counts[i]))]);
    this.table.replaceChildren(
      row(el("label", {}, "bars count", view), quiet("click a bar, or a number of the table, to list its features")),
      table(rows, ["layer", ...bars.map(([value]) => named(value))]));
    const all = Object.values(sites).reduce((a, b) => a + b, 0), of = Object.keys(subjects);
    const [has, lacks] = [true, false].map((is) => of.filter((subject) => subjects[subject].length > 0 === is));
    const ask = (subject) => { this.query.value = subject; this.attempt(() => this.search()); };
    this.card.replaceChildren(
      el("h2", {}, "The whole model"), el("p", {}, `${count(all, "feature")} at ${count(Object.keys(sites).length, "site")}. ${CHANCE}`),
      ...Object.entries(READINGS).map(([kind, text]) => el("p", {}, `${LOOKS[kind][0]} ${kind}: ${text}`)),
      has.length ? el("p", {}, "Subjects to search for: ", ...has.flatMap((subject) => [
        el("button", { className: "fx-link", onclick: () => ask(subject) }, subject), " "])) : "",
      lacks.length ? quiet(`No feature stands for ${lacks.join(", ")}.`) : "");
  }

  // ---- the card
  drawCard() {
    const name = this.center, record = this.records.get(name), { layer, module, index } = parse(name);
    const link = this.about.links[`${layer}/${module}`], from = this.records.labelFrom(name), parts = [];
    const add = (heading, ...children) => parts.push(el("h3", {}, heading), ...children);
    parts.push(
      el("h2", {}, `${LOOKS[record.class ?? module][0]} ${name}`), el("p", {}, this.records.label(name)),
      quiet(from ? `label: ${from}` : "no label"),
      row(el("button", { onclick: () => this.pin(name) }, this.pins.has(name) ? "Unpin" : "Pin"),
        link ? el("a", { href: `${link}${index}`, target: "_blank", rel: "noopener" }, "on Neuronpedia") : ""));
    if (record.contexts?.length) add("Where it is most active", ...record.contexts.map((one) => this.context(one)));
    if (record.writes) add("Writes (logit lens)", el("p", {}, record.writes.map(shown).join(" · ")));
    if (record.class) add("Class", el("p", {}, `${record.class}: ${READINGS[record.class]}`));
    if (record.back) add("Scores against chance", table(Object.entries(record.back).map(([m, back]) => this.score(layer, m, back))));
    if (record.life) {
      const [first, last] = record.life, lived = `${last - first + 1} of ${this.about.layers.length} layers`;
      add("Life", el("p", {}, `lives from layer ${first} to ${last}: ${lived}, by steps above chance`));
    }
    if (record.rate !== undefined) {
      const { subject: best, auc, chance } = record, subjects = Object.keys(this.about.subjects);
      const stands = subjects.filter((each) => this.about.subjects[each].includes(name)).join(" and ");
      const subject = (best ? `; tells passages on ${best} best (AUC ${two(auc)}, by shuffled subjects ${two(chance)} at most)` : "")
        + (stands && `; stands for ${stands}`);
      const often = `active at ${percent(record.rate)} of the tokens read${subject}`;
      add("How often", el("p", {}, record.rate ? often : "not active at any token read"));
    }
    if (record.groups) {
      const shares = record.groups.map((share, i) => [share, this.about.groups[i]]).filter(([share]) => share > 0);
      const rows = shares.sort((a, b) => b[0] - a[0]).map(([share, group]) => [group, percent(share)]);
      add("Which predecessors are active with it", table(rows));
    }
    if (this.direct && record.direct?.length) add("Direct matches", table(record.direct.map(([at, i, score]) => [
      this.button(`${at}/res/${i}`), `${two(score)}, chance ${two(this.about.chance[at])}`, this.records.label(`${at}/res/${i}`)])));
    this.card.replaceChildren(...parts);
    if (this.records.ask && this.trialFor !== name) {
      this.trialFor = name;
      this.trial.replaceChildren(el("h2", {}, `Try ${name} in the model`), ...this.switching(name), ...this.steering(name));
    }
  }
  score(layer, module, back) {
    const score = back.score[0], line = this.records.null("backward", layer, module);
    if (score === undefined) return [SCORES[module], "no match"];
    const bar = el("div", { className: "fx-bar" },
      el("i", { style: `width:${100 * Math.max(score, 0)}%` }), el("b", { style: `left:${100 * line}%` }));
    const lead = back.score.length > 1 ? `, leads by ${two(score - back.score[1])}` : "";
    const told = `${two(score)}, ${score > line ? "above" : "not above"} chance ${two(line)}`;
    return [SCORES[module], bar, `${told}${lead}${back.mutual ? ", mutual" : ""}`];
  }
  window(peak) { // the tokens around a row, of its own text
    const { tokens, texts } = this.about, next = texts.find((start) => start > peak) ?? tokens.length;
    const first = Math.max(texts.findLast((start) => start <= peak), peak - 8);
    const some = tokens.slice(first, Math.min(next, peak + 9));
    return { first, tokens: some, text: some.join("") };
  }
  context([peak, active, near]) {
    const { first, tokens } = this.window(peak), shares = new Map();
    for (let i = 0; i < near.length; i += 2) shares.set(peak + near[i], near[i + 1] / 100);
    const spans = tokens.map((token, i) => {
      const share = shares.get(first + i) ?? 0, className = first + i === peak ? "fx-peak" : "";
      const title = share ? `${Math.round(100 * share)} % of ${active}` : "";
      return el("span", { className, title, style: shade(share) }, className && isBlank(token) ? visible(token) : token.replaceAll("\n", "⏎"));
    });
    return el("p", { className: "fx-context", title: `activation ${active} at the underlined token` }, ...spans);
  }

  // ---- the model, where a kernel has it
  switching(name) {
    const edges = this.records.flow(name, UNCUT, 1, false).edges, seen = el("div");
    const best = this.records.get(name).contexts?.[0], factor = number(3);
    const text = el("input", { className: "fx-text", value: best ? this.window(best[0]).text.trim() : "The ship sailed home." });
    const before = edges.filter((e) => e.target === name).map((e) => e.source); // a module's feature has none
    const what = choice({ own: "this feature", ...(before.length ? { before: "its predecessors" } : {}), pins: "the pinned set" }, "own");
    const later = edges.filter((e) => e.source === name).map((e) => e.target);
    const change = (r) => this.attempt(async () => {
      const features = { own: [name], before, pins: [...this.pins.keys()] }[what.value];
      seen.replaceChildren(el("p", {}, "computing …"));
      const given = { features, r, text: text.value, watched: [name, ...later] };
      const reply = await this.records.ask("change", given).finally(() => seen.replaceChildren());
      seen.replaceChildren(...reply.watched.map((w) => {
        const [before, after] = [w.before, w.after].map((values) => Math.max(...values)), most = Math.max(before, after, 1e-9);
        const strip = (values) => el("div", { className: "fx-tokens" }, ...reply.tokens.map((token, i) =>
          el("span", { style: shade(values[i] / most) }, shown(token), el("small", {}, values[i] > 0 ? digits(values[i], 2) : ""))));
        const told = ` at most ${digits(before, 3)} before, ${digits(after, 3)} after`;
        return el("div", {}, el("p", {}, el("b", {}, w.feature), told), strip(w.before), strip(w.after));
      }));
    });
    return [el("h3", {}, "Switch off, turn up"), el("label", {}, "sentence", text), row(
      el("label", {}, "change", what), el("button", { onclick: () => change(0) }, "Switch off"),
      el("button", { onclick: () => change(Number(factor.value)) }, "Turn up"), el("label", {}, "times", factor)), seen];
  }
  steering(name) {
    const chain = this.records.flow(name, UNCUT, 1, false).chain ?? [name], wrote = el("div");
    const prompt = el("input", { className: "fx-text", value: "I think" }), strength = number(1), seed = number(0, 1);
    const which = choice({ chain: "its chain", own: "this feature alone", pins: "the pinned set" }, "chain");
    const strategies = ["single", "constant", "exponential", "linear"];
    const strategy = choice(Object.fromEntries(strategies.map((s) => [s, s])), "exponential");
    const steer = () => this.attempt(async () => {
      const features = { chain, own: [name], pins: [...this.pins.keys()] }[which.value];
      const given = { features, prompt: prompt.value, strategy: strategy.value, strength: Number(strength.value), seed: Number(seed.value) };
      wrote.replaceChildren(el("p", {}, "writing …"));
      const reply = await this.records.ask("steer", given).finally(() => wrote.replaceChildren());
      const column = (title) => el("div", {}, el("b", {}, title), ...reply[title].map((t) => el("p", {}, given.prompt + t)));
      wrote.replaceChildren(quiet(reply.about), el("div", { className: "fx-texts" }, column("unsteered"), column("steered")));
    });
    return [el("h3", {}, "Steer"), el("label", {}, "prompt", prompt), row(
      el("label", {}, "by", which), el("label", {}, "strategy", strategy), el("label", {}, "strength", strength),
      el("label", {}, "seed", seed), el("button", { onclick: steer }, "Write")), wrote];
  }

  // ---- the pinned set
  pin(name) {
    if (!this.pins.delete(name)) this.pins.set(name, this.ownLabel(name));
    this.pinsChanged = true;
    this.keep();
    this.draw();
  }
  ownLabel(name) { return { label: this.records.label(name).split("\n")[0], from: this.records.labelFrom(name) }; }
  keep() {
    this.hooks.keep?.(this.center, [...this.pins.keys()]);
    try { sessionStorage.setItem(this.storeKey, JSON.stringify(this.set())); } catch { /* a reload forgets it */ }
  }
  set() {
    const features = [...this.pins].map(([feature, said]) => ({ feature, ...said }));
    return { format: SET, suite: this.about.suite, name: this.setName, features };
  }
  readSet(read) {
    const features = read?.format === SET ? read.features : read?.steps;
    if (!Array.isArray(features) || typeof read.suite !== "string") {
      throw new Error("This file holds no set and no plan: expected a file that the explorer or save_plan wrote.");
    }
    if (read.suite !== this.about.suite) throw new Error(`This set is of suite ${read.suite}: expected one of ${this.about.suite}.`);
    const pins = new Map();
    for (const [i, each] of features.entries()) {
      if (typeof each?.feature !== "string") throw new Error(`Entry ${i + 1} of this file names no feature: expected {"feature": "${Object.keys(this.about.sites)[0]}/0"}.`);
      const [name, wrong] = this.records.check(each.feature), own = name && this.ownLabel(name), label = each.label ?? own?.label;
      if (wrong) throw new Error(wrong);
      if (typeof label !== "string") throw new Error(`The label of ${name} is no text but ${JSON.stringify(label)}.`);
      pins.set(name, { label, from: typeof each.from === "string" ? each.from : label === own.label ? own.from : "" });
    }
    const name = read.name ?? read.about;
    Object.assign(this, { pins, pinsChanged: true, setName: typeof name === "string" ? name : "" });
    this.keep();
  }
  get slug() { return this.setName.replaceAll(/[^A-Za-z0-9]+/g, "-").replaceAll(/^-|-$/g, "") || "set"; }
  drawPins() {
    const name = el("input", { value: this.setName, placeholder: "name of the set", onchange: () => { this.setName = name.value; this.keep(); } });
    const file = el("input", { type: "file", accept: ".json", onchange: () => this.attempt(async () => {
      let read;
      try { read = JSON.parse(await file.files[0].text()); } catch { throw new Error(`${file.files[0].name} is not JSON.`); }
      this.readSet(read);
      this.draw();
      const unkept = read.steps?.some((step) => "strength" in step) ? "; the plan's strengths are not kept: “Save as plan” gives all the one beside it" : "";
      this.tell(`${count(this.pins.size, "feature")} loaded${unkept}`);
    }) });
    const { kind: chosen, strength: given } = this.planned;
    const kind = choice({ add: "add, s =", rescale: "rescale, r =" }, chosen), strength = number(given);
    for (const each of [kind, strength]) {
      each.addEventListener("change", () => { this.planned = { kind: kind.value, strength: strength.value }; });
    }
    const save = (what, end, make) => el("button", {
      disabled: !this.pins.size, onclick: () => this.attempt(() => this.download(`${this.slug}${end}`, make())),
    }, what);
    const said = (from) => (from ? `by ${from}` : "typed by hand");
    const relabel = (feature) => (event) => {
      this.pins.set(feature, { label: event.target.value, from: "" });
      event.target.nextSibling.textContent = said("");
      this.keep();
    };
    const items = [...this.pins].map(([feature, { label: value, from }]) => el("li", { className: "fx-row" }, this.button(feature),
      el("input", { className: "fx-text", value, "aria-label": `label of ${feature}`, onchange: relabel(feature) }),
      el("span", { className: "fx-quiet" }, said(from)), el("button", { "aria-label": `unpin ${feature}`, onclick: () => this.pin(feature) }, "Unpin")));
    this.pinBox.replaceChildren(
      el("h2", {}, `Pinned features (${this.pins.size})`),
      row(el("label", {}, "name", name), el("label", { className: "fx-file" }, "load a set or plan", file)), el("ul", {}, ...items),
      row(save("Save set", ".json", () => this.set()), save("Save labels", "-labels.csv", () => this.labels()),
        save("Save for circuit-tracer and Neuronpedia", "-graph.json", () => this.attributionGraph(this.slug)),
        save("Save as plan", "-plan.json", () => this.plan(kind.value, strength.value.trim() ? Number(strength.value) : NaN)), kind, strength));
  }
  plan(kind, strength) {
    const theta = (name) => this.records.get(name).theta;
    const lacking = [...this.pins.keys()].find((name) => !theta(name));
    if (!Number.isFinite(strength)) throw new Error("The strength of a plan is a number.");
    if (kind === "add" && lacking) throw new Error(`The threshold of ${lacking} is not known here: choose to rescale, or use make_plan in Python.`);
    const steps = [...this.pins.keys()].map((feature) => ({ feature, strength, scale: kind === "add" ? theta(feature) : 1 }));
    return { suite: this.about.suite, kind, unit: kind === "add" ? "theta" : "activation", steps, about: this.setName };
  }
  labels() {
    const quote = (text) => `"${text.replaceAll('"', '""')}"`;
    const rows = [...this.pins].filter(([, { label }]) => label.trim());
    if (!rows.length) throw new Error("No pinned feature has a label: type one.");
    return ["feature,label,label_from", ...rows.map(([feature, { label, from }]) => `${feature},${quote(label)},${quote(from)}`)].join("\n") + "\n";
  }
  attributionGraph(slug) { // as flow.to_attribution_graph
    const lanes = ["att", "res", "mlp"], names = [...this.pins.keys()];
    const id = (name) => { const { layer, module, index } = parse(name); return `${layer}_${index}_${lanes.indexOf(module)}`; };
    const nodes = names.map((name) => {
      const { layer, module, index } = parse(name), lane = lanes.indexOf(module), sum = layer + { res: 0, mlp: 1000, att: 2000 }[module] + index;
      const node = { node_id: id(name), jsNodeId: `${layer}_${index}-${lane}`, feature: (sum * (sum + 1)) / 2 + index };
      Object.assign(node, { layer: `${layer}`, ctx_idx: lane, feature_type: "cross layer transcoder" });
      return { ...node, clerp: this.pins.get(name).label || name };
    });
    const links = [];
    for (const name of names) {
      const { layer, index } = parse(name), record = this.records.get(name), seen = new Set();
      for (const [module, back] of Object.entries(record.back ?? {})) back.to.forEach((i, rank) => {
        const source = `${layer - (module === "res")}/${module}/${i}`;
        if (this.pins.has(source)) { seen.add(source); links.push({ source: id(source), target: id(name), weight: back.score[rank] }); }
      });
      for (const source of names) {
        const on = this.records.get(source).on, at = parse(source);
        const rank = name.includes("/res/") && at.layer + (at.module === "res") === layer ? on?.to?.indexOf(index) ?? -1 : -1;
        if (rank >= 0 && !seen.has(source)) links.push({ source: id(source), target: id(name), weight: on.score[rank] });
      }
    }
    const prompt = `feature flow of ${this.setName || names.join(", ")}`, supernode = [this.setName || names[0], ...names.map(id)];
    const metadata = { slug, scan: this.about.suite, schema_version: 1, prompt, transcoder_list: [], prompt_tokens: lanes };
    const qParams = { pinnedIds: names.map(id), supernodes: [supernode], linkType: "both", clickedId: "", sg_pos: "" };
    return { metadata, qParams, nodes, links };
  }
  download(name, content) {
    const text = typeof content === "string" ? content : JSON.stringify(content, null, 1);
    const url = URL.createObjectURL(new Blob([text], { type: "application/octet-stream" }));
    const link = el("a", { href: url, download: name });
    this.root.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
    this.tell(`saved as ${name}`);
  }
}

async function unpacked(bytes) {
  return JSON.parse(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text());
}

/* The page on disk: the records lie in it, packed; the feature in view is in its address. */
export async function openPage(root, packed) {
  const { about, records } = await unpacked(Uint8Array.from(atob(packed), (c) => c.charCodeAt(0)));
  const held = new Records(about);
  held.add(records);
  const keep = (name) => history.replaceState(null, "", name ? `#${name}` : "#");
  const asked = () => (location.href.includes("#") ? location.hash.slice(1) : about.start);
  const first = asked(); // before the explorer writes its own
  const explorer = new Explorer(root, held, globalThis.Plotly, { keep });
  const open = (address) => explorer.attempt(async () => {
    try {
      const [name, wrong] = address ? held.check(address) : [null, null];
      if (wrong) throw new Error(wrong);
      await explorer.go(name);
    } catch (error) { // stay, or begin somewhere
      await explorer.go(explorer.drawn ? explorer.center : about.start || null);
      throw error;
    }
  });
  addEventListener("hashchange", () => open(asked()));
  await open(first);
}

/* The widget: records and live answers come from the kernel, by messages that no notebook keeps. */
async function render({ model, el: root }) {
  const waiting = new Map();
  let last = 0, lost = false, explorer;
  const onLost = () => { lost = true; };
  const onMessage = (content, buffers) => {
    lost = false;
    const [resolve, reject] = waiting.get(content.id) ?? [];
    waiting.delete(content.id);
    if (content.error) reject?.(new Error(content.error));
    else resolve?.({ ...content, buffers });
  };
  model.on("msg:custom", onMessage);
  model.on("comm_live_update", onLost); // the kernel was restarted, or has gone
  const own = `${Date.now()}-${Math.random()}`; // two views of one widget do not take each other's answers
  const ask = (what, given = {}) => new Promise((resolve, reject) => {
    const id = `${own}-${last += 1}`;
    const refuse = () => reject(new Error("The kernel was restarted and knows this view no more: run the cell again."));
    waiting.set(id, [resolve, reject]);
    setTimeout(() => {
      if (!waiting.has(id)) return;
      if (lost) refuse();
      else explorer?.tell("The kernel has not answered yet: it is busy, or this cell has to be run again.");
    }, lost ? 500 : 15000);
    try { model.send({ id, ask: what, given }); } catch { refuse(); }
  });
  root.replaceChildren(el("p", {}, "The explorer is loading …"));
  const late = setTimeout(() => root.replaceChildren(el("p", {}, "The kernel has not answered yet: it is busy, or this cell has to be run again.")), 15000);
  try {
    const start = await ask("start");
    const { about, records } = await unpacked(start.buffers[0].buffer ?? start.buffers[0]);
    let Plotly = globalThis.Plotly;
    if (!Plotly) {
      const code = new TextDecoder().decode((await ask("plotly")).buffers[0]);
      const module = { exports: {} };
      new Function("module", "exports", "define", code)(module, module.exports, undefined);
      Plotly = globalThis.Plotly ??= module.exports;
    }
    clearTimeout(late);
    const held = new Records(about, ask);
    held.add(records);
    const keep = (feature, pinned) => ask("keep", { feature: feature ?? "", pinned }).catch((error) => explorer?.tell(error.message, true));
    explorer = new Explorer(root, held, Plotly, { keep });
    await explorer.attempt(() => explorer.go(about.start || null));
  } catch (error) {
    root.replaceChildren(el("p", {}, error.message));
  }
  return () => { model.off("msg:custom", onMessage); model.off("comm_live_update", onLost); };
}
export default { render };
