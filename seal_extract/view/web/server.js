// Answers for a page from the viewer's server.

class Server {
  constructor() {
    this.version = "";
    this.asking = 0;
  }

  /** The list of slides. */
  async slides() {
    const list = await this.ask("/api/slides");
    this.version = list.version;
    return list;
  }

  /** A slide and the places of its patches, int32 (x, y). */
  async slide(index) {
    const [slide, xy] = await Promise.all([this.ask(`/api/slides/${index}`), this.bytes(this.address(index, "patches"))]);
    return [slide, new Int32Array(xy)];
  }

  /** The layer that shows the slide, for `Stage`. */
  ground(slide, span) {
    return new SlideTiles({ ...span, minNativeZoom: 1 - slide.zooms, maxNativeZoom: 0, keepBuffer: 1, address: (path) => this.address(slide.index, path) });
  }

  /** The kinds of colours that a slide has, with the values and labels to choose from. */
  choices({ clusters: [fewest, most], attention }) {
    const counts = Array.from({ length: most - fewest + 1 }, (_, i) => [fewest + i, `${fewest + i} clusters`]);
    return { embedding: [], clusters: counts, genes: [], ...(attention.length && { attention: attention.map((title, i) => [i, title]) }) };
  }

  genes() {
    return this.ask("/api/genes").catch((error) => ({ named: false, why: error.message }));
  }

  suggest(typed) {
    return this.ask(`/api/suggest?typed=${encodeURIComponent(typed)}`).catch(() => []);
  }

  /** What was typed, if it can be shown; else an error, with the nearest genes. */
  async check(typed) {
    const { why, nearest } = await this.ask(`/api/check?typed=${encodeURIComponent(typed)}`);
    if (why) throw Object.assign(new Error(why), { nearest });
    return typed;
  }

  async layer({ index }, kind, of) {
    const part = (name) => this.address(index, `layers/${kind === "signatures" ? "genes" : kind}/${name}`, { of });
    const legend = await this.ask(part("legend"));
    return { legend, picture: part("picture"), values: new Float32Array(await this.bytes(part("values"))) };
  }

  patchImage({ index }, row) {
    return this.address(index, `patches/${row}/image`);
  }

  async patchGenes({ index }, row) {
    return (await this.ask(`/api/slides/${index}/patches/${row}`)).genes;
  }

  alike({ index }, row, scope) {
    return this.ask(`/api/slides/${index}/patches/${row}/alike?scope=${scope}`);
  }

  region({ index }, polygon) {
    const send = { method: "POST", body: JSON.stringify({ polygon }), headers: { "Content-Type": "application/json" } };
    return this.ask(`/api/slides/${index}/region`, send);
  }

  /** An address below a slide whose answer the browser may keep. */
  address(index, path, query = {}) {
    return `/api/slides/${index}/${path}?${new URLSearchParams({ ...query, v: this.version })}`;
  }

  /** JSON of an address; fails with the server's own line. */
  async ask(path, options = {}) {
    return (await this.#fetch(path, options)).json();
  }

  async bytes(path) {
    return (await this.#fetch(path)).arrayBuffer();
  }

  async #fetch(path, options = {}) {
    this.#busy(1);
    try {
      const response = await fetch(path, options);
      if (response.ok) return response;
      const answer = await response.json().catch(() => ({}));
      throw new Error(answer.error || `the viewer answered ${response.status}`);
    } catch (error) {
      if (error instanceof TypeError) throw new Error("the viewer does not answer; is it still running?");
      throw error;
    } finally {
      this.#busy(-1);
    }
  }

  #busy(change) {
    this.asking += change;
    setTimeout(() => $("busy").classList.toggle("on", this.asking > 0), 250);
  }
}
