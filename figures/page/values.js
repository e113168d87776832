// The page's data, and how its values are unpacked, told and coloured.
//
// Shapes: a grid has H rows and W columns of patches; a patch is [row, column]. A view has, per layer, some pictures
// (of heads, one for all heads, or of tables), each of M x M values (query patch by key patch, or table row by table
// row) or, by offset, of (2H - 1) x (2W - 1) values of the key's place relative to the query's, or, of points, of pairs
// x 2 values: how far each pair of channels turns per patch to the right and per patch down.

const byId = (id) => document.getElementById(id);
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const checkpoints = JSON.parse(byId("data").textContent);

// ---- unpacking

async function inflate(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const unpacked = new Map();

/** The levels of all values of a layer; undefined until they are unpacked, upon which the page is drawn again. */
function levelsOf(layer) {
  if (!unpacked.has(layer)) {
    unpacked.set(layer, undefined);
    inflate(layer.levels).then((bytes) => {
      const levels = new Uint16Array(bytes.length / 2); // the low bytes come first, then the high ones
      for (let i = 0; i < levels.length; i++) levels[i] = bytes[i] + 256 * bytes[levels.length + i];
      unpacked.set(layer, levels);
      schedule();
    });
  }
  return unpacked.get(layer);
}

const isUnpacking = () => [...unpacked.values()].includes(undefined);

/** Rows of values; undefined until the layer is unpacked. `index(row, column)` is a value's place as it is stored. */
function picture(view, layer, head, height, width, index) {
  const levels = levelsOf(layer);
  if (!levels) return undefined;
  const start = head * view.shape[0] * view.shape[1];
  const row = (y) => Array.from({ length: width }, (_, x) => layer.low + layer.step * levels[start + index(y, x)]);
  return Array.from({ length: height }, (_, y) => row(y));
}

/** All values of a head, as they are stored. */
function wholePicture(view, layer, head) {
  const [height, width] = view.shape;
  return picture(view, layer, head, height, width, (y, x) => y * width + x);
}

/** One patch's values with all patches, H x W; of table rows, which have no place, all values. */
function patchPicture(view, layer, head, [H, W], patch) {
  if (view.rows.length) return wholePicture(view, layer, head);
  const [row, column] = patch;
  const width = view.shape[1];
  const index = view.byOffset
    ? (y, x) => (y - row + H - 1) * width + (x - column + W - 1)
    : (y, x) => (row * W + column) * width + y * W + x;
  return picture(view, layer, head, H, W, index);
}

// ---- numbers

/** Decimals such that the largest value has so many digits after its first. */
const digitsFor = (limits, digits) => clamp(digits - Math.floor(Math.log10(Math.max(...limits.map(Math.abs)))), 0, 20);

/** As many decimals as the stored values carry, and no more than five digits. */
function decimals(view, layer) {
  const known = layer.step > 0 ? Math.floor(-Math.log10(layer.step)) : 20;
  return clamp(known, 0, digitsFor(view.limits, 4));
}

function format(value, places) {
  const text = value.toFixed(places);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
}

/** The two digits that a scale's end needs. */
const brief = (value) => format(value, digitsFor([value], 1)).replace(/\.0+$/, "");

/** Evenly spaced numbers of 0 .. count - 1, at most `most` of them. */
function spread(count, most) {
  const step = Math.ceil(count / most);
  return Array.from({ length: Math.ceil(count / step) }, (_, i) => i * step);
}

// ---- colours

const PALETTES = {
  // from the most negative value to the most positive one; the middle is zero
  light: "#053061 #2166ac #4393c3 #92c5de #d1e5f0 #f7f7f7 #fddbc7 #f4a582 #d6604d #b2182b #67001f".split(" "),
  dark: "#cfe8ff #8cc8fb #539fdd #3574ad #264a6e #20252c #6b3428 #a84a35 #dc6c4a #f9a27f #ffdccb".split(" "),
};
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
const theme = () => document.documentElement.dataset.theme || (prefersDark.matches ? "dark" : "light");
const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

/** The colour of `share`, -1 .. 1, of the largest value. */
function colour(share) {
  const stops = PALETTES[theme()].map(channels);
  const place = ((share + 1) / 2) * (stops.length - 1);
  const first = clamp(Math.floor(place), 0, stops.length - 2);
  const mixed = stops[first].map((value, i) => Math.round(value + (place - first) * (stops[first + 1][i] - value)));
  return `rgb(${mixed})`;
}

/** Plotly's colour scale between limits, such that zero has the middle's colour. */
function colourScale([low, high]) {
  const largest = Math.max(Math.abs(low), Math.abs(high));
  return Array.from({ length: 41 }, (_, i) => [i / 40, colour((low + (i / 40) * (high - low)) / largest)]);
}

/** One scale for all checkpoints that have a view of that name: only so can they be compared. */
function limitsOf(name) {
  const all = checkpoints.flatMap((checkpoint) => checkpoint.views.filter((view) => view.name === name));
  return [Math.min(...all.map((view) => view.limits[0])), Math.max(...all.map((view) => view.limits[1]))];
}

/** A colour of the style sheet as the theme at hand has it. */
function styleColour(name) {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}
const probe = document.head.appendChild(document.createElement("i"));
