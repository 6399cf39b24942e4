// How the connection does: latency, jitter, buffer and underruns, as figures of now and as one value a second for the
// trends. Pure but for the clock.

import { RATE } from "./audio/codec.js";

const PAGE_MS = 80;
const SENT = 256; // pages whose time of sending is kept: 20 s
const TREND = 60; // seconds
const NAMES = ["latency", "jitter", "buffer", "underruns"];

function median(values) {
  if (!values.length) return null;
  const sorted = [...values].sort((one, other) => one - other);
  return sorted[Math.floor(sorted.length / 2)];
}

export class Timing {
  /** Newest last, at most TREND; a value is null where nothing was measured. */
  trends = Object.fromEntries(NAMES.map((name) => [name, []]));
  now = { latency: null, jitter: null, buffer: null, target: null, underruns: 0, dropped: 0 };
  #clock;
  #sent = new Float64Array(SENT);
  #count = 0; // pages sent
  #first = null; // number of the service's first page since the socket opened, less ours
  #arrived = null;
  #jitter = null;
  #trips = []; // ms, of this second
  #all = new Map(); // latencies in steps of 5 ms, of the whole conversation
  #seen = 0; // underruns at the last second

  constructor(clock = () => performance.now()) {
    this.#clock = clock;
  }

  /** A new socket: page numbers begin anew. */
  restart() {
    this.#count = 0;
    this.#first = this.#arrived = null;
  }

  sent() {
    this.#sent[this.#count++ % SENT] = this.#clock();
  }

  /** A page of the service; `number` counts its frames from 1. It answers ours of the same number. */
  received(number) {
    const now = this.#clock();
    if (this.#arrived !== null) {
      const off = Math.abs(now - this.#arrived - PAGE_MS);
      this.#jitter = this.#jitter === null ? off : this.#jitter + (off - this.#jitter) / 16; // as RFC 3550
    }
    this.#arrived = now;
    this.#first ??= number - 1;
    const ours = Math.round(number - this.#first) - 1;
    if (ours < 0 || ours >= this.#count || this.#count - ours > SENT) return;
    this.#trips.push(now - this.#sent[ours % SENT]);
  }

  buffer({ stored, target, underruns, dropped }) {
    Object.assign(this.now, {
      buffer: (1e3 * stored) / RATE,
      target: (1e3 * target) / RATE,
      underruns,
      dropped: (1e3 * dropped) / RATE,
    });
  }

  /** Once a second. */
  tick() {
    const trip = median(this.#trips);
    this.#trips = [];
    this.now.latency = trip === null ? null : trip + (this.now.buffer ?? 0);
    this.now.jitter = this.#jitter;
    if (this.now.latency !== null) {
      const step = Math.round(this.now.latency / 5) * 5;
      this.#all.set(step, (this.#all.get(step) ?? 0) + 1);
    }
    this.#put("latency", this.now.latency);
    this.#put("jitter", this.now.jitter);
    this.#put("buffer", this.now.buffer);
    this.#put("underruns", this.now.underruns - this.#seen);
    this.#seen = this.now.underruns;
  }

  /** Of the whole conversation, for its record. */
  summary() {
    const seconds = [...this.#all.entries()].sort(([one], [other]) => one - other);
    const total = seconds.reduce((sum, [, count]) => sum + count, 0);
    const at = (share) => {
      let rest = share * total;
      return seconds.find(([, count]) => (rest -= count) <= 0)?.[0] ?? null;
    };
    const { underruns, dropped } = this.now;
    return { latency_p50_ms: at(0.5), latency_p95_ms: at(0.95), underruns, dropped_ms: Math.round(dropped) };
  }

  #put(name, value) {
    this.trends[name].push(value);
    if (this.trends[name].length > TREND) this.trends[name].shift();
  }
}
