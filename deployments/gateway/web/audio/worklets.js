// Runs on the audio thread: the microphone's samples out, the agent's samples in. All at 48 kHz, except the context
// itself where a browser cannot give the microphone at that rate: then `Capture` resamples.

const RATE = 48_000;
const BLOCK = RATE / 50; // 20 ms

function meanSquare(samples) {
  let sum = 0;
  for (let at = 0; at < samples.length; at++) sum += samples[at] * samples[at];
  return sum / samples.length;
}

/** Streams samples from `sampleRate` to RATE with a windowed sinc; the delay is TAPS / 2 input samples. */
class Resampler {
  static TAPS = 32;
  #history = new Float32Array(Resampler.TAPS);
  #position = 0; // of the next output sample, in input samples behind the newest
  #step = sampleRate / RATE;
  #cutoff = Math.min(1, RATE / sampleRate);

  *push(input) {
    for (const sample of input) {
      this.#history.copyWithin(0, 1);
      this.#history[Resampler.TAPS - 1] = sample;
      for (; this.#position < 1; this.#position += this.#step) yield this.#at(this.#position);
      this.#position -= 1;
    }
  }

  #at(fraction) {
    const { TAPS } = Resampler;
    let sum = 0;
    for (let tap = 0; tap < TAPS; tap++) {
      const x = tap - TAPS / 2 - fraction + 1;
      const window = 0.5 + 0.5 * Math.cos((2 * Math.PI * x) / TAPS);
      const sinc = x ? Math.sin(Math.PI * this.#cutoff * x) / (Math.PI * x) : this.#cutoff;
      sum += this.#history[tap] * sinc * window;
    }
    return sum;
  }
}

/** Posts `{samples, frame, level}` for each 20 ms: samples at RATE, the context's frame of the first, mean square. */
class Capture extends AudioWorkletProcessor {
  #block = new Float32Array(BLOCK);
  #filled = 0;
  #resampler = sampleRate === RATE ? null : new Resampler();

