// The viewer: the page of a slide with a list of slides, look-alikes of a patch, and regions.

class Viewer extends SlidePage {
  constructor() {
    super(new Server());
    this.slides = [];
    this.index = -1;
    this.region = null;
    this.draw = new Draw(this.stage, (polygon) => this.takeRegion(polygon));
    this.regions = new Regions(this.stage, (polygon) => this.takeRegion(polygon));
    const step = (by) => () => this.open(Math.min(Math.max(this.index + by, 0), this.slides.length - 1));
    const toggleDraw = () => this.slide && (this.draw.on ? this.draw.leave() : this.draw.begin());
    const middle = () => this.slide && this.takeRegion(this.stage.middleBox());
    Object.assign(this.keys, { "[": step(-1), "]": step(1), d: toggleDraw, r: middle, k: () => this.keepRegion() });
    const on = (id, event, act) => $(id).addEventListener(event, act);
    on("draw", "click", toggleDraw);
    on("middle", "click", middle);
    on("clear", "click", () => this.clearRegion());
    on("keep", "submit", (event) => { event.preventDefault(); this.keepRegion(); });
    on("save-regions", "click", () => this.regions.save());
    on("filter", "input", () => this.#filter());
  }

  // --- slides -------------------------------------------------------------------------------------------

  async start() {
    const { out, encoder, slides } = await this.source.slides();
    this.slides = slides;
    document.title = `${out} · seal-extract`;
    $("folder").textContent = out;
    $("encoder").textContent = `${count(slides.length, "slide")} by ${encoder}`;
    $("filter").hidden = slides.length < 8;
    $("slides").replaceChildren(...slides.map((slide) => this.#listItem(slide)));
    const [wanted, patch] = location.hash.slice(1).split("/").map(Number);
    const first = slides.findIndex((slide) => !slide.problem);
    await this.open(slides[wanted] ? wanted : Math.max(0, first), Number.isInteger(patch) ? patch - 1 : -1);
  }

  #listItem(slide) {
    const picture = slide.thumbnail
      ? element("img", { className: "pic", src: this.source.address(slide.index, "thumbnail"), alt: "", loading: "lazy" })
      : element("span", { className: "pic none" }, "no picture");
    const words = element("span", {}, element("b", {}, slide.name), element("small", { className: slide.problem ? "bad" : "" }, inShort(slide)));
    const button = element("button", { type: "button", title: slide.problem || slide.name, onclick: () => this.open(slide.index) }, picture, words);
    return element("li", {}, button);
  }

  #filter() {
    const wanted = $("filter").value.trim().toLowerCase();
    [...$("slides").children].forEach((item, i) => { item.hidden = !this.slides[i].name.toLowerCase().includes(wanted); });
  }

  async open(index, patch = -1) {
    const line = this.slides[index];
    this.#mark(index);
    this.draw.leave();
    this.drop("slide");
    if (line.problem) return this.showProblem(line, line.problem);
    await this.latest("slide", () => this.source.slide(index), ([slide, xy]) => {
      this.show(slide, xy);
      if (patch >= 0 && patch < this.patches.length) this.choosePatch(patch, true);
      if (this.genes === null) this.stage.tiles.once("load", async () => this.showGenes(await this.source.genes()));
    }, (error) => this.showProblem(line, error.message));
  }

  #mark(index) {
    [...$("slides").querySelectorAll("button")].forEach((button, i) => {
      button.setAttribute("aria-current", String(i === index));
      if (i === index) button.scrollIntoView({ block: "nearest", inline: "nearest" });
    });
    this.index = index;
    history.replaceState(null, "", `#${index}`);
  }

  show(slide, xy) {
    $("problem").hidden = true;
    super.show(slide, xy);
    this.clearRegion();
    this.regions.open(slide);
  }

  showProblem(line, why) {
    this.clear();
    this.stage.clear();
    this.clearRegion();
    this.legend.show(null);
    $("problem").hidden = false;
    $("problem").querySelector("p").textContent = why;
    $("name").textContent = line.name;
    $("facts").replaceChildren();
  }

  // --- look-alikes --------------------------------------------------------------------------------------

