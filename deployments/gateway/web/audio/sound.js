// Microphone and loudspeaker of this machine: 20 ms of samples out, samples in, on one clock (`now`, in frames at
// 48 kHz). Knows no codec and no conversation.

import { RATE } from "./codec.js";

const TONE_S = 0.6;
const START_MS = 8_000; // a loudspeaker that has not started by then is none: browsers wait for ever for a device

/** A fault of devices or of the browser; `key` names its words. */
export class SoundError extends Error {
  constructor(key, detail = "") {
    super(`${key} ${detail}`.trim());
    this.key = key;
    this.detail = detail;
  }
}

const OPENING_ERRORS = {
  AbortError: "sound.unreachable", // of the worklet's module
  NotAllowedError: "sound.denied",
  NotFoundError: "sound.none",
  NotReadableError: "sound.busy",
  OverconstrainedError: "sound.gone",
};

function explain(error) {
  return error instanceof SoundError ? error : new SoundError(OPENING_ERRORS[error.name] ?? "sound.failed", error.message);
}

/** Whether the loudspeaker can be chosen. */
export const canChooseLoudspeaker = "setSinkId" in (window.AudioContext?.prototype ?? {});

/** `{microphones, loudspeakers}`, each `[{id, label}]`; labels are empty until the microphone was allowed once. */
export async function listDevices() {
  const devices = (await navigator.mediaDevices?.enumerateDevices?.().catch(() => [])) ?? [];
  const of = (kind) => devices.filter((device) => device.kind === kind && device.deviceId)
    .map(({ deviceId, label }) => ({ id: deviceId, label }));
  return { microphones: of("audioinput"), loudspeakers: of("audiooutput") };
}

/** Open one from a click, or browsers keep it silent. */
export class Sound {
  #context;
  #input; // the context of the microphone: another one where the browser cannot resample
  #stream;
  #source;
  #capture;
  #playback;
  #handlers;
  #muted = false;
  #closed = false;

  /**
   * Handlers: `captured({samples, frame, level})` each 20 ms; `played(report)` each 20 ms (see worklets.js);
   * `failed(SoundError)` when a device is taken away.
   */
  constructor(handlers) {
    this.#handlers = handlers;
  }

