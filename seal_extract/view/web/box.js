// A volume as a box of six faces, cut along x, y and z: WebGL 2 without a library. Lengths are to scale.
//
// The planes are slices of one 3D texture, and the codes of a map are another, so that a cut is only a number:
// each point of a face looks up its place in both. Turning is that of a turntable: about the depth, then tilted.

const VERTEX = `#version 300 es
in vec3 corner;
out vec3 at;
uniform vec3 low, high, size;
uniform mat3 turned;
uniform vec2 scale, shift;
uniform vec4 line;
void main() {
  at = mix(low, high, corner);
  vec3 place = turned * ((at - 0.5) * size * vec3(1, -1, -1));
  gl_Position = vec4(place.xy * scale + shift, -place.z - 0.003 * line.a, 1); // lines lie before the faces that they bound
}`;
const FRAGMENT = `#version 300 es
precision highp float;
precision highp sampler3D;
in vec3 at;
out vec4 colour;
uniform vec3 low, high;
uniform vec2 cells;
uniform float planes, opacity;
uniform vec4 line;
uniform sampler3D picture, codes;
uniform sampler2D palette;
void main() {
  vec3 inside = clamp(at, low + 1e-4, high - 1e-4);
  inside.z = (floor(inside.z * planes) + 0.5) / planes;
  vec4 seen = texture(picture, inside);
  vec3 ground = mix(vec3(0.78), seen.rgb, seen.a);
  vec2 cell = inside.xy * cells;
  float code = max(cell.x, cell.y) < 1.0 ? texture(codes, vec3(cell, inside.z)).r : 0.0;
  vec4 tint = texelFetch(palette, ivec2(int(code * 255.0 + 0.5), 0), 0);
  colour = line.a > 0.0 ? line : vec4(mix(ground, tint.rgb, tint.a * opacity), 1);
}`;
const START = { spin: -0.6, tilt: 0.95, zoom: 1, x: 0, y: 0 };
const GROUND = 0.9; // of the smaller side of the stage that the box fills before it is enlarged
const SLICE_PX = 1024; // longest side of a slice
const INK = [0.1, 0.1, 0.1, 1];
const FRAME = [0.45, 0.5, 0.55, 1]; // of what is cut away

const ENDS = [[0, 0], [1, 0], [1, 1], [0, 1]];

/** The point at `along` an axis, and at a and b of the two others. */
function point(axis, along, [a, b]) {
  const at = [0, 0, 0];
  [at[axis], at[(axis + 1) % 3], at[(axis + 2) % 3]] = [along, a, b];
  return at;
}

/** The corners of a cube's six faces as triangles, then of its twelve edges as lines: (x, y, z) of 0 and 1. */
function cube() {
  const axes = [0, 1, 2];
  const faces = axes.flatMap((axis) => [0, 1].flatMap((side) => [0, 1, 2, 0, 2, 3].flatMap((i) => point(axis, side, ENDS[i]))));
  const edges = axes.flatMap((axis) => ENDS.flatMap((end) => [...point(axis, 0, end), ...point(axis, 1, end)]));
  return new Float32Array([...faces, ...edges]);
}

