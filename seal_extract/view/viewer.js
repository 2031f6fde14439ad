// The page: which slide is shown, how it is coloured, what was chosen; and the keys for all of it.
import { address, ask, askBytes, setVersion } from "./viewer_api.js";
import { geneCombo } from "./viewer_combo.js";
import { Draw } from "./viewer_draw.js";
import { saveFigure } from "./viewer_figure.js";
import { Legend } from "./viewer_legend.js";
import { Patches, Stage } from "./viewer_map.js";
import { showFacts, showPatch, showRegion } from "./viewer_panels.js";
import { $, count, element } from "./viewer_parts.js";
import { Regions } from "./viewer_regions.js";
import { slideTiles } from "./viewer_tiles.js";

const stage = new Stage(slideTiles);
const legend = new Legend();
const draw = new Draw(stage, takeRegion);
const regions = new Regions(stage, takeRegion);
const combo = geneCombo(suggestGenes, takeGene);
const state = { slides: [], encoder: "", slide: null, patches: null, patch: -1, kind: "none", genes: null, gene: "", region: null };
const turns = {}; // the latest question of each kind: answers to earlier ones are dropped

/** Run an asynchronous step; if another of its kind began meanwhile, what follows is not done. */
async function latest(kind, step, then, failed) {
  const turn = (turns[kind] = (turns[kind] || 0) + 1);
  try {
    const answer = await step();
    if (turn === turns[kind]) then(answer);
  } catch (error) {
    if (turn === turns[kind]) failed(error);
  }
}

// --- slides ---------------------------------------------------------------------------------------------

async function start() {
  const { out, encoder, slides, version } = await ask("/api/slides");
  setVersion(version);
  Object.assign(state, { slides, encoder });
  document.title = `${out} · seal-extract`;
  $("folder").textContent = out;
  $("encoder").textContent = `${count(slides.length, "slide")} by ${encoder}`;
  $("filter").hidden = slides.length < 8;
  $("slides").replaceChildren(...slides.map(listItem));
  const [wanted, patch] = location.hash.slice(1).split("/").map(Number);
  const first = slides.findIndex((slide) => !slide.problem);
  await openSlide(slides[wanted] ? wanted : Math.max(0, first), Number.isInteger(patch) ? patch - 1 : -1);
}

function listItem(slide) {
  const picture = slide.thumbnail
    ? element("img", { className: "pic", src: address(slide.index, "thumbnail"), alt: "", loading: "lazy" })
    : element("span", { className: "pic none" }, "no picture");
  const words = element("span", {}, element("b", {}, slide.name), element("small", { className: slide.problem ? "bad" : "" }, inShort(slide)));
  const button = element("button", { type: "button", title: slide.problem || slide.name, onclick: () => openSlide(slide.index) }, picture, words);
  return element("li", {}, button);
}

function inShort(slide) {
  if (slide.status === "failed") return "failed";
  if (slide.problem) return "slide not found";
  const errors = slide.read_errors ? ` · ${count(slide.read_errors, "read error")}` : "";
  return slide.patches === null ? "done" : `${count(slide.patches, "patch", "patches")}${errors}`;
}

async function openSlide(index, patch = -1) {
  const line = state.slides[index];
  mark(index);
  draw.leave();
  turns.slide = (turns.slide || 0) + 1;
  if (line.problem) return showProblem(line, line.problem);
  await latest("slide", () => Promise.all([ask(`/api/slides/${index}`), askBytes(address(index, "patches"))]),
    ([slide, xy]) => showSlide(slide, new Int32Array(xy), patch), (error) => showProblem(line, error.message));
}

