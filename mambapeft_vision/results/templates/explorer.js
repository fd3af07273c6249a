"use strict";
// Everything that comes from results is written as text (textContent), never as HTML.
const {title, rows} = JSON.parse(document.getElementById("data").textContent);
const columns = [["method", "text"], ["accuracy"], ["trained"], ["task", "text"], ["split", "text"], ["seed"],
  ["family", "text"], ["backbone", "text"], ["settings", "text"]];
const details = ["settings", "family", "backbone", "task", "split", "seed", "accuracy", "trained", "head", "seconds", "device", "images", "finished"];
const page = 500;
const form = document.querySelector("form"), body = document.querySelector("tbody"), side = document.querySelector("aside");
const more = document.getElementById("more");
let order = {key: "accuracy", up: false}, shown = page;

function make(tag, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
}

function written(key, value) {
  if (key === "accuracy") return value.toFixed(2);
  return typeof value === "number" ? value.toLocaleString("en") : value;
}

function chosen() {
  const wanted = Object.fromEntries(new FormData(form));
  const text = wanted.method.toLowerCase();
  return rows.filter(row => `${row.method} ${row.settings}`.toLowerCase().includes(text)
    && ["family", "backbone", "task", "split"].every(key => !wanted[key] || row[key] === wanted[key]));
}

function draw() {
  const found = chosen(), {key, up} = order;
  found.sort((a, b) => (a[key] < b[key] ? -1 : a[key] > b[key] ? 1 : 0) * (up ? 1 : -1));
  body.replaceChildren(...found.slice(0, shown).map(row => {
    const line = make("tr");
    line.tabIndex = 0;
    line.append(...columns.map(([name, kind]) => make("td", written(name, row[name]), kind)));
    line.addEventListener("mouseenter", () => explain(row));
    line.addEventListener("focus", () => explain(row));
    return line;
  }));
  more.hidden = found.length <= shown;
  document.querySelector("output").textContent = `${found.length} of ${rows.length} results`;
  for (const head of document.querySelectorAll("main > div thead th"))
    head.setAttribute("aria-sort", head.dataset.key !== key ? "none" : up ? "ascending" : "descending");
}

function explain(row) {
  const list = make("dl");
  for (const key of details) list.append(make("dt", key), make("dd", String(written(key, row[key]))));
  side.replaceChildren(make("h2", row.method), list, make("code", row.command), ...confusions(row.confusion));
}

function confusions(found) {
  if (!found) return [make("p", "No predictions of this run are here, so its confusions are not known.")];
  const table = make("table");
  if (found.pairs) {
    table.append(...found.pairs.map(([truth, guess, count]) => {
      const line = make("tr");
      line.append(make("td", truth, "text"), make("td", `→ ${guess}`, "text"), make("td", String(count)));
      return line;
    }));
    return [make("p", "Most frequent confusions: class → predicted, images"), table];
  }
  found.matrix.forEach((counts, number) => {
    const line = make("tr"), total = Math.max(1, counts.reduce((a, b) => a + b, 0));
    line.append(make("th", found.names[number], "text"), ...counts.map(count => {
      const cell = make("td", count ? String(count) : "");
      const share = count / total;
      cell.style.background = `rgba(0, 114, 178, ${share})`;
      cell.style.color = share > 0.5 ? "#fff" : "#111";
      return cell;
    }));
    table.append(line);
  });
  return [make("p", "Confusion: a row a class, a column what was predicted, in the same order; images"), table];
}

document.title = title;
document.querySelector("h1").textContent = title;
for (const key of ["family", "backbone", "task", "split"]) {
  const names = [...new Set(rows.map(row => row[key]))].sort();
  form.elements[key].append(new Option("all", ""), ...names.map(name => new Option(name, name)));
}
document.querySelector("main > div thead tr").append(...columns.map(([key, kind]) => {
  const head = make("th", undefined, kind), button = make("button", key);
  head.dataset.key = key;
  button.addEventListener("click", () => {
    order = {key, up: order.key === key ? !order.up : kind === "text"};
    draw();
  });
  head.append(button);
  return head;
}));
form.addEventListener("input", () => { shown = page; draw(); });
form.addEventListener("submit", event => event.preventDefault());
more.addEventListener("click", () => { shown += page; draw(); });
draw();
