// Small parts of the document. The scripts of a page are joined in order: each uses those before it.

const $ = (id) => document.getElementById(id);

/** An element with properties and children. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const count = (n, word, words = `${word}s`) => `${n.toLocaleString("en")} ${n === 1 ? word : words}`;
const fixed = (value, digits = 2) => value.toFixed(digits).replace("-", "−");
const signed = (value) => `${value >= 0 ? "+" : ""}${fixed(value, 1)}`;

/** A button that shows a gene on the slide: it calls `take`. */
function geneButton(gene, take) {
  return element("button", { type: "button", onclick: () => take(gene), title: `Show ${gene} on the slide` }, gene);
}

function table(head, rows) {
  const cells = (tag, values) => element("tr", {}, ...values.map((value) => element(tag, {}, value)));
  return element("table", {}, element("thead", {}, cells("th", head)), element("tbody", {}, ...rows.map((row) => cells("td", row))));
}

/** The longest of 1, 2 or 5 times a power of ten in µm that fits, and the words for it. */
function scaleLength(most_um) {
  const power = 10 ** Math.floor(Math.log10(most_um));
  const um = [5, 2, 1].map((step) => step * power).find((step) => step <= most_um);
  return [um, um >= 1000 ? `${um / 1000} mm` : `${Number(um.toPrecision(1))} µm`];
}

/** The bytes that stand in a page. */
function bytes(base64) {
  return Uint8Array.from(atob(base64), (char) => char.charCodeAt(0)).buffer;
}

/** Give a canvas as many pixels as the screen has for it; its width and height on the page. */
function fitted(canvas) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const pixels = [width, height].map((side) => Math.round(side * (window.devicePixelRatio || 1)));
  if (canvas.width !== pixels[0] || canvas.height !== pixels[1]) [canvas.width, canvas.height] = pixels;
  return [width, height];
}
