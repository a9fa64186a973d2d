// The gallery: filter, sort, and a page of cards at a time.
const PAGE = 20;
const gallery = { shown: PAGE, methods: new Set(report.columns) };
// The predictions for a picture: those of several named networks in a comparison, else the one in the card itself.
const verdictsOf = (card) => card.verdicts ?? [card];
const verdictOf = (card, network) => verdictsOf(card).find((verdict) => verdict.network === network);
const networks = [...new Set(report.cards.flatMap((card) => verdictsOf(card).map((verdict) => verdict.network)))];
const named = (text, network) => (networks.length > 1 ? `${text} (${network})` : text);
const byProbability = new Map(networks.map((network) => [named("probability of the label", network), network]));
// Cards of detections have no prediction, so that they are neither correct nor wrong.
const judged = report.cards.some((card) => verdictsOf(card).some((verdict) => "prediction" in verdict));
const isCorrect = (card, verdict) => card.label === verdict.prediction;

const sortValue = (card) => {
  const metric = byId("sort-metric").value;
  if (metric === "index") return card.index;
  if (byProbability.has(metric)) return verdictOf(card, byProbability.get(metric))?.probability ?? null;
  return scoreOf(card, byId("sort-method").value, metric);
};

const isWanted = (card) => {
  const choice = byId("filter-correct").value;
  if (choice === "") return true;
  const verdict = verdictOf(card, networks[Math.floor(Number(choice) / 2)]);
  return verdict !== undefined && isCorrect(card, verdict) === (Number(choice) % 2 === 1);
};

const selected = () => {
  const wantedClass = byId("filter-class").value;
  const text = byId("filter-name").value.toLowerCase();
  const direction = Number(byId("sort-order").value);
  const found = report.cards.filter(
    (card) =>
      (wantedClass === "" || card.label === Number(wantedClass)) &&
      isWanted(card) &&
      card.name.toLowerCase().includes(text),
  );
  const key = new Map(found.map((card) => [card, sortValue(card)]));
  // Cards without the score come last in either order; ties keep the order of the data set.
  return found.sort((a, b) => {
    const [x, y] = [key.get(a), key.get(b)];
    if (x === null || y === null) return (x === null) - (y === null) || a.index - b.index;
    return direction * (x - y) || a.index - b.index;
  });
};

const mapFigure = (card, method) => {
  const entry = card.maps[method];
  const sortedBy = byId("sort-metric").value;
  const metric = report.metrics.includes(sortedBy) ? sortedBy : report.metrics[0];
  const caption = element("figcaption", {}, element("b", {}, ...breakable(method)));
  if (metric) {
    const value = short(scoreOf(card, method, metric));
    caption.append(element("br"), `${metric} `, element("span", { className: "score", textContent: value }));
  }
  const figure = element("figure", {});
  figure.dataset.method = method;
  if (!entry) {
    figure.append("no map", caption);
    return figure;
  }
  const canvas = element("canvas", { className: "map" });
  canvas.setAttribute("role", "img");
  const [low, high] = limitsOf(entry);
  const kind = entry.signed ? "signed map" : "map";
  canvas.setAttribute("aria-label", `${kind} of ${method} for ${card.name}, ${low} to ${high}`);
  drawCard(canvas, card, entry, Number(byId("strength").value) / 100);
  const bar = element("canvas", { className: "bar" });
  bar.setAttribute("aria-hidden", "true");
  drawBar(bar, entry.colors);
  const limits = element("div", { className: "limits" }, element("span", { textContent: low }));
  if (entry.signed) limits.append(element("span", { textContent: "0" }));
  limits.append(element("span", { textContent: high }));
  figure.append(canvas, bar, limits, caption);
  return figure;
};

const scoreTable = (card) => {
  const head = element("tr", {}, element("th", { textContent: "method", scope: "col" }));
  report.metrics.forEach((name) => head.append(element("th", { textContent: name, scope: "col" })));
  const body = element("tbody");
  for (const method of report.columns) {
    const row = element("tr", {}, element("th", { scope: "row" }, ...breakable(method)));
    report.metrics.forEach((name) => row.append(element("td", { textContent: short(scoreOf(card, method, name)) })));
    body.append(row);
  }
  const table = element("table", {}, element("thead", {}, head), body);
  const region = element("div", { className: "scroll", tabIndex: 0 }, table);
  region.setAttribute("role", "region");
  region.setAttribute("aria-label", `All scores of ${card.name}`);
  return region;
};

