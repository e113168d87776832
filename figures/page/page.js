// What is shown, and how the reader changes it.

const SECONDS_PER_LAYER = 0.7;
const state = {
  layer: 0,
  head: 0,
  place: [0, 0], // the chosen patch, as shares of the image's height and width: it means the same in every grid
  pinned: false,
  pointed: null, // what the mouse points at: {panel, patch}, or {panel, cell} of its whole picture
};
const panels = [];
let timer = null; // while the layers play
let awaiting = false;
let news = false; // whether what is shown is to be said, too
const late = new Set(); // figures to draw after those that follow the mouse

// ---- drawing

/** Draw before the next frame, once, however many changes there are. */
function schedule() {
  if (awaiting) return;
  awaiting = true;
  byId("panels").setAttribute("aria-busy", true);
  requestAnimationFrame(() => {
    awaiting = false;
    showControls();
    for (const panel of panels) panel.draw();
    if (!late.size) setTimeout(drawLate);
    const figures = ["whole", "plane", "layers", "heads", "curves"];
    for (const name of figures) panels.forEach((_, i) => late.add(`${i} ${name}`));
  });
}

/** Draw one figure that was put off, and later the others: what the reader does meanwhile comes first. */
function drawLate() {
  const [next] = late;
  late.delete(next);
  const [index, name] = next.split(" ");
  panels[index].drawLater(name);
  if (late.size) setTimeout(drawLate);
  else if (!awaiting && !isUnpacking()) finish();
}

/** All is drawn: say what has changed, for those who cannot see the pictures. */
function finish() {
  byId("panels").setAttribute("aria-busy", false);
  if (!news) return;
  news = false;
  const tell = (panel) => `${panel.layer.title}, ${panel.headName()}. ${panel.reading()}.`;
  byId("live").textContent = drawable().map(tell).join(" ");
}

function set(changes, announce = false) {
  Object.assign(state, changes);
  news ||= announce;
  schedule();
}

function showControls() {
  const panel = leading();
  byId("controls").hidden = !panel;
  if (!panel) return;
  const [row, column] = patchOf(panel.grid);
  for (const [id, value, count] of [
    ["layer", state.layer, layerCount()],
    ["head", state.head, headCount()],
    ["row", row, panel.grid[0]],
    ["column", column, panel.grid[1]],
  ]) {
    byId(id).max = count - 1;
    byId(id).value = value;
  }
  byId("layer-name").textContent = panel.layer.title;
  byId("head-name").textContent = panel.headName();
  byId("head-label").textContent = panel.view.panels.length ? "Table" : "Head";
  byId("head-control").hidden = headCount() === 1;
  byId("patch-control").hidden = byId("pin").hidden = drawable().every(({ patch }) => !patch);
  byId("note").textContent = `Values are within ${panel.error()} of the model's.`;
  byId("play").disabled = layerCount() === 1;
  for (const [id, on, texts] of [
    ["play", timer !== null, ["Play", "Pause"]],
    ["pin", state.pinned, ["Pin", "Pinned"]],
  ]) {
    byId(id).setAttribute("aria-pressed", on);
    byId(id).textContent = texts[Number(on)];
  }
}

// ---- choosing

const drawable = () => panels.filter((panel) => panel.view);
const leading = () => drawable()[0];
const layerCount = () => Math.max(1, ...drawable().map((panel) => panel.view.layers.length));
const headCount = () => Math.max(1, ...drawable().map((panel) => panel.view.heads));
const patchOf = (grid) => grid.map((size, axis) => Math.floor(state.place[axis] * size));
const patchName = ([row, column]) => `row ${row}, column ${column}`;

const placeOf = (patch, grid) => patch.map((index, axis) => (index + 0.5) / grid[axis]);

/** Choose a patch, or the nearest that the grid has. */
function choose(patch, grid, changes = {}) {
  const nearest = patch.map((index, axis) => clamp(index, 0, grid[axis] - 1));
  set({ place: placeOf(nearest, grid), ...changes }, true);
}