  /** Starts the clock and the loudspeaker. Raises SoundError. */
  async open({ loudspeaker = "" } = {}) {
    try {
      this.#context = new AudioContext({ sampleRate: RATE, latencyHint: "interactive" });
      if (loudspeaker) await this.useLoudspeaker(loudspeaker);
      await this.#context.audioWorklet.addModule(new URL("worklets.js", import.meta.url));
      await this.#start();
    } catch (error) {
      this.close();
      throw explain(error);
    }
    if (this.#closed) return;
    this.#playback = new AudioWorkletNode(this.#context, "playback", { numberOfInputs: 0, outputChannelCount: [1] });
    this.#playback.port.onmessage = ({ data }) => this.#handlers.played?.(data);
    this.#playback.connect(this.#context.destination);
  }

  /** Asks for the microphone and starts it, in place of the one before. Raises SoundError. */
  async listen({ microphone = "", echo = true, noise = true, gain = true } = {}) {
    if (!navigator.mediaDevices?.getUserMedia) throw new SoundError(window.isSecureContext ? "sound.absent" : "sound.insecure");
    const audio = { channelCount: 1, echoCancellation: echo, noiseSuppression: noise, autoGainControl: gain };
    if (microphone) audio.deviceId = { exact: microphone };
    try {
      const stream = await this.#ask(audio);
      if (this.#closed) return stream.getTracks().forEach((track) => track.stop());
      this.#stopListening();
      this.#stream = stream;
      await this.#connect();
    } catch (error) {
      throw explain(error);
    }
    this.muted = this.#muted;
    const [track] = this.#stream.getAudioTracks();
    track.onended = () => this.#handlers.failed?.(new SoundError("sound.taken"));
  }

  async #ask(audio) {
    try {
      return await navigator.mediaDevices.getUserMedia({ audio });
    } catch (error) {
      if (error.name !== "OverconstrainedError" || !audio.deviceId) throw error;
      return navigator.mediaDevices.getUserMedia({ audio: { ...audio, deviceId: undefined } }); // it was unplugged
    }
  }

  async #start() {
    let timer;
    const late = new Promise((_, reject) => {
      timer = setTimeout(() => reject(new SoundError("sound.output")), START_MS);
    });
    try {
      await Promise.race([this.#context.resume(), late]);
    } finally {
      clearTimeout(timer);
    }
  }

  async #connect() {
    try {
      this.#source = this.#context.createMediaStreamSource(this.#stream);
      this.#input = this.#context;
    } catch (error) {
      if (error.name !== "NotSupportedError") throw error; // Firefox joins no devices of different rates
      this.#input = new AudioContext();
      await this.#input.audioWorklet.addModule(new URL("worklets.js", import.meta.url));
      this.#source = this.#input.createMediaStreamSource(this.#stream);
    }
    const mono = { channelCount: 1, channelCountMode: "explicit", numberOfOutputs: 0 };
    this.#capture = new AudioWorkletNode(this.#input, "capture", mono);
    const { sampleRate } = this.#input;
    const shift = this.#context.currentTime - this.#input.currentTime;
    this.#capture.port.onmessage = ({ data }) => {
      if (this.#closed) return;
      this.#handlers.captured?.({ ...data, frame: Math.round((data.frame / sampleRate + shift) * RATE) });
    };
    this.#source.connect(this.#capture);
  }

  get now() {
    return Math.round(this.#context.currentTime * RATE);
  }

  /** What the browser says lies between the loudspeaker's clock and the ear, in seconds. */
  get outputLatency() {
    return this.#context?.outputLatency || this.#context?.baseLatency || 0;
  }

  async useLoudspeaker(id) {
    if (canChooseLoudspeaker) await this.#context.setSinkId(id).catch(() => {}); // unplugged: the default one
  }

  /** A muted microphone goes on, with silence: the conversation's clock is the user's audio. */
  set muted(muted) {
    this.#muted = muted;
    for (const track of this.#stream?.getAudioTracks() ?? []) track.enabled = !muted;
  }

  /** Hands decoded samples to the loudspeaker; `at` is their place in the decoded stream. */
  play(samples, at) {
    this.#playback?.port.postMessage({ samples, at }, [samples.buffer]);
  }

  /** A short tone of two notes, to hear whether the loudspeaker works. */
  tone() {
    const start = this.#context.currentTime;
    const gain = new GainNode(this.#context, { gain: 0 });
    gain.connect(this.#context.destination);
    for (const [number, frequency] of [440, 660].entries()) {
      const from = start + (number * TONE_S) / 2;
      gain.gain.setTargetAtTime(0.2, from, 0.02);
      gain.gain.setTargetAtTime(0, from + TONE_S / 3, 0.04);
      const note = new OscillatorNode(this.#context, { frequency });
      note.connect(gain);
      note.start(from);
      note.stop(from + TONE_S / 2);
    }
  }

  #stopListening() {
    for (const track of this.#stream?.getTracks() ?? []) {
      track.onended = null;
      track.stop();
    }
    if (this.#capture) {
      this.#capture.port.onmessage = null;
      this.#source.disconnect();
    }
    if (this.#input && this.#input !== this.#context) this.#input.close();
    this.#stream = this.#capture = this.#source = this.#input = undefined;
  }

  close() {
    this.#closed = true;
    this.#stopListening();
    if (this.#playback) this.#playback.port.onmessage = null;
    // Not waited for: one whose loudspeaker never started is never closed either.
    if (this.#context && this.#context.state !== "closed") this.#context.close().catch(() => {});
  }
}
