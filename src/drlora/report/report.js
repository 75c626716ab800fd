// The charts of a report. All data stands in the page (see encode.py); nothing is fetched, and text
// from a run only ever becomes text: textContent in the page, and canvas text in the charts.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e",
    "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
  const SIGNALS = ["routing", "importance", "saliency"];
  const WORDS = { rank: "rank", granted: "granted at this event", routing: "routing",
    importance: "importance", saliency: "saliency" };
  const FEW_ROWS = 12;
  const TYPES = { i2: Int16Array, i4: Int32Array, u1: Uint8Array, u2: Uint16Array };
  const state = { run: 0, map: 0, time: 0, layer: 0, expert: 0, shown: "rank", all: false };
  const charts = {};

  // ---- reading the data

  function integers(column) {
    const text = atob(column.data), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return new TYPES[column.type](bytes.buffer);
  }

  // The inverse of encode.quantise: 0 is 0, the largest code is "not known".
  function numbers(column) {
    const unknown = column.type === "u1" ? 255 : 65535;
    const unit = Math.log(column.high / column.low) / (unknown - 2);
    const codes = integers(column), values = new Float64Array(codes.length);
    codes.forEach((code, i) => {
      if (code) values[i] = code === unknown ? NaN : column.low * Math.exp(unit * (code - 1));
    });
    return values;
  }

  // Ranks at the start and after each event, and the signals, of one map; read when first asked for.
  function read(map) {
    if (map.history) return map;
    map.width = Math.max(...map.experts);
    map.cells = map.blocks.length * map.width;
    const columns = { event: integers(map.grants.event), cell: integers(map.grants.cell),
      granted: integers(map.grants.granted) };
    for (const name of SIGNALS) columns[name] = numbers(map.grants[name]);
    map.history = [integers(map.start)];
    map.byEvent = map.events.map(() => []);
    for (let i = 0; i < columns.cell.length; i++) map.byEvent[columns.event[i] - 1].push(i);
    for (const grants of map.byEvent) {
      const ranks = map.history.at(-1).slice();
      for (const i of grants) ranks[columns.cell[i]] += columns.granted[i];
      map.history.push(ranks);
    }
    map.columns = columns;
    map.known = Object.fromEntries(SIGNALS.map((name) => [name, numbers(map.signals[name])]));
    map.lowest = Infinity;
    map.highest = 0;
    for (const ranks of map.history)
      for (const rank of ranks) {
        if (rank > map.highest) map.highest = rank;
        if (rank >= 0 && rank < map.lowest) map.lowest = rank;
      }
    return map;
  }

  const run = () => data.runs[state.run];
  const map = () => read(run().maps[state.map]);
  const stepAt = (m, time) => (time === 0 ? 0 : m.events[time - 1]);
  const cellOf = (m, layer, expert) => layer * m.width + expert;

  // Which row of the signals tells of a time: what was known just before its event.
  function knownRow(m, time) {
    if (!m.known_at.length) return -1;
    const step = time === 0 ? m.known_at[0] : stepAt(m, time);
    let row = m.known_at.findIndex((known) => known >= step);
    return row < 0 ? m.known_at.length - 1 : row;
  }

  function signal(m, name, row, cell) {
    return row < 0 ? NaN : m.known[name][row * m.cells + cell];
  }

  function layerValues(m, values, layer) {
    const first = layer * m.width;
    return values.subarray(first, first + m.experts[layer]);
  }

  function gini(values) {
    const sorted = Float64Array.from(values).sort(), n = sorted.length;
    let total = 0, weighted = 0;
    sorted.forEach((value, i) => {
      total += value || 0;
      weighted += (2 * (i + 1) - n - 1) * (value || 0);
    });
    return total ? weighted / (n * total) : 0;
  }

  function meanGini(m, values) {
    return m.blocks.reduce((sum, _, l) => sum + gini(layerValues(m, values, l)), 0) / m.blocks.length;
  }

  // ---- showing numbers

  function show(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (value === 0 || Number.isInteger(value)) return value.toLocaleString("en");
    const size = Math.abs(value);
    return size >= 1e5 || size < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(3));
  }

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function look() {
    return { ink: colour("--ink"), soft: colour("--soft"), line: colour("--line"),
      paper: colour("--paper"), first: colour("--first"), second: colour("--second"),
      mark: colour("--mark") };
  }

  function draw(id, option, label) {
    const c = look();
    charts[id] ??= echarts.init(at(id), null, { renderer: "canvas" });
    charts[id].setOption({
      animation: false,
      textStyle: { color: c.ink, fontFamily: "system-ui, sans-serif" },
      ...option,
      tooltip: { renderMode: "richText", confine: true, backgroundColor: c.paper,
        borderColor: c.soft, textStyle: { color: c.ink }, ...option.tooltip },
    }, true);
    at(id).setAttribute("aria-label", label);
    return charts[id];
  }

  function axis(settings) {
    const c = look();
    return { nameLocation: "middle", nameTextStyle: { color: c.soft },
      axisLabel: { color: c.soft, formatter: show, hideOverlap: true },
      axisLine: { lineStyle: { color: c.line } },
      splitLine: { lineStyle: { color: c.line } }, ...settings };
  }

  // What is drawn over a run is kept by step; shown by epoch, a step of each run has a length of its own.
  const length = (one) => (at("epochs").checked ? one.epochs_per_step : 1);
  const along = (points, one = run()) => points.map(([step, ...rest]) => [step * length(one), ...rest]);

  const stepAxis = (runs = [run()]) => axis({ type: "value", name: at("epochs").checked ? "epoch" : "step",
    nameGap: 24, min: 0, max: Math.max(...runs.map((one) => one.steps * length(one))),
    splitLine: { show: false } });
  const GRID = { left: 8, right: 16, top: 26, bottom: 28, containLabel: true };
  const DASHES = ["solid", "dashed", "dotted", [8, 3, 2, 3]];

  const line = (name, points, settings) => ({ name, type: "line", data: points, showSymbol: false,
    connectNulls: false, ...settings });

  function eventMarks(m) {
    return { name: "growth event", type: "scatter", symbol: "triangle", symbolSize: 7,
      itemStyle: { color: look().mark }, data: along(m.events.map((step) => [step, 0])), yAxisIndex: 1,
      tooltip: { formatter: (p) => `growth event at step ${m.events[p.dataIndex]}` } };
  }

  // Where a run diverged, a line from top to bottom that says so.
  function divergence(one, says) {
    if (one.diverged_at === null) return {};
    const c = look();
    return { markLine: { silent: true, symbol: "none", lineStyle: { color: c.mark, type: "solid", width: 2 },
      label: { formatter: says, color: c.mark, position: "insideEndTop" },
      data: [{ xAxis: one.diverged_at * length(one) }] } };
  }

  // ---- the log

  function drawLoss() {
    const c = look(), series = [], many = data.runs.length > 1;
    data.runs.forEach((one, i) => {
      const look_ = { color: i % 2 ? c.second : c.first, type: DASHES[i % DASHES.length], width: 2 };
      series.push(line(many ? one.name : "training loss", along(smoothed(one.log), one),
        { lineStyle: look_, itemStyle: { color: look_.color },
          ...divergence(one, many ? `${one.name} diverged` : "diverged") }));
      series.push({ name: many ? `${one.name}, held out` : "held-out loss", type: "scatter",
        symbol: "diamond", symbolSize: 13, itemStyle: { color: look_.color, borderColor: c.ink },
        data: along(one.held_out, one) });
    });
    const last = run().held_out.at(-1), first = run().held_out[0];
    draw("loss", {
      grid: { ...GRID, top: 34 },
      legend: { type: "scroll", textStyle: { color: c.ink }, top: 0 },
      tooltip: { trigger: "axis", valueFormatter: show },
      xAxis: stepAxis(data.runs),
      yAxis: [axis({ type: "log", logBase: 2, name: "nats a token", nameGap: 40, min: lowestLoss(),
        axisLabel: { color: c.soft, formatter: show, hideOverlap: true, showMinLabel: false } }),
        { type: "value", min: 0, max: 1, show: false }],
      series: [...series, eventMarks(map())],
    }, first && last ? `Loss over steps. Held out: ${show(first[1])} at step ${first[0]}, ` +
      `${show(last[1])} at step ${last[0]}.` : "Loss over steps.");
  }

  // A running mean over about a tenth of the entries, and three at least, where it is asked for.
  function smooth(values) {
    if (!values || !at("smooth").checked) return values;
    const share = 1 / Math.max(3, values.length / 10);
    let mean = null;
    return values.map((value) => {
      if (value === null) return null;
      mean = mean === null ? value : mean + share * (value - mean);
      return mean;
    });
  }

  function smoothed(log) {
    const values = smooth(log.loss);
    return log.step.map((s, k) => [s, values?.[k]]);
  }

  function lowestLoss() {
    const all = data.runs.flatMap((one) => [...(one.log.loss ?? []), ...one.held_out.map((p) => p[1])]);
    const positive = all.filter((v) => v > 0);
    return positive.length ? +(0.9 * Math.min(...positive)).toPrecision(1) : undefined;
  }

  function drawOther() {
    const key = at("curve").value, c = look();
    if (!key) return;
    const series = data.runs.filter((one) => one.log[key]).map((one, i) =>
      line(one.name, along(one.log.step.map((s, k) => [s, one.log[key][k]]), one), {
        lineStyle: { color: i % 2 ? c.second : c.first, type: DASHES[i % DASHES.length] },
        itemStyle: { color: i % 2 ? c.second : c.first } }));
    draw("other", { grid: GRID, tooltip: { trigger: "axis", valueFormatter: show }, xAxis: stepAxis(data.runs),
      yAxis: axis({ type: "value", scale: true }), series }, `${data.curves[key]} over steps.`);
  }

  // ---- the rank map

  function shownValues(m) {
    const values = new Float64Array(m.cells).fill(NaN), row = knownRow(m, state.time);
    const ranks = m.history[state.time];
    for (let cell = 0; cell < m.cells; cell++) {
      if (ranks[cell] < 0) continue;
      if (state.shown === "rank") values[cell] = ranks[cell];
      else if (state.shown === "granted") values[cell] = state.time ? ranks[cell] - m.history[state.time - 1][cell] : 0;
      else values[cell] = signal(m, state.shown, row, cell);
    }
    return values;
  }

  // Importance and saliency span many powers of ten; the logarithm is coloured.
  const isLog = (name) => name === "importance" || name === "saliency";

  function scaled(values) {
    if (!isLog(state.shown)) return values;
    const least = values.reduce((a, v) => (v > 0 && v < a ? v : a), Infinity);
    return values.map((v) => (Number.isNaN(v) ? NaN : Math.log10(Math.max(v, least))));
  }

  function drawMap() {
    const m = map(), c = look(), raw = shownValues(m), values = scaled(raw);
    const real = values.filter((v) => Number.isFinite(v));
    let [low, high] = real.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    if (state.shown === "rank") [low, high] = [Math.min(m.lowest, m.highest - 1), m.highest];
    if (!(high > low)) high = low + 1;
    const chosen = cellOf(m, state.layer, state.expert), cells = [];
    for (let cell = 0; cell < m.cells; cell++) {
      if (Number.isNaN(values[cell])) continue;
      cells.push([cell % m.width, Math.floor(cell / m.width), values[cell]]);
    }
    const height = Math.min(620, Math.max(150, m.blocks.length * 28 + 60));
    at("ranks").style.height = `${height}px`;
    charts.ranks?.resize();
    const gap = at("ranks").clientWidth / m.width > 9 ? 1 : 0;
    const chart = draw("ranks", {
      grid: { left: 8, right: 8, top: 6, bottom: 26, containLabel: true },
      tooltip: { formatter: (p) => describe(m, p.value[1], p.value[0]) },
      xAxis: { type: "category", data: [...Array(m.width).keys()], name: "expert", nameLocation: "middle",
        nameGap: 22, nameTextStyle: { color: c.soft }, axisLabel: { color: c.soft, hideOverlap: true },
        axisTick: { show: false }, axisLine: { show: false } },
      yAxis: { type: "category", inverse: true, data: m.blocks.map((_, l) => l),
        axisLabel: { color: c.soft, hideOverlap: true }, axisTick: { show: false }, axisLine: { show: false } },
      visualMap: { show: false, type: "continuous", min: low, max: high, dimension: 2, seriesIndex: 0,
        inRange: { color: VIRIDIS } },
      series: [
        { type: "heatmap", data: cells, progressive: 0, itemStyle: { borderWidth: gap, borderColor: c.paper },
          emphasis: { itemStyle: { borderColor: c.mark, borderWidth: 2 } } },
        { type: "heatmap", silent: true, data: [[state.expert, state.layer, high]], z: 5,
          itemStyle: { color: "transparent", borderColor: c.mark, borderWidth: 3 } },
      ],
    }, `${WORDS[state.shown]} of every expert, ${m.blocks.length} layers by ${m.width} experts.`);
    chart.off("click");
    chart.on("click", { seriesIndex: 0 }, (p) => choose(p.value[1], p.value[0]));
    const shown = isLog(state.shown) ? [10 ** low, 10 ** high] : [low, high];
    at("least").textContent = `${WORDS[state.shown]} ${show(shown[0])}`;
    at("most").textContent = show(shown[1]);
    at("now").textContent = sayTime(m);
    at("time").setAttribute("aria-valuetext", sayTime(m));
  }

  function sayTime(m) {
    if (!m.events.length) return "Ranks did not change in this run.";
    const ranks = m.history[state.time].filter((r) => r >= 0);
    const mean = ranks.reduce((a, b) => a + b, 0) / ranks.length;
    const range = `mean rank ${mean.toFixed(2)}, from ${Math.min(...ranks)} to ${Math.max(...ranks)}`;
    if (state.time === 0) return `At the start: ${range}.`;
    return `After step ${stepAt(m, state.time)}, event ${state.time} of ${m.events.length}: ${range}.`;
  }

  function describe(m, layer, expert) {
    const cell = cellOf(m, layer, expert), row = knownRow(m, state.time);
    const parts = [`layer ${layer}, expert ${expert}: rank ${m.history[state.time][cell]}`];
    for (const name of SIGNALS) {
      const value = signal(m, name, row, cell);
      if (!Number.isNaN(value)) parts.push(`${name} ${show(value)}`);
    }
    return `${parts.join("\n")}\n${m.blocks[layer]}`;
  }

  function drawFinal() {
    if (data.runs.length < 2) return;
    at("final-section").hidden = false;
    const maps = data.runs.map((one) => read(one.maps[0])), c = look();
    const high = Math.max(...maps.map((m) => m.highest)), low = Math.min(...maps.map((m) => m.lowest));
    maps.forEach((m, i) => {
      const id = `final-${i}`;
      if (!at(id)) {
        const figure = at("final").appendChild(document.createElement("figure"));
        figure.appendChild(document.createElement("figcaption")).textContent = data.runs[i].name;
        const box = figure.appendChild(document.createElement("div"));
        Object.assign(box, { id, className: "chart low" });
        box.setAttribute("role", "img");
        box.style.height = `${Math.min(420, Math.max(120, m.blocks.length * 22 + 30))}px`;
      }
      const ranks = m.history.at(-1), cells = [];
      ranks.forEach((rank, cell) => rank >= 0 && cells.push([cell % m.width, Math.floor(cell / m.width), rank]));
      const hidden = { axisLabel: { show: false }, axisTick: { show: false }, axisLine: { show: false } };
      draw(id, {
        grid: { left: 2, right: 2, top: 6, bottom: 6 },
        tooltip: { formatter: (p) => `layer ${p.value[1]}, expert ${p.value[0]}: rank ${p.value[2]}` },
        xAxis: { type: "category", data: [...Array(m.width).keys()], ...hidden },
        yAxis: { type: "category", inverse: true, data: m.blocks.map((_, l) => l), ...hidden },
        visualMap: { show: false, min: low, max: Math.max(high, low + 1), dimension: 2, inRange: { color: VIRIDIS } },
        series: [{ type: "heatmap", data: cells, progressive: 0 }],
      }, `Final ranks of ${data.runs[i].name}, from ${m.lowest} to ${m.highest}.`);
    });
  }

  // ---- one expert

  function drawExpert() {
    const m = map(), c = look(), cell = cellOf(m, state.layer, state.expert);
    const mark = { silent: true, symbol: "none", label: { show: false },
      lineStyle: { color: c.mark, type: "dashed" }, data: [{ xAxis: stepAt(m, state.time) * length(run()) }] };
    const thick = { lineStyle: { color: c.first, width: 2.5 }, itemStyle: { color: c.first } };
    const thin = { lineStyle: { color: c.soft, width: 1 }, itemStyle: { color: c.soft } };
    const steps = [0, ...m.events, run().steps];
    const rankAt = (i) => m.history[Math.min(i, m.events.length)];
    const meanRank = (i) => { const row = layerValues(m, rankAt(i), state.layer);
      return row.reduce((a, b) => a + b, 0) / row.length; };
    const places = steps.map((s, i) => [s, i]);
    draw("expert-rank", { grid: GRID, tooltip: { trigger: "axis", valueFormatter: show }, xAxis: stepAxis(),
      yAxis: axis({ type: "value", min: 0, minInterval: 1 }),
      series: [line("rank", along(places.map(([s, i]) => [s, rankAt(i)[cell]])), { step: "end", markLine: mark, ...thick }),
        line("mean of the layer", along(places.map(([s, i]) => [s, meanRank(i)])), { step: "end", ...thin })],
    }, `Rank of expert ${state.expert} of layer ${state.layer}: ${rankAt(0)[cell]} at the start, ${rankAt(m.events.length)[cell]} at the end.`);
    for (const name of SIGNALS) drawSignal(m, name, cell, { mark, thick, thin });
    at("chosen").textContent = `${describe(m, state.layer, state.expert).split("\n").slice(0, -1).join(", ")}.`;
  }

  function drawSignal(m, name, cell, { mark, thick, thin }) {
    const positive = (v) => (v > 0 || !isLog(name) ? v : null);
    let series;
    if (m.known_at.length) {
      const means = m.known_at.map((_, row) => {
        const first = row * m.cells + state.layer * m.width;
        const values = m.known[name].slice(first, first + m.experts[state.layer]);
        return values.reduce((a, b) => a + b, 0) / values.length;
      });
      series = [
        line(name, along(m.known_at.map((s, row) => [s, positive(signal(m, name, row, cell))])),
          { markLine: mark, showSymbol: m.known_at.length < 40, symbolSize: 5, ...thick }),
        line("mean of the layer", along(m.known_at.map((s, row) => [s, positive(means[row])])), thin)];
    } else {  // a log from before events.jsonl: only what its grants tell
      const own = [...m.columns.cell.keys()].filter((i) => m.columns.cell[i] === cell);
      series = [{ name: `${name} at its grants`, type: "scatter", symbolSize: 8, markLine: mark, itemStyle: thick.itemStyle,
        data: along(own.map((i) => [m.events[m.columns.event[i] - 1], positive(m.columns[name][i])])) }];
    }
    draw(`expert-${name}`, { grid: GRID, tooltip: { trigger: "axis", valueFormatter: show }, xAxis: stepAxis(),
      yAxis: axis(isLog(name) ? { type: "log" } : { type: "value", min: 0 }), series,
    }, `${name} of expert ${state.expert} of layer ${state.layer} over steps.`);
  }

  // ---- an event

  function listGrants() {
    const m = map(), body = at("grants").tBodies[0];
    body.replaceChildren();
    at("more").hidden = true;
    if (state.time === 0) {
      at("event").textContent = m.events.length ? "Move the time slider to an event." : "No rank was granted in this run.";
      return;
    }
    const columns = m.columns, grants = [...m.byEvent[state.time - 1]];
    grants.sort((a, b) => columns.granted[b] - columns.granted[a] || columns.saliency[b] - columns.saliency[a]);
    const sum = (sign) => grants.reduce((total, i) => total + Math.max(0, sign * columns.granted[i]), 0);
    const layers = new Set(grants.map((i) => Math.floor(columns.cell[i] / m.width))).size;
    const taken = sum(-1) ? `, ${sum(-1)} taken away` : "";
    at("event").textContent = `Step ${stepAt(m, state.time)}: ${sum(1)} ranks given${taken}; ` +
      `${grants.length} experts in ${layers} layers changed. More saliency, more ranks.`;
    for (const i of state.all ? grants : grants.slice(0, FEW_ROWS)) {
      const cell = columns.cell[i], layer = Math.floor(cell / m.width), expert = cell % m.width;
      const row = body.insertRow(), button = document.createElement("button");
      button.type = "button";
      button.textContent = expert;
      button.setAttribute("aria-label", `choose expert ${expert} of layer ${layer}`);
      button.addEventListener("click", () => choose(layer, expert));
      row.insertCell().textContent = layer;
      row.insertCell().appendChild(button);
      const change = columns.granted[i];
      for (const text of [change > 0 ? `+${change}` : `−${-change}`, m.history[state.time][cell],
        ...SIGNALS.map((name) => show(columns[name][i])), placeOf(m, layer, expert)])
        row.insertCell().textContent = text;
    }
    at("more").hidden = grants.length <= FEW_ROWS;
    at("more").textContent = state.all ? "Show fewer" : `Show all ${grants.length}`;
  }

  // `2 of 16`: its place by saliency among the experts of its layer, where that was written.
  function placeOf(m, layer, expert) {
    const row = m.known_at.indexOf(stepAt(m, state.time));
    if (row < 0) return "–";
    const own = signal(m, "saliency", row, cellOf(m, layer, expert));
    let place = 1;
    for (let e = 0; e < m.experts[layer]; e++)
      if (signal(m, "saliency", row, cellOf(m, layer, e)) > own) place++;
    return `${place} of ${m.experts[layer]}`;
  }

  // ---- concentration

  function drawConcentration() {
    const m = map(), c = look(), steps = [0, ...m.events, run().steps];
    const ranks = m.history.map((row) => meanGini(m, row));
    const routing = m.known_at.map((_, row) => meanGini(m, m.known.routing.subarray(row * m.cells, (row + 1) * m.cells)));
    draw("gini", { grid: { ...GRID, top: 34 }, legend: { textStyle: { color: c.ink }, top: 0 },
      tooltip: { trigger: "axis", valueFormatter: show }, xAxis: stepAxis(), yAxis: axis({ type: "value", min: 0 }),
      series: [
        line("ranks", along(steps.map((s, i) => [s, ranks[Math.min(i, m.events.length)]])),
          { step: "end", lineStyle: { color: c.first, width: 2.5 }, itemStyle: { color: c.first } }),
        ...(routing.length ? [line("routing", along(m.known_at.map((s, row) => [s, routing[row]])),
          { lineStyle: { color: c.second, width: 2, type: "dashed" }, itemStyle: { color: c.second } })] : [])],
    }, `Gini coefficient of ranks: ${show(ranks[0])} at the start, ${show(ranks.at(-1))} at the end` +
      `${routing.length ? `; of routing ${show(routing.at(-1))} at the end` : ""}.`);
    drawScatter(m);
  }

  function drawScatter(m) {
    const c = look(), row = knownRow(m, state.time), points = [];
    for (let cell = 0; cell < m.cells; cell++) {
      const rank = m.history[state.time][cell], share = signal(m, "routing", row, cell);
      if (rank >= 0 && !Number.isNaN(share)) points.push([share, rank, Math.floor(cell / m.width), cell % m.width]);
    }
    const layers = m.blocks.length;
    const chart = draw("scatter", { grid: GRID,
      tooltip: { formatter: (p) => `layer ${p.value[2]}, expert ${p.value[3]}: rank ${p.value[1]}, routing ${show(p.value[0])}` },
      graphic: points.length ? [] : [{ type: "text", left: "center", top: "middle",
        style: { text: "this run's log does not tell the routing of all experts", fill: c.soft, width: 220, overflow: "break", textAlign: "center" } }],
      xAxis: axis({ type: "value", name: "routing", nameGap: 24, splitLine: { show: false } }),
      yAxis: axis({ type: "value", name: "rank", nameGap: 30, min: 0, max: m.highest }),
      visualMap: { show: false, dimension: 2, min: 0, max: Math.max(1, layers - 1), inRange: { color: VIRIDIS.slice(1, 9) } },
      series: [{ type: "scatter", data: points, symbolSize: points.length > 600 ? 5 : 9,
        itemStyle: { borderColor: c.soft, borderWidth: 0.5, opacity: 0.9 } }],
    }, `Rank against routing of ${points.length} experts.`);
    chart.off("click");
    chart.on("click", (p) => p.value && choose(p.value[2], p.value[3]));
  }

  // ---- what the reader does

  function options(select, items, value) {
    select.replaceChildren(...items.map(([key, text]) => new Option(text, key)));
    select.value = value;
  }

  function choose(layer, expert) {
    const m = map();
    state.layer = Math.min(Math.max(layer, 0), m.blocks.length - 1);
    state.expert = Math.min(Math.max(expert, 0), m.experts[state.layer] - 1);
    options(at("expert"), [...Array(m.experts[state.layer]).keys()].map((e) => [e, e]), state.expert);
    at("layer").value = state.layer;
    drawMap();
    drawExpert();
  }

  function setTime(time) {
    state.time = time;
    at("time").value = time;
    drawMap();
    drawExpert();
    listGrants();
    drawScatter(map());
  }

  function setMap() {
    const m = map();
    state.time = m.events.length;
    Object.assign(at("time"), { max: m.events.length, value: state.time, disabled: !m.events.length });
    at("play").disabled = !m.events.length;
    const shown = ["rank", "granted", ...(m.known_at.length ? SIGNALS : [])];
    if (!shown.includes(state.shown)) state.shown = "rank";
    options(at("shown"), shown.map((name) => [name, WORDS[name]]), state.shown);
    options(at("layer"), m.blocks.map((name, l) => [l, `${l}: ${name}`]), 0);
    // The expert with the most ranks is the one to look at first.
    const ranks = m.history.at(-1), best = ranks.indexOf(ranks.reduce((a, b) => Math.max(a, b)));
    state.layer = Math.floor(best / m.width);
    state.expert = best % m.width;
    drawLoss();
    drawOther();
    choose(state.layer, state.expert);
    listGrants();
    setTimeout(drawConcentration);  // far down the page: after what is seen first
  }

  function setRun(number) {
    state.run = number;
    state.map = 0;
    options(at("map"), run().maps.map((m, i) => [i, m.projection]), 0);
    at("map-label").hidden = run().maps.length < 2;
    at("toolbar").hidden = data.runs.length < 2 && run().maps.length < 2;
    setMap();
  }

  let playing = 0;
  function play() {
    clearInterval(playing);
    playing = playing ? 0 : 1;
    at("play").textContent = playing ? "Stop" : "Play";
    at("play").setAttribute("aria-pressed", String(Boolean(playing)));
    for (const id of ["now", "chosen"]) at(id).setAttribute("aria-live", playing ? "off" : "polite");
    if (!playing) return;
    const m = map(), wait = Math.max(60, Math.min(500, 10000 / (m.events.length + 1)));
    if (state.time === m.events.length) setTime(0);
    playing = setInterval(() => (state.time < m.events.length ? setTime(state.time + 1) : play()), wait);
  }

  const KEYS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

  function start() {
    options(at("run"), data.runs.map((one, i) => [i, one.name]), 0);
    at("run-label").hidden = data.runs.length < 2;
    const curves = Object.keys(data.curves).filter((k) => k !== "loss" && data.runs.some((one) => one.log[k]));
    options(at("curve"), curves.map((key) => [key, data.curves[key]]), curves[0]);
    at("curve-label").hidden = at("other").hidden = !curves.length;
    at("run").addEventListener("change", (e) => setRun(+e.target.value));
    at("map").addEventListener("change", (e) => { state.map = +e.target.value; setMap(); });
    at("curve").addEventListener("change", drawOther);
    at("smooth").addEventListener("change", drawLoss);
    at("epochs-label").hidden = data.runs.some((one) => !one.epochs_per_step);
    at("epochs").addEventListener("change", () => {
      drawLoss();
      drawOther();
      drawExpert();
      drawConcentration();
    });
    at("shown").addEventListener("change", (e) => { state.shown = e.target.value; drawMap(); });
    at("time").addEventListener("input", (e) => setTime(+e.target.value));
    at("layer").addEventListener("change", (e) => choose(+e.target.value, state.expert));
    at("expert").addEventListener("change", (e) => choose(state.layer, +e.target.value));
    at("more").addEventListener("click", () => { state.all = !state.all; listGrants(); });
    at("play").addEventListener("click", play);
    at("ranks").addEventListener("keydown", (e) => {
      const move = KEYS[e.key];
      if (!move) return;
      e.preventDefault();
      choose(state.layer + move[0], state.expert + move[1]);
    });
    setRun(0);
    drawFinal();
    comeBack();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { setMapColours(); });
    let waiting = 0;
    addEventListener("resize", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => Object.values(charts).forEach((chart) => chart.resize()), 100);
    });
    document.documentElement.dataset.ready = "true";
  }

  // A page that loads itself anew shows what the reader had chosen.
  const KEPT = ["smooth", "epochs", "curve", "run", "map", "shown", "layer", "expert"];

  function comeBack() {
    let kept = {};
    try { kept = JSON.parse(sessionStorage.getItem(document.title)) ?? {}; } catch { return; }
    for (const id of KEPT.filter((key) => key in kept)) {
      const field = at(id), isBox = field.type === "checkbox";
      if (isBox ? field.checked === kept[id] : field.value === kept[id]) continue;
      if (isBox) field.checked = kept[id];
      else if ([...field.options].some((option) => option.value === kept[id])) field.value = kept[id];
      else continue;
      field.dispatchEvent(new Event("change"));
    }
    addEventListener("pagehide", () => {
      const now = KEPT.map((id) => [id, at(id).type === "checkbox" ? at(id).checked : at(id).value]);
      sessionStorage.setItem(document.title, JSON.stringify(Object.fromEntries(now)));
    });
  }

  function setMapColours() {
    const { time } = state;
    drawLoss();
    drawOther();
    drawConcentration();
    drawFinal();
    setTime(time);
  }

  start();
})();
