// The page of one slide, with all of it inside: which colours are shown, what was chosen; and the keys for it.
/* global L */
import { geneCombo } from "./viewer_combo.js";
import { saveFigure } from "./viewer_figure.js";
import { Legend } from "./viewer_legend.js";
import { Patches, Stage } from "./viewer_map.js";
import { $, element, facts, fixed, patchGenes } from "./viewer_parts.js";

const data = JSON.parse($("data").textContent);
const { slide, kinds } = data;
const MOST_SUGGESTED = 12;
const CHOICES = { clusters: $("clusters"), genes: $("genes"), signatures: $("signatures"), attention: $("attention") };

const stage = new Stage(slidePicture);
const legend = new Legend();
const patches = new Patches(new Int32Array(bytes(data.xy)), slide.patch_size_l0);
const state = { kind: "none", layer: null, patch: -1 };
const geneNames = (kinds.genes || []).map((layer) => layer.legend.title);
const combo = geneCombo(suggested, takeGene);

/** The layer that shows the slide, for `Stage`. */
function slidePicture(of, span) {
  const options = { pane: "tilePane", className: "slide-picture", alt: `The slide ${of.name}` };
  return L.imageOverlay(`data:image/jpeg;base64,${data.picture}`, span.bounds, options);
}

// --- numbers --------------------------------------------------------------------------------------------

function bytes(base64) {
  const text = atob(base64);
  const found = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) found[i] = text.charCodeAt(i);
  return found.buffer;
}

/** Numbers as they lie in bytes: float16, or float32. */
function unpacked(type, buffer) {
  return type === "f2" ? Float32Array.from(new Uint16Array(buffer), half) : new Float32Array(buffer);
}

/** The numbers of a layer's patches, unpacked at their first use; none of colours that are three at once. */
function valuesOf(layer) {
  if (layer.values === null) return [];
  layer.numbers ??= unpacked(layer.values.type, bytes(layer.values.base64));
  return layer.numbers;
}

/** One patch's number alone: four letters of base64 are three bytes. */
function valueAt(layer, row) {
  if (layer.numbers) return layer.numbers[row];
  const { type, base64 } = layer.values;
  const width = Number(type[1]);
  const [first, after] = [row * width, (row + 1) * width];
  const triple = Math.floor(first / 3);
  const near = bytes(base64.slice(4 * triple, 4 * Math.ceil(after / 3)));
  return unpacked(type, near.slice(first - 3 * triple, after - 3 * triple))[0];
}

/** A float16 of IEEE 754 by its bits. */
function half(bits) {
  const exponent = (bits >> 10) & 31;
  const fraction = (bits & 1023) / 1024;
  const size = exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction;
  return bits >> 15 ? -size : size;
}

// --- colours --------------------------------------------------------------------------------------------

function offer() {
  for (const radio of document.querySelectorAll("input[name=kind]")) {
    radio.parentElement.hidden = radio.value !== "none" && !kinds[radio.value];
  }
  for (const [kind, list] of Object.entries(CHOICES)) {
    const layers = kinds[kind] || [];
    list.replaceChildren(...layers.map((layer, i) => element("option", { value: i }, layer.legend.title)));
    list.addEventListener("change", () => setKind(kind));
  }
  if (kinds.clusters) CHOICES.clusters.value = Math.min(1, kinds.clusters.length - 1);
  CHOICES.genes.selectedIndex = -1;
  $("genes-why").hidden = !data.no_genes;
  $("genes-why").textContent = data.no_genes;
  $("genes-are").textContent = data.genes_are;
  $("gene").placeholder = `one of ${geneNames.length.toLocaleString("en")} in this page`;
  $("tissue").disabled = !slide.tissue.length;
  $("tissue").checked = slide.tissue.length > 0;
  $("grid").disabled = !patches.length;
}

function setKind(kind) {
  const radio = document.querySelector(`input[name="kind"][value="${kind}"]`);
  if (radio.parentElement.hidden) return;
  radio.checked = true;
  state.kind = kind;
  for (const name of Object.keys(CHOICES)) $(`choose-${name}`).hidden = name !== kind;
  $("colour-error").hidden = true;
  if (kind === "genes" && CHOICES.genes.selectedIndex < 0) CHOICES.genes.selectedIndex = 0;
  const index = kind in CHOICES ? CHOICES[kind].selectedIndex : 0;
  paint(kind === "none" ? null : kinds[kind][index]);
  if (kind === "genes") $("gene").value = state.layer.legend.title;
}

function paint(layer) {
  state.layer = layer;
  stage.paint(layer && `data:image/png;base64,${layer.picture}`);
  legend.show(layer && layer.legend, layer && valuesOf(layer));
  if (layer) legend.point(state.patch);
  if (state.patch >= 0) showPatch();
}

function setOpacity(percent) {
  const value = Math.min(100, Math.max(0, percent));
  $("opacity").value = value;
  $("opacity").setAttribute("aria-valuetext", `${value} %`);
  $("opacity-said").textContent = `${value} %`;
  stage.fade(value / 100);
}

// --- genes ----------------------------------------------------------------------------------------------

/** Genes that begin with what was typed, then those that contain it. */
function suggested(typed) {
  const wanted = typed.toUpperCase();
  const begin = geneNames.filter((name) => name.toUpperCase().startsWith(wanted));
  const inside = geneNames.filter((name) => name.toUpperCase().includes(wanted) && !begin.includes(name));
  return [...begin.sort(), ...inside.sort()].slice(0, MOST_SUGGESTED);
}

