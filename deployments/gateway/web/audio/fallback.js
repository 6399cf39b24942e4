// Opus without WebCodecs: libopus in WebAssembly, from opus-recorder (../vendor). Its workers speak Ogg, so packets
// are put into pages and taken out of them here.

import { PACKET, RATE, packetSamples } from "./codec.js";
import { OggMuxer, audioPages } from "./ogg.js";

const FOLDER = new URL("../vendor/opus-recorder/", import.meta.url);
const AUDIO = 2049; // OPUS_APPLICATION_AUDIO
const COMPLEXITY = 5;

function startWorker(name, onMessage, onError) {
  const worker = new Worker(new URL(name, FOLDER));
  worker.onmessage = ({ data }) => onMessage(data);
  worker.onerror = (event) => {
    event.preventDefault();
    onError(new Error(event.message || "the codec could not be loaded"));
  };
  return worker;
}

export class FallbackEncoder {
  #worker;

  constructor(onPacket, onError) {
    const take = ({ message, page }) => {
      if (message !== "page") return;
      for (const { packets } of audioPages(page)) for (const packet of packets) onPacket(packet.slice());
    };
    this.#worker = startWorker("encoderWorker.min.js", take, onError);
    this.#worker.postMessage({
      command: "init",
      encoderApplication: AUDIO,
      encoderBitRate: 32_000,
      encoderComplexity: COMPLEXITY,
      encoderFrameSize: (1e3 * PACKET) / RATE,
      encoderSampleRate: RATE,
      originalSampleRate: RATE,
      numberOfChannels: 1,
      maxFramesPerPage: 1,
    });
  }

  encode(samples) {
    this.#worker.postMessage({ command: "encode", buffers: [samples] });
  }

  close() {
    this.#worker.terminate();
  }
}

export class FallbackDecoder {
  static BLOCK = 120; // samples, 2.5 ms: every packet is a number of them, so that none stays behind
  #worker;
  #muxer = new OggMuxer(1);
  #given = 0; // samples
  #done = 0;
  #waiting = []; // {until, resolve}

  constructor(onSamples, onError) {
    let parts = [];
    const take = (buffers) => {
      if (!buffers) return;
      parts.push(buffers[0]);
      this.#done += FallbackDecoder.BLOCK;
      if (this.#done % PACKET && this.#done < this.#given) return;
      const samples = new Float32Array(parts.length * FallbackDecoder.BLOCK);
      parts.forEach((part, number) => samples.set(part, number * FallbackDecoder.BLOCK));
      parts = [];
      onSamples(samples);
      this.#waiting = this.#waiting.filter(({ until, resolve }) => until > this.#done || void resolve());
    };
    this.#worker = startWorker("decoderWorker.min.js", take, onError);
    this.#worker.postMessage({
      command: "init",
      decoderSampleRate: RATE,
      outputBufferSampleRate: RATE,
      bufferLength: FallbackDecoder.BLOCK,
    });
    for (const page of this.#muxer.headers(0, RATE)) this.#post(page);
  }

  decode(packet) {
    this.#given += packetSamples(packet);
    this.#post(this.#muxer.page([packet], this.#given));
  }

  /** Resolves when all that was given has come out. */
  flush() {
    if (this.#done >= this.#given) return Promise.resolve();
    return new Promise((resolve) => this.#waiting.push({ until: this.#given, resolve }));
  }

  close() {
    this.#worker.terminate();
    for (const { resolve } of this.#waiting) resolve();
  }

  #post(page) {
    this.#worker.postMessage({ command: "decode", pages: page });
  }
}
