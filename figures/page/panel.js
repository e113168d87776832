// A panel: one checkpoint in one of its views, as pictures and a line that reads out values.

class Panel {
  constructor(index) {
    this.root = byId("panel").content.cloneNode(true).firstElementChild;
    this.find = (selector) => this.root.querySelector(selector);
    this.shown = new Map(); // what each figure shows
    const [pick, pickView] = [this.find(".pick-checkpoint select"), this.find(".pick-view select")];
    pick.append(...checkpoints.map((checkpoint, i) => new Option(checkpoint.name, i)));
    pick.value = index;
    pick.addEventListener("change", () => this.showCheckpoint(Number(pick.value)));
    pickView.addEventListener("change", () => showView(pickView.value, this));
    this.find(".pick-checkpoint").hidden = checkpoints.length < 3;
    this.find(".name").hidden = checkpoints.length > 2; // the choice says it
    this.showCheckpoint(index);
  }

  // ---- what it shows

  showCheckpoint(index) {
    this.checkpoint = checkpoints[index];
    const { name, caption, nothing, views } = this.checkpoint;
    for (const [part, text] of Object.entries({ name, caption, nothing })) this.find(`.${part}`).textContent = text;
    this.root.setAttribute("aria-label", name);
    for (const part of ["pick-view", "scale", "reading", "pictures"]) this.find(`.${part}`).hidden = !views.length;
    this.find(".nothing").hidden = views.length > 0;
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
    return this.view.panels[this.head] ?? (this.view.heads > 1 ? `head ${this.head}` : "all heads alike");
  }

  /** The chosen patch; none where values are between rows of tables, or no values of patches at all. */
  get patch() {
    return this.view.rows.length || this.view.points ? null : patchOf(this.grid);
  }

  /** The other patch that the mouse points at; null if there is none. */
  get other() {
    const { patch, cell } = this.pointed ?? {};
    if (patch) return patch;
    if (!cell || this.view.rows.length) return null;
    if (!this.view.byOffset) return this.patchAt(cell[1]);
    const [row, column] = this.patch.map((place, axis) => place + this.offset(cell)[axis]);
    return row >= 0 && row < this.grid[0] && column >= 0 && column < this.grid[1] ? [row, column] : null;
  }

  get pointed() {
    return state.pointed?.panel === this ? state.pointed : null;
  }

  patchAt(index) {
    return [Math.floor(index / this.grid[1]), index % this.grid[1]];
  }

  offset(cell) {
    return cell.map((place, axis) => place - this.grid[axis] + 1);
  }

  // ---- what the mouse does

  /** It is over a patch, which becomes the chosen one unless one is pinned. */
  pointAtPatch(patch) {
    set(state.pinned ? { pointed: { panel: this, patch } } : { place: placeOf(patch, this.grid), pointed: null });
  }

  /** It is over a cell of the whole picture; its query patch, if any, becomes the chosen one likewise. */
  pointAtCell(cell) {
    const stays = state.pinned || this.view.byOffset || this.view.rows.length;
    const place = stays ? state.place : placeOf(this.patchAt(cell[0]), this.grid);
    set({ place, pointed: { panel: this, cell } });
  }

  pin(patch) {
    const again = state.pinned && String(patch) === String(this.patch);
    choose(patch, this.grid, { pinned: !again, pointed: null });
  }

  // ---- pictures

  /** Draw what must follow the mouse at once. */
  draw() {
    if (!this.view) return;
    this.limits = limitsOf(this.view.name);
    this.find(".scale").hidden = this.view.points;
    const [low, bar, high] = this.find(".scale").children;
    [low.textContent, high.textContent] = this.limits.map(brief);
    bar.style.background = `linear-gradient(to right, ${colourScale(this.limits).map(([, c]) => c)})`;
    this.find(".reading").textContent = this.reading();
    this.drawMap();
  }

  /** Draw a figure that may come a moment later: not before this layer is unpacked, lest others be unpacked first. */
  drawLater(name) {
    if (!this.view || !levelsOf(this.layer)) return;
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
    div.setAttribute("aria-label", caption);
    const width = Math.floor(figure.getBoundingClientRect().width);
    const room = [width, window.innerHeight];
    const content = JSON.stringify([this.checkpoint.name, this.view.name, theme(), room, signature]);
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
    const { patch, grid } = this;
    this.find(".map").hidden = !patch;
    if (!patch) return;
    const other = this.other;
    const make = (width) => {
      const z = patchPicture(this.view, this.layer, this.head, grid, patch);
      if (!z) return undefined;
      const [H, W] = grid;
      const cell = cellSize(width, H, W);
      const layout = gridLayout(cell, H, W, spread(H, 7).map((i) => [i, i]), spread(W, 7).map((i) => [i, i]));
      if (other) layout.shapes = [box(other[1] - 0.5, other[0] - 0.5, 1, 1)];
      const gap = cell > 12 ? 1 : 0;
      const tiles = heat(z, this.limits, { xgap: gap, ygap: gap });
      return { traces: [tiles, ...numbers(z, cell, this.limits, patch), patchMark(patch, cell, state.pinned)], layout };
    };
    const signature = [this.layerIndex, this.head, patch, state.pinned, other];
    this.plot("map", `From ${patchName(patch)} to every patch`, signature, make, (div) => {
      div.on("plotly_hover", ({ points }) => this.pointAtPatch([points[0].y, points[0].x]));
      div.on("plotly_unhover", () => set({ pointed: null }));
      div.on("plotly_click", ({ points }) => this.pin([points[0].y, points[0].x]));
    });
  }

