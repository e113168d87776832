// A panel: a view as pictures and a line that reads out values; of one checkpoint, or of what two differ by.

class Panel {
  constructor() {
    this.root = byId("panel").content.cloneNode(true).firstElementChild;
    this.find = (selector) => this.root.querySelector(selector);
    this.shown = new Map(); // what each figure shows
    this.scales = new Map(); // of differences
    this.view = undefined;
    for (const button of this.root.querySelectorAll(".save")) {
      button.addEventListener("click", () => this.save(button.closest("figure")));
    }
  }

  // ---- what it shows

  /** Write what it is; `nothing` is why there is nothing to see, if so. */
  tell({ letter, name, caption, nothing }) {
    for (const [part, text] of Object.entries({ letter, name, caption, nothing })) {
      this.find(`.${part}`).textContent = text;
    }
    this.root.setAttribute("aria-label", [letter, name].filter(Boolean).join(": "));
    for (const part of ["pick-view", "scale", "reading", "pictures"]) this.find(`.${part}`).hidden = Boolean(nothing);
    this.find(".nothing").hidden = !nothing;
  }

  /** Of the patches; values by offset may be between the places of a window. */
  get grid() {
    return this.view?.byOffset ? this.view.shape.map((side) => (side + 1) / 2) : this.checkpoint.grid;
  }

  get layerIndex() {
    return clamp(state.layer, 0, this.view.layers.length - 1);
  }

  get layer() {
    return this.view.layers[this.layerIndex];
  }

  get head() {
    return clamp(state.head, 0, this.view.heads - 1);
  }

  headName() {
    const { panels, heads, mean, image } = this.view;
    if (mean && this.head === heads - 1) return "mean of heads";
    return panels[this.head] ?? (heads > 1 || image ? `head ${this.head}` : "all heads alike");
  }

  /** Below a small picture. */
  shortName(head) {
    const { panels, heads, mean } = this.view;
    return mean && head === heads - 1 ? "mean" : (panels[head] ?? String(head));
  }

  /** The chosen patch; none where values are between rows of tables, or no values of patches at all. */
  get patch() {
    return this.view.rows.length || this.view.points ? null : patchOf(this.grid);
  }

  /**
   * What the mouse points at in any panel, as it is in this one: a `cell` of the whole picture and, between patches,
   * `from` one `to` another; null if this one has none of it.
   */
  get pointed() {
    const { view, grid, patch } = this;
    const { from, to, offset, cell, table } = state.pointed ?? {};
    if (table) return table === view.name && cell.every((row) => row < view.rows.length) ? { cell } : null;
    if (!patch || !(to || offset)) return null;
    const query = from ? patchOf(grid, from) : patch;
    const steps = offset?.map((share, axis) => Math.round(share * grid[axis]));
    const key = to ? patchOf(grid, to) : query.map((place, axis) => place + steps[axis]);
    const isInside = key.every((place, axis) => place >= 0 && place < grid[axis]);
    const between = isInside ? { from: query, to: key } : {};
    if (view.byOffset) return { ...between, cell: key.map((place, axis) => place - query[axis] + grid[axis] - 1) };
    return isInside ? { ...between, cell: [this.numberOf(query), this.numberOf(key)] } : null;
  }

  patchAt(index) {
    return [Math.floor(index / this.grid[1]), index % this.grid[1]];
  }

  numberOf([row, column]) {
    return row * this.grid[1] + column;
  }

  offset(cell) {
    return cell.map((place, axis) => place - this.grid[axis] + 1);
  }

  /** The scale of differences of these pairs of layers, kept. */
  scaleOfPairs(pairs) {
    const key = JSON.stringify([this.indices, this.view.name, state.difference]);
    if (!this.scales.has(key)) {
      const scale = scaleOfDifferences(pairs, this.view, checkpoints[0].scale === "range");
      if (!scale) return undefined;
      this.scales.set(key, scale);
    }
    return this.scales.get(key);
  }

  // ---- what the mouse does

  /** It is over a patch, which becomes the chosen one unless one is pinned. */
  pointAtPatch(patch) {
    const place = placeOf(patch, this.grid);
    set(state.pinned ? { pointed: { to: place } } : { place, pointed: null });
  }

  /** It is over a cell of the whole picture; its query patch, if any, becomes the chosen one likewise. */
  pointAtCell(cell) {
    const { view, grid } = this;
    if (view.rows.length) set({ pointed: { table: view.name, cell } });
    else if (view.byOffset) set({ pointed: { offset: this.offset(cell).map((steps, axis) => steps / grid[axis]) } });
    else {
      const [from, to] = cell.map((index) => placeOf(this.patchAt(index), grid));
      set(state.pinned ? { pointed: { from, to } } : { place: from, pointed: { from, to } });
    }
  }

