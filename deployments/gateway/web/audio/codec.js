// Opus encoder and decoder, mono at 48 kHz in packets of 20 ms: by WebCodecs, else by ./fallback.js, which is
// fetched only then. Both kinds look the same: `encode(samples)` and `decode(packet)` go in, results come to a
// callback in order, `close()` ends it.

export const RATE = 48_000; // of Opus itself, and of every WebCodecs Opus decoder's output
export const PACKET = RATE / 50;

const ENCODING = { codec: "opus", sampleRate: RATE, numberOfChannels: 1, bitrate: 32_000, opus: { frameDuration: 20_000 } };
const DECODING = { codec: "opus", sampleRate: RATE, numberOfChannels: 1 };

/** Samples at 48 kHz in an Opus packet, by its first two bytes (RFC 6716, section 3.1). */
export function packetSamples(packet) {
  const config = packet[0] >> 3;
  const code = packet[0] & 3;
  const ms = config < 12 ? [10, 20, 40, 60][config & 3] : config < 16 ? [10, 20][config & 1] : 2.5 * 2 ** (config & 3);
  return ms * (RATE / 1_000) * (code === 3 ? packet[1] & 63 : code ? 2 : 1);
}

let kind; // a promise of "webcodecs", "fallback" or null

/** How this browser can do Opus: "webcodecs", "fallback", or null for not at all. */
export function opusKind() {
  kind ??= findKind();
  return kind;
}

async function findKind() {
  try {
    const [encodes, decodes] = await Promise.all([
      AudioEncoder.isConfigSupported(ENCODING),
      AudioDecoder.isConfigSupported(DECODING),
    ]);
    if (encodes.supported && decodes.supported) return "webcodecs";
  } catch {
    // no WebCodecs, or one that has never heard of Opus
  }
  return "WebAssembly" in window && "Worker" in window ? "fallback" : null;
}

/** An encoder; `onPacket(bytes)` for each 20 ms, `onError(error)` once when it gives up. */
export async function makeEncoder(onPacket, onError) {
  if ((await opusKind()) === "webcodecs") return new Encoder(onPacket, onError);
  const { FallbackEncoder } = await import("./fallback.js");
  return new FallbackEncoder(onPacket, onError);
}

/** A decoder; `onSamples(Float32Array)` for each packet or part of it, `onError(error)` once. */
export async function makeDecoder(onSamples, onError) {
  if ((await opusKind()) === "webcodecs") return new Decoder(onSamples, onError);
  const { FallbackDecoder } = await import("./fallback.js");
  return new FallbackDecoder(onSamples, onError);
}

class Encoder {
  #codec;
  #given = 0; // samples

  constructor(onPacket, onError) {
    const output = (chunk) => {
      const packet = new Uint8Array(chunk.byteLength);
      chunk.copyTo(packet);
      onPacket(packet);
    };
    this.#codec = new AudioEncoder({ output, error: onError });
    this.#codec.configure(ENCODING);
  }

  encode(samples) {
    if (this.#codec.state !== "configured") return;
    const timestamp = (this.#given / RATE) * 1e6;
    this.#given += samples.length;
    const format = { format: "f32-planar", sampleRate: RATE, numberOfChannels: 1 };
    const data = new AudioData({ ...format, numberOfFrames: samples.length, timestamp, data: samples });
    this.#codec.encode(data);
    data.close();
  }

  close() {
    if (this.#codec.state !== "closed") this.#codec.close();
  }
}

class Decoder {
  #codec;
  #given = 0; // samples

  constructor(onSamples, onError) {
    const output = (data) => {
      const samples = new Float32Array(data.numberOfFrames);
      data.copyTo(samples, { planeIndex: 0, format: "f32-planar" });
      data.close();
      onSamples(samples);
    };
    this.#codec = new AudioDecoder({ output, error: onError });
    this.#codec.configure(DECODING);
  }

  decode(packet) {
    if (this.#codec.state !== "configured") return;
    const timestamp = (this.#given / RATE) * 1e6;
    this.#given += packetSamples(packet);
    this.#codec.decode(new EncodedAudioChunk({ type: "key", timestamp, data: packet }));
  }

  /** Resolves when all that was given has come out. */
  async flush() {
    if (this.#codec.state === "configured") await this.#codec.flush();
  }

  close() {
    if (this.#codec.state !== "closed") this.#codec.close();
  }
}