const scoreDetails = (card) => {
  const details = element("details", {}, element("summary", { textContent: "All scores of this picture" }));
  const fill = () => details.childElementCount === 1 && details.append(scoreTable(card));
  details.addEventListener("toggle", fill, { once: true });
  return details;
};

const verdictText = (card, verdict) => {
  const kind = isCorrect(card, verdict) ? "correct" : "wrong";
  const explained = verdict.target === card.label ? "" : `, explained ${className(verdict.target)}`;
  const text = `${kind}: predicted ${className(verdict.prediction)} (${short(verdict.confidence)})${explained}`;
  return element("span", { className: kind, textContent: networks.length > 1 ? `${verdict.network}: ${text}` : text });
};

const cardHead = (card) => {
  const verdicts = verdictsOf(card);
  const numbers = verdicts.map((verdict) => named(short(verdict.probability), verdict.network)).join(", ");
  const head = element(
    "div",
    { className: "card-head" },
    element("h3", { textContent: card.name }),
    element("span", { textContent: `${className(card.label)} (probability ${numbers})` }),
    ...(judged ? verdicts.map((verdict) => verdictText(card, verdict)) : []),
  );
  if (report.player && card.curves) {
    const step = element("button", { type: "button", textContent: "Step through" });
    step.addEventListener("click", () => showInPlayer(card));
    head.append(step);
  }
  return head;
};

const cardElement = (card) => {
  const article = element("article", { className: "card" }, cardHead(card));
  article.dataset.index = card.index;
  article.dataset.name = card.name;
  const methods = report.columns.filter((name) => gallery.methods.has(name));
  const canvas = element("canvas", { className: "picture" });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${card.name}${card.mask || card.boxes.length ? ", ground truth outlined" : ""}`);
  drawCard(canvas, card, null, 0);
  const row = element("div", { className: "row", tabIndex: -1 });
  row.setAttribute("role", "group");
  row.setAttribute("aria-label", `Maps of ${card.name}`);
  row.append(element("figure", {}, canvas, element("figcaption", { textContent: "picture" })));
  methods.forEach((method) => row.append(mapFigure(card, method)));
  article.append(row);
  if (report.metrics.length) article.append(scoreDetails(card));
  return article;
};

const renderGallery = () => {
  const cards = selected();
  byId("cards").replaceChildren(...cards.slice(0, gallery.shown).map(cardElement));
  const count = Math.min(cards.length, gallery.shown);
  byId("status").textContent = `${cards.length} of ${report.cards.length} pictures, ${count} shown`;
  byId("more").hidden = count === cards.length;
};

const startGallery = () => {
  report.classNames.forEach((name, n) => byId("filter-class").append(element("option", { value: n, textContent: name })));
  networks.forEach((network, place) => {
    for (const [right, name] of [[1, "correct"], [0, "wrong"]]) {
      const option = { value: String(2 * place + right), textContent: named(name, network) };
      byId("filter-correct").append(element("option", option));
    }
  });
  byId("filter-correct").parentElement.hidden = !judged;
  fillSelect(byId("sort-metric"), ["index", ...byProbability.keys(), ...report.metrics]);
  fillSelect(byId("sort-method"), report.columns);
  byId("sort-order").value = "1";
  for (const name of report.columns) {
    const box = element("input", { type: "checkbox", checked: true, value: name });
    box.addEventListener("input", () => gallery.methods[box.checked ? "add" : "delete"](name));
    byId("filter-methods").append(element("label", {}, box, ...breakable(name)));
  }
  const again = (event) => {
    if (event.target.id === "strength") return;
    gallery.shown = PAGE;
    renderGallery();
  };
  byId("controls").addEventListener("input", again);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("strength").addEventListener("change", renderGallery);
  byId("more").addEventListener("click", () => {
    const first = gallery.shown;
    gallery.shown += PAGE;
    renderGallery();
    byId("cards").children[first]?.querySelector(".row").focus();
  });
  renderGallery();
};
