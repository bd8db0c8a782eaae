// Markdown as elements: headings, lists, tables, quotes, code, maths, emphasis, links. HTML in it stays text.

import { make } from "./elements.js";
import { mathOf } from "./maths.js";

const INLINE = [
  [/^(`+)([^]*?[^`])\1(?!`)/, (m) => make("code", {}, m[2])],
  [/^\\\(([^]+?)\\\)/, (m) => mathOf(m[1], false)],
  [/^\$(?!\s)([^$\n]*[^\s$\\])\$(?!\d)/, (m) => mathOf(m[1], false)],
  [/^\*\*(?!\s)([^]+?)\*\*/, (m, depth) => make("strong", {}, ...inline(m[1], depth))],
  [/^\*(?![\s*])([^*]+)\*/, (m, depth) => make("em", {}, ...inline(m[1], depth))],
  [/^_(?![\s_])([^_]+)_(?!\w)/, (m, depth) => make("em", {}, ...inline(m[1], depth))],
  [/^~~([^~]+)~~/, (m, depth) => make("s", {}, ...inline(m[1], depth))],
  [/^\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/, (m) => linkTo(m[2], m[1])],
  [/^\\([\\`*_{}[\]()#+.!$|~-])/, (m) => m[1]],
];
const SPECIAL = /[`\\$*_~[]/;
const DEEPEST = 20;

// The address stands beside the words, so that nobody is led to where the words do not say.
function linkTo(address, words) {
  const link = make("a", { href: address, rel: "noopener noreferrer nofollow", target: "_blank" }, words);
  return words === address ? link : make("span", {}, link, ` (${new URL(address).host})`);
}

function inline(text, depth = 0) {
  const parts = [];
  let plain = "";
  for (let place = 0; place < text.length; ) {
    const rest = text.slice(place);
    const isWordBefore = place > 0 && /\w/.test(text[place - 1]);
    const rule = depth < DEEPEST && SPECIAL.test(rest[0]) && !(rest[0] === "_" && isWordBefore)
      ? INLINE.map(([pattern, build]) => [rest.match(pattern), build]).find(([match]) => match) : null;
    if (!rule) {
      plain += rest[0];
      place += 1;
      continue;
    }
    if (plain) parts.push(plain);
    plain = "";
    parts.push(built(rule, depth));
    place += rule[0][0].length;
  }
  return plain ? [...parts, plain] : parts;
}

function built([match, build], depth) {
  try {
    return build(match, depth + 1);
  } catch {
    return match[0]; // an address that is none
  }
}

export function markdown(text, depth = 0) {
  const blocks = document.createDocumentFragment();
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  for (let i = 0; i < lines.length; ) i = block(lines, i, blocks, depth);
  return blocks;
}

// Adds the block that begins at line i; returns the line after it.
function block(lines, i, out, depth) {
  const line = lines[i];
  const until = (isIn) => {
    let end = i + 1;
    while (end < lines.length && isIn(lines[end])) end += 1;
    return end;
  };
  let match;
  if (!line.trim()) return i + 1;
  if ((match = line.match(/^\s*(```+|~~~+)\s*([\w+#.-]*)/))) {
    const fence = match[1];
    const end = until((other) => !other.trim().startsWith(fence));
    out.append(codeBlock(lines.slice(i + 1, end).join("\n"), match[2]));
    return end + 1;
  }
  if ((match = line.match(/^\s*(\$\$|\\\[)/))) {
    const close = match[1] === "$$" ? "$$" : "\\]";
    const isOneLine = line.trim().length > 2 && line.trim().endsWith(close);
    const end = isOneLine ? i + 1 : until((other) => !other.includes(close)) + 1;
    const whole = lines.slice(i, end).join("\n").trim();
    out.append(mathOf(whole.slice(2).replace(close, ""), true));
    return end;
  }
  if ((match = line.match(/^(#{1,6})\s+(.*)$/))) {
    out.append(make(`h${Math.min(6, match[1].length + 2)}`, {}, ...inline(match[2])));
    return i + 1;
  }
  if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
    out.append(make("hr"));
    return i + 1;
  }
  if (depth < DEEPEST && /^\s*>/.test(line)) {
    const end = until((other) => /^\s*>/.test(other));
    const inner = lines.slice(i, end).map((quoted) => quoted.replace(/^\s*>\s?/, "")).join("\n");
    out.append(make("blockquote", {}, markdown(inner, depth + 1)));
    return end;
  }
  if (depth < DEEPEST && (match = line.match(/^(\s*)([-*+]|\d{1,9}[.)])\s+/))) return list(lines, i, out, depth, match);
  if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?\s*$/.test(lines[i + 1] ?? "")) {
    const end = until((other) => other.includes("|"));
    out.append(table(lines.slice(i, end)));
    return end;
  }
  const starts = /^\s*(```|~~~|#{1,6}\s|>|\$\$|\\\[|([-*+]|\d{1,9}[.)])\s)/;
  const end = until((other) => other.trim() && !starts.test(other));
  const paragraph = make("p");
  lines.slice(i, end).forEach((part, j) => paragraph.append(...(j ? [make("br")] : []), ...inline(part)));
  out.append(paragraph);
  return end;
}

function list(lines, i, out, depth, match) {
  const isOrdered = /\d/.test(match[2]);
  const element = make(isOrdered ? "ol" : "ul", isOrdered ? { start: parseInt(match[2], 10) } : {});
  const item = new RegExp(`^\\s{0,${match[1].length + 1}}(?:${isOrdered ? "\\d{1,9}[.)]" : "[-*+]"})\\s+`);
  while (i < lines.length && item.test(lines[i])) {
    const inner = [lines[i].replace(item, "")];
    for (i += 1; i < lines.length && lines[i].trim() && !item.test(lines[i]); i += 1) {
      if (!/^\s/.test(lines[i]) && /^([-*+]|\d{1,9}[.)])\s/.test(lines[i])) break;
      inner.push(lines[i].replace(/^\s{1,4}/, ""));
    }
    if (!(lines[i] ?? "").trim() && item.test(lines[i + 1] ?? "")) i += 1;
    const content = markdown(inner.join("\n"), depth + 1);
    const isPlain = content.childElementCount === 1 && content.firstElementChild.tagName === "P";
    element.append(make("li", {}, ...(isPlain ? content.firstElementChild.childNodes : [content])));
  }
  out.append(element);
  return i;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (name) => (line) => make("tr", {}, ...cells(line).map((cell) => make(name, {}, ...inline(cell))));
  const [head, , ...body] = lines;
  const made = make("table", {}, make("thead", {}, row("th")(head)), make("tbody", {}, ...body.map(row("td"))));
  return make("div", { class: "wide", tabIndex: 0 }, made);
}

const WORDS = new Set(`and as assert async await break case class const continue def del do elif else enum export except
  extends finally fn for from func function if impl import in int is lambda let match mod mut new None not null or pass
  pub raise return self static struct switch this throw true True false False try type use var void while with yield`.split(/\s+/));
const CODE = /(#[^\n]*|\/\/[^\n]*|\/\*[^]*?\*\/)|("""[^]*?"""|'''[^]*?'''|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|(\b\d[\w.]*)|(\b[A-Za-z_]\w*)/g;

export function codeBlock(text, language) {
  const code = make("code");
  let end = 0;
  for (const found of text.matchAll(CODE)) {
    const kind = found[1] ? "comment" : found[2] ? "string" : found[3] ? "number" : WORDS.has(found[4]) ? "word" : "";
    if (!kind) continue;
    code.append(text.slice(end, found.index), make("span", { class: `code-${kind}` }, found[0]));
    end = found.index + found[0].length;
  }
  code.append(text.slice(end));
  const copy = make("button", { type: "button", class: "small" }, "Copy");
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
  });
  const head = make("div", { class: "code-head" }, make("span", {}, language || "text"), copy);
  return make("div", { class: "code" }, head, make("pre", { tabIndex: 0 }, code));
}
