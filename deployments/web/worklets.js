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
 * Plays what is posted to it. It starts with START_S in store; over LIMIT_S it drops the oldest, since a
 * conversation that runs late stays late; after a gap it fills up to START_S again.
 * Posts `{level, stored, gaps, dropped}`, `stored` in samples.
 */
class Playback extends AudioWorkletProcessor {
  static START_S = 0.08;
  static LIMIT_S = 0.24;

  #pieces = [];
  #offset = 0; // into the first piece
  #stored = 0;
  #playing = false;
  #gaps = 0;
  #dropped = 0;
  #level = new Level();

  constructor() {
    super();
    this.port.onmessage = ({ data }) => {
      this.#pieces.push(data);
      this.#stored += data.length;
      if (this.#stored <= Playback.LIMIT_S * sampleRate) return;
      const surplus = this.#stored - Math.round(Playback.START_S * sampleRate);
      this.#read(new Float32Array(surplus));
      this.#dropped += surplus;
    };
  }

  process(_inputs, [[output]]) {
    if (!this.#playing && this.#stored >= Playback.START_S * sampleRate) this.#playing = true;
    if (this.#playing && this.#read(output) < output.length) {
      this.#playing = false;
      this.#gaps++;
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
