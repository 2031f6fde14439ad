// What the colours mean, and which of them the chosen patch has.

class Legend {
  constructor() {
    this.legend = null;
  }

  show(legend, values) {
    this.legend = legend;
    this.values = values;
    $("legend").hidden = legend === null;
    if (legend === null) return;
    $("legend-title").textContent = legend.title;
    $("legend-unit").textContent = legend.unit;
    const bodies = { scale: () => this.#scale(), clusters: () => this.#clusters(), embedding: () => [] };
    $("legend-body").replaceChildren(...bodies[legend.kind]());
  }

  /** Mark the value of a patch; -1 marks nothing. */
  point(row) {
    if (!this.legend || !this.values || !this.values.length) return;
    const value = row < 0 ? null : this.values[row];
    if (this.legend.kind === "scale") this.#pointScale(value);
    if (this.legend.kind === "clusters") this.items.forEach((item, k) => item.classList.toggle("here", k === value));
  }

  #scale() {
    const { colours, low, high, least, most } = this.legend;
    const bar = element("div", { className: "bar" });
    bar.style.background = `linear-gradient(to right, ${colours.join(", ")})`;
    this.mark = element("i", { className: "mark", hidden: true });
    this.here = element("p", { className: "here" });
    bar.append(this.mark);
    const end = (value, beyond, sign) => `${beyond ? sign : ""}${fixed(value)}`;
    const ends = element("div", { className: "ends" },
      element("span", {}, end(low, least < low - 1e-6, "≤ ")), element("span", {}, end(high, most > high + 1e-6, "≥ ")));
    return [bar, ends, this.here];
  }

  #pointScale(value) {
    const { low, high } = this.legend;
    this.mark.hidden = value === null;
    this.here.textContent = value === null ? "" : `here ${fixed(value)}`;
    if (value !== null) this.mark.style.left = `${100 * Math.min(1, Math.max(0, (value - low) / (high - low)))}%`;
  }

  #clusters() {
    const total = this.legend.counts.reduce((a, b) => a + b, 0);
    this.items = this.legend.colours.map((colour, k) => {
      const swatch = element("i");
      swatch.style.background = colour;
      return element("li", {}, swatch, `${k + 1}  ·  ${fixed((100 * this.legend.counts[k]) / total, 0)} %`);
    });
    return [element("ol", {}, ...this.items)];
  }
}
