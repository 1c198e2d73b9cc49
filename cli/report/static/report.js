"use strict";
// Draws the pictures of a report: resolves palette names, expands heat maps, follows size and theme.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const pictures = read("data-pictures");
  const palettes = read("data-palettes");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const font = getComputedStyle(document.body).fontFamily;
  const charts = new Map();
  let printing = false;

  const palette = () => palettes[dark.matches && !printing ? "dark" : "light"];

  // "$after" under a key of a colour stands for that colour of the palette; other text is text.
  function resolved(value, colours) {
    if (Array.isArray(value)) return value.map((item) => resolved(item, colours));
    if (value === null || typeof value !== "object") return value;
    const copy = {};
    for (const [key, item] of Object.entries(value)) {
      const named = key === "color" && typeof item === "string" && item[0] === "$";
      copy[key] = named ? colours[item.slice(1)] : resolved(item, colours);
    }
    return copy;
  }

  function triplets(rows) {
    const data = [];
    rows.forEach((row, y) => row.forEach((value, x) => data.push([x, y, value ?? "-"])));
    return data;
  }

  function axis(given, colours, vertical) {
    const { axisLabel, axisTick, splitLine, ...rest } = given;
    const category = given.type === "category";
    return {
      nameLocation: "middle",
      nameGap: vertical ? 38 : 26,
      nameTextStyle: { color: colours.muted, fontSize: 12 },
      ...rest,
      z: category ? 3 : 0,
      axisLabel: { color: colours.muted, fontSize: 12, hideOverlap: true, ...axisLabel },
      axisLine: { show: !vertical, lineStyle: { color: colours.line } },
      axisTick: { show: false, lineStyle: { color: colours.line }, ...axisTick },
      splitLine: {
        show: vertical && !category,
        lineStyle: { color: category ? colours.muted : colours.line, opacity: category ? 0.5 : 1 },
        ...splitLine,
      },
    };
  }

  // On narrow screens labels of nodes are thinned to what fits; lines between nodes stay.
  function thinned(x, width) {
    const step = (x.axisLabel?.interval ?? 0) + 1;
    const labels = x.data ? x.data.length / step : 0;
    if (!x.axisLabel?.interval || labels * 34 < width) return x;
    const every = Math.ceil((labels * 34) / width);
    return { ...x, axisLabel: { ...x.axisLabel, interval: step * every - 1 } };
  }

  function heatTooltip(option) {
    const escaped = echarts.format.encodeHTML;
    const [x, y] = [option.xAxis, option.yAxis];
    return ({ value: [i, j, v] }) =>
      `${escaped(y.name)} ${escaped(y.data[j])}, ${escaped(x.name)} ${escaped(x.data[i])}<br>` +
      `<b>${escaped(String(v))}</b> ${escaped(option.series[0].name)}`;
  }

  function complete(given, width) {
    const colours = palette();
    const option = resolved(given, colours);
    const heat = option.series.some((series) => series.rows);
    const series = option.series.map(({ rows, ...rest }) =>
      rows
        ? { ...rest, data: triplets(rows), progressive: 0, animation: false,
            emphasis: { itemStyle: { borderColor: colours.text, borderWidth: 1 } } }
        : rest);
    return {
      ...option,
      animation: false,
      backgroundColor: "transparent",
      textStyle: { fontFamily: font, color: colours.text },
      grid: { left: 52, right: 16, top: option.legend && option.legend.show !== false ? 40 : 12, bottom: 44 },
      xAxis: axis(thinned(option.xAxis, width - 70), colours, false),
      yAxis: axis(option.yAxis, colours, true),
      legend: { show: !heat, top: 0, left: 0, itemWidth: 30, itemGap: 16, type: "scroll", selectedMode: true,
        ...option.legend, textStyle: { color: colours.text, fontSize: 13 } },
      tooltip: { confine: true, backgroundColor: colours.card, borderColor: colours.line,
        textStyle: { color: colours.text, fontSize: 13 },
        ...(heat ? { formatter: heatTooltip(option) } : {}), ...option.tooltip },
      series: series.map((item) => ({
        ...item,
        ...(item.markArea ? { markArea: { ...item.markArea,
          label: { ...item.markArea.label, color: colours.muted, fontSize: 12 } } } : {}),
      })),
    };
  }

  function draw() {
    for (const [key, { option }] of Object.entries(pictures)) {
      const place = document.getElementById(`picture-${key}`);
      const heat = option.series.some((series) => series.rows);
      const chart = charts.get(key) ??
        echarts.init(place, null, { renderer: heat ? "canvas" : "svg", devicePixelRatio: Math.max(2, window.devicePixelRatio) });
      charts.set(key, chart);
      chart.resize();
      chart.setOption(complete(option, place.clientWidth), { notMerge: true });
      if (printing) chart.getZr().flush();
    }
  }

  // The values of a heat map are made into a table only when someone asks for them.
  function fill(details) {
    if (!details.open || details.querySelector("table")) return;
    const { option, title } = pictures[details.dataset.values];
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const text of [`${option.yAxis.name} \\ ${option.xAxis.name}`, ...option.xAxis.data]) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = text;
      head.append(cell);
    }
    const body = table.createTBody();
    option.series[0].rows.forEach((values, y) => {
      const row = body.insertRow();
      const name = document.createElement("th");
      name.scope = "row";
      name.textContent = option.yAxis.data[y];
      row.append(name);
      values.forEach((value) => { row.insertCell().textContent = value ?? ""; });
    });
    const scroll = document.createElement("div");
    scroll.className = "scroll";
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", `All values: ${title}`);
    scroll.append(table);
    details.append(scroll);
  }

  function follow() {
    const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
    const seen = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        if (!isIntersecting) continue;
        links.forEach((link) => link.removeAttribute("aria-current"));
        links.get(target.id)?.setAttribute("aria-current", "true");
      }
    }, { rootMargin: "0px 0px -70% 0px" });
    document.querySelectorAll("main section").forEach((section) => seen.observe(section));
  }

  draw();
  follow();
  document.querySelectorAll("details[data-values]").forEach((details) =>
    details.addEventListener("toggle", () => fill(details)));
  dark.addEventListener("change", draw);
  let waiting = 0;
  window.addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    if (!printing) waiting = requestAnimationFrame(draw);
  });
  // Drawn at the width of paper before the printer looks: it does not wait for frames.
  const print = (on) => {
    printing = on;
    document.documentElement.classList.toggle("printing", on);
    draw();
  };
  window.addEventListener("beforeprint", () => print(true));
  window.addEventListener("afterprint", () => print(false));
})();
