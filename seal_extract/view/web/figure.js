// The view as a PNG picture: the slide and all that lies on it, and below it what the colours mean.

const PANES = [".leaflet-tile-pane", ".leaflet-colours-pane", ".leaflet-grid-pane", ".leaflet-overlay-pane"];
const MARGIN = 16; // all lengths in pixels of the page
const LINE = 20;

/** Offer any content for saving under a file name. */
function save(content, name) {
  const link = element("a", { href: URL.createObjectURL(content), download: name.replace(/[^\w.-]+/g, "_") });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Save what is on the stage, with `lines` of text and `legend` (null where there are no colours). */
function saveFigure(name, lines, legend) {
  const map = $("map");
  const { width, height } = map.getBoundingClientRect();
  const ratio = Math.max(2, window.devicePixelRatio || 1);
  const words = [...lines, ...(legend ? [[legend.title, legend.unit].filter(Boolean).join(": ")] : [])];
  const below = 2 * MARGIN + LINE * words.length + (legend ? 2.5 * LINE : LINE);
  const canvas = element("canvas", { width: width * ratio, height: (height + below) * ratio });
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, width, height + below);
  drawMap(pen, map);
  pen.clearRect(0, height, width, below);
  pen.fillStyle = "#fff";
  pen.fillRect(0, height, width, below);
  let y = height + MARGIN + LINE / 2;
  for (const line of words) y = write(pen, line, MARGIN, y, width);
  if (legend) drawLegend(pen, legend, y, width);
  drawScale(pen, width, height + below - MARGIN);
  canvas.toBlob((png) => save(png, `${name}.png`), "image/png");
}

function drawMap(pen, map) {
  const origin = map.getBoundingClientRect();
  for (const shown of PANES.flatMap((pane) => [...map.querySelectorAll(`${pane} img, ${pane} canvas`)])) {
    const box = shown.getBoundingClientRect();
    const ready = shown.tagName === "CANVAS" ? shown.width > 0 : shown.complete && shown.naturalWidth > 0;
    if (!ready || !box.width) continue;
    pen.globalAlpha = Number(getComputedStyle(shown).opacity);
    pen.imageSmoothingEnabled = !shown.classList.contains("pixels");
    pen.filter = getComputedStyle(shown).filter;
    pen.drawImage(shown, box.left - origin.left, box.top - origin.top, box.width, box.height);
  }
  pen.globalAlpha = 1;
  pen.filter = "none";
}

function write(pen, text, x, y, width) {
  pen.fillStyle = "#111";
  pen.font = "14px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.fillText(text, x, y, width - 2 * MARGIN);
  return y + LINE;
}

/** Colours in a row: a gradient with its ends, or a swatch for each cluster. An embedding has none. */
function drawLegend(pen, legend, y, width) {
  const { kind, colours, low, high, least, most, counts } = legend;
  const wide = Math.min(260, width / 2);
  if (kind === "scale") {
    const gradient = pen.createLinearGradient(MARGIN, 0, MARGIN + wide, 0);
    colours.forEach((colour, i) => gradient.addColorStop(i / (colours.length - 1), colour));
    pen.fillStyle = gradient;
    pen.fillRect(MARGIN, y - 6, wide, 12);
    write(pen, `${least < low - 1e-6 ? "≤ " : ""}${fixed(low)}`, MARGIN, y + LINE, width);
    pen.textAlign = "right";
    pen.fillText(`${most > high + 1e-6 ? "≥ " : ""}${fixed(high)}`, MARGIN + wide, y + LINE);
    pen.textAlign = "left";
  }
  if (kind === "clusters") {
    const total = counts.reduce((a, b) => a + b, 0);
    const step = Math.min(80, (width - 2 * MARGIN) / colours.length);
    colours.forEach((colour, k) => {
      pen.fillStyle = colour;
      pen.fillRect(MARGIN + k * step, y - 6, 12, 12);
      write(pen, `${k + 1}: ${fixed((100 * counts[k]) / total, 0)} %`, MARGIN + k * step + 16, y, width);
    });
  }
}

function drawScale(pen, width, bottom) {
  const wide = $("scale-bar").getBoundingClientRect().width;
  pen.fillStyle = "#111";
  pen.fillRect(width - MARGIN - wide, bottom - 3, wide, 3);
  pen.font = "14px system-ui, sans-serif";
  pen.textAlign = "right";
  pen.fillText($("scale-text").textContent, width - MARGIN, bottom - 14);
  pen.textAlign = "left";
}
