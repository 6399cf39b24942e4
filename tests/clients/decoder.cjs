// opus-recorder's decoder worker, which NVIDIA's page plays with, under node: `node decoder.cjs WORKER < PAGES > PCM`.
// PAGES are payloads of audio messages, each behind its length, 32 bits; PCM is float32 at 24 kHz. The worker runs as it
// is: its global scope is node's.

const fs = require("fs");

const input = fs.readFileSync(0);
const pages = [];
for (let at = 0; at < input.length; ) {
  const size = input.readUInt32LE(at);
  pages.push(new Uint8Array(input.subarray(at + 4, at + 4 + size)));
  at += 4 + size;
}

globalThis.postMessage = (pieces) => {
  for (const piece of pieces ?? []) fs.writeSync(1, Buffer.from(piece.buffer, piece.byteOffset, piece.byteLength));
};
globalThis.close = () => {};
delete globalThis.fetch; // which would take the path of the .wasm for a URL
require(require("path").resolve(process.argv[2]));

const config = { bufferLength: 960, decoderSampleRate: 24000, outputBufferSampleRate: 24000, resampleQuality: 0 };
const send = (data) => globalThis.onmessage({ data });
send({ command: "init", ...config });
for (const page of pages) send({ command: "decode", pages: page });
send({ command: "done" });
