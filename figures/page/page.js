// What is shown, and how the reader changes it.

const SECONDS_PER_LAYER = 0.7;
const state = {
  layer: 0,
  head: 0,
  place: [0, 0], // the chosen patch, as shares of the image's height and width: it means the same in every grid
  pinned: false,
  /**
   * What the mouse points at, the same in all panels: {from, to}, two patches as places, the chosen one where there is
   * no `from`; {offset}, as shares of the image; {table, cell} of a view between rows; or {head, pair} of frequencies.
   */
  pointed: null,
  difference: null, // the number of the layer from which differences are taken, or A_MINUS_B
};
const A_MINUS_B = "A-B";
const panels = []; // of one or two checkpoints, and of what two differ by
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
    difference()?.update();
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
  writeAddressSoon();
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
  showDifferences(panel);
  const isOver = drawable().some(({ view }) => view.image);
  const over = isOver ? ` Over the image, colours have ${100 * OVER_IMAGE} % of their strength.` : "";
  byId("note").textContent = `Values are within ${panel.error()} of the model's.${over}`;
  byId("play").disabled = layerCount() === 1;
  for (const [id, on, texts] of [
    ["play", timer !== null, ["Play", "Pause"]],
    ["pin", state.pinned, ["Pin", "Pinned"]],
  ]) {
    byId(id).setAttribute("aria-pressed", on);
    byId(id).textContent = texts[Number(on)];
  }
}

/** Offer what there is: the values, two checkpoints' difference, and that from each layer. */
function showDifferences({ view }) {
  const layers = view.layers.map(({ title }, i) => [`minus ${title}`, i]);
  const ofTwo = difference() ? [["A − B", A_MINUS_B]] : [];
  const choices = [["values", ""], ...ofTwo, ...(layers.length > 1 ? layers : [])];
  const select = byId("difference");
  if (JSON.stringify(choices) !== select.dataset.choices) {
    select.dataset.choices = JSON.stringify(choices);
    select.replaceChildren(...choices.map((choice) => new Option(...choice)));
  }
  select.value = state.difference ?? "";
  byId("difference-control").hidden = choices.length === 1;
}

// ---- choosing

const difference = () => panels[2];
const drawable = () => panels.filter((panel) => panel.view);
const leading = () => drawable()[0];
const layerCount = () => Math.max(1, ...drawable().map((panel) => panel.view.layers.length));
const headCount = () => Math.max(1, ...drawable().map((panel) => panel.view.heads));
const patchOf = (grid, place = state.place) => grid.map((size, axis) => Math.floor(place[axis] * size));
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
  for (const each of new Set([panel, ...panels.slice(0, 2)])) each.showView(each.named(name) ?? each.view);
  set({ pointed: null }, true);
}

/** Values, A − B where there are two, what differs from the layer at hand, and values again. */
function nextDifference() {
  const { layer, difference: now } = state;
  const next = now === null && difference() ? A_MINUS_B : !Number.isInteger(now) && layerCount() > 1 ? layer : null;
  set({ difference: next }, true);
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
  d: nextDifference,
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
  byId("difference").addEventListener("change", ({ target: { value } }) => {
    set({ difference: value === "" || value === A_MINUS_B ? value || null : Number(value) }, true);
  });
  prefersDark.addEventListener("change", showTheme);
  window.addEventListener("hashchange", readAddress);
  window.addEventListener("resize", schedule);
  new ResizeObserver(schedule).observe(byId("panels"));
}

// ---- the address, which opens the same again

const ADDRESS_DELAY = 400; // ms: browsers refuse many changes at once
let addressTimer = null;

function writeAddressSoon() {
  clearTimeout(addressTimer);
  addressTimer = setTimeout(() => history.replaceState(null, "", `#${address()}`), ADDRESS_DELAY);
}

/** What is shown, as the address says it. */
function address() {
  const { layer, head, pinned } = state;
  const ofCheckpoints = panels.slice(0, 2);
  const parts = {
    checkpoints: ofCheckpoints.map(({ indices }) => indices[0]),
    views: ofCheckpoints.map(({ view }) => view?.name ?? ""),
    layer,
    head,
    patch: patchOf(leading()?.grid ?? [1, 1]),
    ...(pinned && { pinned: 1 }),
    ...(state.difference !== null && { show: state.difference }),
  };
  return new URLSearchParams(parts).toString().replaceAll("%2C", ",");
}

/** Show what the address says; what it does not say, or what the page does not have, is as when the page was new. */
function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const list = (name) => (asked.get(name) ?? "").split(",");
  const below = (count, text) => (/^\d{1,6}$/.test(text) && Number(text) < count ? Number(text) : undefined);
  const [views, indices] = [list("views"), list("checkpoints")];
  for (const [place, panel] of panels.slice(0, 2).entries()) {
    panel.showCheckpoint(below(checkpoints.length, indices[place]) ?? place);
    panel.showView(panel.named(views[place]) ?? panel.named(panels[0].view?.name) ?? panel.checkpoint.views[0]);
  }
  const panel = leading();
  if (!panel) return;
  const patch = list("patch").map((text, axis) => below(panel.grid[axis], text));
  const show = asked.get("show");
  const { token, grid } = panel.checkpoint;
  const isPatch = patch.length === 2 && !patch.includes(undefined);
  set(
    {
      layer: below(layerCount(), asked.get("layer")) ?? 0,
      head: below(headCount(), asked.get("head")) ?? 0,
      place: isPatch ? placeOf(patch, panel.grid) : placeOf(token, grid),
      pinned: asked.get("pinned") === "1",
      pointed: null,
      difference: show === A_MINUS_B && difference() ? A_MINUS_B : (below(layerCount(), show) ?? null),
    },
    true,
  );
}

async function start() {
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(await inflate(byId("plotly").textContent));
  document.head.append(script);
  for (const index of checkpoints.slice(0, 2).keys()) panels.push(new CheckpointPanel(index));
  byId("panels").dataset.count = panels.length;
  byId("panels").append(...panels.map((panel) => panel.root));
  if (panels.length === 2) panels.push(new DifferencePanel(...panels));
  listen();
  showTheme();
  readAddress();
}

if ("DecompressionStream" in window) await start();
else byId("note").textContent = "This page needs a browser of 2023 or later.";