  pin(patch) {
    const again = state.pinned && String(patch) === String(this.patch);
    choose(patch, this.grid, { pinned: !again, pointed: null });
  }

  // ---- pictures

  /** Draw what must follow the mouse at once. */
  draw() {
    if (!this.view) return;
    this.scale = this.makeScale();
    if (!this.scale) return;
    this.find(".scale").hidden = this.view.points;
    const { limit, largest, signed } = this.scale;
    this.find(".scale-name").textContent = this.scaleName();
    this.find(".scale-low").textContent = brief(signed ? -limit : 0);
    this.find(".scale-zero").textContent = signed ? "0" : "";
    this.find(".scale-high").textContent = brief(limit);
    const colours = coloursOf(this.scale).map(([, colour]) => colour);
    this.find(".scale-bar").style.background = `linear-gradient(to right, ${colours})`;
    const end = `${signed ? "±" : ""}${brief(limit)}`;
    this.find(".cut").textContent = `colours end at ${end}, the largest value is ${brief(largest)}`;
    this.find(".cut").hidden = largest <= 1.001 * limit || this.view.points;
    this.find(".reading").textContent = this.reading();
    this.drawMap();
  }

  /** Draw a figure that may come a moment later: not before this layer is unpacked, lest others be unpacked first. */
  drawLater(name) {
    if (!this.view || !this.scale || !areUnpacked(this.terms())) return;
    if (name === "whole") this.drawWhole();
    else if (name === "plane") this.drawPlane();
    else if (name === "curves") this.drawCurves();
    else this.drawSheet(name);
  }

  /** Draw a figure, unless it shows the same already. `make(width)` gives Plotly's input, if all is unpacked for it. */
  plot(name, caption, signature, make, listen) {
    const figure = this.find(`.${name}`);
    const div = figure.querySelector(".plot");
    figure.querySelector("figcaption").textContent = caption;
    figure.querySelector(".save").setAttribute("aria-label", `Save as PNG: ${caption}`);
    div.setAttribute("aria-label", caption);
    const width = Math.floor(figure.getBoundingClientRect().width);
    const what = [this.indices, this.view.name, state.difference, this.scale.limit];
    const content = JSON.stringify([what, theme(), [width, window.innerHeight], signature]);
    if (this.shown.get(name) === content || width === 0) return;
    const made = make(width);
    if (!made) return;
    const first = !this.shown.has(name);
    this.shown.set(name, content);
    Plotly.react(div, made.traces, made.layout, CONFIG);
    if (first) listen(div);
    if (!performance.getEntriesByName("drawn").length) performance.mark("drawn");
  }

  drawMap() {
    const { patch, grid, pointed, view } = this;
    this.find(".map").hidden = !patch;
    if (!patch) return;
    const make = (width) => {
      const z = patchPicture(this.terms(), grid, patch);
      if (!z) return undefined;
      const [H, W] = grid;
      const cell = cellSize(width, H, W);
      const [down, across] = [
        { name: "row (patches)", ticks: spread(H, 7).map((i) => [i, i]) },
        { name: "column (patches)", ticks: spread(W, 7).map((i) => [i, i]) },
      ];
      const layout = gridLayout(cell, H, W, down, across);
      if (pointed?.to) {
        if (String(pointed.from) !== String(patch)) layout.shapes.push(...cellFrame(pointed.from, cell, "dot"));
        layout.shapes.push(...cellFrame(pointed.to, cell));
      }
      const gap = cell > 12 && !view.image ? 1 : 0;
      const tiles = heat(z, this.scale, { xgap: gap, ygap: gap, ...(view.image && { opacity: OVER_IMAGE }) });
      if (view.image) layout.images = [imageBelow(view.image, H, W)];
      const values = view.image ? [] : numbers(z, cell, this.scale, patch);
      return { traces: [tiles, ...values, patchMark(patch, cell, state.pinned)], layout };
    };
    const signature = [this.layerIndex, this.head, patch, state.pinned, pointed];
    const over = view.image ? `, over ${view.image.name}` : "";
    this.plot("map", `From ${patchName(patch)} to every patch${over}`, signature, make, (div) => {
      div.on("plotly_hover", ({ points }) => this.pointAtPatch([points[0].y, points[0].x]));
      div.on("plotly_unhover", () => set({ pointed: null }));
      div.on("plotly_click", ({ points }) => this.pin([points[0].y, points[0].x]));
    });
  }

