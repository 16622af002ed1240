"use strict";
// The page works on the data of one JSON block; nothing is fetched.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const element = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const shown = (error) => (error === 0 ? "0" : error.toExponential(1));
const WRONG = data.wrong === null ? Infinity : data.wrong;  // where no equality is promised, no error is a fault
const LONG = 60;  // characters of a name in the graph

const rowsOf = { before: new Map(), after: new Map() };
for (const side of ["before", "after"]) for (const row of data[side] || []) rowsOf[side].set(row.name, row);

// -- trees ----------------------------------------------------------------------------------------

const nest = (rows) => {
  const root = { row: rows[0], children: new Map() };
  for (const row of rows.slice(1)) {
    let at = root;
    const parts = row.name.split(".");
    parts.forEach((part, depth) => {
      if (!at.children.has(part)) {
        at.children.set(part, { row: { name: parts.slice(0, depth + 1).join("."), kind: "" }, children: new Map() });
      }
      at = at.children.get(part);
    });
    at.row = row;
  }
  return root;
};

const state = (name) => data.states[name] || {};

const worst = (node) => {
  let most = typeof node.row.error === "number" ? node.row.error : -1;
  for (const child of node.children.values()) most = Math.max(most, worst(child));
  return most;
};

const signature = (node) => {
  const own = state(node.row.name);
  const off = rowsOf.after.has(node.row.name) && (rowsOf.after.get(node.row.name).error || 0) > WRONG;
  const inside = [...node.children].map(([part, child]) => part + ":" + signature(child));
  return [node.row.kind, own.did || "", own.why || "", off, ...inside].join("|");
};

// Red is a fault; what rounding explains, or no contract forbids, has the colour of a change.
const colour = (error) => {
  if (error < 0) return "";
  const strength = Math.min(1, Math.max(0, (Math.log10(Math.max(error, 1e-17)) + 16) / 16));
  const tint = error > WRONG ? `--bad) ${Math.round(30 + 30 * strength)}%` : `--changed) ${Math.round(40 * strength)}%`;
  return `color-mix(in srgb, var(${tint}, transparent)`;
};

// A branch that holds a fault stands open on both sides.
const faulty = new Set();
for (const row of rowsOf.after.values()) {
  if (!((row.error || 0) > WRONG)) continue;
  for (let at = row.name.length; at > 0; at = row.name.lastIndexOf(".", at - 1)) faulty.add(row.name.slice(0, at));
}

const DID = { changed: "rewritten", skipped: "left alone" };

// What colour says to the eye is said in words to a screen reader.
const spoken = (row, most) => {
  const did = DID[state(row.name).did];
  const parts = [row.name || "model", row.kind, did, most >= 0 ? `largest error ${shown(most)}` : ""];
  return parts.filter(Boolean).join(", ");
};

const line = (node, side, label) => {
  const row = node.row;
  const button = element("button", "row");
  button.type = "button";
  button.setAttribute("aria-pressed", "false");
  button.dataset.name = row.name;
  button.append(element("span", "name", label), " ", element("span", "kind", row.kind));
  // A value of the original that the rewritten model no longer computes is no error by itself.
  const most = side === "after" ? worst(node) : -1;
  button.setAttribute("aria-label", spoken(row, most));
  if (most >= 0) {
    const badge = element("span", "error", shown(most));
    badge.style.background = colour(most);
    badge.title = "largest relative error of its values";
    button.append(" ", badge);
  }
  button.addEventListener("click", (event) => {
    event.preventDefault();
    select(row.name, side);
  });
  return button;
};

const draw = (node, side, label, open) => {
  const own = state(node.row.name);
  const kind = own.did ? " " + own.did : "";
  if (!node.children.size) {
    const leaf = element("div", "leaf entry" + kind);
    leaf.append(line(node, side, label));
    return leaf;
  }
  const holder = element("details", "entry" + kind);
  holder.open = open;
  const summary = element("summary");
  summary.append(line(node, side, label));
  holder.append(summary);
  const children = [...node.children];
  for (let i = 0; i < children.length; ) {
    let j = i + 1;
    const [part, child] = children[i];
    if (/^\d+$/.test(part)) {
      const own = signature(child);
      while (j < children.length && /^\d+$/.test(children[j][0]) && signature(children[j][1]) === own) j += 1;
    }
    if (j - i < 3) {
      j = i + 1;
      holder.append(draw(child, side, part, faulty.has(child.row.name)));
    } else {
      const group = element("details", "entry group");
      const title = element("summary");
      const most = side === "after" ? Math.max(...children.slice(i, j).map(([, each]) => worst(each))) : -1;
      title.append(`${part}…${children[j - 1][0]} `, element("span", "kind", `${j - i} alike, ${child.row.kind}`));
      if (most >= 0) {
        const badge = element("span", "error", shown(most));
        badge.style.background = colour(most);
        title.append(" ", badge);
      }
      group.append(title);
      for (const [each, inside] of children.slice(i, j)) group.append(draw(inside, side, each, false));
      holder.append(group);
    }
    i = j;
  }
  return holder;
};

