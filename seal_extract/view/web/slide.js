// The page of one slide: its colours, the chosen patch, and the keys for them. The viewer and the report share it.

const CHOICES = ["clusters", "genes", "signatures", "attention"]; // kinds of colours of which there are several
const BESIDE = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const PREDICTED = "predicted from the picture, not measured";

class SlidePage {
  /** `source` gives all that is shown: the viewer's `Server`, or the data `Inlined` in a report. */
  constructor(source) {
    this.source = source;
    this.stage = new Stage((slide, span) => source.ground(slide, span));
    this.legend = new Legend();
    this.combo = new Combo($("gene"), $("gene-list"), (typed) => source.suggest(typed), (text) => this.takeGene(text));
    this.turns = {}; // the latest question of each kind: answers to earlier ones are dropped
    this.clear();
    this.kind = "none";
    this.gene = "";
    this.genes = null;
    const press = (id) => () => $(id).click();
    const fade = (by) => () => this.setOpacity(Number($("opacity").value) + by);
    const colour = (kind) => () => this.setKind(kind);
    this.keys = {
      "?": () => $("help").showModal(), f: () => this.stage.fit(), "/": () => this.typeGene(),
      n: colour("none"), e: colour("embedding"), c: colour("clusters"), a: colour("attention"),
      t: press("tissue"), g: press("grid"), s: press("grey"), i: () => this.takePicture(), ",": fade(-10), ".": fade(10),
      "+": () => this.stage.map.zoomIn(), "=": () => this.stage.map.zoomIn(), "-": () => this.stage.map.zoomOut(),
      p: () => this.slide && this.choosePatch(this.stage.middle()),
    };
    this.#listen();
  }

  /** Run an asynchronous step; if another of its kind began meanwhile, what follows is not done. */
  async latest(kind, step, then, failed) {
    const turn = this.drop(kind);
    try {
      const answer = await step();
      if (turn === this.turns[kind]) then(answer);
    } catch (error) {
      if (turn === this.turns[kind]) failed(error);
    }
  }

  /** Answers to questions of a kind that are still on their way are dropped. */
  drop(kind) {
    this.turns[kind] = (this.turns[kind] || 0) + 1;
    return this.turns[kind];
  }

  // --- a slide ------------------------------------------------------------------------------------------

  show(slide, xy) {
    this.clear();
    this.slide = slide;
    this.patches = new Patches(xy, slide.patch_size_l0);
    this.stage.show(slide, this.patches);
    $("name").textContent = slide.name;
    $("facts").replaceChildren(...facts(slide));
    $("notes").replaceChildren(...slide.notes.map((note) => element("li", {}, note)));
    $("notes").parentElement.hidden = !slide.notes.length;
    $("tissue").disabled = !slide.tissue.length;
    $("tissue").checked = slide.tissue.length > 0 && this.stage.shown.tissue;
    $("grid").disabled = !this.patches.length;
    this.#offer(this.source.choices(slide));
    this.colour();
  }

  clear() {
    for (const kind of Object.keys(this.turns)) if (kind !== "slide") this.drop(kind);
    this.slide = null;
    this.patches = null;
    this.layer = null;
    this.patch = -1;
    $("patch").replaceChildren(element("p", { className: "muted" }, "Click a patch, or press ", element("kbd", {}, "P"), " for the one in the middle."));
  }

