// The sound of a stored talk, both sides on the clock of the one who talked: the user as sent, the agent as heard.

import { PACKET, RATE, makeDecoder, packetSamples } from "../audio/codec.js";
import { Levels } from "../levels.js";
import { unpack } from "./packets.js";

const PREROLL = 4 * PACKET; // a decoder that begins inside a stream is right after this much
const LOOK_AHEAD = 312; // samples, of libopus' encoder: what went in comes out so much later

/** One side's stream and where its parts were spoken or heard. */
class Side {
  #packets;
  #starts = []; // sample at which each packet begins
  #marks; // [frame, sample], sorted
  #skip;
  #decoder = null;
  #next = 0; // packet to be given to the decoder
  #pieces = []; // decoded samples, from #from on
  #from = 0;
  #until = 0;
  #arrived = () => {};
  #failure = null;

  constructor(packets, marks, skip) {
    this.#packets = packets;
    this.#marks = marks.map(([seconds, at]) => [Math.round(seconds * RATE), at]).sort(([one], [other]) => one - other);
    this.#skip = skip;
    let at = 0;
    for (const packet of packets) {
      this.#starts.push(at);
      at += packetSamples(packet);
    }
    this.length = at;
  }

  /** Writes the samples of `out.length` frames from `from` on; where nothing was said or heard, zeros. */
  async fill(out, from) {
    for (const [number, [frame, at]] of this.#marks.entries()) {
      const next = this.#marks[number + 1]?.[0] ?? Infinity;
      const begin = Math.max(frame, from);
      const end = Math.min(next, from + out.length, frame + this.length - at - this.#skip);
      if (at < 0 || begin >= end) continue;
      const source = at + this.#skip + begin - frame;
      out.set(await this.#decode(source, end - begin), begin - from);
    }
  }

  close() {
    this.#decoder?.close();
    this.#decoder = null;
  }

  async #decode(from, count) {
    if (!this.#decoder || from < this.#from || from > this.#until + RATE) await this.#seek(from);
    while (this.#next < this.#packets.length && this.#starts[this.#next] < from + count) {
      this.#decoder.decode(this.#packets[this.#next++]);
    }
    const given = this.#starts[this.#next] ?? this.length;
    while (this.#until < given && !this.#failure) await new Promise((resolve) => (this.#arrived = resolve));
    if (this.#failure) throw this.#failure;
    return this.#take(from, count);
  }

  async #seek(from) {
    this.close();
    const first = this.#starts.findLastIndex((start) => start <= Math.max(0, from - PREROLL));
    this.#next = Math.max(0, first);
    this.#from = this.#until = this.#starts[this.#next] ?? 0;
    this.#pieces = [];
    this.#decoder = await makeDecoder((samples) => {
      this.#pieces.push(samples);
      this.#until += samples.length;
      this.#arrived();
    }, (error) => {
      this.#failure = error;
      this.#arrived();
    });
  }

  /** Samples from `from` on; those before them are let go. */
  #take(from, count) {
    const out = new Float32Array(count);
    while (this.#pieces.length && this.#from + this.#pieces[0].length <= from) this.#from += this.#pieces.shift().length;
    let at = this.#from;
    for (const piece of this.#pieces) {
      const begin = Math.max(at, from);
      const end = Math.min(at + piece.length, from + count);
      if (begin < end) out.set(piece.subarray(begin - at, end - at), begin - from);
      at += piece.length;
    }
    return out;
  }
}

export class Reader {
  #user;
  #agent;

  /** Of a talk's chunks, in their order. `levels`: {user, agent} of all of it; `seconds`: how long the sound is. */
  constructor(chunks) {
    const all = (name) => chunks.flatMap((chunk) => unpack(chunk[name]));
    const marks = (name) => chunks.flatMap((chunk) => chunk[name]);
    this.#user = new Side(all("sent"), marks("sentMarks"), LOOK_AHEAD);
    this.#agent = new Side(all("heard"), marks("heardMarks"), 0);
    this.levels = { user: joined(chunks, "user"), agent: joined(chunks, "agent") };
    this.seconds = Math.max(this.levels.user.length, this.levels.agent.length) / 50;
  }

  /** `{user, agent}` samples of `count` frames at 48 kHz from frame `from` on. Raises what the decoder does. */
  async read(from, count) {
    const [user, agent] = [new Float32Array(count), new Float32Array(count)];
    await Promise.all([this.#user.fill(user, from), this.#agent.fill(agent, from)]);
    return { user, agent };
  }

  close() {
    this.#user.close();
    this.#agent.close();
  }
}

function joined(chunks, name) {
  const bytes = new Uint8Array(chunks.reduce((size, chunk) => size + chunk[name].length, 0));
  let at = 0;
  for (const chunk of chunks) {
    bytes.set(chunk[name], at);
    at += chunk[name].length;
  }
  return Levels.of(bytes);
}
