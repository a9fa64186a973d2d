// Insertion and deletion of one picture: frames are composed of picture and fill by the step at which each patch moves.
const player = { card: null, timer: null };
const SVG = "http://www.w3.org/2000/svg";
const frame = { left: 46, right: 10, top: 10, bottom: 36, width: 380, height: 240 };

const stepsOf = (text) => {
  const bytes = bytesOf(text);
  const view = new DataView(bytes.buffer);
  return Uint16Array.from({ length: bytes.length / 2 }, (_, n) => view.getUint16(2 * n, true));
};

const compose = async (canvas, card, method, step, moved, fill) => {
  const turn = (drawings.get(canvas) ?? 0) + 1;
  drawings.set(canvas, turn);
  const [picture, filling] = await Promise.all([load(card.picture), load(fill)]);
  if (drawings.get(canvas) !== turn) return;
  const { naturalWidth: width, naturalHeight: height } = picture;
  const shown = pixelsOf(picture);
  const hidden = element("canvas", { width, height });
  const context = hidden.getContext("2d");
  context.drawImage(filling, 0, 0, width, height);
  const other = context.getImageData(0, 0, width, height);
  const steps = stepsOf(card.steps[method]);
  const { patch, size } = report.player;
  const columns = Math.ceil(size[1] / patch);
  for (let y = 0; y < height; y += 1) {
    const row = Math.floor(((y + 0.5) * size[0]) / height / patch);
    for (let x = 0; x < width; x += 1) {
      const column = Math.floor(((x + 0.5) * size[1]) / width / patch);
      if ((steps[row * columns + column] <= step) !== moved) {
        const place = 4 * (y * width + x);
        shown.data.set(other.data.subarray(place, place + 4), place);
      }
    }
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d", { willReadFrequently: true }).putImageData(shown, 0, 0);
  canvas.dataset.step = step;
};

const svgElement = (tag, attributes) => {
  const made = document.createElementNS(SVG, tag);
  Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
  return made;
};

const across = (x) => frame.left + x * (frame.width - frame.left - frame.right);
const up = (y) => {
  const [low, high] = report.player.limits;
  return frame.height - frame.bottom - ((y - low) / (high - low)) * (frame.height - frame.top - frame.bottom);
};

const drawPlayerChart = (curve, step) => {
  const grid = svgElement("g", { class: "grid" });
  for (const tick of report.player.ticks) {
    const left = svgElement("text", { x: frame.left - 5, y: up(tick) + 4, "text-anchor": "end" });
    left.textContent = String(tick);
    grid.append(svgElement("line", { x1: across(0), x2: across(1), y1: up(tick), y2: up(tick) }), left);
  }
  for (const tick of [0, 0.2, 0.4, 0.6, 0.8, 1]) {
    const below = svgElement("text", { x: across(tick), y: frame.height - frame.bottom + 15, "text-anchor": "middle" });
    below.textContent = String(tick);
    grid.append(below);
  }
  const parts = [grid];
  for (const [name, hue, dash] of [["insertion", 2, 0], ["deletion", 1, 1]]) {
    const path = curve.x.map((x, n) => `${n ? "L" : "M"}${across(x).toFixed(1)} ${up(curve[name][n]).toFixed(1)}`);
    const group = svgElement("g", { class: `hue-${hue} dash-${dash}` });
    group.append(svgElement("path", { class: "line", d: path.join("") }));
    parts.push(group);
  }
  const x = across(curve.x[step]);
  const [bottom, top] = [frame.height - frame.bottom, frame.top];
  parts.push(svgElement("line", { class: "cursor", x1: x, x2: x, y1: bottom, y2: top }));
  byId("player-chart").replaceChildren(...parts);
};

const drawPlayer = () => {
  const { card } = player;
  const method = byId("player-method").value;
  const curve = card.curves[method];
  const slider = byId("player-step");
  slider.max = curve.x.length - 1;
  const step = Number(slider.value);
  const share = `${(100 * curve.x[step]).toFixed(1)} % of the patches`;
  const numbers = { insertion: short(curve.insertion[step]), deletion: short(curve.deletion[step]) };
  byId("insertion-probability").textContent = numbers.insertion;
  byId("deletion-probability").textContent = numbers.deletion;
  byId("player-status").textContent =
    `${report.player.metric}, ${card.name}, ${method}: step ${step} of ${slider.max}, ${share} moved`;
  slider.setAttribute(
    "aria-valuetext",
    `step ${step} of ${slider.max}, ${share}: insertion ${numbers.insertion}, deletion ${numbers.deletion}`,
  );
  byId("player-insertion").setAttribute("aria-label", `${card.name} with ${share} shown on the fill`);
  byId("player-deletion").setAttribute("aria-label", `${card.name} with ${share} removed`);
  compose(byId("player-insertion"), card, method, step, true, report.player.fills[card.fills[0]]);
  compose(byId("player-deletion"), card, method, step, false, report.player.fills[card.fills[1]]);
  drawPlayerChart(curve, step);
};

const stopPlaying = () => {
  clearInterval(player.timer);
  player.timer = null;
  byId("player-play").textContent = "Play";
  byId("player-play").setAttribute("aria-pressed", "false");
};

const chooseCard = (card) => {
  player.card = card;
  const before = byId("player-method").value;
  byId("player-method").replaceChildren();
  const methods = report.columns.filter((name) => card.curves[name] && card.steps?.[name]);
  fillSelect(byId("player-method"), methods);
  if (methods.includes(before)) byId("player-method").value = before;
  byId("player-card").value = String(card.index);
  drawPlayer();
};

const showInPlayer = (card) => {
  stopPlaying();
  byId("player-step").value = "0";
  chooseCard(card);
  byId("player").scrollIntoView();
  byId("player-step").focus({ preventScroll: true });
};

const togglePlaying = () => {
  if (player.timer) return stopPlaying();
  const slider = byId("player-step");
  if (slider.value === slider.max) slider.value = "0";
  byId("player-play").textContent = "Stop";
  byId("player-play").setAttribute("aria-pressed", "true");
  player.timer = setInterval(() => {
    slider.value = Number(slider.value) + 1;
    drawPlayer();
    if (slider.value === slider.max) stopPlaying();
  }, 250);
};

const startPlayer = () => {
  const cards = report.cards.filter((card) => card.curves);
  for (const card of cards) {
    byId("player-card").append(element("option", { value: String(card.index), textContent: card.name }));
  }
  byId("player-card").addEventListener("change", (event) => {
    chooseCard(cards.find((card) => String(card.index) === event.target.value));
  });
  byId("player-method").addEventListener("change", drawPlayer);
  byId("player-step").addEventListener("input", drawPlayer);
  byId("player-play").addEventListener("click", togglePlaying);
  chooseCard(cards[0]);
};
