// Small helpers for building the page. Texts only ever become text nodes.

export const $ = (id) => document.getElementById(id);

/** Create an element: `make("p", { class: "cost" }, "text", child)`. Functions become listeners, null leaves out. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value === true) element.setAttribute(key, "");
    else element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

export function icon(name, kind = "") {
  const svg = shape("svg", { "aria-hidden": "true", class: kind });
  svg.append(shape("use", { href: `#i-${name}` }));
  return svg;
}

/** A button with an icon. */
export function iconButton(name, label, onClick) {
  return make("button", { type: "button", class: "icon", "aria-label": label, title: label, click: onClick }, icon(name));
}

// Brows and mouth of each emotion.
const FACES = {
  angry: ["M6.5 7.5 10 9M17.5 7.5 14 9", "M8 17c2-2 6-2 8 0"],
  disgust: ["M6.5 8 10 8.8M17.5 7 14 8.8", "M8 16.5c1.5-2 3 0 4-.5s2.5-1.5 4 .2"],
  fearful: ["M6.5 8.5 10 7M17.5 8.5 14 7", "M8.5 16.5c2-2.5 5-2.5 7 0Z"],
  happy: ["", "M7.5 14c2 4 7 4 9 0"],
  neutral: ["", "M8.5 15.5h7"],
  sad: ["M6.5 9 10 7.5M17.5 9 14 7.5", "M8 17.2c2-2.8 6-2.8 8 0"],
  surprise: ["M6.5 7C7.5 6 9 6 10 6.8M14 6.8c1-.8 2.5-.8 3.5.2", "M12 14a2 2.4 0 1 0 .01 0Z"],
};

/** The drawing of an emotion; other names give the neutral face. */
export function face(emotion) {
  const [brows, mouth] = FACES[emotion] || FACES.neutral;
  const svg = shape("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" });
  svg.append(
    shape("circle", { cx: 12, cy: 12, r: 10 }),
    shape("circle", { cx: 8.7, cy: 11, r: 0.9, class: "solid" }),
    shape("circle", { cx: 15.3, cy: 11, r: 0.9, class: "solid" }),
    shape("path", { d: brows }),
    shape("path", { d: mouth }),
  );
  return svg;
}

export const percent = (value) => `${Math.round(100 * value)} %`;
