// Drawing a polygon by clicks, or by Space at the cross in the middle.
/* global L */
import { $ } from "./viewer_parts.js";

export class Draw {
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
