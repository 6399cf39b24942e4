// Plays a stored talk: the agent on the left, the user on the right. Decodes a little ahead of what is heard.

import { RATE } from "../audio/codec.js";
import { Reader } from "./reader.js";

const BLOCK_S = 1;
const AHEAD_S = 2;
const TICK_MS = 250;

export class Player {
  #reader;
  #context = null;
  #sources = new Set();
  #from = 0; // seconds of the talk at #began
  #began = 0; // the context's time
  #next = 0; // seconds of the talk that are to be scheduled
  #timer = null;
  #run = 0; // told apart, so that a block of an older one is not played
  #busy = false; // a tick is at work
  #changed;
  #failed;

  /** `changed()` when it starts or stops; `failed(error)` when the sound cannot be read. */
  constructor(chunks, changed, failed) {
    this.#reader = new Reader(chunks);
    this.#changed = changed;
    this.#failed = failed;
  }

  get levels() {
    return this.#reader.levels;
  }

  get seconds() {
    return this.#reader.seconds;
  }

  get playing() {
    return this.#timer !== null;
  }

  get position() {
    if (!this.playing) return this.#from;
    return Math.min(this.seconds, Math.max(this.#from, this.#from + this.#context.currentTime - this.#began));
  }

  async play() {
    if (this.playing) return;
    this.#context ??= new AudioContext({ sampleRate: RATE });
    const run = ++this.#run;
    this.#timer = setInterval(() => this.#tick(run), TICK_MS);
    this.#changed();
    await this.#context.resume();
    if (run !== this.#run) return;
    if (this.#from >= this.seconds - 0.05) this.#from = 0;
    this.#next = this.#from;
    this.#began = this.#context.currentTime + 0.1;
    await this.#tick(run);
  }

  pause() {
    if (!this.playing) return;
    this.#from = this.position;
    this.#stop();
  }

  seek(seconds) {
    const goesOn = this.playing;
    this.#stop();
    this.#from = Math.max(0, Math.min(seconds, this.seconds));
    if (goesOn) this.play();
    else this.#changed();
  }

  close() {
    this.#stop();
    this.#reader.close();
    this.#context?.close();
  }

  #stop() {
    this.#run++;
    clearInterval(this.#timer);
    this.#timer = null;
    for (const source of this.#sources) source.stop();
    this.#sources.clear();
    this.#changed();
  }

  async #tick(run) {
    if (this.#busy || run !== this.#run) return;
    if (this.position >= this.seconds) {
      this.#from = this.seconds;
      return this.#stop();
    }
    this.#busy = true;
    try {
      while (run === this.#run && this.#next < Math.min(this.seconds, this.position + AHEAD_S)) await this.#schedule(run);
    } catch (error) {
      this.pause();
      this.#failed(error);
    } finally {
      this.#busy = false;
    }
  }

  async #schedule(run) {
    const seconds = Math.min(BLOCK_S, this.seconds - this.#next);
    const count = Math.max(1, Math.round(seconds * RATE));
    const { user, agent } = await this.#reader.read(Math.round(this.#next * RATE), count);
    if (run !== this.#run) return;
    const buffer = new AudioBuffer({ length: count, numberOfChannels: 2, sampleRate: RATE });
    buffer.copyToChannel(agent, 0);
    buffer.copyToChannel(user, 1);
    const source = new AudioBufferSourceNode(this.#context, { buffer });
    source.connect(this.#context.destination);
    source.onended = () => this.#sources.delete(source);
    const at = this.#began + this.#next - this.#from;
    const late = Math.max(0, this.#context.currentTime - at);
    source.start(Math.max(at, this.#context.currentTime), late);
    this.#sources.add(source);
    this.#next += seconds;
  }
}