function mark(index) {
  [...$("slides").querySelectorAll("button")].forEach((button, i) => {
    button.setAttribute("aria-current", String(i === index));
    if (i === index) button.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
  state.index = index;
  history.replaceState(null, "", `#${index}`);
}

function showSlide(slide, xy, patch) {
  Object.assign(state, { slide, patches: new Patches(xy, slide.patch_size_l0), patch: -1 });
  $("problem").hidden = true;
  stage.show(slide, state.patches);
  showFacts(slide, state.slides[slide.index], state.encoder);
  offer(slide);
  forget();
  regions.open(slide);
  colour();
  if (patch >= 0 && patch < state.patches.length) choosePatch(patch, true);
  if (state.genes === null) stage.tiles.once("load", askGenes);
}

function showProblem(line, why) {
  stage.clear();
  Object.assign(state, { slide: null, patches: null, patch: -1 });
  $("problem").hidden = false;
  $("problem").querySelector("p").textContent = why;
  $("name").textContent = line.name;
  $("facts").replaceChildren();
  legend.show(null);
  forget();
}

/** What can be chosen of this slide. */
function offer(slide) {
  $("clusters").max = slide.clusters[1];
  $("attention-kind").hidden = slide.attention.length === 0;
  $("attention").replaceChildren(...slide.attention.map((title, i) => element("option", { value: i }, title)));
  if (state.kind === "attention" && !slide.attention.length) setKind("none");
}

function forget() {
  $("patch").replaceChildren(element("p", { className: "muted" }, "Click a patch, or press ", element("kbd", {}, "P"), " for the one in the middle."));
  clearRegion();
}

const step = (by) => openSlide(Math.min(Math.max(state.index + by, 0), state.slides.length - 1));

// --- colours --------------------------------------------------------------------------------------------

function setKind(kind) {
  const radio = document.querySelector(`input[name="kind"][value="${kind}"]`);
  if (radio.disabled || radio.parentElement.hidden) return;
  radio.checked = true;
  state.kind = kind;
  for (const name of ["clusters", "genes", "attention"]) $(`choose-${name}`).hidden = name !== kind;
  colour();
}

function colour() {
  if (!state.slide) return;
  const of = { clusters: $("clusters").value, genes: state.gene, attention: $("attention").value }[state.kind] || "";
  $("colour-error").hidden = true;
  if (state.kind === "none" || !state.patches.length || (state.kind === "genes" && !of)) {
    turns.colour = (turns.colour || 0) + 1;
    stage.paint(null);
    legend.show(null);
    return;
  }
  const { index } = state.slide;
  const part = (name) => address(index, `layers/${state.kind}/${name}`, { of });
  latest("colour", async () => {
    if (state.kind === "genes") await checkGenes(of);
    const said = await ask(part("legend"));
    return [said, part("picture"), new Float32Array(await askBytes(part("values")))];
  }, ([said, picture, values]) => {
    stage.paint(picture);
    legend.show(said, values);
    legend.point(state.patch);
  }, notColoured);
}

async function checkGenes(typed) {
  const { why, nearest } = await ask(`/api/check?typed=${encodeURIComponent(typed)}`);
  if (why) throw Object.assign(new Error(why), { nearest });
}

function notColoured(error) {
  stage.paint(null);
  legend.show(null);
  const near = (error.nearest || []).map((gene) => element("button", { type: "button", onclick: () => takeGene(gene) }, gene));
  $("colour-error").replaceChildren(near.length ? error.message.split(";")[0] : error.message, ...(near.length ? ["; the nearest: ", ...near] : []));
  $("colour-error").hidden = false;
}

function setOpacity(percent) {
  const value = Math.min(100, Math.max(0, percent));
  $("opacity").value = value;
  $("opacity").setAttribute("aria-valuetext", `${value} %`);
  $("opacity-said").textContent = `${value} %`;
  stage.fade(value / 100);
}

// --- genes ----------------------------------------------------------------------------------------------

async function askGenes() {
  const genes = await ask("/api/genes").catch((error) => ({ named: false, why: error.message }));
  state.genes = genes;
  document.querySelector('input[value="genes"]').disabled = !genes.named;
  $("genes-why").hidden = genes.named;
  $("genes-why").textContent = genes.named ? "" : `No genes: ${genes.why}`;
  if (genes.named) $("gene").placeholder = `one of ${genes.count.toLocaleString("en")}`;
}

function suggestGenes(typed) {
  return ask(`/api/suggest?typed=${encodeURIComponent(typed)}`).catch(() => []);
}

function takeGene(text) {
  state.gene = text;
  $("gene").value = text;
  setKind("genes");
}

function typeGene() {
  setKind("genes");
  if (state.kind === "genes") $("gene").focus();
}

// --- a patch --------------------------------------------------------------------------------------------

async function choosePatch(row, move = false) {
  if (row < 0) return;
  const { slide, patches } = state;
  state.patch = row;
  history.replaceState(null, "", `#${slide.index}/${row + 1}`);
  stage.choose(row, [], move);
  legend.point(row);
  if (!move) $("patch").parentElement.scrollIntoView({ block: "nearest" });
  const panel = showPatch(slide, row, patches, actions);
  const path = `/api/slides/${slide.index}/patches/${row}`;
  latest("patch", () => ask(path), ({ genes }) => panel.genes(genes), (error) => panel.failed("genes", error.message));
  latest("alike", () => ask(`${path}/alike?scope=slide`), (found) => {
    panel.alike("slide", found);
    stage.choose(row, found.map((one) => one.row), false);
  }, (error) => panel.failed("slide", error.message));
  if (state.slides.filter((one) => one.status === "done").length < 2) return;
  latest("cohort", () => ask(`${path}/alike?scope=cohort`), (found) => panel.alike("cohort", found), (error) => panel.failed("cohort", error.message));
}

const actions = {
  gene: takeGene,
  go: (slide, row) => (slide === state.index ? choosePatch(row, true) : openSlide(slide, row)),
};

// --- a region -------------------------------------------------------------------------------------------

function takeRegion(polygon) {
  const { index } = state.slide;
  state.region = polygon;
  stage.outlineRegion(polygon);
  $("clear").hidden = $("keep").hidden = false;
  $("region").replaceChildren(element("p", { className: "muted" }, "Comparing…"));
  const body = JSON.stringify({ polygon });
  const send = { method: "POST", body, headers: { "Content-Type": "application/json" } };
  latest("region", () => ask(`/api/slides/${index}/region`, send), (answer) => {
    showRegion(answer, actions);
    $("region").parentElement.scrollIntoView({ block: "start" });
  }, (error) => $("region").replaceChildren(element("p", { className: "bad" }, error.message)));
}

function clearRegion() {
  turns.region = (turns.region || 0) + 1;
  state.region = null;
  stage.outlineRegion(null);
  $("clear").hidden = $("keep").hidden = true;
  $("region").replaceChildren();
}

function keepRegion() {
  if (!state.region) return;
  regions.keep(state.region, $("region-class").value);
  clearRegion();
}

// --- a picture ------------------------------------------------------------------------------------------

function takePicture() {
  if (!state.slide) return;
  const { name } = state.slide;
  const shown = legend.legend;
  const made = state.kind === "none" ? [] : [`${state.encoder}${state.kind === "genes" ? ", predicted from the picture, not measured" : ""}`];
  saveFigure([name, ...(shown ? [shown.title] : [])].join("_"), [[name, ...made].join(" · ")], shown);
}

const toggleDraw = () => state.slide && (draw.on ? draw.leave() : draw.begin());
const middleRegion = () => state.slide && takeRegion(stage.middleBox());

// --- pointer, fields, keys ------------------------------------------------------------------------------

function patchUnder({ latlng }) {
  return state.patches ? state.patches.find(latlng.lng, latlng.lat) : -1;
}

function listen() {
  stage.map.on("click", (event) => draw.on || draw.justClosed || choosePatch(patchUnder(event)));
  stage.map.on("mousemove", (event) => { const row = patchUnder(event); legend.point(row < 0 ? state.patch : row); });
  stage.map.on("mouseout", () => legend.point(state.patch));
  $("kinds").addEventListener("change", (event) => setKind(event.target.value));
  $("clusters").addEventListener("input", () => { $("clusters-said").textContent = $("clusters").value; colour(); });
  $("attention").addEventListener("change", colour);
  $("opacity").addEventListener("input", () => setOpacity(Number($("opacity").value)));
  for (const name of ["tissue", "grid"]) $(name).addEventListener("change", () => stage.toggle(name, $(name).checked));
  $("grey").addEventListener("change", () => stage.grey($("grey").checked));
  $("draw").addEventListener("click", toggleDraw);
  $("middle").addEventListener("click", middleRegion);
  $("clear").addEventListener("click", clearRegion);
  $("keep").addEventListener("submit", (event) => { event.preventDefault(); keepRegion(); });
  $("save-regions").addEventListener("click", () => regions.save());
  $("save-figure").addEventListener("click", takePicture);
  $("zoom-in").addEventListener("click", () => stage.map.zoomIn());
  $("zoom-out").addEventListener("click", () => stage.map.zoomOut());
  $("zoom-fit").addEventListener("click", () => stage.fit());
  $("show-help").addEventListener("click", () => $("help").showModal());
  $("filter").addEventListener("input", filterList);
  document.addEventListener("keydown", onKey, true);
}

function filterList() {
  const wanted = $("filter").value.trim().toLowerCase();
  [...$("slides").children].forEach((item, i) => { item.hidden = !state.slides[i].name.toLowerCase().includes(wanted); });
}

const press = (id) => () => $(id).click();
const KEYS = {
  "?": () => $("help").showModal(), f: () => stage.fit(), "[": () => step(-1), "]": () => step(1),
  n: () => setKind("none"), e: () => setKind("embedding"), c: () => setKind("clusters"), a: () => setKind("attention"),
  "/": typeGene, t: press("tissue"), g: press("grid"), s: press("grey"), d: toggleDraw, r: middleRegion, k: keepRegion, i: takePicture,
  ",": () => setOpacity(Number($("opacity").value) - 10), ".": () => setOpacity(Number($("opacity").value) + 10),
  "+": () => stage.map.zoomIn(), "=": () => stage.map.zoomIn(), "-": () => stage.map.zoomOut(),
  p: () => state.patches && choosePatch(stage.middle()),
};
const BESIDE = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function onKey(event) {
  if (event.target.matches("input[type=text], input[type=search], select") || event.ctrlKey || event.metaKey || $("help").open) return;
  const onButton = event.target.matches("button, input, summary") && [" ", "Enter"].includes(event.key);
  if (draw.on && !onButton && draw.key(event.key)) return stop(event);
  if (event.altKey) return event.key in BESIDE ? beside(event) : undefined;
  const act = KEYS[event.key.toLowerCase()]; // with Shift, which + needs, Leaflet would zoom by three
  if (!act) return undefined;
  act();
  return stop(event);
}

function beside(event) {
  stop(event);
  if (state.patches && state.patch >= 0) choosePatch(state.patches.beside(state.patch, ...BESIDE[event.key]));
}

function stop(event) {
  event.preventDefault();
  event.stopPropagation();
}

listen();
start().catch((error) => showProblem({ name: "seal-extract" }, error.message));