  process([[input]]) {
    if (input) for (const sample of this.#resampler ? this.#resampler.push(input) : input) this.#put(sample);
    return true;
  }

  #put(sample) {
    this.#block[this.#filled++] = sample;
    if (this.#filled < BLOCK) return;
    const frame = currentFrame + 128 - Math.round((BLOCK * sampleRate) / RATE);
    this.port.postMessage({ samples: this.#block, frame, level: meanSquare(this.#block) }, [this.#block.buffer]);
    this.#block = new Float32Array(BLOCK);
    this.#filled = 0;
  }
}

/**
 * Plays what is posted to it: `{samples, at}`, where `at` is the place of the first sample in the decoded stream.
 *
 * A jitter buffer. The first piece waits for `target` samples, the reserve against pieces that come late. Each
 * underrun makes the target larger; while WINDOW_S pass with more than MARGIN_S always in reserve it shrinks by
 * SHRINK_S. Where pieces go on later than they began, the reserve is smaller from then on: when LOW_PIECES in a row
 * find less than half of the target, it is filled again by a silence where it is quiet. What lies in store beyond the
 * target, because two clocks differ or after a stall, is left out where it is quiet, and cut at LIMIT_S beyond it,
 * since a conversation must not run late.
 *
 * Posts, for each 20 ms of output, `{frame, level, stored, target, underruns, dropped, marks}`: the context's frame,
 * mean square, samples, and `marks` `[frame, at]` where the output goes on at another place of the stream than the
 * next (-1: silence). `dropped` samples were cut though they were not quiet.
 */
class Playback extends AudioWorkletProcessor {
  static PAGE_S = 0.08; // what comes at once
  static START_S = 0.09;
  static LEAST_S = 0.09; // smaller ones are tried out at the price of an underrun every few minutes
  static MOST_S = 0.4;
  static GROW_S = 0.04;
  static SHRINK_S = 0.005;
  static WINDOW_S = 30;
  static MARGIN_S = 0.04;
  static LIMIT_S = 0.25;
  static LOW_PIECES = 2;
  static QUIET = 1e-6; // mean square, -60 dBFS
  static FADE = 96; // samples, 2 ms

  #pieces = []; // {samples, at}
  #offset = 0; // into the first piece
  #stored = 0;
  #target = Playback.START_S * RATE;
  #wait = this.#target; // samples until playing (again) once there is something
  #least = Infinity; // in store when a piece came, since #windowEnd was set
  #windowEnd = 0;
  #reserve = 0; // in store when the last piece came
  #low = 0; // pieces in a row that found less than half of the target in store
  #next = -1; // place in the stream that was played last, plus one; -1 after silence
  #last = 0; // sample played last, faded out in an underrun
  #underruns = 0;
  #dropped = 0;
  #marks = [];
  #sum = 0;
  #count = 0;

  constructor() {
    super();
    this.port.onmessage = ({ data: { samples, at } }) => {
      if (this.#next >= 0) this.#adapt();
      for (let from = 0; from < samples.length; from += BLOCK) {
        this.#store({ samples: samples.subarray(from, from + BLOCK), at: at + from });
      }
    };
  }

  #adapt() {
    this.#reserve = this.#stored;
    this.#low = this.#reserve < this.#target / 2 ? this.#low + 1 : 0;
    this.#least = Math.min(this.#least, this.#stored);
    if (currentFrame < this.#windowEnd) return;
    if (this.#least !== Infinity && this.#least > Playback.MARGIN_S * RATE && this.#windowEnd) {
      this.#target = Math.max(this.#target - Playback.SHRINK_S * RATE, Playback.LEAST_S * RATE);
    }
    this.#least = Infinity;
    this.#windowEnd = currentFrame + Playback.WINDOW_S * RATE;
  }

  #store(piece) {
    const enough = this.#target + Playback.PAGE_S * RATE;
    if (this.#stored > enough && meanSquare(piece.samples) < Playback.QUIET) return;
    this.#pieces.push(piece);
    this.#stored += piece.samples.length;
    while (this.#stored > enough + Playback.LIMIT_S * RATE) {
      this.#dropped += this.#pieces[0].samples.length - this.#offset;
      this.#drop();
    }
  }

  #drop() {
    this.#stored -= this.#pieces.shift().samples.length - this.#offset;
    this.#offset = 0;
  }

  process(_inputs, [[output]]) {
    if (this.#low >= Playback.LOW_PIECES && this.#quiet()) this.#refill();
    if (this.#stored && this.#wait > 0) this.#wait -= output.length;
    else if (this.#wait <= 0) {
      const played = this.#read(output);
      if (played < output.length) this.#underrun(output, played);
    }
    this.#report(output);
    return true;
  }

  #quiet() {
    return this.#wait <= 0 && this.#pieces.length > 0 && meanSquare(this.#pieces[0].samples) < Playback.QUIET;
  }

  /** As much silence as the reserve lacks. */
  #refill() {
    this.#wait = this.#target - this.#reserve;
    this.#mark(currentFrame, -1);
    this.#low = 0;
    this.#least = Infinity;
  }

  #underrun(output, played) {
    this.#underruns++;
    this.#mark(currentFrame + played, -1);
    const from = played ? output[played - 1] : this.#last;
    for (let at = 0; at < Playback.FADE && played + at < output.length; at++) {
      output[played + at] = from * (1 - at / Playback.FADE);
    }
    this.#target = Math.min(this.#target + Playback.GROW_S * RATE, Playback.MOST_S * RATE);
    this.#wait = this.#target;
    this.#low = 0;
    this.#windowEnd = currentFrame + Playback.WINDOW_S * RATE;
    this.#least = Infinity;
  }

  /** Moves samples from the store into `output`; returns how many there were. */
  #read(output) {
    let filled = 0;
    while (filled < output.length && this.#pieces.length) {
      const { samples, at } = this.#pieces[0];
      const count = Math.min(samples.length - this.#offset, output.length - filled);
      if (at + this.#offset !== this.#next) this.#mark(currentFrame + filled, at + this.#offset);
      output.set(samples.subarray(this.#offset, this.#offset + count), filled);
      filled += count;
      this.#offset += count;
      this.#stored -= count;
      this.#next = at + this.#offset;
      if (this.#offset === samples.length) this.#drop();
    }
    this.#last = output[output.length - 1];
    return filled;
  }

  #mark(frame, at) {
    this.#marks.push([frame, at]);
    this.#next = at;
  }

  #report(output) {
    this.#sum += meanSquare(output) * output.length;
    this.#count += output.length;
    if (this.#count < BLOCK) return;
    this.port.postMessage({
      frame: currentFrame + output.length - this.#count,
      level: this.#sum / this.#count,
      stored: this.#stored,
      target: this.#target,
      underruns: this.#underruns,
      dropped: this.#dropped,
      marks: this.#marks,
    });
    this.#sum = this.#count = 0;
    this.#marks = [];
  }
}

registerProcessor("capture", Capture);
registerProcessor("playback", Playback);
