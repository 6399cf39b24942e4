// Runs on the audio thread: the microphone's samples out, the agent's samples in.

const REPORT_SAMPLES = 2_400; // 50 ms between reports of level and buffer

/** Mean square of what passed since the last report. */
class Level {
  #sum = 0;
  #count = 0;

  add(samples) {
    for (const sample of samples) this.#sum += sample * sample;
    this.#count += samples.length;
    return this.#count >= REPORT_SAMPLES;
  }

  take() {
    const level = this.#sum / this.#count;
    this.#sum = this.#count = 0;
    return level;
  }
}

function isQuiet(samples) {
  return samples.reduce((sum, sample) => sum + sample * sample, 0) < Playback.QUIET * samples.length;
}

/** Posts `{samples}` of 20 ms each, and `{level}`. */
class Capture extends AudioWorkletProcessor {
  #block = new Float32Array(sampleRate / 50);
  #filled = 0;
  #level = new Level();

  process([[input]]) {
    if (!input) return true;
    for (let at = 0; at < input.length; ) {
      const count = Math.min(input.length - at, this.#block.length - this.#filled);
      this.#block.set(input.subarray(at, at + count), this.#filled);
      this.#filled += count;
      at += count;
      if (this.#filled === this.#block.length) {
        this.port.postMessage({ samples: this.#block }, [this.#block.buffer]);
        this.#block = new Float32Array(sampleRate / 50);
        this.#filled = 0;
      }
    }
    if (this.#level.add(input)) this.port.postMessage({ level: this.#level.take() });
    return true;
  }
}

/**
 * Plays what is posted to it, in pieces of 20 ms. The service sends 80 ms every 80 ms, so the first piece waits for
 * a cushion against late ones; each gap makes the cushion larger. What gathers beyond it, because two clocks
 * differ or after a stall, is left out where it is quiet, and cut at LIMIT_S: a conversation must not run late.
 * Posts `{level, stored, gaps, dropped}`; `stored` and `dropped` are samples, quiet ones not counted as dropped.
 */
class Playback extends AudioWorkletProcessor {
  static PAGE_S = 0.08;
  static CUSHION_S = 0.04;
  static WIDEN_S = 0.02;
  static WIDEST_S = 0.16;
  static LIMIT_S = 0.32;
  static QUIET = 1e-6; // mean square, -60 dBFS

  #pieces = [];
  #offset = 0; // into the first piece
  #stored = 0;
  #cushion = Playback.CUSHION_S * sampleRate;
  #wait = this.#cushion; // samples until playing (again) once there is something
  #gaps = 0;
  #dropped = 0;
  #level = new Level();

  constructor() {
    super();
    const size = sampleRate / 50;
    this.port.onmessage = ({ data }) => {
      for (let at = 0; at < data.length; at += size) this.#store(data.subarray(at, at + size));
    };
  }

  #store(piece) {
    const enough = this.#cushion + Playback.PAGE_S * sampleRate;
    if (this.#stored > enough && isQuiet(piece)) return;
    this.#pieces.push(piece);
    this.#stored += piece.length;
    if (this.#stored > Playback.LIMIT_S * sampleRate) {
      const surplus = new Float32Array(this.#stored - Math.round(enough));
      this.#dropped += this.#read(surplus);
    }
  }

  process(_inputs, [[output]]) {
    if (this.#stored && this.#wait > 0) this.#wait -= output.length;
    else if (this.#wait <= 0 && this.#read(output) < output.length) {
      this.#gaps++;
      this.#cushion = Math.min(this.#cushion + Playback.WIDEN_S * sampleRate, Playback.WIDEST_S * sampleRate);
      this.#wait = this.#cushion;
    }
    if (this.#level.add(output)) {
      const report = { level: this.#level.take(), stored: this.#stored, gaps: this.#gaps, dropped: this.#dropped };
      this.port.postMessage(report);
    }
    return true;
  }

  /** Moves samples from the store into `output`; returns how many there were. */
  #read(output) {
    let filled = 0;
    while (filled < output.length && this.#pieces.length) {
      const piece = this.#pieces[0];
      const count = Math.min(piece.length - this.#offset, output.length - filled);
      output.set(piece.subarray(this.#offset, this.#offset + count), filled);
      filled += count;
      this.#offset += count;
      if (this.#offset === piece.length) {
        this.#pieces.shift();
        this.#offset = 0;
      }
    }
    this.#stored -= filled;
    return filled;
  }
}

registerProcessor("capture", Capture);
registerProcessor("playback", Playback);
