// The page of a volume: a plane and a box side by side, coloured by a gene or by domains. The viewer and the report share it.

const STEPS = 254; // of a map's codes, from 1
const KEPT = 6; // pictures of planes
const REST_MS = 150; // that a plane is shown before its picture is fetched
const AT_ONCE = 2; // slices of the box on their way
const TIMES = [1, 2, 5, 10, 20, 50, 100, 200]; // that the depth may be drawn
const FLAT = 0.2; // of the longer side: a thinner box is drawn deeper at first
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

class VolumePage {
  /** `source` gives all that is shown: the viewer's `ServedVolume`, or the data `InlinedVolume` in a report. */
  constructor(source) {
    this.source = source;
    this.legend = new Legend();
    this.map = null;
    this.kind = "none";
    this.gene = "";
    this.turn = 0; // of the latest map: those that come too late are dropped
    this.pictures = new Map(); // by plane, the newest last
  }

  async start() {
    try {
      this.#open(await this.source.describe());
    } catch (error) {
      this.showError(error);
    }
  }

  #open(volume) {
    this.volume = volume;
    const { planes, size_um, cells, slice_px, genes } = volume;
    this.cut = { x: [0, 1], y: [0, 1], z: [0, planes.length - 1] }; // shares of the sides; numbers of planes
    this.shares = ["x", "y"].map((_, i) => size_um[i] / (cells[i] * volume.cell_um[i]));
    const flat = (FLAT * Math.max(size_um[0], size_um[1])) / size_um[2];
    this.times = TIMES.find((times) => times >= flat) || TIMES.at(-1);
    $("times").replaceChildren(...TIMES.map((times) => element("option", { value: times, selected: times === this.times }, `× ${times}`)));
    this.plane = new Plane($("plane"), size_um.slice(0, 2));
    this.slices = planes.map(() => null);
    try {
      this.box = new Box($("box"), [...document.querySelectorAll("#labels span")], { planes: planes.length, pixels: slice_px, cells });
    } catch (error) {
      $("no-box").hidden = false;
      $("box-scale").hidden = true;
      $("no-box").textContent = `No box: ${error.message}.`;
    }
    document.title = `${volume.name} · seal-extract`;
    $("name").textContent = volume.name;
    $("facts").replaceChildren(...volumeFacts(volume));
    $("notes").replaceChildren(...[...volume.notes, ...gaps(planes)].map((note) => element("li", {}, note)));
    document.querySelector("input[value=domains]").disabled = !volume.domains;
    $("genes").replaceChildren(...genes.map((gene) => element("option", {}, gene)));
    $("gene").placeholder = `one of ${genes.length.toLocaleString("en")}`;
    this.gene = genes[0] || "";
    this.combo = new Combo($("gene"), $("gene-list"), (typed) => namesLike(genes, typed), (text) => this.takeGene(text));
    for (const axis of ["x", "y", "z"]) this.#range(axis);
    $("z").max = planes.length - 1;
    this.#listen();
    this.setKind(genes.length ? "genes" : "none");
    this.setCut("z", 0, 0);
    if (this.box) this.#load();
  }

  // --- pictures -----------------------------------------------------------------------------------------

  /** Fetch the slices of the box, a few at a time. */
  async #load() {
    const waiting = this.volume.planes.flatMap(({ problem }, i) => (problem ? [] : [i]));
    const next = async () => {
      for (let plane = waiting.shift(); plane !== undefined; plane = waiting.shift()) {
        try {
          this.slices[plane] = await this.source.picture(plane, "slice");
          this.box.slice(plane, this.slices[plane]);
          this.draw();
        } catch (error) {
          this.showError(error);
        }
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, next));
    document.body.dataset.loaded = this.slices.filter(Boolean).length;
  }

  /** The picture of a plane, or its slice until that has come; null if there is none. */
  #picture(plane) {
    if (this.wanted !== plane) {
      this.wanted = plane;
      clearTimeout(this.timer);
      if (!this.pictures.has(plane) && !this.volume.planes[plane].problem) this.timer = setTimeout(() => this.#bring(plane), REST_MS);
    }
    return this.pictures.get(plane) || this.slices[plane];
  }

  async #bring(plane) {
    try {
      this.pictures.set(plane, await this.source.picture(plane, "picture"));
      if (this.pictures.size > KEPT) this.pictures.delete(this.pictures.keys().next().value);
      this.draw();
    } catch (error) {
      this.showError(error);
    }
  }

  // --- colours ------------------------------------------------------------------------------------------

  setKind(kind) {
    const radio = document.querySelector(`input[name=kind][value=${kind}]`);
    if (radio.disabled || (kind === "genes" && !this.gene)) return;
    radio.checked = true;
    this.kind = kind;
    $("choose-genes").hidden = kind !== "genes";
    $("choose-opacity").hidden = kind === "none";
    $("gene").value = this.gene;
    $("genes").value = this.gene;
    this.#colour();
  }

  async #colour() {
    const turn = ++this.turn;
    $("colour-error").hidden = true;
    if (this.kind === "none") return this.#paint(null);
    try {
      const map = await this.source.map(this.kind, this.gene);
      if (turn === this.turn) this.#paint(map);
    } catch (error) {
      if (turn === this.turn) this.showError(error);
    }
  }

  #paint(map) {
    this.map = map;
    this.legend.show(map && map.legend, [0]);
    if (map) map.palette = paletteOf(map.legend);
    if (this.box) this.box.paint(map && { ...map, cells: [...this.volume.cells, this.slices.length] });
    this.coloured = -1;
    this.draw();
  }

  /** The map of one plane as a canvas of a pixel per cell. */
  #colours(plane) {
    if (!this.map) return null;
    if (this.coloured === plane) return this.canvas;
    const [width, height] = this.volume.cells;
    const colours = new Uint32Array(this.map.palette.buffer);
    const codes = this.map.codes.subarray(plane * width * height, (plane + 1) * width * height);
    const picture = new ImageData(width, height);
    new Uint32Array(picture.data.buffer).set(Uint32Array.from(codes, (code) => colours[code]));
    this.canvas = element("canvas", { width, height });
    this.canvas.getContext("2d").putImageData(picture, 0, 0);
    this.coloured = plane;
    return this.canvas;
  }

  takeGene(typed) {
    try {
      this.gene = nameAmong(this.volume.genes, typed);
      this.setKind("genes");
    } catch (error) {
      this.showError(error);
    }
  }

  showError({ message }) {
    $("colour-error").textContent = message;
    $("colour-error").hidden = false;
  }

  setOpacity(percent) {
    const value = Math.min(100, Math.max(0, percent));
    $("opacity").value = value;
    $("opacity-text").textContent = `${value} %`;
    this.draw();
  }

  // --- cuts ---------------------------------------------------------------------------------------------

  /** Two sliders of an axis, which cut from both of its sides. */
  #range(axis) {
    const most = axis === "z" ? this.volume.planes.length - 1 : 1;
    for (const end of [0, 1]) {
      const slider = $(`${axis}-${end}`);
      Object.assign(slider, { min: 0, max: most, step: axis === "z" ? 1 : 0.005, value: end * most });
      slider.addEventListener("input", () => this.setCut(axis, end, Number(slider.value)));
    }
  }

  /** Cut an axis at its begin (end 0) or its end (1); the other side gives way. The first plane left is that shown. */
  setCut(axis, end, value) {
    const cut = this.cut[axis];
    const most = axis === "z" ? this.volume.planes.length - 1 : 1;
    const apart = axis === "z" ? 0 : 0.01;
    cut[end] = Math.min(most - (end ? 0 : apart), Math.max(end ? apart : 0, value));
    cut[1 - end] = end ? Math.min(cut[0], cut[1] - apart) : Math.max(cut[1], cut[0] + apart);
    this.#tell();
    this.draw();
  }

  /** The plane before or after the one that is shown. */
  step(by) {
    this.setCut("z", 0, this.cut.z[0] + by);
  }

  #tell() {
    const { planes, size_um, spacing_um } = this.volume;
    for (const axis of ["x", "y", "z"]) for (const end of [0, 1]) $(`${axis}-${end}`).value = this.cut[axis][end];
    ["x", "y"].forEach((axis, i) => { $(`${axis}-text`).textContent = this.cut[axis].map((share) => fixed((share * size_um[i]) / 1000)).join(" to ") + " mm"; });
    const [first, last] = this.cut.z;
    $("z-text").textContent = first === last ? planes[first].name : `${planes[first].name} to ${planes[last].name}`;
    $("z").value = first;
    $("z").setAttribute("aria-valuetext", `plane ${planes[first].name}`);
    const where = `${first + 1} of ${planes.length} · ${fixed(first * spacing_um, 0)} µm`;
    $("z-now").replaceChildren(element("b", {}, planes[first].name), ` ${where}${planes[first].problem ? " · no picture" : ""}`);
    const address = planes[first].slide === null ? "" : this.source.slide(planes[first].slide);
    $("as-slide").hidden = !address;
    $("as-slide").href = address;
  }

  reset() {
    this.cut = { x: [0, 1], y: [0, 1], z: [0, this.volume.planes.length - 1] };
    this.#tell();
    this.fit();
  }

  fit() {
    this.plane.fit();
    this.box?.reset();
    this.draw();
  }

  zoom(by) {
    if (this.plane.view) this.plane.zoom(by); // it has none before it is drawn
    this.box?.zoom(by);
    this.draw();
  }

  setView(view) {
    $("stage").dataset.view = view;
    document.querySelector(`input[name=view][value=${view}]`).checked = true;
    this.plane.view = null;
    this.draw();
  }

  // --- drawing ------------------------------------------------------------------------------------------

  /** Draw at the next frame, once. */
  draw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.#draw();
    });
  }

  #draw() {
    const { cells, cell_um, size_um, planes } = this.volume;
    const { x, y, z } = this.cut;
    const opacity = Number($("opacity").value) / 100;
    if ($("plane").clientWidth) {
      this.plane.draw(this.#picture(z[0]), this.#colours(z[0]), cells.map((n, i) => n * cell_um[i]), opacity);
      drawScale("plane-scale", 1 / this.plane.view.scale);
    }
    if (!this.box || !$("box").clientWidth) return;
    const cut = { low: [x[0], y[0], z[0] / planes.length], high: [x[1], y[1], (z[1] + 1) / planes.length] };
    const words = size_um.map((um, i) => `${"xyz"[i]} ${lengthText(um)}${i === 2 && this.times > 1 ? `, drawn × ${this.times}` : ""}`);
    this.box.draw(cut, [size_um[0], size_um[1], size_um[2] * this.times], words, this.shares, opacity);
    drawScale("box-scale", this.box.um_per_px);
  }

  // --- pointer and keys ---------------------------------------------------------------------------------

  /** The value under the pointer, on the legend. */
  #point(x, y) {
    if (!this.map) return;
    const { cells, cell_um } = this.volume;
    const [column, row] = this.plane.place(x, y).map((um, i) => Math.floor(um / cell_um[i]));
    const inside = column >= 0 && row >= 0 && column < cells[0] && row < cells[1];
    const code = inside ? this.map.codes[(this.cut.z[0] * cells[1] + row) * cells[0] + column] : 0;
    const { kind, low, high } = this.map.legend;
    this.legend.values = [kind === "scale" ? low + ((code - 1) / STEPS) * (high - low) : code - 1];
    this.legend.point(code ? 0 : -1);
  }

  #listen() {
    const on = (id, event, act) => $(id).addEventListener(event, act);
    const then = (act) => (...values) => { act(...values); this.draw(); };
    gestures($("plane"), then((dx, dy) => this.plane.move(dx, dy)), then((...by) => this.plane.zoom(...by)), (x, y) => this.#point(x, y));
    if (this.box) gestures($("box"), then((dx, dy) => this.box.turn(dx / 150, dy / 150)), then((...by) => this.box.zoom(...by)), () => {});
    on("plane", "pointerleave", () => this.legend.point(-1));
    on("kinds", "change", (event) => this.setKind(event.target.value));
    on("views", "change", (event) => this.setView(event.target.value));
    on("genes", "change", () => this.takeGene($("genes").value));
    on("opacity", "input", () => this.setOpacity(Number($("opacity").value)));
    on("z", "input", () => this.setCut("z", 0, Number($("z").value)));
    on("before", "click", () => this.step(-1));
    on("after", "click", () => this.step(1));
    on("times", "change", then(() => { this.times = Number($("times").value); }));
    on("reset", "click", () => this.reset());
    on("zoom-in", "click", () => this.zoom(1.5));
    on("zoom-out", "click", () => this.zoom(1 / 1.5));
    on("zoom-fit", "click", () => this.fit());
    on("show-help", "click", () => $("help").showModal());
    document.addEventListener("keydown", (event) => this.#onKey(event));
    new ResizeObserver(() => { this.plane.view = null; this.draw(); }).observe($("stage"));
  }

  #onKey(event) {
    if (event.target.matches("input[type=text], select") || event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    const fade = (by) => this.setOpacity(Number($("opacity").value) + by);
    const move = ([dx, dy]) => (event.target === $("box") ? this.box?.turn(dx / 10, dy / 10) : this.plane.move(-60 * dx, -60 * dy));
    const keys = {
      "[": () => this.step(-1), "]": () => this.step(1), "+": () => this.zoom(1.5), "=": () => this.zoom(1.5), "-": () => this.zoom(1 / 1.5),
      f: () => this.fit(), r: () => this.reset(), n: () => this.setKind("none"), g: () => this.setKind("genes"), d: () => this.setKind("domains"),
      "/": () => { this.setKind("genes"); $("gene").focus(); $("gene").select(); }, ",": () => fade(-10), ".": () => fade(10),
      1: () => this.setView("plane"), 2: () => this.setView("box"), 3: () => this.setView("both"), "?": () => $("help").showModal(),
    };
    const onCanvas = event.target.matches("canvas") && event.key in MOVES;
    const act = onCanvas ? () => move(MOVES[event.key]) : keys[event.key.toLowerCase()];
    if (!act) return;
    act();
    this.draw();
    event.preventDefault();
  }
}

