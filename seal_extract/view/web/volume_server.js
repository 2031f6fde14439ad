// A volume from the viewer's server.

class ServedVolume extends Server {
  async describe() {
    const volume = await this.ask("/api/volume");
    this.version = volume.version;
    return volume;
  }

  /** The legend of a map, and a code for each cell. */
  async map(kind, of) {
    const part = (name) => `/api/volume/maps/${kind}/${name}?${new URLSearchParams({ of, v: this.version })}`;
    const [legend, codes] = await Promise.all([this.ask(part("legend")), this.bytes(part("codes"))]);
    return { legend, codes: new Uint8Array(codes) };
  }

  /** The picture of a plane: a `picture` to look at, or a `slice` of the box. */
  async picture(plane, size) {
    return createImageBitmap(new Blob([await this.bytes(`/api/volume/planes/${plane}/${size}?v=${this.version}`)]));
  }

  /** The page on which a plane is shown as a slide is. */
  slide(number) {
    return `/slides#${number}`;
  }
}

new VolumePage(new ServedVolume()).start();
