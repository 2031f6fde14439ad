// A volume from the data that stand in the page: the report of a volume.

class InlinedVolume {
  constructor(data) {
    this.data = data;
    this.pictures = [];
  }

  async describe() {
    return this.data.volume;
  }

  async map(kind, of) {
    const map = this.data.maps[kind].find(({ legend }) => kind !== "genes" || legend.title === of);
    const packed = new Blob([bytes(map.codes)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return { legend: map.legend, codes: new Uint8Array(await new Response(packed).arrayBuffer()) };
  }

  picture(plane) {
    return (this.pictures[plane] ??= createImageBitmap(new Blob([bytes(this.data.pictures[plane])])));
  }

  slide() {
    return "";
  }
}

new VolumePage(new InlinedVolume(JSON.parse($("data").textContent))).start();