/** A sentence about planes without a picture. */
function gaps(planes) {
  const gone = planes.filter(({ problem }) => problem);
  const names = gone.slice(0, 5).map(({ name }) => name).join(", ") + (gone.length > 5 ? ", …" : "");
  return gone.length ? [`There is no picture of ${count(gone.length, "plane")} (${names}); drawn in grey: ${gone[0].problem}.`] : [];
}

/** RGBA of the 256 codes of a map: none, then from low to high, or a colour for each domain. */
function paletteOf({ kind, colours }) {
  const rgb = colours.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  const palette = new Uint8Array(1024);
  for (let code = 1; code < 256; code++) {
    const at = kind === "scale" ? ((code - 1) / STEPS) * (rgb.length - 1) : Math.min(code, rgb.length) - 1;
    const [before, after] = [rgb[Math.floor(at)], rgb[Math.ceil(at)]];
    palette.set([...before.map((v, i) => v + (after[i] - v) * (at % 1)), 255], 4 * code);
  }
  return palette;
}

/** Drag with one pointer, enlarge with two or with the wheel; places are counted from the middle. */
function gestures(canvas, drag, zoom, hover) {
  const points = new Map();
  const place = (event) => {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    return [event.clientX - left - width / 2, event.clientY - top - height / 2];
  };
  const spread = ([[ax, ay], [bx, by]]) => [Math.hypot(ax - bx, ay - by), (ax + bx) / 2, (ay + by) / 2];
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    points.set(event.pointerId, place(event));
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => points.delete(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = place(event);
    hover(x, y);
    if (!points.has(event.pointerId)) return;
    const before = [...points.values()];
    const [x0, y0] = points.get(event.pointerId);
    points.set(event.pointerId, [x, y]);
    if (points.size === 1) drag(x - x0, y - y0);
    if (points.size !== 2) return;
    const [[was], [is, ...middle]] = [spread(before), spread([...points.values()])];
    zoom(is / Math.max(1, was), ...middle);
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(2 ** (-event.deltaY / 400), ...place(event));
  }, { passive: false });
}

const lengthText = (um) => (um >= 1000 ? `${fixed(um / 1000, 1)} mm` : `${Number(um.toPrecision(3))} µm`);

function drawScale(id, um_per_px) {
  const [um, text] = scaleLength(120 * um_per_px);
  $(id).querySelector("i").style.width = `${um / um_per_px}px`;
  $(id).querySelector("span").textContent = text;
}

function volumeFacts({ size_um, size_l0, mpp, depths, patches, patch_um, encoder, genes }) {
  const pairs = [
    ["Size", `${size_um.map((um) => lengthText(um)).join(" × ")}`],
    ["Planes", `${depths.toLocaleString("en")}, ${Number((size_um[2] / depths).toPrecision(3))} µm apart`],
    ["Plane", `${size_l0.map((px) => px.toLocaleString("en")).join(" × ")} px, ${Number(mpp.toPrecision(3))} µm/px`],
    ["Patches", `${patches.join(" × ")} a plane, ${Number(patch_um.toPrecision(3))} µm wide`],
    ["Encoder", encoder],
    ["Genes", genes.length.toLocaleString("en")],
  ];
  return pairs.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
}
