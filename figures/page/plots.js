// What Plotly is told: layouts and marks.

const MARGIN = { left: 46, right: 8, top: 8, bottom: 40 };
const FONT = { family: "system-ui, Segoe UI, Helvetica Neue, Arial, sans-serif", size: 11 };
const LABEL = 15; // height of a small picture's label, in pixels
const GAP = 8; // between small pictures
const FRAME = 3; // what the frame of the first of them needs to its left
const CONFIG = { displayModeBar: false, doubleClick: false, showTips: false };

/** Pixels of a cell such that the picture fits the width that there is, and most windows' height. */
function cellSize(width, rows, columns, side = 0) {
  const most = clamp(window.innerHeight - 376, 260, 560);
  return Math.min((width - MARGIN.left - side - MARGIN.right) / columns, most / rows, most / columns);
}

function baseLayout(width, height, margin) {
  return {
    width: width + margin.l + margin.r,
    height: height + margin.t + margin.b,
    margin: { ...margin, pad: 0 },
    font: { ...FONT, color: styleColour("--quiet") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hovermode: "closest",
    dragmode: false,
    showlegend: false,
  };
}

const AXIS_NAME = 12; // its size
const axisTitle = (text) => ({ text, standoff: 4, font: { size: AXIS_NAME } });
const pen = document.createElement("canvas").getContext("2d");

/** Of a line of text, in pixels. */
function textWidth(text, size = FONT.size) {
  pen.font = `${size}px ${FONT.family}`;
  return pen.measureText(text).width;
}

/** How far the name of an axis of so many pixels reaches beyond each end of it. */
const overhang = (name, side) => Math.max(0, (textWidth(name, AXIS_NAME) - side) / 2);

/**
 * Of a picture of cells; `down` and `across` are its axes: {name, ticks: [place, text]}; `side` is the room for long
 * texts of ticks.
 */
function gridLayout(cell, rows, columns, down, across, side = 0) {
  const axis = ({ name, ticks }) => ({
    ...{ fixedrange: true, showgrid: false, zeroline: false, showline: false, ticks: "" },
    ...{ tickvals: ticks.map(([place]) => place), ticktext: ticks.map(([, text]) => text) },
    title: axisTitle(name),
  });
  const margin = {
    l: MARGIN.left + side,
    r: Math.max(MARGIN.right, overhang(across.name, cell * columns)),
    t: Math.max(MARGIN.top, overhang(down.name, cell * rows)),
    b: MARGIN.bottom + side,
  };
  return {
    ...baseLayout(cell * columns, cell * rows, margin),
    xaxis: { ...axis(across), range: [-0.5, columns - 0.5], tickangle: side ? -90 : 0 },
    yaxis: { ...axis(down), range: [rows - 0.5, -0.5] },
    shapes: [],
  };
}

/** Cells in the colours of a scale. */
function heat(z, scale, more = {}) {
  const { limit, signed } = scale;
  const colours = { zmin: signed ? -limit : 0, zmax: limit, colorscale: coloursOf(scale), showscale: false };
  return { type: "heatmap", z, ...colours, hoverinfo: "none", hoverongaps: false, ...more };
}

const OVER_IMAGE = 0.6; // how much of its colours a map over an image has

/** An image that fills a picture of cells, below them. */
const imageBelow = ({ url }, rows, columns) => ({
  ...{ source: url, layer: "below", sizing: "stretch" },
  ...{ xref: "x", yref: "y", x: -0.5, y: -0.5, sizex: columns, sizey: rows },
});

/** The values themselves, where cells are large enough for them; not in the cell that bears the mark. */
function numbers(z, cell, { limit, signed }, marked = []) {
  if (cell < 40) return [];
  const cells = z.flatMap((values, y) => values.map((value, x) => ({ value, x, y })));
  const shown = cells.filter(({ x, y }) => y !== marked[0] || x !== marked[1]);
  return [
    {
      mode: "text",
      hoverinfo: "skip",
      x: shown.map(({ x }) => x),
      y: shown.map(({ y }) => y),
      text: shown.map(({ value }) => format(value, digitsFor(limit, 2))),
      textfont: { color: shown.map(({ value }) => (Math.abs(value) > 0.6 * limit === signed ? "white" : "black")) },
    },
  ];
}

/** Ticks of the offsets -size + 1 .. size - 1, which lie at 0 .. 2 size - 2. */
function offsetTicks(size) {
  const offsets = new Set(spread(size, 4).flatMap((offset) => [-offset, offset]));
  return [...offsets].map((offset) => [offset + size - 1, format(offset, 0)]);
}

/** Points [right, down] of each head about the origin, as far as `reach`; one head stands out, and one point. */
function scatter(heads, selected, reach, side, pointed) {
  const colour = (head) => styleColour(head === selected ? "--accent" : "--quiet");
  const traces = heads.map((points, head) => ({
    mode: "markers",
    hoverinfo: "none",
    x: points.map(([right]) => right),
    y: points.map(([, down]) => down),
    marker: { color: colour(head), size: head === selected ? 9 : 6, opacity: head === selected ? 1 : 0.45 },
    zorder: head === selected ? 1 : 0,
  }));
  const found = heads[pointed?.head]?.[pointed.pair];
  if (found) {
    traces.push(mark(...found, { symbol: "circle-open", size: 14, color: styleColour("--ink"), line: { width: 2 } }));
  }
  const line = { zerolinecolor: styleColour("--line"), linecolor: styleColour("--line") };
  const axis = { ...line, fixedrange: true, showgrid: false, nticks: 7, mirror: true, showline: true };
  const named = (where) => ({ ...axis, title: axisTitle(`radians per patch ${where}`) });
  const layout = {
    ...baseLayout(side, side, { l: MARGIN.left, r: MARGIN.right, t: MARGIN.top, b: MARGIN.bottom }),
    xaxis: { ...named("to the right"), range: [-1.08 * reach, 1.08 * reach] },
    yaxis: { ...named("down"), range: [1.08 * reach, -1.08 * reach] },
  };
  return { traces, layout };
}

const mark = (x, y, marker) => ({ x: [x], y: [y], mode: "markers", hoverinfo: "skip", cliponaxis: false, marker });

/** The chosen patch: a ring, filled once it is pinned. */
const patchMark = ([row, column], cell, pinned) =>
  mark(column, row, {
    symbol: "circle",
    size: clamp(cell * 0.45, 5, 13),
    color: pinned ? styleColour("--accent") : "rgba(255,255,255,0.85)",
    line: { color: pinned ? "white" : "black", width: 1.5 },
  });

/** Points from the left at a row of the picture. */
const rowMark = (row) => mark(-0.5, row, { symbol: "triangle-right", size: 9, color: styleColour("--accent") });

const box = (x, y, width, height, line = { color: styleColour("--accent"), width: 2 }) => ({
  type: "rect",
  ...{ x0: x, y0: y, x1: x + width, y1: y + height, line },
});

/** A frame that is seen on every colour. */
const frame = (x, y, width, height, dash = "solid") => [
  box(x, y, width, height, { color: "white", width: 4 }),
  box(x, y, width, height, { color: "black", width: 2, dash }),
];

/** A frame around a cell, large enough to be seen. */
function cellFrame([row, column], cell, dash) {
  const half = Math.max(0.5, 3.5 / cell);
  return frame(column - half, row - half, 2 * half, 2 * half, dash);
}

/** Text that Plotly, which knows a few tags, shall show as it is. */
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");

/**
 * Small pictures in rows, as large as a width and height (in pixels) admit, as one heat map; the selected one is
 * framed. The picture at place [r, c] of its z is number floor(r / (H + 1)) * columns + floor(c / (W + 1)).
 */
function contactSheet(images, names, selected, scale, width, height) {
  const [H, W] = [images[0].length, images[0][0].length];
  const cellWith = (columns) => {
    const rows = Math.ceil(images.length / columns);
    return Math.min((width - FRAME - GAP * columns) / (columns * W), (height / rows - LABEL - GAP) / H);
  };
  const columns = images.map((_, i) => i + 1).reduce((best, n) => (cellWith(n) > cellWith(best) ? n : best), 1);
  const [rows, cell] = [Math.ceil(images.length / columns), cellWith(columns)];
  const [stepX, stepY] = [W + GAP / cell, H + (LABEL + GAP) / cell];
  const list = (count, item) => Array.from({ length: count }, (_, i) => item(i));
  const gap = Array(W).fill(null);
  const line = (r, c) => images[Math.floor(r / (H + 1)) * columns + c]?.[r % (H + 1)] ?? gap;
  const z = list(rows * (H + 1) - 1, (r) => list(columns, (c) => [...line(r, c), null]).flat().slice(0, -1));
  const edges = (count, size, step) => list(count, (i) => list(size + 1, (edge) => i * step + edge)).flat();
  const [x, y] = [edges(columns, W, stepX), edges(rows, H, stepY)];
  const corner = (i) => [(i % columns) * stepX, Math.floor(i / columns) * stepY];
  const labels = {
    mode: "text",
    hoverinfo: "skip",
    cliponaxis: false,
    x: images.map((_, i) => corner(i)[0]),
    y: images.map((_, i) => corner(i)[1]),
    text: names.map((name, i) => (i === selected ? `<b>${plain(name)}</b>` : plain(name))),
    textposition: "top right",
    textfont: { color: names.map((_, i) => styleColour(i === selected ? "--accent" : "--quiet")) },
  };
  const axis = { visible: false, fixedrange: true };
  const layout = {
    ...baseLayout(Math.floor(columns * stepX * cell), rows * stepY * cell, { l: FRAME, r: 0, t: LABEL, b: 0 }),
    xaxis: { ...axis, range: [0, columns * stepX] },
    yaxis: { ...axis, range: [rows * stepY, 0] },
    shapes: [box(...corner(selected), W, H)],
  };
  return { traces: [heat(z, scale, { x, y }), labels], layout, columns };
}

const CURVE = { height: 84, title: 22 }; // of each row of curves, in pixels

/** Curves over the blocks, one row below the other, with a line at one block. */
function curveSheet(curves, layer, width) {
  const margin = { l: 40, r: MARGIN.right, t: CURVE.title, b: 34 };
  const height = curves.length * (CURVE.height + CURVE.title) - CURVE.title;
  const part = (pixels) => pixels / height;
  const top = (row) => 1 - part(row * (CURVE.height + CURVE.title));
  const axis = { fixedrange: true, zerolinecolor: styleColour("--line"), gridcolor: styleColour("--line") };
  const name = (row) => (row ? `y${row + 1}` : "y");
  const dashes = ["solid", "dash"];
  const traces = curves.flatMap(({ lines }, row) =>
    lines.map(({ name: line, values }, i) => ({
      mode: "lines+markers",
      x: values.map((_, block) => block),
      y: values,
      yaxis: name(row),
      hovertemplate: `block %{x}: %{y:.3f}${line && `, ${plain(line)}`}<extra></extra>`,
      line: { color: styleColour("--accent"), dash: dashes[i], width: 1.5 },
      marker: { size: 5 },
    })),
  );
  const named = (lines) => lines.map((line, i) => `${line.name} (${dashes[i]})`).join(", ");
  const titles = curves.map(({ title, lines }, row) => ({
    ...{ xref: "paper", yref: "paper", x: 0, y: top(row), xanchor: "left", yanchor: "bottom", showarrow: false },
    text: plain(lines.length > 1 ? `${title}: ${named(lines)}` : title),
  }));
  const rows = curves.map((_, row) => [
    `yaxis${row ? row + 1 : ""}`,
    { ...axis, domain: [Math.max(0, top(row) - part(CURVE.height)), top(row)], nticks: 4 },
  ]);
  const blocks = curves[0].lines[0].values.length;
  const at = { type: "line", xref: "x", yref: "paper", x0: layer, x1: layer, y0: 0, y1: 1 };
  const below = { anchor: "free", position: 0, title: axisTitle("block") };
  const layout = {
    ...baseLayout(width - margin.l - margin.r, height, margin),
    xaxis: { ...axis, ...below, range: [-0.4, blocks - 0.6], dtick: Math.ceil(blocks / 12) },
    ...Object.fromEntries(rows),
    annotations: titles,
    shapes: [{ ...at, line: { color: styleColour("--ink"), width: 1, dash: "dot" } }],
  };
  return { traces, layout };
}

const EXPORT = { line: 15, scale: 64, pad: 10 }; // of a saved picture: a line of text, the colour bar, in pixels

/** Save a picture as a PNG file, with lines of text above it and, of heat maps, the scale beside it. */
function savePng(filename, lines, data, layout, hasScale) {
  const { r, t, b } = layout.margin;
  const l = Math.max(layout.margin.l, EXPORT.pad);
  const [across, down] = [layout.width - layout.margin.l - r, layout.height - t - b];
  const top = t + EXPORT.line * lines.length + EXPORT.pad;
  const text = Math.max(...lines.map((line) => textWidth(line))) + 2 * EXPORT.pad;
  const right = Math.max(r + (hasScale ? EXPORT.scale : 0), text - l - across);
  const titles = lines.map((line, i) => ({
    ...{ xref: "paper", yref: "paper", x: 0, y: 1, xanchor: "left", yanchor: "bottom", showarrow: false },
    ...{ xshift: EXPORT.pad - l, yshift: t + EXPORT.line * (lines.length - 1 - i) },
    ...{ text: plain(line), font: { size: FONT.size } },
  }));
  const bar = { thickness: 10, outlinewidth: 0, x: 1, xpad: 8 };
  const [first, ...rest] = data;
  const [width, height] = [l + across + right, top + down + b];
  const figure = {
    data: hasScale ? [{ ...first, showscale: true, colorbar: bar }, ...rest] : data,
    layout: {
      ...layout,
      ...{ width, height, margin: { ...layout.margin, l, t: top, r: right } },
      paper_bgcolor: styleColour("--card"),
      annotations: [...(layout.annotations ?? []), ...titles],
    },
  };
  return Plotly.downloadImage(figure, { format: "png", scale: 2, filename, width, height });
}
