// A slide in tiles, as the server cuts them.
/* global L */
import { address } from "./viewer_api.js";

const SlideTiles = L.GridLayer.extend({
  createTile(at, done) {
    const tile = L.DomUtil.create("img", "slide-tile");
    tile.alt = "";
    tile.onload = () => done(null, tile);
    tile.onerror = () => done(new Error("a tile"), tile);
    tile.src = address(this.options.slide, `tiles/${-at.z}/${at.x}/${at.y}`);
    return tile;
  },
});

/** The layer of a slide for `Stage`. */
export function slideTiles(slide, span) {
  return new SlideTiles({ ...span, minNativeZoom: 1 - slide.zooms, maxNativeZoom: 0, slide: slide.index, keepBuffer: 1 });
}
