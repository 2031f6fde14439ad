// Questions to the server.
import { $ } from "./viewer_parts.js";

let version = "";
let asking = 0;

export function setVersion(value) {
  version = value;
}

/** An address below a slide whose answer the browser may keep. */
export function address(slide, rest, query = {}) {
  const words = new URLSearchParams({ ...query, v: version });
  return `/api/slides/${slide}/${rest}?${words}`;
}

/** JSON of an address; fails with the server's own line. */
export async function ask(path, options = {}) {
  const response = await fetched(path, options);
  return response.json();
}

/** Bytes of an address as an ArrayBuffer. */
export async function askBytes(path, options = {}) {
  const response = await fetched(path, options);
  return response.arrayBuffer();
}

async function fetched(path, options) {
  busy(1);
  try {
    const response = await fetch(path, options);
    if (response.ok) return response;
    const said = await response.json().catch(() => ({}));
    throw new Error(said.error || `the viewer answered ${response.status}`);
  } catch (error) {
    if (error instanceof TypeError) throw new Error("the viewer does not answer; is it still running?");
    throw error;
  } finally {
    busy(-1);
  }
}

function busy(change) {
  asking += change;
  setTimeout(() => $("busy").classList.toggle("on", asking > 0), 250);
}
