// Regions: a polygon is drawn, kept with a class, and saved as GeoJSON that QuPath and `search --region` read.

/** Draws a polygon by clicks, or by Space at the cross in the middle. */
class Draw {
  constructor(stage, finished) {
    this.stage = stage;
    this.finished = finished;
    this.corners = null;
    this.justClosed = false;
    stage.map.on("click", (event) => this.on && this.#add(event.latlng));
    stage.map.on("dblclick", () => this.on && this.close());
    stage.map.on("mousemove", (event) => this.on && this.#draw(event.latlng));
  }

  get on() {
    return this.corners !== null;
  }

  begin() {
    this.corners = [];
    this.line = L.polyline([], { color: "#fff", weight: 2, dashArray: "5 5", interactive: false }).addTo(this.stage.map);
    this.stage.map.doubleClickZoom.disable();
    this.#tell();
    $("map").focus();
  }

  leave() {
    if (!this.on) return;
    this.corners = null;
    this.line.remove();
    this.justClosed = true; // the click that closes a region is not for the patch below it
    setTimeout(() => {
      this.justClosed = false;
      this.stage.map.doubleClickZoom.enable();
    }, 0);
    this.#tell();
  }

  close() {
    const corners = this.corners;
    this.leave();
    if (corners.length >= 3) this.finished(corners.map(({ lat, lng }) => [lng, lat]));
  }

  /** A key while drawing; true if it was for us. */
  key(name) {
    if (name === " ") this.#add(this.stage.map.getCenter());
    else if (name === "Enter") this.close();
    else if (name === "Backspace") this.#back();
    else if (name === "Escape") this.leave();
    else return false;
    return true;
  }

  #add(latlng) {
    if (this.#closes(latlng)) {
      this.close();
      return;
    }
    const last = this.corners.at(-1);
    if (!last || !last.equals(latlng)) this.corners.push(latlng);
    this.#draw();
    this.#tell();
  }

  #closes(latlng) {
    if (this.corners.length < 3) return false;
    const [first, here] = [this.corners[0], latlng].map((p) => this.stage.map.latLngToContainerPoint(p));
    return first.distanceTo(here) < 10;
  }

  #back() {
    this.corners.pop();
    this.#draw();
    this.#tell();
  }

  #draw(pointer) {
    this.line.setLatLngs(pointer && this.corners.length ? [...this.corners, pointer] : this.corners);
  }

  #tell() {
    $("draw").setAttribute("aria-pressed", String(this.on));
    $("map").classList.toggle("drawing", this.on);
    $("cross").hidden = !this.on;
    $("hint").hidden = !this.on;
    if (!this.on) return;
    const n = this.corners.length;
    const next = n < 3 ? `${n} of at least 3 corners: click, or Space at the cross` : `${n} corners: double-click or Enter closes the region`;
    $("hint").textContent = `${next} · Esc leaves`;
  }
}

/** The regions that are kept, by slide. */
class Regions {
  /** `stage` shows them; `shown` is told when one is asked for again. */
  constructor(stage, shown) {
    this.stage = stage;
    this.shown = shown;
    this.bySlide = new Map();
    this.unsaved = false;
    window.addEventListener("beforeunload", (event) => this.unsaved && event.preventDefault());
  }

  /** Those of another slide. */
  open(slide) {
    this.slide = slide;
    this.#draw();
  }

  get kept() {
    return this.bySlide.get(this.slide?.index) || [];
  }

  keep(polygon, name) {
    this.#put([...this.kept, { polygon, name: name.trim() || "Region" }]);
  }

  save() {
    const text = JSON.stringify({ type: "FeatureCollection", features: this.kept.map(feature) });
    save(new Blob([text], { type: "application/geo+json" }), `${this.slide.name}_regions.geojson`);
    this.unsaved = false;
  }

  #put(regions) {
    this.bySlide.set(this.slide.index, regions);
    this.unsaved = true;
    this.#draw();
  }

  #draw() {
    const { kept } = this;
    this.stage.outlineKept(kept.map(({ polygon }) => polygon));
    $("save-regions").hidden = kept.length === 0;
    $("kept").replaceChildren(...kept.map((region, i) => {
      const show = element("button", { type: "button", title: "Show this region", onclick: () => this.shown(region.polygon) }, `${i + 1}. ${region.name}`);
      const drop = element("button", { type: "button", title: "Delete this region", onclick: () => this.#put(kept.filter((one) => one !== region)) }, "×");
      drop.setAttribute("aria-label", `Delete region ${i + 1}, ${region.name}`);
      return element("li", {}, show, drop);
    }));
    const classes = new Set([...this.bySlide.values()].flat().map(({ name }) => name));
    $("region-classes").replaceChildren(...[...classes].map((value) => element("option", { value })));
  }
}

/** A polygon in level-0 pixels as QuPath writes an annotation: its ring is closed. */
function feature({ polygon, name }) {
  const properties = { objectType: "annotation", classification: { name } };
  return { type: "Feature", geometry: { type: "Polygon", coordinates: [[...polygon, polygon[0]]] }, properties };
}