  drawWhole() {
    const { patch, view, pointed } = this;
    this.find(".whole").hidden = view.points;
    if (view.points) return;
    const [H, W] = this.grid;
    const [height, width] = view.shape;
    const make = (available) => {
      const z = wholePicture(this.terms());
      if (!z) return undefined;
      const side = view.rows.length ? 8 + Math.max(...view.rows.map((row) => textWidth(row))) : 0;
      const cell = cellSize(available, height, width, side);
      const layout = gridLayout(cell, height, width, ...this.wholeAxes(), side);
      if (view.byOffset) {
        const [x, y] = [W - 1.5, H - 1.5]; // the corner of no offset at all
        layout.shapes.push(...frame(x - patch[1], y - patch[0], W, H, "dash")); // what the chosen patch reaches
        layout.shapes.push(...frame(x, y, 1, 1, "dash"));
      }
      if (pointed) layout.shapes.push(...cellFrame(pointed.cell, cell));
      const marks = view.byOffset || !patch ? [] : [rowMark(this.numberOf(pointed?.from ?? patch))];
      const values = numbers(z, cell, this.scale);
      return { traces: [heat(z, this.scale), ...values, ...marks], layout };
    };
    const what = view.rows.length ? "row" : "patch";
    const caption = view.byOffset ? "By offset from query to key" : `From every ${what} to every ${what}`;
    this.plot("whole", caption, [this.layerIndex, this.head, patch, pointed], make, (div) => {
      div.on("plotly_hover", ({ points }) => this.pointAtCell([points[0].y, points[0].x]));
      div.on("plotly_unhover", () => set({ pointed: null }));
      div.on("plotly_click", ({ points }) => {
        if (!this.view.byOffset && !this.view.rows.length) this.pin(this.patchAt(points[0].y));
      });
    });
  }

  /** The axes of the whole picture, down and across. */
  wholeAxes() {
    const { view, grid } = this;
    if (view.rows.length) {
      const axis = { name: "offset (patches)", ticks: view.rows.map((row, i) => [i, plain(row)]) };
      return [axis, axis];
    }
    if (view.byOffset) {
      const names = ["rows to the key (patches)", "columns to the key (patches)"];
      return names.map((name, axis) => ({ name, ticks: offsetTicks(grid[axis]) }));
    }
    const ticks = spread(grid[0], 5).map((row) => [row * grid[1], row * grid[1]]);
    return ["query patch, row by row", "key patch, row by row"].map((name) => ({ name, ticks }));
  }

  /** Frequencies as points in the plane, of all heads; a click on one chooses its head. */
  drawPlane() {
    const { view, layer } = this;
    this.find(".plane").hidden = !view.points;
    if (!view.points) return;
    const heads = Array.from({ length: view.heads }, (_, head) => wholePicture(this.terms(this.layerIndex, head)));
    const point = state.pointed?.pair === undefined ? undefined : state.pointed;
    const make = (width) => scatter(heads, this.head, this.scale.limit, cellSize(width, 1, 1), point);
    this.plot("plane", `Every head, ${layer.title}`, [this.layerIndex, this.head, point], make, (div) => {
      div.on("plotly_hover", ({ points }) => {
        const [{ curveNumber: head, pointIndex: pair }] = points;
        set({ pointed: { head, pair } });
      });
      div.on("plotly_unhover", () => set({ pointed: null }));
      div.on("plotly_click", ({ points }) => set({ head: points[0].curveNumber }, true));
    });
  }

  /** Small pictures of all layers or of all heads; a click goes there. */
  drawSheet(name) {
    const { view, grid, patch } = this;
    const ofLayers = name === "layers";
    const count = ofLayers ? view.layers.length : view.heads;
    const hidden = count === 1 || view.points;
    this.find(`.${name}`).hidden = hidden;
    if (hidden) return;
    const selected = ofLayers ? this.layerIndex : this.head;
    const make = (width) => {
      const terms = (i) => (ofLayers ? this.terms(i) : this.terms(this.layerIndex, i));
      const images = Array.from({ length: count }, (_, i) => patchPicture(terms(i), grid, patch));
      if (images.includes(undefined)) return undefined;
      const names = images.map((_, i) => (ofLayers ? String(i) : this.shortName(i)));
      const made = contactSheet(images, names, selected, this.scale, width, this.sheetHeight());
      this.columns = { ...this.columns, [name]: made.columns };
      return made;
    };
    const headName = view.heads > 1 ? `, ${this.headName()}` : "";
    const head = view.panels.length ? "table" : "head";
    const caption = ofLayers ? `Every layer${headName}` : `Every ${head}, ${this.layer.title}`;
    this.plot(name, caption, [this.layerIndex, this.head, patch, view.heads, this.sheetHeight()], make, (div) => {
      div.on("plotly_click", ({ points }) => {
        const [H, W] = this.patch ? this.grid : this.view.shape;
        const [row, column] = points[0].pointIndex;
        const place = Math.floor(row / (H + 1)) * this.columns[name] + Math.floor(column / (W + 1));
        set({ [ofLayers ? "layer" : "head"]: place }, true);
      });
    });
  }

