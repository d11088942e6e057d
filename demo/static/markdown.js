// Markdown as elements. Nothing is ever parsed as HTML, so that a text can bring neither tags nor scripts.

import { make } from "./dom.js";

// The lengths are bounded, so that no text takes long.
const INLINE = /(`{1,9})([^`]{1,999}?)\1|\*\*([^\s*](?:.{0,999}?[^\s*])??)\*\*|__([^\s_](?:.{0,999}?[^\s_])??)__|\*([^\s*](?:.{0,999}?[^\s*])??)\*|\b_([^\s_](?:.{0,999}?[^\s_])??)_\b|\[([^\]]{1,999})\]\(([^)\s]{1,999})\)/;
const BULLET = /^\s{0,3}[-*+]\s+/;
const NUMBER = /^\s{0,3}\d{1,9}[.)]\s+/;
const MOST_NESTED = 8;

/** A link's address if a browser may open it, else null. */
function address(text) {
  try {
    const url = new URL(text);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function inline(text, depth = 0) {
  const nodes = [];
  while (text) {
    const found = depth < MOST_NESTED ? INLINE.exec(text) : null;
    if (!found) {
      nodes.push(text);
      break;
    }
    if (found.index) nodes.push(text.slice(0, found.index));
    const [all, , code, strong, strong2, em, em2, label, link] = found;
    if (code !== undefined) nodes.push(make("code", {}, code));
    else if (strong ?? strong2) nodes.push(make("strong", {}, ...inline(strong ?? strong2, depth + 1)));
    else if (em ?? em2) nodes.push(make("em", {}, ...inline(em ?? em2, depth + 1)));
    else if (address(link)) {
      nodes.push(make("a", { href: address(link), target: "_blank", rel: "noopener noreferrer" }, ...inline(label, depth + 1)));
    } else nodes.push(all);
    text = text.slice(found.index + all.length);
  }
  return nodes;
}

function lines(texts) {
  return texts.flatMap((text, place) => (place ? [make("br"), ...inline(text)] : inline(text)));
}

/** Turn a text in Markdown into elements: paragraphs, lists, quotes, code, headings, emphasis and links. */
export function markdown(text) {
  const blocks = [];
  const rows = text.replace(/\r\n?/g, "\n").split("\n");
  let place = 0;
  const take = (fits) => {
    const start = place;
    while (place < rows.length && fits(rows[place])) place += 1;
    return rows.slice(start, place);
  };
  while (place < rows.length) {
    const row = rows[place];
    const fence = /^\s{0,3}(```+|~~~+)[^`]*$/.exec(row);
    const heading = /^#{1,6}\s+(.*)$/.exec(row);
    if (!row.trim()) place += 1;
    else if (fence) {
      place += 1;
      const code = take((line) => !line.trim().startsWith(fence[1]));
      place += 1;
      blocks.push(make("pre", { tabindex: "0" }, make("code", {}, code.join("\n"))));
    } else if (heading) {
      place += 1;
      blocks.push(make("h3", {}, ...inline(heading[1])));
    } else if (row.startsWith(">")) {
      blocks.push(make("blockquote", {}, ...lines(take((line) => line.startsWith(">")).map((line) => line.replace(/^>\s?/, "")))));
    } else if (BULLET.test(row) || NUMBER.test(row)) {
      const marker = BULLET.test(row) ? BULLET : NUMBER;
      const items = take((line) => marker.test(line)).map((line) => make("li", {}, ...inline(line.replace(marker, ""))));
      const first = marker === NUMBER ? String(parseInt(row, 10)) : null;
      blocks.push(make(marker === BULLET ? "ul" : "ol", { start: first === "1" ? null : first }, ...items));
    } else {
      const paragraph = take((line) => line.trim() && !/^(\s{0,3}(```+|~~~+)[^`]*$|#{1,6}\s|>)/.test(line) && !BULLET.test(line) && !NUMBER.test(line));
      blocks.push(make("p", {}, ...lines(paragraph)));
    }
  }
  return blocks;
}
