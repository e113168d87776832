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

/**
 * A value of a head by its place as it is stored: of the first of one or two terms {view, layer, head}, less the
 * second's. Their layers must be unpacked.
 */
function valueAt(terms, place) {
  const values = terms.map(({ view, layer, head }) => {
    return layer.low + layer.step * unpacked.get(layer)[head * view.shape[0] * view.shape[1] + place];
  });
  return values.reduce((first, second) => first - second);
}

const areUnpacked = (terms) => terms.map(({ layer }) => levelsOf(layer)).every(Boolean);

/** Rows of values of terms; undefined until these are unpacked. `place(row, column)` is as for `valueAt`. */
function picture(terms, height, width, place) {
  if (!areUnpacked(terms)) return undefined;
  const row = (y) => Array.from({ length: width }, (_, x) => valueAt(terms, place(y, x)));
  return Array.from({ length: height }, (_, y) => row(y));
}

/** All values of a head, as they are stored. */
function wholePicture(terms) {
  const [height, width] = terms[0].view.shape;
  return picture(terms, height, width, (y, x) => y * width + x);
}

/** One patch's values with all patches, H x W; of table rows, which have no place, all values. */
function patchPicture(terms, [H, W], patch) {
  const [{ view }] = terms;
  if (view.rows.length) return wholePicture(terms);
  const [row, column] = patch;
  const width = view.shape[1];
  const place = view.byOffset
    ? (y, x) => (y - row + H - 1) * width + (x - column + W - 1)
    : (y, x) => (row * W + column) * width + y * W + x;
  return picture(terms, H, W, place);
}

// ---- numbers

/** Decimals such that the largest value has so many digits after its first. */
const digitsFor = (largest, digits) => clamp(digits - Math.floor(Math.log10(Math.abs(largest))), 0, 20);

/** As many decimals as the stored values carry, and no more than five digits. */
function decimals(view, layer) {
  const known = layer.step > 0 ? Math.floor(-Math.log10(layer.step)) : 20;
  return clamp(known, 0, digitsFor(view.limit, 4));
}

function format(value, places) {
  const text = value.toFixed(places);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
}

/** The two digits that a scale's end needs. */
const brief = (value) => (value === 0 ? "0" : format(value, digitsFor(value, 1)).replace(/\.0+$/, ""));

/** Evenly spaced numbers of 0 .. count - 1, at most `most` of them. */
function spread(count, most) {
  const step = Math.ceil(count / most);
  return Array.from({ length: Math.ceil(count / step) }, (_, i) => i * step);
}

// ---- colours

/** Plotly's colour scales, those of the files: of signed values, where white is zero, the middle, and of others. */
const COLOURS = JSON.parse(byId("colours").textContent);
for (const [name, stops] of Object.entries(COLOURS)) COLOURS[name] = stops.map((c, i) => [i / (stops.length - 1), c]);
const coloursOf = ({ signed }) => COLOURS[signed ? "signed" : "unsigned"];
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
const theme = () => document.documentElement.dataset.theme || (prefersDark.matches ? "dark" : "light");

/** The scale that has room for all scales; undefined if one of them is. */
function widest(scales) {
  if (scales.includes(undefined)) return undefined;
  const most = (key) => Math.max(...scales.map((scale) => scale[key]));
  return { limit: most("limit"), largest: most("largest"), signed: scales.some(({ signed }) => signed) };
}

/** One scale for all checkpoints that have a view of that name: only so can they be compared. */
const scaleOf = (name) => widest(checkpoints.flatMap(({ views }) => views.filter((view) => view.name === name)));

const [QUANTILE, WORTHWHILE] = [0.99, 0.8]; // as `limits_of` in lape_vit/drawing/panels.py has them for values
const BINS = 10_000;

/**
 * A scale for what pairs of layers of a view differ by, which tells 99 % of the differences between different places
 * apart, or, if it is to reach them `all`, the largest; undefined until all are unpacked.
 */
function scaleOfDifferences(pairs, { byOffset, shape: [height, width], heads }, all) {
  if (!pairs.flat().map(levelsOf).every(Boolean)) return undefined;
  const sizes = pairs.map(([first, second]) => {
    const [a, b] = [unpacked.get(first), unpacked.get(second)];
    const size = (_, i) => Math.abs(first.low + first.step * a[i] - second.low - second.step * b[i]);
    return Float32Array.from({ length: heads * height * width }, size);
  });
  const largest = sizes.reduce((most, of) => of.reduce((one, other) => Math.max(one, other), most), 0);
  if (all || largest === 0) return { limit: largest || 1, largest, signed: true };
  const isSame = (place) => (byOffset ? 2 * place === height * width - 1 : place % (width + 1) === 0);
  const counts = new Uint32Array(BINS + 1);
  for (const of of sizes) {
    of.forEach((size, i) => {
      if (!isSame(i % (height * width))) counts[Math.ceil((size / largest) * BINS)] += 1;
    });
  }
  const needed = QUANTILE * counts.reduce((sum, count) => sum + count, 0);
  let [bin, seen] = [0, counts[0]];
  while (seen < needed) seen += counts[++bin];
  const limit = (bin / BINS) * largest;
  if (limit === 0 || limit > WORTHWHILE * largest) return { limit: largest, largest, signed: true };
  const step = 10 ** (Math.floor(Math.log10(limit)) - 1);
  return { limit: Math.min(largest, Math.ceil(limit / step) * step), largest, signed: true }; // two digits
}

/** A colour of the style sheet as the theme at hand has it. */
function styleColour(name) {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}
const probe = document.head.appendChild(document.createElement("i"));