class Box {
  /** Fails where the browser has no WebGL 2. `size` is in µm, `pixels` those of a slice. */
  constructor(canvas, labels, { planes, pixels, cells }) {
    this.canvas = canvas;
    this.labels = labels;
    this.planes = planes;
    this.pixels = pixels.map((side) => Math.max(1, Math.round(side * Math.min(1, SLICE_PX / Math.max(...pixels)))));
    this.view = { ...START };
    const gl = canvas.getContext("webgl2", { antialias: true });
    if (!gl) throw new Error("this browser draws no WebGL 2, which the box needs");
    const most = gl.getParameter(gl.MAX_3D_TEXTURE_SIZE);
    if (Math.max(planes, SLICE_PX, ...cells) > most) throw new Error(`this browser draws boxes of at most ${most} planes or patches a side`);
    this.gl = gl;
    this.program = this.#program();
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, cube(), gl.STATIC_DRAW);
    gl.enableVertexAttribArray(0);
    gl.vertexAttribPointer(0, 3, gl.FLOAT, false, 0, 0);
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
    this.#texture(0, "picture", gl.TEXTURE_3D, gl.LINEAR);
    gl.texStorage3D(gl.TEXTURE_3D, 1, gl.RGBA8, ...this.pixels, planes);
    this.#texture(1, "codes", gl.TEXTURE_3D, gl.NEAREST);
    this.#texture(2, "palette", gl.TEXTURE_2D, gl.NEAREST);
    this.paint(null);
    gl.enable(gl.DEPTH_TEST);
    gl.depthFunc(gl.LEQUAL);
  }

  #program() {
    const { gl } = this;
    const program = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.bindAttribLocation(program, 0, "corner");
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(`the box cannot be drawn: ${gl.getProgramInfoLog(program)}`);
    gl.useProgram(program);
    return program;
  }

  #texture(unit, name, kind, filter) {
    const { gl } = this;
    gl.activeTexture(gl.TEXTURE0 + unit);
    gl.bindTexture(kind, gl.createTexture());
    for (const way of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(kind, way, filter);
    for (const wrap of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T, gl.TEXTURE_WRAP_R]) gl.texParameteri(kind, wrap, gl.CLAMP_TO_EDGE);
    gl.uniform1i(this.#at(name), unit);
  }

  #at(name) {
    return this.gl.getUniformLocation(this.program, name);
  }

  /** Put the picture of a plane into the box; planes without one are grey. */
  slice(plane, image) {
    const { gl } = this;
    const [width, height] = this.pixels;
    const small = element("canvas", { width, height });
    small.getContext("2d").drawImage(image, 0, 0, width, height);
    gl.activeTexture(gl.TEXTURE0);
    gl.texSubImage3D(gl.TEXTURE_3D, 0, 0, 0, plane, width, height, 1, gl.RGBA, gl.UNSIGNED_BYTE, small);
  }

  /** Colour it by the codes of a map, with RGBA of 256 colours; null takes them away. */
  paint(map) {
    const { gl } = this;
    const { codes, palette, cells } = map || { codes: new Uint8Array(1), palette: new Uint8Array(1024), cells: [1, 1, 1] };
    gl.activeTexture(gl.TEXTURE1);
    gl.texImage3D(gl.TEXTURE_3D, 0, gl.R8, ...cells, 0, gl.RED, gl.UNSIGNED_BYTE, codes);
    gl.activeTexture(gl.TEXTURE2);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA8, 256, 1, 0, gl.RGBA, gl.UNSIGNED_BYTE, palette);
  }

  turn(dx, dy) {
    this.view.spin += dx;
    this.view.tilt = Math.min(Math.PI, Math.max(0, this.view.tilt + dy));
  }

  /** Enlarge about a point of the canvas, counted from its middle. */
  zoom(by, x = 0, y = 0) {
    const { view } = this;
    const zoom = Math.min(40, Math.max(0.3, view.zoom * by));
    view.x = x - ((x - view.x) * zoom) / view.zoom;
    view.y = y - ((y - view.y) * zoom) / view.zoom;
    view.zoom = zoom;
  }

  reset() {
    this.view = { ...START };
  }

  #turned() {
    const { spin, tilt } = this.view;
    const [a, b, c, d] = [Math.cos(spin), Math.sin(spin), Math.cos(tilt), Math.sin(tilt)];
    return [[a, b * c, -b * d], [-b, a * c, -a * d], [0, d, c]]; // columns
  }

  /** Draw it. `cut` has low and high along x, y and z as shares, `size` µm with the depth as it is drawn. */
  draw(cut, size, words, cells, opacity) {
    const { gl, canvas, view } = this;
    const [width, height] = fitted(canvas);
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.clearColor(0.06, 0.067, 0.075, 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    const diagonal = Math.hypot(...size);
    const lengths = size.map((um) => um / diagonal);
    const fill = GROUND * Math.min(width, height) * view.zoom; // pixels of the diagonal
    this.um_per_px = diagonal / fill;
    const turned = this.#turned();
    gl.uniformMatrix3fv(this.#at("turned"), false, turned.flat());
    gl.uniform3fv(this.#at("size"), lengths);
    gl.uniform2f(this.#at("scale"), (2 * fill) / width, (2 * fill) / height);
    gl.uniform2f(this.#at("shift"), (2 * view.x) / width, (-2 * view.y) / height);
    gl.uniform2fv(this.#at("cells"), cells);
    gl.uniform1f(this.#at("planes"), this.planes);
    gl.uniform1f(this.#at("opacity"), opacity);
    const part = (low, high, line, mode, first, count) => {
      gl.uniform3fv(this.#at("low"), low);
      gl.uniform3fv(this.#at("high"), high);
      gl.uniform4fv(this.#at("line"), line);
      gl.drawArrays(mode, first, count);
    };
    part(cut.low, cut.high, [0, 0, 0, 0], gl.TRIANGLES, 0, 36);
    part(cut.low, cut.high, INK, gl.LINES, 36, 24);
    part([0, 0, 0], [1, 1, 1], FRAME, gl.LINES, 36, 24);
    this.#label(turned, lengths, fill, words);
  }

  /** Write along each axis, beside that of its four edges which is farthest out. */
  #label(turned, lengths, fill, words) {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const project = (p) => {
      const [x, y, z] = p.map((v, i) => (v - 0.5) * lengths[i] * (i ? -1 : 1));
      return [0, 1].map((i) => (turned[0][i] * x + turned[1][i] * y + turned[2][i] * z) * fill * (i ? -1 : 1));
    };
    words.forEach((text, axis) => {
      const middles = ENDS.map((end) => project(point(axis, 0.5, end)));
      const [x, y] = middles.reduce((far, one) => (Math.hypot(...one) > Math.hypot(...far) + 1e-6 ? one : far));
      const away = 1 + 22 / Math.max(1, Math.hypot(x, y));
      const label = this.labels[axis];
      label.textContent = text;
      const half = label.offsetWidth / 2 + 4;
      label.style.left = `${Math.min(width - half, Math.max(half, width / 2 + this.view.x + x * away))}px`;
      label.style.top = `${Math.min(height - 12, Math.max(12, height / 2 + this.view.y + y * away))}px`;
    });
  }
}