  choosePatch(row, move = false) {
    if (row < 0) return;
    const { slide, source } = this;
    const places = { slide: element("div"), cohort: element("div") };
    super.choosePatch(row, move, Object.values(places));
    history.replaceState(null, "", `#${slide.index}/${row + 1}`);
    const ask = (scope) => this.latest(`alike ${scope}`, () => source.alike(slide, row, scope), (found) => {
      places[scope].replaceChildren(...this.#alike(scope, found));
      if (scope === "slide") this.stage.choose(row, found.map((one) => one.row), false);
    }, (error) => places[scope].replaceChildren(element("p", { className: "bad small" }, error.message)));
    ask("slide");
    if (this.slides.filter((one) => one.status === "done").length > 1) ask("cohort");
  }

  #alike(scope, found) {
    if (!found.length) return [];
    const title = scope === "slide" ? "Alike in this slide" : "Alike in the other slides";
    return [
      element("h4", {}, title, " ", element("small", {}, "cosine")),
      element("div", { className: "alike" }, ...found.map((one) => this.#alikeButton(scope, one))),
    ];
  }

  #alikeButton(scope, one) {
    const where = scope === "slide" ? `patch ${one.row + 1}` : `${one.name}, patch ${one.row + 1}`;
    const cosine = fixed(one.cosine, 3);
    const go = () => (one.slide === this.index ? this.choosePatch(one.row, true) : this.open(one.slide, one.row));
    const picture = element("img", { src: this.source.patchImage({ index: one.slide }, one.row), alt: "", loading: "lazy" });
    const words = scope === "slide" ? [cosine] : [cosine, element("br"), one.name];
    const button = element("button", { type: "button", title: where, onclick: go }, picture, element("small", {}, ...words));
    button.setAttribute("aria-label", `Go to ${where}, cosine ${cosine}`);
    return button;
  }

  // --- a region -----------------------------------------------------------------------------------------

  get choosing() {
    return !this.draw.on && !this.draw.justClosed;
  }

  takeKey(key) {
    return this.draw.on && this.draw.key(key);
  }

  takeRegion(polygon) {
    this.region = polygon;
    this.stage.outlineRegion(polygon);
    $("clear").hidden = $("keep").hidden = false;
    $("region").replaceChildren(element("p", { className: "muted" }, "Comparing…"));
    this.latest("region", () => this.source.region(this.slide, polygon), (answer) => {
      $("region").replaceChildren(...this.#compared(answer));
      $("region").parentElement.scrollIntoView({ block: "start" });
    }, (error) => $("region").replaceChildren(element("p", { className: "bad" }, error.message)));
  }

  #compared(answer) {
    const tissue = typeof answer.tissue_mm2 === "number" ? `, tissue ${areaText(answer.tissue_mm2)}` : "";
    const head = element("p", {}, `${count(answer.patches, "patch", "patches")}, region ${areaText(answer.area_mm2)}${tissue}`);
    if (!answer.genes.length) return [head, element("p", { className: "muted small" }, answer.why)];
    const rows = answer.genes.map(({ gene, inside, outside, effect, p, q }) => [
      geneButton(gene, (name) => this.takeGene(name)), fixed(inside), fixed(outside), signed(effect), small(p), small(q),
    ]);
    return [
      head,
      element("h4", {}, "Genes ", element("small", {}, "higher here than in the rest of the slide")),
      table(["Gene", "inside", "outside", "effect", "p", "q"], rows),
      element("p", { className: "muted small" }, answer.note),
    ];
  }

  clearRegion() {
    this.drop("region");
    this.region = null;
    this.stage.outlineRegion(null);
    $("clear").hidden = $("keep").hidden = true;
    $("region").replaceChildren();
  }

  keepRegion() {
    if (!this.region) return;
    this.regions.keep(this.region, $("region-class").value);
    this.clearRegion();
  }
}

function inShort(slide) {
  if (slide.status === "failed") return "failed";
  if (slide.problem) return "slide not found";
  const errors = slide.read_errors ? ` · ${count(slide.read_errors, "read error")}` : "";
  return slide.patches === null ? "done" : `${count(slide.patches, "patch", "patches")}${errors}`;
}

const small = (p) => (p < 0.001 ? "< .001" : fixed(p, 3));
const areaText = (mm2) => (mm2 >= 0.01 || !mm2 ? `${fixed(mm2)} mm²` : `${Math.round(mm2 * 1e6).toLocaleString("en")} µm²`);

const viewer = new Viewer();
viewer.start().catch((error) => viewer.showProblem({ name: "seal-extract" }, error.message));
