// The stage: a slide, patches and colours of one slide in level-0 pixels, x to the right and y downwards.

const ACCENT = "#58c7b8";
const CRS = L.extend({}, L.CRS.Simple, { transformation: new L.Transformation(1, 0, 1, 0) });
const MOST_ZOOM = 2; // a pixel of the slide becomes 4 of the screen
const OUTLINED_FROM_PX = 7; // smaller patches are tinted

const PatchGrid = L.GridLayer.extend({
  createTile(at) {
    const ratio = window.devicePixelRatio || 1;
    const size = this.getTileSize();
    const tile = L.DomUtil.create("canvas", "");
    tile.width = size.x * ratio;
    tile.height = size.y * ratio;
    const pen = tile.getContext("2d");
    const scale = 2 ** at.z;
    const side = this.options.patches.side;
    pen.scale(ratio, ratio);
    pen.strokeStyle = "#0a6e64";
    pen.fillStyle = "#0a6e6455";
    const outlined = side * scale >= OUTLINED_FROM_PX;
    const [left, top] = [at.x * size.x, at.y * size.y];
    const box = [left, top, left + size.x, top + size.y].map((v) => v / scale);
    for (const row of this.options.patches.within(...box)) {
      const [x, y] = this.options.patches.at(row);
      const place = [x * scale - left, y * scale - top, side * scale, side * scale];
      if (outlined) pen.strokeRect(...place);
      else pen.fillRect(...place);
    }
    return tile;
  },
});

const SlideTiles = L.GridLayer.extend({
  createTile(at, done) {
    const tile = L.DomUtil.create("img", "slide-tile");
    tile.alt = "";
    tile.onload = () => done(null, tile);
    tile.onerror = () => done(new Error("a tile"), tile);
    tile.src = this.options.address(`tiles/${-at.z}/${at.x}/${at.y}`);
    return tile;
  },
});

/** Patches of a slide, found by place. */
class Patches {
  constructor(xy, side) {
    this.xy = xy;
    this.side = side;
    this.length = xy.length / 2;
    this.cell = side * 8;
    this.cells = new Map();
    for (let row = 0; row < this.length; row++) {
      const key = this.#key(Math.floor(xy[2 * row] / this.cell), Math.floor(xy[2 * row + 1] / this.cell));
      if (!this.cells.has(key)) this.cells.set(key, []);
      this.cells.get(key).push(row);
    }
  }

  #key(column, row) {
    return row * 2 ** 22 + column;
  }

  at(row) {
    return [this.xy[2 * row], this.xy[2 * row + 1]];
  }

  centre(row) {
    const [x, y] = this.at(row);
    return [x + this.side / 2, y + this.side / 2];
  }

  /** Rows of patches that touch a box. */
  *within(x0, y0, x1, y1) {
    const cells = [x0 - this.side, y0 - this.side, x1, y1].map((v) => Math.floor(v / this.cell));
    for (let r = cells[1]; r <= cells[3]; r++) {
      for (let c = cells[0]; c <= cells[2]; c++) {
        for (const row of this.cells.get(this.#key(c, r)) || []) {
          const [x, y] = this.at(row);
          if (x < x1 && y < y1 && x + this.side > x0 && y + this.side > y0) yield row;
        }
      }
    }
  }

  /** The patch at a point, of several the one whose centre is nearest; -1 where there is none. */
  find(x, y) {
    return this.#nearest(this.within(x, y, x + 1, y + 1), x, y);
  }

  /** The patch nearest to a point, however far. */
  nearest(x, y) {
    return this.#nearest(Array(this.length).keys(), x, y);
  }

  /** The patch beside one, in the direction (dx, dy); -1 at the border. */
  beside(row, dx, dy) {
    const [x, y] = this.centre(row);
    const reach = this.side * 1.5;
    const there = [...this.within(x - reach, y - reach, x + reach, y + reach)].filter((other) => {
      const [ox, oy] = this.centre(other);
      const along = (ox - x) * dx + (oy - y) * dy;
      const across = Math.abs((ox - x) * dy) + Math.abs((oy - y) * dx);
      return along > 0 && across < along;
    });
    return this.#nearest(there, x + dx * 1e-3, y + dy * 1e-3);
  }

  #nearest(rows, x, y) {
    let best = -1;
    let least = Infinity;
    for (const row of rows) {
      const [cx, cy] = this.centre(row);
      const far = (cx - x) ** 2 + (cy - y) ** 2;
      if (far < least) [best, least] = [row, far];
    }
    return best;
  }
}

