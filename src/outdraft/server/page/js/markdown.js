// A small part of CommonMark as elements: headings, lists, quotes, fences, emphasis, code.
// Links and images stay text: what a model writes must not lead anywhere by a click.

import { h } from "./dom.js";

/** Elements for a text. */
export function render(text) {
  const blocks = [];
  const lines = text.split("\n");
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    const fence = line.match(/^ {0,3}(```+|~~~+)\s*([\w+-]*)/);
    if (fence) {
      const body = [];
      for (i++; i < lines.length && !lines[i].trimStart().startsWith(fence[1]); i++) {
        body.push(lines[i]);
      }
      i++;
      const label = fence[2] ? `code, ${fence[2]}` : "code";
      blocks.push(h("pre", { tabIndex: 0, role: "region", "aria-label": label },
        h("code", {}, body.join("\n"))));
      continue;
    }
    const heading = line.match(/^(#{1,6})\s+(.*)$/);
    if (heading) {
      blocks.push(h(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(heading[2])));
      i++;
      continue;
    }
    const item = /^\s*([-*+]|\d+[.)])\s+/;
    if (item.test(line)) {
      const tag = /^\s*\d/.test(line) ? "ol" : "ul";
      const items = [];
      for (; i < lines.length && item.test(lines[i]); i++) {
        items.push(h("li", {}, ...inline(lines[i].replace(item, ""))));
      }
      blocks.push(h(tag, {}, ...items));
      continue;
    }
    if (line.startsWith(">")) {
      const body = [];
      for (; i < lines.length && lines[i].startsWith(">"); i++) {
        body.push(lines[i].replace(/^>\s?/, ""));
      }
      blocks.push(h("blockquote", {}, ...inline(body.join("\n"))));
      continue;
    }
    if (line.trim() === "") {
      i++;
      continue;
    }
    const body = [];
    for (; i < lines.length && lines[i].trim() !== "" && !/^ {0,3}(```|~~~|#{1,6}\s|>)/.test(lines[i])
      && !item.test(lines[i]); i++) {
      body.push(lines[i]);
    }
    if (!body.length) body.push(lines[i++]);
    blocks.push(h("p", {}, ...inline(body.join("\n"))));
  }
  return blocks;
}

function inline(text) {
  const parts = [];
  let rest = text;
  for (;;) {
    const found = rest.match(/`([^`]+)`|\*\*([^*]+)\*\*|\*([^*\s][^*]*)\*/);
    if (!found) break;
    parts.push(rest.slice(0, found.index));
    if (found[1]) parts.push(h("code", {}, found[1]));
    else if (found[2]) parts.push(h("strong", {}, found[2]));
    else parts.push(h("em", {}, found[3]));
    rest = rest.slice(found.index + found[0].length);
  }
  return [...parts, rest].filter((p) => p !== "");
}
