// Numbers as people read them, and elements that hold them.

const $ = (id) => document.getElementById(id);

/** Three figures, with k, M, G beyond. */
function count(n) {
  const units = ["", " k", " M", " G", " T"];
  let unit = 0;
  while (n >= 999.5 && unit < units.length - 1) {
    n /= 1000;
    unit += 1;
  }
  return (unit === 0 ? figures(n) : n.toPrecision(3)) + units[unit];
}

/** At most two decimals, none that are zero. */
function figures(n) {
  return String(Number(n.toFixed(n < 10 ? 2 : n < 100 ? 1 : 0)));
}

/** Balancedness: two decimals, so that columns and changes line up. */
function balanced(n) {
  return n.toFixed(2);
}

function percent(ratio) {
  return `${figures(ratio * 100)} %`;
}

/** A change by a ratio, with its sign. */
function signed(ratio) {
  return `${ratio < 0 ? "−" : "+"}${figures(Math.abs(ratio) * 100)} %`;
}

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (n >= 1024 && unit < units.length - 1) {
    n /= 1024;
    unit += 1;
  }
  return `${figures(n)} ${units[unit]}`;
}

/** A length of time in its largest fitting unit. */
function span(seconds) {
  if (seconds < 1) return "less than a second";
  const [unit, name] = seconds < 100 ? [1, "s"] : seconds < 6000 ? [60, "min"] : seconds < 172800 ? [3600, "h"] : [86400, "days"];
  return `${Math.round(seconds / unit)} ${name}`;
}

/** "1 rank", "4 ranks". */
function many(n, noun) {
  return `${n} ${noun}${n === 1 ? "" : "s"}`;
}

/** "0, 3 and 7"; long lists are cut. */
function list(items) {
  const shown = items.length > 8 ? [...items.slice(0, 7), `${items.length - 7} more`] : items;
  return shown.length < 2 ? shown.join("") : `${shown.slice(0, -1).join(", ")} and ${shown.at(-1)}`;
}

/** An element with a text, or with children, and properties. */
function element(tag, content, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...(Array.isArray(content) ? content : [content]));
  return made;
}

/** Replaces what `parent` holds, where the text differs: selections and focus survive a poll that brings nothing new. */
function fill(parent, ...children) {
  const holder = element("div", children);
  if (parent.textContent !== holder.textContent || parent.children.length !== holder.children.length) {
    parent.replaceChildren(...holder.childNodes);
  }
}

/** A text whose parts between asterisks are bold. */
function say(parent, text) {
  const parts = text.split("*").map((part, i) => (i % 2 ? element("b", part) : part));
  fill(parent, ...parts);
}