for (const side of ["before", "after"]) {
  if (!data[side]) continue;
  const root = nest(data[side]);
  byId(side).append(draw(root, side, "model", true));
}

// -- one module -----------------------------------------------------------------------------------

const facts = (name) => {
  const own = state(name);
  const found = [];
  for (const [side, title] of [["before", data.names[0]], ["after", data.names[1]]]) {
    const row = rowsOf[side].get(name);
    if (!row) continue;
    const calls = Object.entries(row.calls || {}).map(([f, n]) => (n > 1 ? `${f} × ${n}` : f)).join(", ");
    const parts = [row.kind, `${(row.parameters || 0).toLocaleString("en")} parameters`];
    if (calls) parts.push(`calls ${calls}`);
    if (side === "after" && typeof row.error === "number") parts.push(`error ${shown(row.error)}`);
    found.push([title, parts.join("; ")]);
  }
  if (own.change) found.push(["what was done", own.change]);
  if (own.why) found.push(["left alone", own.why]);
  return found;
};

const neighbours = (side, name) => {
  const row = rowsOf[side].get(name);
  const feeds = [...rowsOf[side].values()].filter((other) => (other.readers || []).includes(name));
  return { feeds: feeds.map((other) => other.name), readers: row ? row.readers || [] : [] };
};

const graph = (side, name) => {
  const holder = byId("graph");
  holder.replaceChildren();
  const { feeds, readers } = neighbours(side, name);
  const layout = new dagre.graphlib.Graph().setGraph({ rankdir: "LR", nodesep: 12, ranksep: 40, marginx: 4, marginy: 4 });
  layout.setDefaultEdgeLabel(() => ({}));
  const key = (each) => `.${each}`;  // dagre cannot lay out a node whose name is empty, the model's
  const title = (each) => (each.length > LONG ? `${each.slice(0, LONG / 2)}…${each.slice(-LONG / 2)}` : each || "the model's own forward");
  for (const each of new Set([name, ...feeds.slice(0, 24), ...readers.slice(0, 24)])) {
    layout.setNode(key(each), { name: each, width: 16 + 7.4 * title(each).length, height: 26 });
  }
  for (const each of feeds.slice(0, 24)) if (each !== name) layout.setEdge(key(each), key(name));
  for (const each of readers.slice(0, 24)) if (each !== name) layout.setEdge(key(name), key(each));
  dagre.layout(layout);
  const { width, height } = layout.graph();
  const svg = d3.create("svg").attr("width", width).attr("height", height).attr("viewBox", `0 0 ${width} ${height}`);
  const path = d3.line(({ x }) => x, ({ y }) => y).curve(d3.curveBasis);
  for (const edge of layout.edges()) svg.append("path").attr("class", "edge").attr("d", path(layout.edge(edge).points));
  for (const each of layout.nodes()) {
    const { name: own, x, y, width: w, height: h } = layout.node(each);
    const box = svg.append("g").attr("class", own === name ? "node self" : "node");
    box.append("rect").attr("x", x - w / 2).attr("y", y - h / 2).attr("width", w).attr("height", h).attr("rx", 4);
    box.append("text").attr("x", x).attr("y", y + 4).attr("text-anchor", "middle").text(title(own));
    box.append("title").text(own);
  }
  holder.append(svg.node());
};

const select = (name, side) => {
  const press = (row, on) => {
    row.classList.toggle("linked", on);
    row.setAttribute("aria-pressed", String(on));
  };
  document.querySelectorAll(".row.linked").forEach((row) => press(row, false));
  for (const row of document.querySelectorAll(".row")) {
    if (row.dataset.name !== name) continue;
    press(row, true);
    for (let at = row.parentElement; at && !at.classList.contains("tree"); at = at.parentElement) {
      if (at.tagName === "DETAILS" && !at.contains(document.activeElement)) at.open = true;
    }
  }
  byId("detail").hidden = false;
  byId("detail-name").textContent = name || "the model";
  const list = byId("detail-facts");
  list.replaceChildren();
  for (const [what, value] of facts(name)) list.append(element("dt", "", what), element("dd", "", value));
  graph(side, name);
};

// -- searching ------------------------------------------------------------------------------------