  /** What can be chosen: values and labels by kind; kinds that are missing are hidden. */
  #offer(choices) {
    for (const radio of document.querySelectorAll("input[name=kind]")) {
      if (radio.value !== "none" && radio.value !== "signatures") radio.parentElement.hidden = !(radio.value in choices);
    }
    for (const kind of CHOICES) if (choices[kind]) this.#fill(kind, choices[kind]);
    if (this.kind !== "none" && document.querySelector(`input[value="${this.kind}"]`).parentElement.hidden) this.setKind("none");
  }

  #fill(kind, values) {
    const list = $(kind);
    const before = list.value || (kind === "clusters" ? "5" : "");
    list.replaceChildren(...values.map(([value, label]) => element("option", { value }, label)));
    list.value = before;
    if (list.selectedIndex < 0) list.selectedIndex = 0;
  }

  // --- colours ------------------------------------------------------------------------------------------

  setKind(kind) {
    const radio = document.querySelector(`input[name="kind"][value="${kind}"]`);
    if (radio.disabled || radio.parentElement.hidden) return;
    radio.checked = true;
    this.kind = kind;
    for (const name of CHOICES) $(`choose-${name}`).hidden = name !== kind;
    if (kind === "genes") {
      $("gene").value = this.gene;
      $("genes").selectedIndex = this.genes?.names?.indexOf(this.gene) ?? -1;
    }
    this.colour();
  }

  colour() {
    if (!this.slide) return;
    const { kind } = this;
    const of = kind === "genes" ? this.gene : CHOICES.includes(kind) ? $(kind).value : "";
    $("colour-error").hidden = true;
    if (kind === "none" || !this.patches.length || (kind === "genes" && !of)) {
      this.drop("colour");
      this.#paint(null);
      return;
    }
    this.latest("colour", () => this.source.layer(this.slide, kind, of), (layer) => this.#paint(layer), (error) => {
      this.#paint(null);
      this.showError(error);
    });
  }

  #paint(layer) {
    this.layer = layer;
    this.stage.paint(layer && layer.picture);
    this.legend.show(layer && layer.legend, layer && layer.values);
    this.legend.point(this.patch);
    this.#showValue();
  }

  showError({ message, nearest = [] }) {
    const near = nearest.map((gene) => element("button", { type: "button", onclick: () => this.takeGene(gene) }, gene));
    $("colour-error").replaceChildren(near.length ? message.split(";")[0] : message, ...(near.length ? ["; the nearest: ", ...near] : []));
    $("colour-error").hidden = false;
  }

  setOpacity(percent) {
    const value = Math.min(100, Math.max(0, percent));
    $("opacity").value = value;
    $("opacity").setAttribute("aria-valuetext", `${value} %`);
    $("opacity-text").textContent = `${value} %`;
    this.stage.fade(value / 100);
  }

  // --- genes --------------------------------------------------------------------------------------------

  /** What is known of the genes: whether they are `named`, and if not why; `names` to choose from, if they are few. */
  showGenes(genes) {
    this.genes = genes;
    document.querySelector("input[value=genes]").disabled = !genes.named;
    $("genes-why").hidden = genes.named;
    $("genes-why").textContent = genes.named ? "" : `No genes: ${genes.why}`;
    $("genes-are").textContent = genes.are || "";
    $("genes").hidden = !genes.names;
    this.gene ||= genes.names?.[0] || "";
    if (genes.named) $("gene").placeholder = `one of ${genes.count.toLocaleString("en")}${genes.names ? " in this page" : ""}`;
    if (genes.signatures?.length) this.#fill("signatures", genes.signatures.map((name) => [name, name]));
    document.querySelector("input[value=signatures]").parentElement.hidden = !$("signatures").length;
  }

  takeGene(typed) {
    this.latest("gene", () => this.source.check(typed), (gene) => {
      this.gene = gene;
      this.setKind("genes");
    }, (error) => this.showError(error));
  }

  typeGene() {
    this.setKind("genes");
    if (this.kind !== "genes") return;
    $("gene").focus();
    $("gene").select();
  }

  // --- a patch ------------------------------------------------------------------------------------------

  /** Show a patch: its picture and place at once, its genes as they come; `more` stands below them. */
  choosePatch(row, move = false, more = []) {
    if (row < 0) return;
    const { slide, source } = this;
    this.patch = row;
    this.stage.choose(row, [], move);
    this.legend.point(row);
    const name = element("b", {}, `Patch ${(row + 1).toLocaleString("en")}`);
    const [x, y] = this.patches.at(row);
    const um = (px) => Math.round(px * slide.mpp).toLocaleString("en");
    const about = element("div", {}, name, element("p", { className: "muted small" },
      `x ${x.toLocaleString("en")}, y ${y.toLocaleString("en")} px of level 0`, element("br"), `x ${um(x)}, y ${um(y)} µm, its top left corner`));
    const picture = source.patchImage(slide, row);
    const head = picture ? element("div", { className: "chosen" }, element("img", { src: picture, alt: `Patch ${row + 1}` }), about) : about;
    const unread = slide.unread.includes(row) ? [element("p", { className: "bad small" }, "This patch could not be read.")] : [];
    const genes = element("div");
    $("patch").replaceChildren(head, ...unread, element("div", { id: "value" }), genes, ...more);
    this.#showValue();
    if (!move) $("patch").parentElement.scrollIntoView({ block: "nearest" });
    this.latest("patch", () => source.patchGenes(slide, row), (found) => genes.replaceChildren(...this.#patchGenes(found)),
      (error) => genes.replaceChildren(element("p", { className: "bad small" }, error.message)));
  }

  #patchGenes(genes) {
    if (!genes.length) return [];
    const rows = genes.slice(0, 8).map(({ gene, value, above }) => [geneButton(gene, (name) => this.takeGene(name)), fixed(value), signed(above)]);
    const which = this.genes?.names ? "in this page by which it stands out most" : "by which it stands out of the slide";
    return [element("h4", {}, "Genes ", element("small", {}, which)), table(["Gene", "predicted", "SD above mean"], rows)];
  }

  /** The value of the shown colours at the chosen patch. */
  #showValue() {
    const { layer, patch } = this;
    if (!$("value")) return;
    if (!layer || !layer.values.length) return void $("value").replaceChildren();
    const { kind, title, unit } = layer.legend;
    const value = kind === "clusters" ? `cluster ${layer.values[patch] + 1}` : fixed(layer.values[patch]);
    $("value").replaceChildren(element("p", { className: "value" }, `${title}: `, element("b", {}, value)), element("p", { className: "muted small" }, unit));
  }

  // --- a picture, pointer, keys -------------------------------------------------------------------------

  takePicture() {
    const { slide, kind, legend: { legend } } = this;
    if (!slide) return;
    const made = legend ? [`${slide.encoder}${["genes", "signatures"].includes(kind) ? `, ${PREDICTED}` : ""}`] : [];
    saveFigure([slide.name, ...(legend ? [legend.title] : [])].join("_"), [[slide.name, ...made].join(" · ")], legend);
  }

  /** Whether a click on the map chooses a patch. */
  get choosing() {
    return true;
  }

  /** A key that is taken before all others; true if it was. */
  takeKey() {
    return false;
  }

  #patchUnder({ latlng }) {
    return this.patches ? this.patches.find(latlng.lng, latlng.lat) : -1;
  }

  #listen() {
    const { map } = this.stage;
    const on = (id, event, act) => $(id).addEventListener(event, act);
    map.on("click", (event) => this.choosing && this.choosePatch(this.#patchUnder(event)));
    map.on("mousemove", (event) => { const row = this.#patchUnder(event); this.legend.point(row < 0 ? this.patch : row); });
    map.on("mouseout", () => this.legend.point(this.patch));
    on("kinds", "change", (event) => this.setKind(event.target.value));
    for (const kind of ["clusters", "signatures", "attention"]) on(kind, "change", () => this.colour());
    on("genes", "change", () => this.takeGene($("genes").selectedOptions[0].label));
    on("opacity", "input", () => this.setOpacity(Number($("opacity").value)));
    for (const name of ["tissue", "grid"]) on(name, "change", () => this.stage.toggle(name, $(name).checked));
    on("grey", "change", () => this.stage.grey($("grey").checked));
    on("save-figure", "click", () => this.takePicture());
    on("zoom-in", "click", () => map.zoomIn());
    on("zoom-out", "click", () => map.zoomOut());
    on("zoom-fit", "click", () => this.stage.fit());
    on("show-help", "click", () => $("help").showModal());
    document.addEventListener("keydown", (event) => this.#onKey(event), true);
  }

  #onKey(event) {
    if (event.target.matches("input[type=text], input[type=search], select") || event.ctrlKey || event.metaKey || $("help").open) return;
    const onButton = event.target.matches("button, input, summary") && [" ", "Enter"].includes(event.key);
    const beside = event.altKey && event.key in BESIDE && this.patch >= 0;
    const act = beside ? () => this.choosePatch(this.patches.beside(this.patch, ...BESIDE[event.key]))
      : this.keys[event.key.toLowerCase()]; // with Shift, which + needs, Leaflet would zoom by three
    if (!onButton && this.takeKey(event.key)) return void stop(event);
    if (!act || (event.altKey && !beside)) return;
    act();
    stop(event);
  }
}

function stop(event) {
  event.preventDefault();
  event.stopPropagation();
}

function facts(slide) {
  const [width, height] = slide.size_l0;
  const mm = (px) => fixed((px * slide.mpp) / 1000, 1);
  const short = (mpp) => Number(mpp.toPrecision(3));
  const pairs = [
    ...(slide.case ? [["Case", slide.case]] : []),
    ["Size", `${mm(width)} × ${mm(height)} mm`],
    ...(slide.tissue_mm2 === null ? [] : [["Tissue", `${fixed(slide.tissue_mm2, 1)} mm²`]]),
    ["Level 0", `${width.toLocaleString("en")} × ${height.toLocaleString("en")} px`],
    ["Resolution", `${short(slide.mpp)} µm/px`],
    ["Patches", `${slide.patches.toLocaleString("en")} of ${slide.patch_px} px at ${short(slide.patch_mpp)} µm/px`],
    ["Encoder", `${slide.encoder}, ${slide.dim} numbers a patch`],
  ];
  return pairs.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
}