  drawWhole() {
    const { patch, view } = this;
    this.find(".whole").hidden = view.points;
    if (view.points) return;
    const [H, W] = this.grid;
    const [height, width] = view.shape;
    const make = (available) => {
      const z = wholePicture(view, this.layer, this.head);
      if (!z) return undefined;
      const side = 8 + 7 * Math.max(0, ...view.rows.map((row) => row.length));
      const cell = cellSize(available, height, width, side);
      const starts = spread(H, 5).map((row) => [row * W, row * W]);
      let [down, across] = [starts, starts];
      if (view.byOffset) [down, across] = [H, W].map((size) => offsetTicks(size));
      if (view.rows.length) down = across = view.rows.map((row, i) => [i, plain(row)]);
      const layout = gridLayout(cell, height, width, down, across, view.rows.length ? side : 0);
      if (view.byOffset) {
        const [x, y] = [W - 1.5, H - 1.5]; // the corner of no offset at all
        layout.shapes = [box(x - patch[1], y - patch[0], W, H), box(x, y, 1, 1)]; // what the chosen patch reaches
      }
      const marks = view.byOffset || !patch ? [] : [rowMark(patch[0] * W + patch[1])];
      return { traces: [heat(z, this.limits), ...numbers(z, cell, this.limits), ...marks], layout };
    };
    const what = view.rows.length ? "row" : "patch";
    const caption = view.byOffset ? "By offset from query to key" : `From every ${what} to every ${what}`;
    this.plot("whole", caption, [this.layerIndex, this.head, patch], make, (div) => {
      div.on("plotly_hover", ({ points }) => this.pointAtCell([points[0].y, points[0].x]));
      div.on("plotly_unhover", () => set({ pointed: null }));
      div.on("plotly_click", ({ points }) => {
        if (!this.view.byOffset && !this.view.rows.length) this.pin(this.patchAt(points[0].y));
      });
    });
  }

  /** Frequencies as points in the plane, of all heads; a click on one chooses its head. */
  drawPlane() {
    const { view, layer } = this;
    this.find(".plane").hidden = !view.points;
    if (!view.points) return;
    const heads = Array.from({ length: view.heads }, (_, head) => wholePicture(view, layer, head));
    const make = (width) => scatter(heads, this.head, this.limits[1], cellSize(width, 1, 1));
    const caption = `Right and down, of every head, ${layer.title}`;
    this.plot("plane", caption, [this.layerIndex, this.head], make, (div) => {
      div.on("plotly_hover", ({ points }) => {
        const [{ curveNumber: head, pointIndex: pair }] = points;
        set({ pointed: { panel: this, head, pair } });
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
      const source = (i) => (ofLayers ? [view.layers[i], this.head] : [this.layer, i]);
      const images = Array.from({ length: count }, (_, i) => patchPicture(view, ...source(i), grid, patch));
      if (images.includes(undefined)) return undefined;
      const names = images.map((_, i) => (ofLayers ? String(i) : (view.panels[i] ?? String(i))));
      const made = contactSheet(images, names, selected, this.limits, width, this.sheetHeight());
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

  // ---- words

  /** By how much the values of this layer may be off, having been rounded for the page. */
  error() {
    return String(Number((this.layer.step / 2).toPrecision(1)));
  }

  /** What the numbers are: of the cell that the mouse points at, else of the chosen patch. */
  reading() {
    const { view, layer, patch, other } = this;
    if (!levelsOf(layer)) return "";
    const cell = this.pointed?.cell;
    if (view.points) return this.frequency();
    if (!patch && !cell) return "Point at a cell to read its value.";
    if (cell && (view.byOffset || !patch)) {
      const [down, right] = this.offset(cell).map((places) => format(places, 0));
      const rows = cell.map((row) => view.rows[row]);
      const where = patch ? `rows ${down}, columns ${right} from the query` : rows.join(" to ");
      return `${where}: ${this.say(wholePicture(view, layer, this.head)[cell[0]][cell[1]])}`;
    }
    const from = cell ? this.patchAt(cell[0]) : patch; // which differ if one is pinned
    const z = patchPicture(view, layer, this.head, this.grid, from);
    if (other) return `${patchName(from)} to ${patchName(other)}: ${this.say(z[other[0]][other[1]])}`;
    return `${patchName(patch)}: ${this.say(z[patch[0]][patch[1]])} to itself${this.extremes(z.flat())}`;
  }

  frequency() {
    if (!this.pointed) return "Point at a frequency to read it, click on it to choose its head.";
    const { head, pair } = this.pointed;
    const [right, down] = wholePicture(this.view, this.layer, head)[pair].map((value) => this.say(value));
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
}
