// Pictures and maps on canvases: levels 0..254 become colours here, so that one small grey image is enough per map.
const LEVELS = 254;
const tables = Object.fromEntries(Object.entries(report.colors).map(([name, text]) => [name, bytesOf(text)]));
const loaded = new Map();

const load = (uri) => {
  if (!loaded.has(uri)) {
    const image = new Image();
    image.src = uri;
    loaded.set(uri, image.decode().then(() => image));
    if (loaded.size > 2000) loaded.delete(loaded.keys().next().value);
  }
  return loaded.get(uri);
};

const pixelsOf = (image) => {
  const canvas = element("canvas", { width: image.naturalWidth, height: image.naturalHeight });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
};

const colored = (image, table) => {
  const levels = pixelsOf(image);
  for (let p = 0; p < levels.data.length; p += 4) {
    const place = 3 * Math.round((Math.min(levels.data[p], LEVELS) / LEVELS) * 255);
    levels.data.set([table[place], table[place + 1], table[place + 2], 255], p);
  }
  const canvas = element("canvas", { width: levels.width, height: levels.height });
  canvas.getContext("2d").putImageData(levels, 0, 0);
  return canvas;
};

// The rim of the ground truth: set pixels with an unset neighbour.
const outline = (image) => {
  const mask = pixelsOf(image);
  const { width, height } = mask;
  const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && mask.data[4 * (y * width + x)] > 127;
  const rim = new ImageData(width, height);
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const whole = inside(x - 1, y) && inside(x + 1, y) && inside(x, y - 1) && inside(x, y + 1);
      if (inside(x, y) && !whole) rim.data.set([60, 255, 60, 255], 4 * (y * width + x));
    }
  }
  const canvas = element("canvas", { width, height });
  canvas.getContext("2d").putImageData(rim, 0, 0);
  return canvas;
};

const drawTruth = async (context, card) => {
  const { width, height } = context.canvas;
  if (card.mask) context.drawImage(outline(await load(card.mask)), 0, 0, width, height);
  context.strokeStyle = "rgb(60 255 60)";
  for (const [left, top, right, bottom] of card.boxes) {
    context.strokeRect(left * width, top * height, (right - left) * width, (bottom - top) * height);
  }
};

// A newer drawing of the same canvas wins over an older one that is still loading.
const drawings = new WeakMap();
const drawCard = async (canvas, card, entry, strength) => {
  const turn = (drawings.get(canvas) ?? 0) + 1;
  drawings.set(canvas, turn);
  const [picture, heat] = await Promise.all([load(card.picture), entry ? load(entry.data) : null]);
  if (drawings.get(canvas) !== turn) return;
  canvas.width = picture.naturalWidth;
  canvas.height = picture.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.filter = entry ? "grayscale(1)" : "none";
  context.drawImage(picture, 0, 0);
  context.filter = "none";
  if (entry) {
    context.globalAlpha = strength;
    context.drawImage(colored(heat, tables[entry.colors]), 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
  }
  await drawTruth(context, card);
  canvas.dataset.drawn = "1";
};

const drawBar = (canvas, name) => {
  canvas.width = 256;
  canvas.height = 1;
  const bar = new ImageData(256, 1);
  for (let n = 0; n < 256; n += 1) bar.data.set([...tables[name].slice(3 * n, 3 * n + 3), 255], 4 * n);
  canvas.getContext("2d").putImageData(bar, 0, 0);
};
