// Small parts of the document.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export const count = (n, word, words = `${word}s`) => `${n.toLocaleString("en")} ${n === 1 ? word : words}`;
export const fixed = (value, digits = 2) => value.toFixed(digits).replace("-", "−");
export const signed = (value) => `${value >= 0 ? "+" : ""}${fixed(value, 1)}`;

export const facts = (pairs) => pairs.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);

export function geneButton(gene, actions) {
  const button = element("button", { type: "button", onclick: () => actions.gene(gene), title: `Show ${gene} on the slide` }, gene);
  return button;
}

export function table(head, rows) {
  const cells = (tag, values) => element("tr", {}, ...values.map((value) => element(tag, {}, value)));
  return element("table", {}, element("thead", {}, cells("th", head)), element("tbody", {}, ...rows.map((row) => cells("td", row))));
}

export function patchGenes(genes, actions, which = "by which it stands out of the slide") {
  if (!genes.length) return [];
  const rows = genes.slice(0, 8).map(({ gene, value, above }) => [geneButton(gene, actions), fixed(value), signed(above)]);
  return [
    element("h4", {}, "Genes ", element("small", {}, which)),
    table(["Gene", "predicted", "SD above mean"], rows),
  ];
}
