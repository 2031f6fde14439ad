// Answers for a page from the data that stands in it: the report of one slide.
/* global L */

class Inlined {
  constructor(data) {
    this.data = data;
    this.names = (data.kinds.genes || []).map((layer) => layer.legend.title);
  }

  ground({ name }, span) {
    const options = { pane: "tilePane", className: "slide-picture", alt: `The slide ${name}` };
    return L.imageOverlay(`data:image/jpeg;base64,${this.data.picture}`, span.bounds, options);
  }

  choices() {
    const label = (layer, i) => [layer.legend.kind === "clusters" ? layer.legend.counts.length : i, layer.legend.title];
    return Object.fromEntries(Object.entries(this.data.kinds).map(([kind, layers]) => [kind, layers.map(label)]));
  }

  genes() {
    return { ...this.data.genes, names: this.names, count: this.names.length };
  }

  suggest(typed) {
    return namesLike(this.names, typed);
  }

  async check(typed) {
    return nameAmong(this.names, typed);
  }

  layer(_, kind, of) {
    const index = this.choices()[kind].findIndex(([value, label]) => (kind === "genes" ? label : String(value)) === of);
    const layer = this.data.kinds[kind][Math.max(0, index)];
    return { legend: layer.legend, picture: `data:image/png;base64,${layer.picture}`, values: this.#values(layer) };
  }

  patchImage() {
    return null;
  }

  /** The genes in this page by which a patch stands out of its slide most. */
  patchGenes(_, row) {
    const found = (this.data.kinds.genes || []).map((layer) => {
      const value = valueAt(layer, row);
      return { gene: layer.legend.title, value, above: layer.sd > 1e-6 ? (value - layer.mean) / layer.sd : 0 };
    });
    return found.sort((a, b) => b.above - a.above);
  }

  /** The numbers of a layer, unpacked when they are first used; none of colours that are three at once. */
  #values(layer) {
    if (layer.values === null) return [];
    layer.numbers ??= unpacked(layer.values.type, bytes(layer.values.base64));
    return layer.numbers;
  }
}

/** Numbers from bytes: float16, or float32. */
function unpacked(type, buffer) {
  return type === "f2" ? Float32Array.from(new Uint16Array(buffer), half) : new Float32Array(buffer);
}

/** The number of one patch alone: four letters of base64 are three bytes. */
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

const data = JSON.parse($("data").textContent);
const page = new SlidePage(new Inlined(data));
page.show(data.slide, new Int32Array(bytes(data.xy)));
page.showGenes(page.source.genes());
page.stage.map.setMaxZoom(data.most_zoom);