  /** What was measured in every block, with a line at the layer that is shown; a click goes to the nearest block. */
  drawCurves() {
    const { curves } = this.checkpoint;
    this.find(".curves").hidden = !curves.length;
    if (!curves.length) return;
    const make = (width) => curveSheet(curves, this.layerIndex, width);
    this.plot("curves", "What was measured in every block", [this.layerIndex], make, (div) => {
      div.on("plotly_click", ({ points }) => set({ layer: points[0].x }, true));
    });
  }

  /** What the sheets may take in height: beside the large pictures as much as those, below them less. */
  sheetHeight() {
    const [map, strips] = [this.find(".whole"), this.find(".strips")];
    const beside = strips.offsetTop < map.offsetTop + map.offsetHeight;
    const both = this.view.heads > 1 && this.view.layers.length > 1;
    if (beside) return Math.max(map.offsetHeight - 24, 200) / (both ? 2 : 1) - (both ? 18 : 0);
    return both ? 150 : 180;
  }

  /** Save a figure as a file: on the page's own background, below what it is, beside its scale. */
  save(figure) {
    const { view, patch } = this;
    const [name] = figure.classList;
    const { data, layout } = figure.querySelector(".plot");
    const caption = figure.querySelector("figcaption").textContent;
    const lines = [this.checkpoint.caption, `${this.layer.title}, ${this.headName()}: ${this.scaleName()}`, caption];
    const hasScale = !view.points && name !== "curves";
    const file = [
      this.checkpoint.stem,
      view.name,
      `layer${this.layerIndex}`,
      view.heads > 1 && (view.mean && this.head === view.heads - 1 ? "mean" : `head${this.head}`),
      Number.isInteger(state.difference) && `minus_layer${this.base}`,
      patch && name !== "whole" && `from_${patch.join("_")}`,
      name,
    ];
    return savePng(file.filter(Boolean).join("_"), lines, data, layout, hasScale);
  }

  // ---- words

  /** By how much the values of this layer may be off, having been rounded for the page. */
  error() {
    const steps = this.terms().reduce((sum, { layer }) => sum + layer.step, 0);
    return String(Number((steps / 2).toPrecision(1)));
  }

  /** What the numbers are: of the cell that the mouse points at, else of the chosen patch. */
  reading() {
    const { view, patch, pointed } = this;
    if (!areUnpacked(this.terms())) return "";
    if (view.points) return this.frequency();
    if (pointed) return `${this.whereIs(pointed)}: ${this.sayAt(pointed.cell)}`;
    if (!patch) return "Point at a cell to read its value.";
    const z = patchPicture(this.terms(), this.grid, patch);
    return `${patchName(patch)}: ${this.say(z[patch[0]][patch[1]])} to itself${this.extremes(z.flat())}`;
  }

  whereIs({ from, to, cell }) {
    if (this.view.rows.length) return cell.map((row) => this.view.rows[row]).join(" to ");
    if (to && !(this.view.byOffset && state.pointed.offset)) return `${patchName(from)} to ${patchName(to)}`;
    const [down, right] = this.offset(cell).map((places) => format(places, 0));
    return `rows ${down}, columns ${right} from the query`;
  }

  /** A value and, of a difference, what it is the difference of. */
  sayAt([row, column]) {
    const terms = this.terms();
    const value = (of) => this.say(valueAt(of, row * this.view.shape[1] + column));
    const names = this.termNames();
    const parts = terms.length > 1 ? ` (${terms.map((term, i) => `${names[i]}: ${value([term])}`).join("; ")})` : "";
    return value(terms) + parts;
  }

  frequency() {
    const { head, pair } = state.pointed ?? {};
    if (!(head < this.view.heads && pair < this.view.shape[0])) {
      return "Point at a frequency to read it, click on it to choose its head.";
    }
    const terms = this.terms(this.layerIndex, head);
    const [right, down] = [0, 1].map((axis) => this.say(valueAt(terms, 2 * pair + axis)));
    return `head ${head}, pair ${pair}: ${right} to the right, ${down} down`;
  }

