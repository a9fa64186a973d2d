// The data of the page and small helpers. Strings of the data enter the page as text nodes only, never as HTML.
const report = JSON.parse(document.getElementById("report-data").textContent);
const byId = (id) => document.getElementById(id);

const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const className = (number) => report.classNames[number] ?? String(number);
// A number that rounds to 0 has no sign, as in the tables.
const short = (value) => (value === null || value === undefined ? "–" : value.toFixed(3).replace(/^-(?=0\.000$)/, ""));
// A name that may be broken behind its underscores, not inside a word.
const breakable = (name) => name.split(/(?<=_)/).flatMap((piece, n) => (n ? [element("wbr"), piece] : [piece]));
// With enough digits to distinguish the limits of a nearly flat map; a limit far below the other one is 0.
const limitsOf = ({ low, high }) => {
  const span = high > low ? high - low : Math.abs(low);
  return [low, high].map((value) => {
    const digits = Math.ceil(Math.log10(Math.abs(value) / span) + 1);
    if (!value || digits < -1) return "0";
    const rounded = Number(value.toPrecision(Math.min(Math.max(digits, 2), 9)));
    const isShort = Math.abs(rounded) >= 1e-3 && Math.abs(rounded) < 1e5;
    return isShort ? rounded.toString() : rounded.toExponential();
  });
};

const scoreOf = (card, method, metric) => {
  const place = report.metrics.indexOf(metric);
  const value = report.scores[card.name]?.[method]?.[place];
  return value === undefined ? null : value;
};

const fillSelect = (select, names) => {
  for (const name of names) select.append(element("option", { value: name, textContent: name }));
};
