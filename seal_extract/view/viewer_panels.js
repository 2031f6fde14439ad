// What stands beside the slide: facts, the chosen patch, the region.
import { address } from "./viewer_api.js";
import { $, count, element, facts, fixed, geneButton, patchGenes, signed, table } from "./viewer_parts.js";

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

const small = (p) => (p < 0.001 ? "< .001" : fixed(p, 3));

const areaText = (mm2) => (mm2 >= 0.01 || !mm2 ? `${fixed(mm2)} mm²` : `${Math.round(mm2 * 1e6).toLocaleString("en")} µm²`);

export function showRegion(answer, actions) {
  const tissue = typeof answer.tissue_mm2 === "number" ? `, tissue ${areaText(answer.tissue_mm2)}` : "";
  const parts = [element("p", {}, `${count(answer.patches, "patch", "patches")}, region ${areaText(answer.area_mm2)}${tissue}`)];
  if (answer.why) parts.push(element("p", { className: "muted small" }, answer.why));
  if (answer.genes.length) parts.push(...regionGenes(answer, actions));
  $("region").replaceChildren(...parts);
}

function regionGenes(answer, actions) {
  const tested = answer.genes.some((row) => row.p !== undefined);
  const head = ["Gene", "inside", "outside", "effect", ...(tested ? ["p", "q"] : [])];
  const rows = answer.genes.map((row) => [
    geneButton(row.gene, actions), fixed(row.inside), fixed(row.outside), signed(row.effect), ...(tested ? [small(row.p), small(row.q)] : []),
  ]);
  return [
    element("h4", {}, "Genes ", element("small", {}, "higher here than in the rest of the slide")),
    table(head, rows),
    element("p", { className: "muted small" }, answer.note || ""),
  ];
}