function takeGene(text) {
  const index = geneNames.findIndex((name) => name.toUpperCase() === text.toUpperCase());
  if (index >= 0) {
    CHOICES.genes.selectedIndex = index;
    setKind("genes");
    return;
  }
  $("colour-error").textContent = `${text} is not among the ${geneNames.length.toLocaleString("en")} genes in this page.`;
  $("colour-error").hidden = false;
}

function typeGene() {
  setKind("genes");
  if (state.kind !== "genes") return;
  $("gene").focus();
  $("gene").select();
}

// --- a patch --------------------------------------------------------------------------------------------

function choosePatch(row) {
  if (row < 0) return;
  state.patch = row;
  stage.choose(row, [], false);
  legend.point(row);
  showPatch();
  $("patch").parentElement.scrollIntoView({ block: "nearest" });
}

function showPatch() {
  const [x, y] = patches.at(state.patch);
  const um = (px) => Math.round(px * slide.mpp).toLocaleString("en");
  const place = element("p", { className: "muted small" },
    `x ${x.toLocaleString("en")}, y ${y.toLocaleString("en")} px of level 0`, element("br"), `x ${um(x)}, y ${um(y)} µm, its top left corner`);
  const unread = slide.unread.includes(state.patch) ? [element("p", { className: "bad small" }, "This patch could not be read.")] : [];
  $("patch").replaceChildren(element("b", {}, `Patch ${(state.patch + 1).toLocaleString("en")}`), place, ...unread, ...shownValue(),
    ...patchGenes(topGenes(state.patch), { gene: takeGene }, "in this page by which it stands out most"));
}

function shownValue() {
  const { layer, patch } = state;
  if (!layer || !layer.values) return [];
  const value = valueAt(layer, patch);
  const words = layer.legend.kind === "clusters" ? `cluster ${value + 1}` : fixed(value);
  return [element("p", { className: "value" }, `${layer.legend.title}: `, element("b", {}, words)),
    element("p", { className: "muted small" }, layer.legend.unit)];
}

/** The genes in this page by which a patch stands out of its slide, as the viewer orders all genes. */
function topGenes(row) {
  const found = (kinds.genes || []).map((layer) => {
    const value = valueAt(layer, row);
    return { gene: layer.legend.title, value, above: layer.sd > 1e-6 ? (value - layer.mean) / layer.sd : 0 };
  });
  return found.sort((a, b) => b.above - a.above);
}

// --- a picture ------------------------------------------------------------------------------------------

function takePicture() {
  const { layer } = state;
  const predicted = ["genes", "signatures"].includes(state.kind) ? ", predicted from the picture, not measured" : "";
  const lines = [[slide.name, ...(layer ? [`${slide.encoder}${predicted}`] : [])].join(" · ")];
  saveFigure([slide.name, ...(layer ? [layer.legend.title] : [])].join("_"), lines, layer && layer.legend);
}

// --- pointer, fields, keys ------------------------------------------------------------------------------

const press = (id) => () => $(id).click();
const nearest = () => patches.length && choosePatch(stage.middle());
const KEYS = {
  "?": () => $("help").showModal(), f: () => stage.fit(), "/": typeGene, p: nearest,
  n: () => setKind("none"), e: () => setKind("embedding"), c: () => setKind("clusters"), a: () => setKind("attention"),
  t: press("tissue"), g: press("grid"), s: press("grey"), i: takePicture,
  ",": () => setOpacity(Number($("opacity").value) - 10), ".": () => setOpacity(Number($("opacity").value) + 10),
  "+": () => stage.map.zoomIn(), "-": () => stage.map.zoomOut(),
};
const BESIDE = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function onKey(event) {
  if (event.target.matches("input[type=text], select") || event.ctrlKey || event.metaKey || $("help").open) return;
  const leaflets = document.activeElement === $("map") && ["+", "-"].includes(event.key);
  const besides = event.altKey && event.key in BESIDE && state.patch >= 0;
  const act = besides ? () => choosePatch(patches.beside(state.patch, ...BESIDE[event.key])) : KEYS[event.key.toLowerCase()];
  if (!act || leaflets || (event.altKey && !besides)) return;
  act();
  event.preventDefault();
  event.stopPropagation();
}

function listen() {
  document.addEventListener("keydown", onKey, true);
  document.querySelectorAll("input[name=kind]").forEach((radio) => radio.addEventListener("change", () => setKind(radio.value)));
  stage.map.on("click", ({ latlng }) => choosePatch(patches.find(latlng.lng, latlng.lat)));
  $("opacity").addEventListener("input", () => setOpacity(Number($("opacity").value)));
  for (const name of ["tissue", "grid"]) $(name).addEventListener("change", () => stage.toggle(name, $(name).checked));
  $("grey").addEventListener("change", () => stage.grey($("grey").checked));
  $("zoom-in").addEventListener("click", () => stage.map.zoomIn());
  $("zoom-out").addEventListener("click", () => stage.map.zoomOut());
  $("zoom-fit").addEventListener("click", () => stage.fit());
  $("save-figure").addEventListener("click", takePicture);
  $("show-help").addEventListener("click", () => $("help").showModal());
  $("close-help").addEventListener("click", () => $("help").close());
}

$("facts").replaceChildren(...facts(data.facts));
offer();
listen();
stage.show(slide, patches);
stage.map.setMaxZoom(slide.most_zoom);