  /** Where the chosen patch's values, row by row, are greatest and least, itself left out. */
  extremes(values) {
    const itself = this.patch[0] * this.grid[1] + this.patch[1];
    const others = [...values.keys()].filter((i) => i !== itself).sort((i, j) => values[j] - values[i]);
    if (!others.length) return "";
    const tell = (i) => `${this.say(values[i])} to ${patchName(this.patchAt(i))}`;
    return `; elsewhere at most ${tell(others[0])}, at least ${tell(others.at(-1))}`;
  }

  say(value) {
    return format(value, decimals(this.view, this.layer));
  }
  /** What the colours of the scale are of. */
  scaleName() {
    const names = this.termNames();
    return names.length > 1 ? `difference ${names.join(" − ")}` : this.view.title;
  }
}

/** A checkpoint in one of its views: the values, or what they differ by from one of its layers. */
class CheckpointPanel extends Panel {
  constructor(index) {
    super();
    this.letter = checkpoints.length > 1 ? "AB"[index] : "";
    const [pick, pickView] = [this.find(".pick-checkpoint select"), this.find(".pick-view select")];
    pick.append(...checkpoints.map((checkpoint, i) => new Option(checkpoint.name, i)));
    pick.addEventListener("change", () => this.showCheckpoint(Number(pick.value)));
    pickView.addEventListener("change", () => showView(pickView.value, this));
    this.find(".pick-checkpoint").hidden = checkpoints.length < 3;
    this.find(".name").hidden = checkpoints.length > 2; // the choice says it
    this.showCheckpoint(index);
  }

  showCheckpoint(index) {
    this.checkpoint = checkpoints[index];
    this.indices = [index];
    const { views } = this.checkpoint;
    this.tell({ letter: this.letter, ...this.checkpoint });
    this.find(".pick-checkpoint select").value = index;
    this.find(".pick-view select").replaceChildren(...views.map((view) => new Option(view.title, view.name)));
    this.showView(this.named((this.view ?? leading()?.view)?.name) ?? views[0]);
  }

  named(name) {
    return this.checkpoint.views.find((view) => view.name === name);
  }

  showView(view) {
    this.view = view;
    if (view) this.find(".pick-view select").value = view.name;
    schedule();
  }

  /** The layer from which differences are taken, if so. */
  get base() {
    return Number.isInteger(state.difference) ? clamp(state.difference, 0, this.view.layers.length - 1) : null;
  }

  terms(layer = this.layerIndex, head = this.head) {
    const layers = this.base === null ? [layer] : [layer, this.base];
    return layers.map((i) => ({ view: this.view, layer: this.view.layers[i], head }));
  }

  termNames() {
    return this.terms().map(({ layer }) => layer.title);
  }

  makeScale() {
    if (this.base === null) return scaleOf(this.view.name);
    const { name } = this.view;
    return widest(panels.filter(({ view }) => view?.name === name).map((panel) => panel.scaleFromBase()));
  }

  scaleFromBase() {
    const { layers } = this.view;
    return this.scaleOfPairs(layers.map((layer) => [layer, layers[this.base]]));
  }
}

/** What two checkpoints differ by, where both show the same. */
class DifferencePanel extends Panel {
  constructor(first, second) {
    super();
    this.sides = [first, second];
    this.root.classList.add("difference");
  }

  /** Follow what the two panels show. */
  update() {
    if (state.difference !== A_MINUS_B) {
      this.view = undefined;
      this.root.remove();
      return;
    }
    if (!this.root.isConnected) byId("panels").prepend(this.root);
    const shown = this.sides.map(({ view, grid }) => view && [view.name, view.heads, view.rows, grid]);
    const isSame = shown.every(Boolean) && new Set(shown.map((one) => JSON.stringify(one))).size === 1;
    const [a, b] = this.sides.map(({ view }) => view);
    this.view = isSame ? { ...a, layers: a.layers.slice(0, b.layers.length) } : undefined;
    this.indices = this.sides.map(({ indices }) => indices);
    this.checkpoint = {
      name: "A − B",
      caption: isSame ? this.terms().map(({ layer }) => layer.title).join(" − ") : "",
      nothing: isSame ? "" : "No difference: A and B show different views, grids or numbers of heads.",
      stem: this.sides.map(({ checkpoint }) => checkpoint.stem).join("_minus_"),
      grid: this.sides[0].grid,
      curves: [],
    };
    this.tell({ letter: "", ...this.checkpoint });
  }

  terms(layer = this.layerIndex, head = this.head) {
    return this.sides.map(({ view }) => ({ view, layer: view.layers[layer], head }));
  }

  termNames() {
    return ["A", "B"];
  }

  makeScale() {
    return this.scaleOfPairs(this.view.layers.map((_, i) => this.terms(i, 0).map(({ layer }) => layer)));
  }
}