function move(rows, columns) {
  const { grid } = leading();
  const [row, column] = patchOf(grid);
  choose([row + rows, column + columns], grid);
}

const around = (value, by, count) => (Math.min(value, count - 1) + by + count) % count;
const stepLayer = (by) => set({ layer: around(state.layer, by, layerCount()) }, true);
const stepHead = (by) => set({ head: around(state.head, by, headCount()) }, true);
const pinOrLetGo = () => set({ pinned: !state.pinned, pointed: null }, true);

function playOrPause() {
  clearInterval(timer);
  timer = timer === null && layerCount() > 1 ? setInterval(() => stepLayer(1), SECONDS_PER_LAYER * 1000) : null;
  schedule();
}

/** Show a view in every panel whose checkpoint has it. */
function showView(name, panel) {
  for (const each of new Set([panel, ...drawable()])) each.showView(each.named(name) ?? each.view);
  set({ pointed: null }, true);
}

function nextView() {
  const { checkpoint, view } = leading();
  const { name } = checkpoint.views[around(checkpoint.views.indexOf(view), 1, checkpoint.views.length)];
  showView(name, leading());
}

function switchTheme() {
  document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
  showTheme();
}

function showTheme() {
  byId("theme").setAttribute("aria-pressed", theme() === "dark");
  schedule();
}

const showKeys = () => byId("help").showModal();

// ---- listening

const KEYS = {
  ArrowUp: () => move(-1, 0),
  ArrowDown: () => move(1, 0),
  ArrowLeft: () => move(0, -1),
  ArrowRight: () => move(0, 1),
  "[": () => stepLayer(-1),
  "]": () => stepLayer(1),
  PageUp: () => stepLayer(-1),
  PageDown: () => stepLayer(1),
  ",": () => stepHead(-1),
  ".": () => stepHead(1),
  " ": playOrPause,
  Enter: pinOrLetGo,
  Escape: () => set({ pinned: false, pointed: null }, true),
  v: nextView,
  t: switchTheme,
  "?": showKeys,
};

/** A control that has the focus keeps its own keys. */
function press(event) {
  const { key, target } = event;
  const taken = target.closest("input, select, dialog") || (target.closest("button") && [" ", "Enter"].includes(key));
  if (!(key in KEYS) || taken || event.ctrlKey || event.metaKey || event.altKey || !leading()) return;
  event.preventDefault();
  KEYS[key]();
}

function listen() {
  document.addEventListener("keydown", press);
  const clicks = { keys: showKeys, theme: switchTheme, play: playOrPause, pin: pinOrLetGo };
  for (const [id, action] of Object.entries(clicks)) byId(id).addEventListener("click", action);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const name of ["layer", "head"]) {
    byId(name).addEventListener("input", (event) => set({ [name]: event.target.valueAsNumber }));
  }
  for (const [axis, name] of ["row", "column"].entries()) {
    byId(name).addEventListener("change", (event) => {
      const { grid } = leading();
      const patch = patchOf(grid);
      patch[axis] = Math.round(event.target.valueAsNumber) || 0;
      choose(patch, grid);
    });
  }
  prefersDark.addEventListener("change", showTheme);
  window.addEventListener("resize", schedule);
  new ResizeObserver(schedule).observe(byId("panels"));
}

async function start() {
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(await inflate(byId("plotly").textContent));
  document.head.append(script);
  for (const index of checkpoints.slice(0, 2).keys()) panels.push(new Panel(index));
  byId("panels").dataset.count = panels.length;
  byId("panels").append(...panels.map((panel) => panel.root));
  listen();
  showTheme();
  if (leading()) choose(leading().checkpoint.token, leading().grid);
}

if ("DecompressionStream" in window) await start();
else byId("note").textContent = "This page needs a browser of 2023 or later.";
