"use strict";
/* Voxels of the page: base64 of gzipped bytes in script elements, decoded when they are first needed. */

const volumes = (() => {
  const MOST = 24; // decoded volumes kept; the oldest goes first
  const kept = new Map();

  function bytes(base64) {
    if (typeof Uint8Array.fromBase64 === "function") return Uint8Array.fromBase64(base64);
    const text = atob(base64);
    const out = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i += 1) out[i] = text.charCodeAt(i);
    return out;
  }

  async function decode(id) {
    const packed = bytes(document.getElementById(id).textContent.trim());
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  /* A promise of the voxels of an element, or of null where there is none. */
  function load(id) {
    if (!id) return Promise.resolve(null);
    if (!kept.has(id)) {
      kept.set(id, decode(id));
      if (kept.size > MOST) kept.delete(kept.keys().next().value);
    }
    return kept.get(id);
  }

  /* The one plane of a volume that is shown, patient's right and front to the left, head up: all axes are mirrored.
     `across`, `down` and `through` are the axes (0 to R, 1 to A, 2 to S) that the picture's columns, rows and depth
     run along. Voxels lie with axis 0 slowest. */
  function plane(voxels, shape, across, down, through, index) {
    const stride = [shape[1] * shape[2], shape[2], 1];
    const width = shape[across];
    const height = shape[down];
    const out = new Uint8Array(width * height);
    let at = 0;
    for (let v = height - 1; v >= 0; v -= 1) {
      let from = index * stride[through] + v * stride[down] + (width - 1) * stride[across];
      for (let u = 0; u < width; u += 1) {
        out[at] = voxels[from];
        at += 1;
        from -= stride[across];
      }
    }
    return out;
  }

  /* Outlines of the pixels with a bit set, as closed loops of corner points [x, y, x, y, ...]. */
  function loops(codes, width, height, bit) {
    const side = width + 1;
    const next = new Map(); // directed edges by their start, the inside to the right
    const inside = (u, v) => u >= 0 && v >= 0 && u < width && v < height && (codes[v * width + u] & bit) !== 0;
    const edge = (from, to) => {
      const ends = next.get(from);
      if (ends) ends.push(to);
      else next.set(from, [to]);
    };
    for (let v = 0; v < height; v += 1) {
      for (let u = 0; u < width; u += 1) {
        if (!inside(u, v)) continue;
        const corner = v * side + u;
        if (!inside(u, v - 1)) edge(corner, corner + 1);
        if (!inside(u + 1, v)) edge(corner + 1, corner + side + 1);
        if (!inside(u, v + 1)) edge(corner + side + 1, corner + side);
        if (!inside(u - 1, v)) edge(corner + side, corner);
      }
    }
    const found = [];
    for (const start of next.keys()) {
      while (next.get(start).length) {
        const loop = [];
        let here = start;
        do {
          loop.push(here % side, Math.floor(here / side));
          here = next.get(here).pop();
        } while (here !== start);
        found.push(loop);
      }
    }
    return found;
  }

  return { load, plane, loops };
})();
