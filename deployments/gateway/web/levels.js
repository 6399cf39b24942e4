// How loud both sides were, in steps of 20 ms, and when each of them spoke. Pure: no page, no sound.

import { RATE } from "./audio/codec.js";

export const STEP = RATE / 50; // frames at 48 kHz
export const STEP_S = STEP / RATE;
export const FLOOR_DB = -60;
const SPEAKS = 0x80; // beside a level of 0 to 60

export function decibels(meanSquare) {
  return Math.max(FLOOR_DB, Math.min(0, 10 * Math.log10(meanSquare || 1e-12)));
}

/** Levels of one side, one byte a step: decibels above the floor, and a bit for speech. */
export class Levels {
  #bytes = new Uint8Array(3_000);
  length = 0; // steps

  static of(bytes) {
    const levels = new Levels();
    levels.#bytes = bytes;
    levels.length = bytes.length;
    return levels;
  }

  /** `seconds` from the start, lasting `lasts`. */
  put(seconds, lasts, db) {
    const from = Math.max(0, Math.round(seconds / STEP_S));
    const until = Math.max(from + 1, Math.round((seconds + lasts) / STEP_S));
    this.#reserve(until);
    this.#bytes.fill(Math.round(db - FLOOR_DB), from, until);
    this.length = Math.max(this.length, until);
  }

  /** Says whether this side spoke between two moments. */
  mark(from, until, speaks = true) {
    const first = Math.max(0, Math.round(from / STEP_S));
    const end = Math.min(this.length, Math.round(until / STEP_S));
    for (let step = first; step < end; step++) {
      this.#bytes[step] = speaks ? this.#bytes[step] | SPEAKS : this.#bytes[step] & ~SPEAKS;
    }
  }

  db(step) {
    return step < this.length ? (this.#bytes[step] & ~SPEAKS) + FLOOR_DB : FLOOR_DB;
  }

  speaks(step) {
    return step >= 0 && step < this.length && this.#bytes[step] >= SPEAKS;
  }

  slice(from, until = this.length) {
    return this.#bytes.slice(from, Math.min(until, this.length));
  }

  #reserve(steps) {
    if (steps <= this.#bytes.length) return;
    const larger = new Uint8Array(Math.max(steps, 2 * this.#bytes.length));
    larger.set(this.#bytes);
    this.#bytes = larger;
  }
}

/**
 * When one side speaks, by its level alone: above a noise floor that follows the quiet, with hangover. `push` answers
 * null, or `{start, end}` in seconds where `end` is null while it goes on.
 */
export class SpeechDetector {
  static ABOVE_DB = 12;
  static LEAST_DB = -50; // quieter is never speech
  static HIGHEST_FLOOR_DB = -35; // a floor that rose to speech itself would hear nothing
  static ONSET_S = 0.08;
  static HANGOVER_S = 0.4;
  static RISE_DB_PER_S = 3;
  static LATE_S = 0.3; // between the levels of two devices

  #floor = -55;
  #since = null; // loud since
  #last = null; // loud last
  speaking = false;
  #start = 0;

  push(seconds, lasts, db) {
    this.#follow(lasts, db);
    const loud = db > Math.max(SpeechDetector.LEAST_DB, this.#floor + SpeechDetector.ABOVE_DB);
    if (loud) {
      this.#since ??= seconds;
      this.#last = seconds + lasts;
    } else if (!this.speaking) this.#since = null;
    if (!this.speaking && this.#since !== null && this.#last - this.#since >= SpeechDetector.ONSET_S) {
      this.speaking = true;
      this.#start = this.#since;
      return { start: this.#start, end: null };
    }
    if (this.speaking && seconds + lasts - this.#last > SpeechDetector.HANGOVER_S) return this.stop();
    return null;
  }

  /** Whether it is loud at a moment: without the hangover. */
  loudAt(seconds) {
    return this.speaking && seconds - this.#last < SpeechDetector.LATE_S;
  }

  /** Ends speech that goes on. */
  stop() {
    if (!this.speaking) return null;
    this.speaking = false;
    this.#since = null;
    return { start: this.#start, end: this.#last };
  }

  #follow(lasts, db) {
    if (db < this.#floor) this.#floor = db;
    else this.#floor = Math.min(this.#floor + SpeechDetector.RISE_DB_PER_S * lasts, SpeechDetector.HIGHEST_FLOOR_DB);
  }
}
