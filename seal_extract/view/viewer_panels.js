// What stands beside the slide: facts, legend, the chosen patch, the region.
import { $, address, count, element, fixed } from "./viewer_api.js";

const facts = (pairs) => pairs.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);

export function showFacts(slide, line, encoder) {
  const [width, height] = slide.size_l0;
  const mm = (px) => fixed((px * slide.mpp) / 1000, 1);
  $("name").textContent = slide.name;
  const tissue = line.tissue_mm2 === null ? [] : [["Tissue", `${fixed(line.tissue_mm2, 1)} mm²`]];
  const patient = line.case ? [["Case", line.case]] : [];
  $("facts").replaceChildren(
    ...facts([
      ...patient,
      ["Size", `${mm(width)} × ${mm(height)} mm`],
      ...tissue,
      ["Level 0", `${width.toLocaleString("en")} × ${height.toLocaleString("en")} px`],
      ["Resolution", `${Number(slide.mpp.toPrecision(3))} µm/px`],
      ["Patches", `${slide.patches.toLocaleString("en")} of ${slide.patch_px} px at ${Number(slide.patch_mpp.toPrecision(3))} µm/px`],
      ["Encoder", `${encoder}, ${slide.dim} numbers a patch`],
    ]),
  );
}

// --- legend ---------------------------------------------------------------------------------------------

export class Legend {
  constructor() {
    this.legend = null;
  }

  show(legend, values) {
    this.legend = legend;
    this.values = values;
    $("legend").hidden = legend === null;
    if (legend === null) return;
    $("legend-title").textContent = legend.title;
    $("legend-unit").textContent = legend.unit;
    const bodies = { scale: () => this.#scale(), clusters: () => this.#clusters(), embedding: () => [] };
    $("legend-body").replaceChildren(...bodies[legend.kind]());
  }

  /** Mark the value of a patch; -1 marks nothing. */
  point(row) {
    if (!this.legend || !this.values || !this.values.length) return;
    const value = row < 0 ? null : this.values[row];
    if (this.legend.kind === "scale") this.#pointScale(value);
    if (this.legend.kind === "clusters") this.items.forEach((item, k) => item.classList.toggle("here", k === value));
  }

  #scale() {
    const { colours, low, high, least, most } = this.legend;
    const bar = element("div", { className: "bar" });
    bar.style.background = `linear-gradient(to right, ${colours.join(", ")})`;
    this.mark = element("i", { className: "mark", hidden: true });
    this.here = element("p", { className: "here" });
    bar.append(this.mark);
    const end = (value, beyond, sign) => `${beyond ? sign : ""}${fixed(value)}`;
    const ends = element("div", { className: "ends" },
      element("span", {}, end(low, least < low - 1e-6, "≤ ")), element("span", {}, end(high, most > high + 1e-6, "≥ ")));
    return [bar, ends, this.here];
  }

  #pointScale(value) {
    const { low, high } = this.legend;
    this.mark.hidden = value === null;
    this.here.textContent = value === null ? "" : `here ${fixed(value)}`;
    if (value !== null) this.mark.style.left = `${100 * Math.min(1, Math.max(0, (value - low) / (high - low)))}%`;
  }

  #clusters() {
    const total = this.legend.counts.reduce((a, b) => a + b, 0);
    this.items = this.legend.colours.map((colour, k) => {
      const swatch = element("i");
      swatch.style.background = colour;
      return element("li", {}, swatch, `${k + 1}  ·  ${fixed((100 * this.legend.counts[k]) / total, 0)} %`);
    });
    return [element("ol", {}, ...this.items)];
  }
}

// --- patch ----------------------------------------------------------------------------------------------

