// Regions that are kept, each with a class, and saved as GeoJSON that QuPath and `search --region` read.
import { save } from "./viewer_figure.js";
import { $, element } from "./viewer_parts.js";

export class Regions {
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
