// One plane of a volume: its picture and a map on it, moved and enlarged on a canvas.

class Plane {
  /** `size` is (width, height) in µm. */
  constructor(canvas, size) {
    this.canvas = canvas;
    this.size = size;
    this.view = null;
  }

  /** The whole plane. */
  fit() {
    const [width, height] = this.size;
    const { clientWidth, clientHeight } = this.canvas;
    this.view = { x: width / 2, y: height / 2, scale: 0.96 * Math.min(clientWidth / width, clientHeight / height) };
    this.least = this.view.scale / 2;
  }

  move(dx, dy) {
    this.view.x -= dx / this.view.scale;
    this.view.y -= dy / this.view.scale;
  }

  /** Enlarge about a point of the canvas, counted from its middle. */
  zoom(by, x = 0, y = 0) {
    const { view } = this;
    const scale = Math.min(400 * this.least, Math.max(this.least, view.scale * by));
    this.move(x * (1 - scale / view.scale), y * (1 - scale / view.scale));
    view.scale = scale;
  }

  /** The place in µm at a point of the canvas, counted from its middle. */
  place(x, y) {
    return [this.view.x + x / this.view.scale, this.view.y + y / this.view.scale];
  }

  /** Draw a picture (null is grey), and a picture of cells over it (or null) that covers `covered` µm. */
  draw(picture, colours, covered, opacity) {
    const { canvas, size: [width, height] } = this;
    const [shown] = fitted(canvas);
    const ratio = canvas.width / shown;
    if (!this.view) this.fit();
    const { x, y, scale } = this.view;
    const pen = canvas.getContext("2d");
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.globalAlpha = 1;
    pen.imageSmoothingEnabled = true;
    pen.setTransform(scale * ratio, 0, 0, scale * ratio, canvas.width / 2 - x * scale * ratio, canvas.height / 2 - y * scale * ratio);
    pen.fillStyle = "#c8c8c8";
    pen.fillRect(0, 0, width, height);
    pen.imageSmoothingQuality = "high";
    if (picture) pen.drawImage(picture, 0, 0, width, height);
    if (!colours) return;
    pen.imageSmoothingEnabled = false;
    pen.globalAlpha = opacity;
    pen.drawImage(colours, 0, 0, ...covered);
  }
}