/** The chosen patch: its picture and place at once, its genes and neighbours as they come. */
export function showPatch(slide, row, patches, actions) {
  const [x, y] = patches.at(row);
  const picture = element("img", { src: address(slide.index, `patches/${row}/image`), alt: `Patch ${row + 1}` });
  const about = element("div", {},
    element("b", {}, `Patch ${(row + 1).toLocaleString("en")}`), element("br"),
    element("span", { className: "muted small" }, `x ${x.toLocaleString("en")}, y ${y.toLocaleString("en")} px`));
  const places = { genes: element("div"), slide: element("div"), cohort: element("div") };
  $("patch").replaceChildren(element("div", { className: "chosen" }, picture, about), places.genes, places.slide, places.cohort);
  return {
    genes: (genes) => places.genes.replaceChildren(...patchGenes(genes, actions)),
    alike: (scope, found) => places[scope].replaceChildren(...alike(scope, found, actions)),
    failed: (scope, line) => places[scope].replaceChildren(element("p", { className: "bad small" }, line)),
  };
}

function patchGenes(genes, actions) {
  if (!genes.length) return [];
  const rows = genes.slice(0, 8).map(({ gene, value, above }) => [geneButton(gene, actions), fixed(value), signed(above)]);
  return [
    element("h4", {}, "Genes ", element("small", {}, "by which it stands out of the slide")),
    table(["Gene", "predicted", "SD above mean"], rows),
  ];
}

function alike(scope, found, actions) {
  if (!found.length) return [];
  const title = scope === "slide" ? "Alike in this slide" : "Alike in the other slides";
  return [
    element("h4", {}, title, " ", element("small", {}, "cosine")),
    element("div", { className: "alike" }, ...found.map((one) => alikeButton(scope, one, actions))),
  ];
}

function alikeButton(scope, one, actions) {
  const where = scope === "slide" ? `patch ${one.row + 1}` : `${one.name}, patch ${one.row + 1}`;
  const picture = element("img", { src: address(one.slide, `patches/${one.row}/image`), alt: "", loading: "lazy" });
  const words = scope === "slide" ? [fixed(one.cosine, 3)] : [fixed(one.cosine, 3), element("br"), one.name];
  const button = element("button", { type: "button", title: where, onclick: () => actions.go(one.slide, one.row) }, picture, element("small", {}, ...words));
  button.setAttribute("aria-label", `Go to ${where}, cosine ${fixed(one.cosine, 3)}`);
  return button;
}

// --- region ---------------------------------------------------------------------------------------------

export function showRegion(answer, actions) {
  const area = answer.area_mm2 >= 0.01 ? `${fixed(answer.area_mm2)} mm²` : `${Math.round(answer.area_mm2 * 1e6).toLocaleString("en")} µm²`;
  const parts = [element("p", {}, `${count(answer.patches, "patch", "patches")}, ${area}`)];
  if (answer.why) parts.push(element("p", { className: "muted small" }, answer.why));
  if (answer.genes.length) parts.push(...regionGenes(answer, actions));
  $("region").replaceChildren(...parts);
}

function regionGenes(answer, actions) {
  const tested = answer.genes.some((row) => row.p !== undefined);
  const head = ["Gene", "inside", "outside", "effect", ...(tested ? ["p"] : [])];
  const rows = answer.genes.map((row) => [
    geneButton(row.gene, actions), fixed(row.inside), fixed(row.outside), signed(row.effect), ...(tested ? [small(row.p)] : []),
  ]);
  return [
    element("h4", {}, "Genes ", element("small", {}, "higher here than in the rest of the slide")),
    table(head, rows),
    element("p", { className: "muted small" }, answer.note || ""),
  ];
}

// --- parts ----------------------------------------------------------------------------------------------

const signed = (value) => `${value >= 0 ? "+" : ""}${fixed(value, 1)}`;
const small = (p) => (p < 0.001 ? "< .001" : fixed(p, 3));

function geneButton(gene, actions) {
  const button = element("button", { type: "button", onclick: () => actions.gene(gene), title: `Show ${gene} on the slide` }, gene);
  return button;
}

function table(head, rows) {
  const cells = (tag, values) => element("tr", {}, ...values.map((value) => element(tag, {}, value)));
  return element("table", {}, element("thead", {}, cells("th", head)), element("tbody", {}, ...rows.map((row) => cells("td", row))));
}