/** The map, and what lies on it. */
class Stage {
  /** `ground` makes the layer that shows a slide, of the slide and its span of zooms. */
  constructor(ground) {
    this.ground = ground;
    this.map = L.map("map", {
      crs: CRS, zoomSnap: 0.25, zoomDelta: 1, wheelPxPerZoomLevel: 110, zoomControl: false,
      attributionControl: false, maxZoom: MOST_ZOOM, keyboardPanDelta: 120, preferCanvas: true,
    });
    this.map.setView([0, 0], 0);
    this.map.createPane("colours").style.zIndex = 300;
    this.map.createPane("grid").style.zIndex = 320;
    this.map.on("move zoom zoomend", () => this.#drawScale());
    this.map.on("zoomend", () => this.#overlapTiles());
    new ResizeObserver(() => this.map.invalidateSize()).observe($("map"));
    this.opacity = 0.65;
    this.colours = [];
    this.shown = { tissue: true, grid: false };
  }

  /** Put another slide on the stage. */
  show(slide, patches) {
    this.clear();
    this.slide = slide;
    this.patches = patches;
    const [width, height] = slide.size_l0;
    this.bounds = L.latLngBounds([0, 0], [height, width]);
    this.map.setMinZoom(-slide.zooms - 1);
    this.map.setMaxBounds(this.bounds.pad(0.6));
    const span = { minZoom: -slide.zooms - 1, maxZoom: MOST_ZOOM, bounds: this.bounds };
    this.tiles = this.ground(slide, span).addTo(this.map);
    this.outline = L.polygon(slide.tissue.map((ring) => ring.map(([x, y]) => [y, x])), {
      color: "#2f6bff", weight: 2, fill: false, interactive: false,
    });
    this.grid = new PatchGrid({ ...span, patches, pane: "grid", keepBuffer: 1 });
    this.marks = L.layerGroup().addTo(this.map);
    for (const name of ["tissue", "grid"]) this.toggle(name, this.shown[name]);
    this.fit();
  }

  clear() {
    this.paint(null);
    for (const name of ["tiles", "outline", "grid", "marks", "region", "kept"]) {
      if (this[name]) this[name].remove();
      this[name] = null;
    }
    this.slide = null;
  }

  fit() {
    this.map.invalidateSize({ animate: false });
    if (this.bounds) this.map.fitBounds(this.bounds, { animate: false, padding: [12, 12] });
  }

  toggle(name, on) {
    this.shown[name] = on;
    const layer = name === "tissue" ? this.outline : this.grid;
    if (layer) on ? layer.addTo(this.map) : layer.remove();
  }

  grey(on) {
    $("map").classList.toggle("grey", on);
  }

  /** Lay a picture of a pixel per patch over the slide, in place of any before; null takes it away. */
  paint(url) {
    const before = this.colours;
    this.colours = [];
    if (url === null) {
      before.forEach((layer) => layer.remove());
      return;
    }
    const [x0, y0, x1, y1] = this.slide.bounds_l0;
    const options = { opacity: this.opacity, className: "pixels", pane: "colours", alt: "Colours of patches" };
    const layer = L.imageOverlay(url, [[y0, x0], [y1, x1]], options);
    this.colours = [...before, layer];
    layer.once("load error", () => { // the one before stays until the new one is there
      before.forEach((old) => old.remove());
      this.colours = this.colours.filter((one) => !before.includes(one));
    });
    layer.addTo(this.map);
  }

  fade(share) {
    this.opacity = share;
    this.colours.forEach((layer) => layer.setOpacity(share));
  }

  /** Frame the chosen patch and those like it, and bring it into view if it is not. */
  choose(row, alike, move) {
    this.marks.clearLayers();
    for (const other of alike) this.#frame(other, { color: "#ffd166", weight: 2 });
    this.#frame(row, { color: "#000", weight: 5 });
    this.#frame(row, { color: "#fff", weight: 2.5 });
    const [x, y] = this.patches.centre(row);
    const close = Math.log2(90 / this.patches.side);
    if (move) this.map.setView([y, x], Math.min(0, Math.max(this.map.getZoom(), close)), { animate: false });
    else if (!this.map.getBounds().contains([y, x])) this.map.panTo([y, x]);
  }

  #frame(row, style) {
    const [x, y] = this.patches.at(row);
    const side = this.patches.side;
    L.rectangle([[y, x], [y + side, x + side]], { ...style, fill: false, interactive: false }).addTo(this.marks);
  }

  /** The patch in the middle of the view, or the nearest. */
  middle() {
    const { lat, lng } = this.map.getCenter();
    return this.patches.nearest(lng, lat);
  }

  /** The middle half of the view as a polygon, within the slide. */
  middleBox() {
    const inner = this.map.getBounds().pad(-0.25);
    const [width, height] = this.slide.size_l0;
    const clip = (v, most) => Math.min(Math.max(v, 0), most);
    const [x0, x1] = [inner.getWest(), inner.getEast()].map((v) => clip(v, width));
    const [y0, y1] = [inner.getSouth(), inner.getNorth()].map((v) => clip(v, height)).sort((a, b) => a - b);
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
  }

  /** Show a polygon as the region; null takes it away. */
  outlineRegion(polygon) {
    if (this.region) this.region.remove();
    this.region = null;
    if (polygon === null) return;
    const corners = polygon.map(([x, y]) => [y, x]);
    this.region = L.layerGroup([
      L.polygon(corners, { color: "#000", weight: 5, fill: false, interactive: false }),
      L.polygon(corners, { color: ACCENT, weight: 2.5, fillOpacity: 0.08, interactive: false }),
    ]).addTo(this.map);
  }

  /** Show polygons that are kept, in place of those before. */
  outlineKept(polygons) {
    if (this.kept) this.kept.remove();
    const style = { color: ACCENT, weight: 2, dashArray: "6 4", fill: false, interactive: false };
    this.kept = L.layerGroup(polygons.map((ring) => L.polygon(ring.map(([x, y]) => [y, x]), style))).addTo(this.map);
  }

  /** Tiles reach a little over each other, or their scaled edges would show: by 2 pixels of the screen at most. */
  #overlapTiles() {
    const enlarged = 2 ** Math.max(0, this.map.getZoom());
    $("map").style.setProperty("--tile", `${256 + Math.min(0.5, 2 / enlarged)}px`);
  }

  #drawScale() {
    if (!this.slide) return;
    const um = this.slide.mpp * 2 ** -this.map.getZoom();
    const [length, text] = scaleLength(150 * um);
    $("scale-bar").style.width = `${length / um}px`;
    $("scale-text").textContent = text;
    $("scale-mag").textContent = `${Number((10 / um).toPrecision(2))}×  ·  ${Number(um.toPrecision(2))} µm/px`;
  }
}
