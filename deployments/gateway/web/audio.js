// Microphone to Opus packets, Opus packets to the loudspeaker, by WebCodecs and audio worklets.

export const SAMPLE_RATE = 48_000; // of Opus itself, and of every WebCodecs Opus decoder's output
export const PRE_SKIP = 312; // libopus's look-ahead of 6.5 ms; browsers differ or get the unit wrong
const PACKET_S = 0.02;

const ENCODING = {
  codec: "opus",
  sampleRate: SAMPLE_RATE,
  numberOfChannels: 1,
  bitrate: 32_000,
  opus: { frameDuration: PACKET_S * 1e6 },
};
const DECODING = { codec: "opus", sampleRate: SAMPLE_RATE, numberOfChannels: 1 };

const OPENING_ERRORS = {
  AbortError: "The service cannot be reached.", // for the worklet's module
  NotAllowedError: "The microphone was refused. Allow it for this page in your browser, then connect again.",
  NotFoundError: "No microphone was found. Plug one in, then connect again.",
  NotReadableError: "The microphone cannot be used; another program may hold it.",
};

/** Samples at 48 kHz in an Opus packet, by its first two bytes (RFC 6716, section 3.1). */
export function packetSamples(packet) {
  const config = packet[0] >> 3;
  const code = packet[0] & 3;
  const ms = config < 12 ? [10, 20, 40, 60][config & 3] : config < 16 ? [10, 20][config & 1] : 2.5 * 2 ** (config & 3);
  return ms * (SAMPLE_RATE / 1_000) * (code === 3 ? packet[1] & 63 : code ? 2 : 1);
}

/** Why this page cannot talk here, in words for people, or null. */
export async function obstacle() {
  if (!window.isSecureContext) {
    return `Browsers give the microphone to secure pages only, and ${location.origin} is not one. Open this page `
      + "by https://, or on the machine itself by http://localhost.";
  }
  if (!navigator.mediaDevices?.getUserMedia) return "This browser gives web pages no microphone.";
  const browsers = "Chrome or Edge 94, Firefox 130 on a desktop, Safari 26, or anything newer, can.";
  if (!("AudioEncoder" in window) || !("AudioDecoder" in window) || !("AudioWorkletNode" in window)) {
    return `This browser cannot encode speech in web pages (WebCodecs). ${browsers}`;
  }
  const [encodes, decodes] = await Promise.all([
    AudioEncoder.isConfigSupported(ENCODING),
    AudioDecoder.isConfigSupported(DECODING),
  ]);
  return encodes.supported && decodes.supported ? null : `This browser has no Opus codec for web pages. ${browsers}`;
}

/** Both directions of sound for one conversation. Open it from a click, or browsers keep it silent. */
export class Sound {
  #context;
  #stream;
  #capture;
  #playback;
  #encoder;
  #decoder;
  #handlers;
  #sending = false;
  #given = 0; // samples, to the decoder

  /**
   * Handlers: `packet(bytes)` for each 20 ms spoken after `start`; `spoken(level)`; `heard(report)` (see
   * worklets.js); `failed(message)` when a codec or the device gives up. Levels are mean squares.
   */
  constructor(handlers) {
    this.#handlers = handlers;
  }

  /** Asks for the microphone and readies both codecs. Throws an Error with words for people. */
  async open() {
    try {
      this.#context = new AudioContext({ sampleRate: SAMPLE_RATE, latencyHint: "interactive" });
      const audio = { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true };
      this.#stream = await navigator.mediaDevices.getUserMedia({ audio });
      await this.#context.audioWorklet.addModule(new URL("worklets.js", import.meta.url));
      await this.#context.resume();
    } catch (error) {
      await this.close();
      throw new Error(OPENING_ERRORS[error.name] ?? `The sound could not be started: ${error.message}`);
    }
    const failed = (error) => this.#handlers.failed(`The speech codec failed: ${error.message}`);
    this.#encoder = new AudioEncoder({ output: (chunk) => this.#encoded(chunk), error: failed });
    this.#encoder.configure(ENCODING);
    this.#decoder = new AudioDecoder({ output: (data) => this.#decoded(data), error: failed });
    this.#decoder.configure(DECODING);
    this.#connect();
  }

  #connect() {
    const mono = { channelCount: 1, channelCountMode: "explicit" };
    this.#capture = new AudioWorkletNode(this.#context, "capture", { ...mono, numberOfOutputs: 0 });
    this.#capture.port.onmessage = ({ data }) => this.#captured(data);
    this.#context.createMediaStreamSource(this.#stream).connect(this.#capture);
    this.#playback = new AudioWorkletNode(this.#context, "playback", { numberOfInputs: 0, outputChannelCount: [1] });
    this.#playback.port.onmessage = ({ data }) => this.#handlers.heard(data);
    this.#playback.connect(this.#context.destination);
    const [track] = this.#stream.getAudioTracks();
    track.onended = () => this.#handlers.failed("The microphone was taken away.");
  }

  /** From now on what is spoken is encoded. */
  start() {
    this.#sending = true;
  }

  /** A muted microphone goes on, with silence: the conversation's clock is the user's audio. */
  set muted(muted) {
    for (const track of this.#stream.getAudioTracks()) track.enabled = !muted;
  }

  /** Decodes and plays one Opus packet of any length. */
  play(packet) {
    if (this.#decoder?.state !== "configured") return;
    const timestamp = (this.#given / SAMPLE_RATE) * 1e6;
    this.#given += packetSamples(packet);
    this.#decoder.decode(new EncodedAudioChunk({ type: "key", timestamp, data: packet }));
  }

  async close() {
    this.#sending = false;
    for (const track of this.#stream?.getTracks() ?? []) {
      track.onended = null;
      track.stop();
    }
    for (const codec of [this.#encoder, this.#decoder]) if (codec && codec.state !== "closed") codec.close();
    if (this.#context && this.#context.state !== "closed") await this.#context.close();
  }

  #captured({ samples, level }) {
    if (level !== undefined) this.#handlers.spoken(level);
    if (!samples || !this.#sending || this.#encoder.state !== "configured") return;
    const data = new AudioData({
      format: "f32-planar",
      sampleRate: SAMPLE_RATE,
      numberOfFrames: samples.length,
      numberOfChannels: 1,
      timestamp: performance.now() * 1e3,
      data: samples,
    });
    this.#encoder.encode(data);
    data.close();
  }

  #encoded(chunk) {
    const packet = new Uint8Array(chunk.byteLength);
    chunk.copyTo(packet);
    if (this.#sending) this.#handlers.packet(packet);
  }

  #decoded(data) {
    const samples = new Float32Array(data.numberOfFrames);
    data.copyTo(samples, { planeIndex: 0, format: "f32-planar" });
    data.close();
    this.#playback.port.postMessage(samples, [samples.buffer]);
  }
}