if (data.after) {
  const off = (name) => ((rowsOf.after.get(name) || {}).error || 0) > WRONG;
  const wanted = (name, text, only) => {
    const own = state(name);
    if (only && !own.did && !off(name)) return false;
    const kinds = ["before", "after"].map((side) => (rowsOf[side].get(name) || {}).kind || "");
    return [name, own.why || "", own.change || "", ...kinds].join(" ").toLowerCase().includes(text);
  };
  const search = () => {
    const text = byId("search").value.trim().toLowerCase();
    const only = byId("only").checked;
    const all = !text && !only;
    const names = new Set();
    for (const tree of document.querySelectorAll(".tree")) {
      const walk = (entry) => {
        const row = entry.matches(".leaf") ? entry.firstChild : entry.querySelector(":scope > summary > .row");
        const own = row ? all || wanted(row.dataset.name, text, only) : false;
        let inside = false;
        for (const child of entry.children) if (child.matches(".entry")) inside = walk(child) || inside;
        const keep = all || own || inside;
        entry.classList.toggle("hidden", !keep);
        if (!all && inside && entry.tagName === "DETAILS") entry.open = true;
        if (own && !all) names.add(row.dataset.name);
        return keep;
      };
      for (const entry of tree.children) walk(entry);
    }
    byId("found").textContent = all ? "" : `${names.size} module${names.size === 1 ? "" : "s"} found`;
  };
  byId("search").addEventListener("input", search);
  byId("only").addEventListener("change", search);
  for (const [id, open] of [["expand", true], ["collapse", false]]) {
    byId(id).addEventListener("click", () => {
      document.querySelectorAll(".tree details").forEach((each) => { each.open = open; });
    });
  }
}

if (byId("filter")) {
  const filter = () => {
    const text = byId("filter").value.trim().toLowerCase();
    const reason = byId("reason").value;
    for (const row of document.querySelectorAll("#skips tbody tr")) {
      const keep = row.textContent.toLowerCase().includes(text) && (!reason || row.dataset.reason === reason);
      row.classList.toggle("hidden", !keep);
    }
  };
  byId("filter").addEventListener("input", filter);
  byId("reason").addEventListener("change", filter);
}
for (const row of document.querySelectorAll("tr[data-name]")) {
  row.addEventListener("click", () => { if (data.after) select(row.dataset.name, "after"); });
}

// -- errors by depth ------------------------------------------------------------------------------

// As wide as the page is, so that its letters are as large as the others.
const chart = () => {
  const points = data.after.filter((row) => row.order !== null && typeof row.error === "number")
    .sort((one, other) => one.order - other.order);
  const width = Math.max(280, byId("chart").clientWidth), height = 240, left = 52, bottom = 30;
  const errors = points.map((row) => row.error).filter((error) => error > 0);
  const top = Math.max(1e-12, d3.max(errors) || 0) * 10;
  const floor = Math.max(1e-17, Math.min(d3.min(errors) || 1e-12, top / 1e4) / 10);
  const x = d3.scaleLinear([0, Math.max(1, points.length - 1)], [left, width - 12]);
  const y = d3.scaleLog([floor, top], [height - bottom, 10]);
  const named = Math.max(2, Math.min(7, Math.floor(width / 170), points.length));
  const ticks = points.length < 2 ? [0] : [...new Set(d3.range(named).map((i) => Math.round(i * (points.length - 1) / (named - 1))))];
  const name = (at) => (points[at] ? points[at].name.slice(-22) || "the model" : "");
  const svg = d3.create("svg").attr("viewBox", `0 0 ${width} ${height}`);
  const axis = svg.append("g").attr("class", "axis").attr("transform", `translate(0,${height - bottom})`)
    .call(d3.axisBottom(x).tickValues(ticks).tickFormat(name));
  axis.selectAll("text").attr("text-anchor", (at) => (at === 0 ? "start" : at === points.length - 1 ? "end" : "middle"));
  svg.append("g").attr("class", "axis").attr("transform", `translate(${left},0)`).call(d3.axisLeft(y).ticks(6, ".0e"));
  if (floor < WRONG && WRONG < top) svg.append("line").attr("class", "limit").attr("x1", left).attr("x2", width - 12).attr("y1", y(WRONG)).attr("y2", y(WRONG))
    .append("title").text(`more than ${shown(WRONG)} is no rounding`);
  const place = (row) => y(Math.max(floor, Math.min(top, row.error)));
  svg.append("path").attr("class", "edge").attr("d", d3.line((row, i) => x(i), place)(points));
  svg.append("g").selectAll("circle").data(points).join("circle")
    .attr("cx", (row, i) => x(i)).attr("cy", place).attr("r", 3)
    .attr("fill", (row) => (row.error > WRONG ? "var(--bad)" : state(row.name).did ? "var(--changed)" : "var(--faint)"))
    .on("click", (event, row) => select(row.name, "after"))
    .append("title").text((row) => `${row.name || "the model"} (${row.kind}): ${shown(row.error)}`);
  byId("chart").replaceChildren(svg.node());
};

if (byId("chart")) {
  let drawn = 0;
  new ResizeObserver(() => {
    if (byId("chart").clientWidth === drawn) return;
    drawn = byId("chart").clientWidth;
    chart();
  }).observe(byId("chart"));
  chart();
}
if (data.after && rowsOf.after.has(data.first)) select(data.first, "after");
document.body.dataset.ready = "true";
