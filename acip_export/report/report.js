"use strict";
(() => {
  const D = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";

  // All text goes through textContent: names come from model files, and may be anything.
  function el(tag, options = {}, ...children) {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(options)) {
      if (key === "text") made.textContent = value;
      else if (key === "cls") made.className = value;
      else if (key === "vars") for (const [name, v] of Object.entries(value)) made.style.setProperty(name, v);
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }
  function svg(tag, attributes, text) {
    const made = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function size(bytes) {
    for (const [unit, factor] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
      if (Math.abs(bytes) >= factor) {
        const value = bytes / factor;
        return `${value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ${unit}`;
      }
    }
    return `${bytes} B`;
  }
  const percent = (part, digits = 0) => `${(100 * part).toFixed(digits)} %`;
  const share = (part) => `${(100 * part).toFixed(1)}%`; // as CSS writes it
  const number = (value) => (value >= 1000 ? Math.round(value).toLocaleString("en") : value.toFixed(value < 100 ? 2 : 1));

  // --- theme ---------------------------------------------------------------------------------------------------------
  const themes = [["", "◐", "as the system"], ["light", "☀", "light"], ["dark", "☾", "dark"]];
  function stored() {
    try { return localStorage.getItem("acip-report-theme") || ""; } catch { return ""; }
  }
  function setTheme(name) {
    const [theme, sign, words] = themes.find(([key]) => key === name) || themes[0];
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    $("theme").textContent = sign;
    $("theme").setAttribute("aria-label", `Theme: ${words}`);
    try { localStorage.setItem("acip-report-theme", theme); } catch { /* a private window: the choice lasts for the page */ }
  }
  $("theme").hidden = false;
  setTheme(stored());
  $("theme").addEventListener("click", () => {
    const now = themes.findIndex(([key]) => key === (document.documentElement.dataset.theme || ""));
    setTheme(themes[(now + 1) % themes.length][0]);
  });

  // --- numbers of a size ---------------------------------------------------------------------------------------------
  if (!D.points.length) return;
  const points = D.points;
  const tensors = D.tensors.map(([name, layer, kind, rows, columns]) => ({ name, layer, kind, rows, columns }));
  const types = D.types.map(([name, bits]) => ({ name, bits }));
  const lowRank = points.some((p) => p.cells.some(([, , rank]) => rank));
  // The scale of colours spans the bits that occur, of stored numbers and of whole matrices.
  const occurring = points.flatMap((p) => p.cells.map(([bytes], i) => (8 * bytes) / (tensors[i].rows * tensors[i].columns)));
  const fewest = Math.min(...types.map((t) => t.bits), ...occurring), most = Math.max(...types.map((t) => t.bits));
  const depth = (bits) => 0.06 + 0.94 * (most > fewest ? Math.min(1, Math.max(0, Math.log(bits / fewest) / Math.log(most / fewest))) : 1);
  // Encoders have no perplexity; their sizes are compared by the predicted loss.
  const quality = points.every((p) => p.shown !== null)
    ? { of: (p) => p.shown, scale: Math.log, back: Math.exp, limit: (best) => 4 * best, title: "Perplexity by size" }
    : { of: (p) => p.loss, scale: (value) => value, back: (value) => value, limit: () => Infinity, title: "Predicted loss by size" };
  const hasPerplexity = points.every((p) => p.shown !== null);
  const turn = 0.555; // where the colours of report.css need the other text
  let current = D.own;

  function describe(tensor, [bytes, type, rank]) {
    const most = Math.min(tensor.rows, tensor.columns);
    const bits = (8 * bytes) / (tensor.rows * tensor.columns);
    const what = rank ? `rank ${rank} of ${most} (${percent(rank / most)})` : "dense";
    return `${tensor.rows} × ${tensor.columns}, ${what}, ${types[type].name}: ${size(bytes)}, ${bits.toFixed(2)} bits per weight of the model`;
  }
  function detail(place, title, text) {
    place.replaceChildren(el("b", { text: title }), document.createTextNode(` ${text}`));
  }

  // --- one set of arrow keys for grids of buttons ----------------------------------------------------------------------
  function roving(container, buttons, move) {
    buttons.forEach((button, i) => { button.tabIndex = i ? -1 : 0; });
    container.onkeydown = (event) => {
      const at = buttons.indexOf(document.activeElement);
      if (at < 0) return;
      const next = event.key === "Home" ? 0 : event.key === "End" ? buttons.length - 1 : move(at, event.key);
      if (next === undefined || !buttons[next]) return;
      event.preventDefault();
      buttons[at].tabIndex = -1;
      buttons[next].tabIndex = 0;
      buttons[next].focus();
    };
  }
  function explained(button, place, title, text) {
    const show = () => detail(place, title, text);
    for (const event of ["focus", "pointerenter", "click"]) button.addEventListener(event, show);
    button.setAttribute("aria-label", `${title} ${text}`);
    return button;
  }
  function switcher(place, options, chosen, change) {
    const buttons = options.map(([key, text]) => {
      const button = el("button", { type: "button", text, "aria-pressed": String(key === chosen) });
      button.addEventListener("click", () => {
        buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
        change(key);
      });
      return button;
    });
    place.replaceChildren(...buttons);
  }

  // --- figures -------------------------------------------------------------------------------------------------------
  function figures() {
    const p = points[current];
    const linear = p.cells.reduce((sum, [bytes]) => sum + bytes, 0);
    const weights = tensors.reduce((sum, t) => sum + t.rows * t.columns, 0);
    const shown = [
      [size(p.files), "in files", `${p.files.toLocaleString("en")} bytes, ${percent(p.ratio, 1)} of the dense model`],
      [size(p.memory), "of memory", D.scope === "file" ? "not limited by this budget" : `${percent(p.used / p.budget, 1)} of a budget of ${size(p.budget)}`],
    ];
    if (hasPerplexity) {
      shown.push([number(p.shown), "predicted perplexity", `${p.loss.toFixed(4)} ${D.unit} above the dense model`]);
    } else {
      shown.push([p.loss.toPrecision(3), "predicted loss", `${D.unit} above the dense model`]);
    }
    const own = measuredAt(current);
    if (own) {
      const dense = D.dense ? `dense model: ${number(D.dense)}` : own.runtime;
      shown.push([number(own.perplexity), "measured perplexity", `${bounds(own)}; ${dense}`]);
    }
    shown.push([((8 * linear) / weights).toFixed(2), "bits per weight", "of the dense model's matrices"]);
    $("figures").replaceChildren(
      ...shown.map(([value, label, note]) =>
        el("div", { cls: "figure" }, el("b", { text: value }), el("span", { text: label }), el("span", { text: note }))),
    );
    $("size").value = current;
    $("size-text").textContent = size(p.used);
    $("size").setAttribute("aria-valuetext",
      `${size(p.used)}${hasPerplexity ? `, predicted perplexity ${number(p.shown)}` : ""}`);
    const notes = [current === D.own ? "This is the size of this export." : own ? "Exported and measured too." : "Planned, not exported.", p.note];
    $("size-note").textContent = notes.filter(Boolean).join(" ");
  }
  const measuredAt = (i) => D.measured.find((m) => m.point === i);
  const bounds = (m) => (m.low === null ? "one window: no standard error" : `± ${number((m.high - m.low) / 2)} (standard error)`);

  // --- curve ---------------------------------------------------------------------------------------------------------
  function curve() {
    const measured = hasPerplexity ? D.measured : [], dense = hasPerplexity ? D.dense : null;
    if (points.length < 2) { $("curve").hidden = true; return; }
    const width = Math.max(260, $("curve").clientWidth), height = Math.round(Math.min(300, Math.max(190, width * 0.42)));
    const left = 46, right = 14, top = 14, bottom = 34;
    const xs = points.map((p) => p.used);
    const ys = [...points.map(quality.of), ...measured.flatMap((m) => [m.low ?? m.perplexity, m.high ?? m.perplexity]), ...(dense ? [dense] : [])];
    const x0 = Math.log(Math.min(...xs)), x1 = Math.log(Math.max(...xs));
    // The smallest sizes can be a hundred times worse; they leave the axis, so that the others stay apart.
    const worst = Math.max(quality.limit(Math.min(...ys)), ...measured.map((m) => m.high ?? m.perplexity));
    const low = quality.scale(Math.min(...ys)), high = quality.scale(Math.min(Math.max(...ys), worst));
    const room = 0.06 * (high - low) + 1e-3, y0 = low - room, y1 = high + room;
    const X = (bytes) => left + ((Math.log(bytes) - x0) / (x1 - x0 || 1)) * (width - left - right);
    const Y = (value) => top + (1 - (quality.scale(value) - y0) / (y1 - y0)) * (height - top - bottom);
    const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
    drawing.append(svg("title", {}, quality.title));
    for (const tick of axis(quality.back(y0), quality.back(y1))) {
      drawing.append(svg("line", { x1: left, x2: width - right, y1: Y(tick), y2: Y(tick), class: "grid" }));
      drawing.append(svg("text", { x: left - 6, y: Y(tick) + 4, "text-anchor": "end" }, String(tick)));
    }
    const ticks = Math.max(2, Math.min(6, Math.floor((width - left) / 95)));
    for (let i = 0; i < ticks; i++) {
      const bytes = Math.exp(x0 + ((x1 - x0) * i) / (ticks - 1));
      const anchor = i === 0 ? "start" : i === ticks - 1 ? "end" : "middle";
      drawing.append(svg("text", { x: X(bytes), y: height - 10, "text-anchor": anchor }, size(Math.round(bytes))));
    }
    if (dense) drawing.append(svg("line", { x1: left, x2: width - right, y1: Y(dense), y2: Y(dense), class: "dense" }));
    const now = X(points[current].used);
    drawing.append(svg("line", { x1: now, x2: now, y1: top, y2: height - bottom, class: "now-line" }));
    const clip = svg("clipPath", { id: "plot" });
    clip.append(svg("rect", { x: 0, y: top - 8, width, height: height - top - bottom + 16 }));
    drawing.append(clip);
    drawing.append(svg("polyline", { class: "line", "clip-path": "url(#plot)", points: points.map((p) => `${X(p.used).toFixed(1)},${Y(quality.of(p)).toFixed(1)}`).join(" ") }));
    for (const p of points) {
      const chosen = p === points[current];
      if (quality.scale(quality.of(p)) > y1) {
        const x = X(p.used);
        drawing.append(svg("path", { d: `M${x - 5} ${top + 4}l5-8l5 8z`, class: chosen ? "dot now" : "dot" }));
        continue;
      }
      drawing.append(svg("circle", { cx: X(p.used), cy: Y(quality.of(p)), r: chosen ? 6 : 3.5, class: chosen ? "dot now" : "dot" }));
    }
    for (const m of measured) {
      const x = X(points[m.point].used);
      if (m.low !== null) drawing.append(svg("line", { x1: x, x2: x, y1: Y(m.low), y2: Y(m.high), class: "error" }));
      const y = Y(m.perplexity);
      drawing.append(svg("path", { d: `M${x} ${y - 6}l6 6l-6 6l-6-6z`, class: "measure" }));
    }
    drawing.addEventListener("click", (event) => {
      const box = drawing.getBoundingClientRect();
      const bytes = ((event.clientX - box.left) / box.width) * width;
      choose(xs.reduce((best, x, i) => (Math.abs(X(x) - bytes) < Math.abs(X(xs[best]) - bytes) ? i : best), 0));
    });
    $("curve").replaceChildren(drawing);
    const entries = [["line", "--accent", hasPerplexity ? "predicted perplexity" : "predicted loss"]];
    if (measured.length) entries.push(["diamond", "--measured", "measured in the runtime, with its standard error"]);
    if (dense) entries.push(["line", "--soft", `dense model: ${number(dense)}`]);
    $("curve-legend").replaceChildren(...entries.map(([cls, colour, text]) =>
      el("li", {}, el("i", { cls, vars: { "--fill": `var(${colour})` } }), el("span", { text }))));
  }
  function axis(low, high) {
    const steps = [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8];
    const all = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const step of steps) {
        const tick = Number((step * 10 ** power).toPrecision(3));
        if (tick >= low && tick <= high) all.push(tick);
      }
    }
    if (all.length < 2) {
      const step = 10 ** Math.floor(Math.log10((high - low) / 2));
      const few = [];
      for (let tick = Math.ceil(low / step) * step; tick <= high && few.length < 12; tick += step) few.push(Number(tick.toPrecision(6)));
      return thin(few);
    }
    return thin(all);
  }
  const thin = (ticks) => ticks.filter((_, i) => i % Math.ceil(ticks.length / 6) === 0);

  // --- budget --------------------------------------------------------------------------------------------------------
  function budget() {
    const p = points[current];
    const counted = p.breakdown.filter(([, bytes, inside]) => bytes && inside);
    const left = Math.max(0, p.budget - counted.reduce((sum, [, bytes]) => sum + bytes, 0));
    const rows = counted.map(([name, bytes], i) => [inWords(name), bytes, `var(--part-${i % 8})`]);
    if (left) rows.push(["left over", left, null]);
    $("bar").replaceChildren(...rows.map(([, bytes, fill]) => {
      const part = el("span", fill ? { vars: { "--fill": fill } } : { cls: "free" });
      part.style.flexGrow = bytes / p.budget;
      return part;
    }));
    $("bar").setAttribute("aria-label", rows.map(([name, bytes]) => `${name} ${size(bytes)}`).join(", "));
    $("bar-legend").replaceChildren(...rows.map(([name, bytes, fill]) => amount(fill ? { vars: { "--fill": fill } } : { cls: "free" }, name, bytes, p.budget)),
      ...p.breakdown.filter(([, bytes, inside]) => bytes && !inside).map(([name, bytes]) => amount({}, `${inWords(name)}, not in the budget`, bytes, 0)));
  }
  const inWords = (name) => name.replace(/^kv /, "KV "); // a key of the plan's breakdown
  function amount(mark, name, bytes, whole) {
    return el("li", {}, el("i", mark), el("span", { text: name }), el("b", { text: size(bytes) }), el("small", { text: whole ? percent(bytes / whole, 1) : "" }));
  }

  // --- treemap -------------------------------------------------------------------------------------------------------
  const groupings = {
    layer: ["layer", (t) => (t.layer < 0 ? t.kind : `layer ${t.layer}`)],
    module: ["module", (t) => t.kind],
    type: ["type", (t, cell) => types[cell[1]].name],
  };
  let grouping = "layer";

  // Squarified treemap (Bruls, Huizing, van Wijk 2000): rows that keep the worst aspect ratio low.
  function squarify(items, box, place) {
    const rest = items.filter((item) => item.bytes > 0).sort((a, b) => b.bytes - a.bytes);
    let { x, y, w, h } = box;
    let total = rest.reduce((sum, item) => sum + item.bytes, 0);
    while (rest.length) {
      const side = Math.min(w, h), area = w * h;
      const row = [];
      let sum = 0, worst = Infinity;
      while (rest.length) {
        const next = rest[0].bytes, s = ((sum + next) / total) * area;
        const ratio = Math.max(...[...row, rest[0]].map((item) => {
          const a = (item.bytes / total) * area;
          return Math.max((side * side * a) / (s * s), (s * s) / (side * side * a));
        }));
        if (row.length && ratio > worst) break;
        worst = ratio;
        sum += next;
        row.push(rest.shift());
      }
      const thickness = side ? ((sum / total) * area) / side : 0;
      let at = 0;
      for (const item of row) {
        const length = (item.bytes / sum) * side;
        place(item, w >= h ? { x, y: y + at, w: thickness, h: length } : { x: x + at, y, w: length, h: thickness });
        at += length;
      }
      if (w >= h) { x += thickness; w -= thickness; } else { y += thickness; h -= thickness; }
      total -= sum;
    }
  }

  function treemap() {
    const p = points[current], place = $("treemap");
    const groups = new Map();
    p.cells.forEach((cell, i) => {
      const name = groupings[grouping][1](tensors[i], cell);
      if (!groups.has(name)) groups.set(name, { name, bytes: 0, items: [] });
      const group = groups.get(name);
      group.bytes += cell[0];
      group.items.push({ bytes: cell[0], tensor: tensors[i], cell });
    });
    for (const [name, bytes] of [["norms and biases", p.vectors], ["tokenizer and metadata", p.overhead]]) {
      if (bytes > 0) groups.set(name, { name, bytes, items: [{ bytes, title: name }] });
    }
    const buttons = [];
    const wide = place.clientWidth, high = place.clientHeight;
    const put = (element, { x, y, w, h }) => {
      Object.assign(element.style, { left: `${(100 * x) / wide}%`, top: `${(100 * y) / high}%`, width: `${(100 * w) / wide}%`, height: `${(100 * h) / high}%` });
    };
    const frames = [];
    squarify([...groups.values()], { x: 0, y: 0, w: wide, h: high }, (group, box) => {
      const frame = el("span", { cls: "group" });
      put(frame, box);
      frames.push(frame);
      squarify(group.items, box, (item, inner) => {
        const title = item.title || item.tensor.name;
        const text = item.title ? size(item.bytes) : describe(item.tensor, item.cell);
        const value = item.cell ? depth(types[item.cell[1]].bits) : 0;
        const button = el("button", { type: "button", cls: item.cell ? `shade${value > turn ? " deep" : ""}` : "plain", vars: { "--v": share(value) } });
        if (inner.w > 44 && inner.h > 18) {
          const label = item.title || (grouping === "layer" && item.tensor.layer >= 0 ? `${item.tensor.layer} ${short(item.tensor.kind)}` : grouping === "module" && item.tensor.layer >= 0 ? `${short(item.tensor.kind)} ${item.tensor.layer}` : short(item.tensor.kind));
          button.append(el("span", { text: label }));
          if (inner.h > 34) button.append(el("small", { text: item.cell ? `${item.cell[2] ? `r${item.cell[2]} ` : ""}${types[item.cell[1]].name}` : size(item.bytes) }));
        }
        put(button, inner);
        buttons.push(explained(button, $("treemap-detail"), title, text));
      });
    });
    place.replaceChildren(...buttons, ...frames);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    roving(place, buttons, (at, key) => (step[key] ? at + step[key] : undefined));
    const byType = new Map();
    for (const [bytes, type] of p.cells) byType.set(type, (byType.get(type) || 0) + bytes);
    const ordered = [...byType].sort((a, b) => types[b[0]].bits - types[a[0]].bits);
    $("type-legend").replaceChildren(
      ...ordered.map(([type, bytes]) => amount({ cls: "shade", vars: { "--v": share(depth(types[type].bits)) } }, types[type].name, bytes, p.files)),
      ...(p.vectors ? [amount({ vars: { "--fill": "var(--line)" } }, "norms and biases", p.vectors, p.files)] : []),
      ...(p.overhead ? [amount({ vars: { "--fill": "var(--line)" } }, "tokenizer and metadata", p.overhead, p.files)] : []),
    );
    if (!$("treemap-detail").textContent) $("treemap-detail").textContent = "Point at a tensor, or tap it, for its shape, type and bytes.";
  }
  const ends = new Map();
  for (const t of tensors) {
    const last = t.kind.split(".").at(-1);
    if (!ends.has(last)) ends.set(last, new Set());
    ends.get(last).add(t.kind);
  }
  function short(kind) {
    const parts = kind.split("."), last = parts.at(-1);
    return (ends.get(last).size > 1 ? parts.slice(-2).join(".") : last).replace(/_proj$/, "");
  }

  // --- heat map ------------------------------------------------------------------------------------------------------
  const layers = [...new Set(tensors.filter((t) => t.layer >= 0).map((t) => t.layer))].sort((a, b) => a - b);
  // As data flows through a layer: attention before the feed-forward part, whatever the files' order.
  const flow = ["q", "query", "k", "key", "v", "value", "qkv", "o", "out", "gate", "gate_up", "up", "intermediate", "down", "output"];
  const position = (kind) => {
    const parts = kind.split("."), at = flow.indexOf(parts.map((part) => part.replace(/_proj$/, "")).findLast((part) => flow.includes(part)));
    return (/attn|attention/.test(kind) ? 0 : 100) + (at < 0 ? 50 : at);
  };
  const kinds = [...new Set(tensors.filter((t) => t.layer >= 0).map((t) => t.kind))].sort((a, b) => position(a) - position(b));
  const members = new Map();
  tensors.forEach((t, i) => {
    const key = `${t.layer}/${t.kind}`;
    members.set(key, [...(members.get(key) || []), i]);
  });
  const quantities = {
    kept: {
      text: "Ranks",
      caption: "Share of each matrix's singular components that this size keeps; 100 % is a dense matrix.",
      ends: ["0 %", "100 %"],
      of: (found) => {
        const whole = found.reduce((sum, [t]) => sum + Math.min(t.rows, t.columns), 0);
        return found.reduce((sum, [t, c]) => sum + (c[2] || Math.min(t.rows, t.columns)), 0) / whole;
      },
      show: (value) => `${Math.round(100 * value)}`,
      shade: (value) => value,
    },
    bits: {
      text: "Bits per weight",
      caption: "Bytes of each matrix at this size, over the weights that it had: rank and type together.",
      ends: [`${fewest.toFixed(1)} bits`, `${most.toFixed(1)} bits`],
      of: (found) => found.reduce((sum, [, c]) => sum + 8 * c[0], 0) / found.reduce((sum, [t]) => sum + t.rows * t.columns, 0),
      show: (value) => value.toFixed(1),
      shade: depth,
    },
    ranking: {
      text: "Score map",
      caption: "",
      ends: ["0 %", "100 %"],
      of: (found, indices) => indices.reduce((sum, i) => sum + points[current].ranking[i], 0) / indices.length,
      show: (value) => `${Math.round(100 * value)}`,
      shade: (value) => value,
    },
  };
  const offered = [...(lowRank ? ["kept"] : []), "bits", ...(points.every((p) => p.ranking) ? ["ranking"] : [])];
  let quantity = offered[0];
  const cells = new Map();

  function buildHeat() {
    const place = $("heat"), labels = kinds.map(short);
    const tall = labels.some((label) => label.length > 8) && kinds.length > 4;
    place.style.gridTemplateColumns = `minmax(1.6rem, auto) repeat(${kinds.length}, minmax(0, 1fr))`;
    place.classList.toggle("many", layers.length > 48 || kinds.length > 12);
    const parts = [el("span", { cls: "side", text: "layer" }), ...kinds.map((kind, i) => el("span", { cls: "head", text: tall ? labels[i].replaceAll(".", " ") : labels[i], title: kind }))];
    const buttons = [];
    for (const layer of layers) {
      parts.push(el("span", { cls: "side", text: String(layer) }));
      for (const kind of kinds) {
        const key = `${layer}/${kind}`;
        if (!members.has(key)) { parts.push(el("span", { cls: "none" })); continue; }
        const button = el("button", { type: "button", cls: "shade", "data-cell": key });
        const show = () => detail($("heat-detail"), button.dataset.title, button.dataset.text);
        for (const event of ["focus", "pointerenter", "click"]) button.addEventListener(event, show);
        cells.set(key, button);
        buttons.push(button);
        parts.push(button);
      }
    }
    place.replaceChildren(...parts);
    const index = new Map(buttons.map((button, i) => [button.dataset.cell, i]));
    const find = (row, column) => index.get(`${layers[row]}/${kinds[column]}`);
    roving(place, buttons, (at, key) => {
      const [layer, ...kind] = buttons[at].dataset.cell.split("/");
      const row = layers.indexOf(Number(layer)), column = kinds.indexOf(kind.join("/"));
      return { ArrowRight: find(row, column + 1), ArrowLeft: find(row, column - 1), ArrowDown: find(row + 1, column), ArrowUp: find(row - 1, column) }[key];
    });
  }
  function heat() {
    const p = points[current], q = quantities[quantity];
    for (const [key, button] of cells) {
      const indices = members.get(key);
      const found = indices.map((i) => [tensors[i], p.cells[i]]);
      const value = q.of(found, indices), shade = q.shade(value);
      button.style.setProperty("--v", share(shade));
      button.classList.toggle("deep", shade > turn);
      button.textContent = q.show(value);
      const first = tensors[indices[0]];
      button.dataset.title = indices.length > 1 ? `layer ${first.layer} ${first.kind} (${indices.length} matrices)` : first.name;
      const ranked = quantity === "ranking" ? `the ranking keeps ${percent(value)}; planned: ` : "";
      button.dataset.text = ranked + (indices.length > 1 ? `${size(found.reduce((sum, [, c]) => sum + c[0], 0))} together` : describe(first, p.cells[indices[0]]));
      button.setAttribute("aria-label", `${button.dataset.title} ${button.dataset.text}`);
      if (document.activeElement === button) detail($("heat-detail"), button.dataset.title, button.dataset.text);
    }
    $("layers-caption").textContent = quantity === "ranking"
      ? `The share of each matrix that the ranking alone would keep, had these layers to fit into as many bytes (${percent(p.ranking_ratio)}) by rank only, in 16 bits.`
      : q.caption;
    [$("scale-low").textContent, $("scale-high").textContent] = q.ends;
    if (!$("heat-detail").textContent) $("heat-detail").textContent = "Point at a cell, or tap it, for its matrix.";
  }

  // --- together ------------------------------------------------------------------------------------------------------
  function draw() { figures(); curve(); budget(); treemap(); if (layers.length) heat(); }
  function choose(index) {
    if (index === current) return;
    current = index;
    draw();
  }
  for (const id of ["sizes", "budget", "bytes", ...(layers.length ? ["layers"] : [])]) $(id).hidden = false;
  $("slider-row").hidden = points.length < 2;
  $("size").max = points.length - 1;
  $("size").addEventListener("input", () => choose(Number($("size").value)));
  switcher($("grouping"), Object.entries(groupings).map(([key, [text]]) => [key, `by ${text}`]), grouping, (key) => { grouping = key; treemap(); });
  switcher($("quantity"), offered.map((key) => [key, quantities[key].text]), quantity, (key) => { quantity = key; heat(); });
  buildHeat();
  draw();
  let width = document.documentElement.clientWidth;
  addEventListener("resize", () => {
    if (document.documentElement.clientWidth === width) return;
    width = document.documentElement.clientWidth;
    curve();
    treemap();
  });
})();
