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
// With enough digits to distinguish the limits of a nearly flat map.
const limitsOf = ({ low, high }) => {
  const ratio = high > low ? Math.max(Math.abs(low), Math.abs(high)) / (high - low) : 1;
  const digits = Math.min(Math.max(1 + Math.ceil(Math.log10(ratio)), 2), 9);
  return [low, high].map((value) => Number(value.toPrecision(digits)).toString());
};

const scoreOf = (card, method, metric) => {
  const place = report.metrics.indexOf(metric);
  const value = report.scores[card.name]?.[method]?.[place];
  return value === undefined ? null : value;
};

const fillSelect = (select, names) => {
  for (const name of names) select.append(element("option", { value: name, textContent: name }));
};
