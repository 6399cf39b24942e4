// A stored talk as files: a stereo wav (agent left, user right, 48 kHz, 16 bit) and JSON.

import { RATE } from "../audio/codec.js";
import { Reader } from "./reader.js";

const BLOCK_S = 10;

function ascii(view, at, text) {
  for (let n = 0; n < text.length; n++) view.setUint8(at + n, text.charCodeAt(n));
}

function wavHead(frames) {
  const view = new DataView(new ArrayBuffer(44));
  const size = 4 * frames;
  ascii(view, 0, "RIFF");
  view.setUint32(4, 36 + size, true);
  ascii(view, 8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 2, true);
  view.setUint32(24, RATE, true);
  view.setUint32(28, 4 * RATE, true);
  view.setUint16(32, 4, true);
  view.setUint16(34, 16, true);
  ascii(view, 36, "data");
  view.setUint32(40, size, true);
  return view.buffer;
}

/** The wav of a talk as a Blob. `progress(share)` is called as it goes on. */
export async function wav(chunks, progress = () => {}) {
  const reader = new Reader(chunks);
  const frames = Math.round(reader.seconds * RATE);
  const parts = [wavHead(frames)];
  try {
    for (let from = 0; from < frames; from += BLOCK_S * RATE) {
      const count = Math.min(BLOCK_S * RATE, frames - from);
      const { user, agent } = await reader.read(from, count);
      const block = new Int16Array(2 * count);
      for (let n = 0; n < count; n++) {
        block[2 * n] = Math.max(-1, Math.min(1, agent[n])) * 32_767;
        block[2 * n + 1] = Math.max(-1, Math.min(1, user[n])) * 32_767;
      }
      parts.push(new Blob([block.buffer])); // which a browser may keep on disk
      progress((from + count) / frames);
    }
  } finally {
    reader.close();
  }
  return new Blob(parts, { type: "audio/wav" });
}

/** What is known of a talk, for people and programs. */
export function json(talk) {
  const { id, bytes, ...rest } = talk;
  const seconds = (value) => Math.round(value * 100) / 100;
  const entries = talk.entries.map(({ side, start, end, text, overlap }) =>
    ({ side, start: seconds(start), end: seconds(end), text, overlap }));
  const about = { ...rest, started: new Date(talk.started).toISOString(), seconds: seconds(talk.seconds), entries };
  about.ended = talk.ended && new Date(talk.ended).toISOString();
  return new Blob([JSON.stringify(about, null, 2)], { type: "application/json" });
}

/** A name for a talk's files. */
export function fileName(talk) {
  const moment = new Date(talk.started).toISOString().slice(0, 19).replace("T", "-").replaceAll(":", "");
  return `personaplex-${moment}`;
}

export function download(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
