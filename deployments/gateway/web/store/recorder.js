// Writes one conversation into the history while it goes on: the Opus packets of both sides as they were sent and
// received, and marks that say when each was spoken and heard. From those ./reader.js makes the sound again.

import { holdTalk } from "./history.js";
import { pack } from "./packets.js";

const FLUSH_STEPS = 100; // 2 s

function empty() {
  return { sent: [], heard: [], sentMarks: [], heardMarks: [] };
}

export class Recorder {
  #history;
  #failed;
  #talk;
  #levels; // {user, agent}
  #chunk = empty();
  #number = 0;
  #steps = 0; // written so far
  #release;
  #writing = Promise.resolve();
  #stopped = false;

  /** `talk`: the record to begin with, see view of history; `levels`: {user, agent}; `failed(error)`, once. */
  constructor(history, talk, levels, failed) {
    this.#history = history;
    this.#talk = { ...talk, ended: null, seconds: 0, bytes: 0, cause: null, entries: [] };
    this.#levels = levels;
    this.#failed = failed;
    this.#release = holdTalk(talk.id);
    this.#write();
  }

  get talk() {
    return this.#talk;
  }

  /** Changes fields of the record. */
  note(fields) {
    Object.assign(this.#talk, fields);
  }

  sent(packet) {
    this.#chunk.sent.push(packet);
  }

  heard(packet) {
    this.#chunk.heard.push(packet);
  }

  /** `side` sent or heard; `seconds` of the conversation at which the stream's sample `at` (at 48 kHz) comes. */
  mark(side, seconds, at) {
    this.#chunk[`${side}Marks`].push([seconds, at]);
  }

  /** To be called as the conversation goes on. */
  advance(seconds, entries) {
    this.#talk.seconds = seconds;
    this.#talk.entries = entries;
    if (this.#levels.user.length - this.#steps >= FLUSH_STEPS) this.#flush();
  }

  async finish(cause) {
    this.#talk.ended = Date.now();
    this.#talk.cause = cause;
    this.#flush();
    await this.#writing;
    if (this.#stopped) await this.#history.put(this.#talk).catch(() => {}); // the record is small: it may still fit
    this.#release?.();
  }

  /** Writes what there is, for a page that is about to go. */
  flush() {
    this.#flush();
  }

  #flush() {
    const from = this.#steps;
    this.#steps = Math.max(from, Math.min(this.#levels.user.length, this.#levels.agent.length));
    const chunk = {
      id: this.#talk.id,
      number: this.#number++,
      sent: pack(this.#chunk.sent),
      heard: pack(this.#chunk.heard),
      sentMarks: this.#chunk.sentMarks,
      heardMarks: this.#chunk.heardMarks,
      user: this.#levels.user.slice(from, this.#steps),
      agent: this.#levels.agent.slice(from, this.#steps),
    };
    this.#chunk = empty();
    this.#talk.bytes += chunk.sent.length + chunk.heard.length + 2 * (this.#steps - from);
    this.#write(chunk);
  }

  #write(chunk = null) {
    if (this.#stopped) return;
    const talk = { ...this.#talk, entries: structuredClone(this.#talk.entries) };
    this.#writing = this.#writing.then(() => this.#history.put(talk, chunk)).catch((error) => {
      if (this.#stopped) return;
      this.#stopped = true;
      this.#failed(error);
    });
  }
}
