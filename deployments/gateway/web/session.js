// One conversation: the WebSocket protocol of /api/chat around a Sound. Knows no page.

import { PRE_SKIP, SAMPLE_RATE, Sound } from "./audio.js";
import { OggMuxer, audioPages } from "./ogg.js";

const Kind = { HANDSHAKE: 0, AUDIO: 1, TEXT: 2, METADATA: 4, ERROR: 5 };
const PACKETS_PER_PAGE = 2; // 40 ms
const PACKET_SAMPLES = SAMPLE_RATE / 50;
const FRAME_SAMPLES = SAMPLE_RATE * 0.08; // the agent answers each frame of ours with one of its own
const PATIENCE_MS = 10_000; // without a message, once live

const CLOSE_WORDS = {
  1000: "The conversation is over.",
  1001: "The service is going away.",
  1006: "The connection to the service was lost.",
  1012: "The server running this conversation failed or is being replaced. Connect again.",
  1013: "All slots are taken. Try again in a moment.",
};

export class Session {
  #url;
  #handlers;
  #socket;
  #sound;
  #muxer = new OggMuxer(crypto.getRandomValues(new Uint32Array(1))[0]);
  #packets = [];
  #granule = 0;
  #frameSent = []; // when each 80 ms of ours had left, in ms of performance.now()
  #words = ""; // the service's own about its error
  #timer;
  #live = false;
  #over = false;

  /**
   * Handlers: `state(name, detail)` with name `microphone`, `connecting`, `queued`, `warming` or `live`;
   * `recorded()` when the service keeps a record; `text(piece)`; `latency(ms)`; `spoken(level)`; `heard(report)`; `end(message)`, last of all, where the
   * message is null if the end was asked for.
   */
  constructor(url, handlers) {
    this.#url = url;
    this.#handlers = handlers;
  }

  async open() {
    this.#handlers.state("microphone");
    this.#sound = new Sound({
      packet: (packet) => this.#speak(packet),
      spoken: (level) => this.#handlers.spoken(level),
      heard: (report) => this.#handlers.heard(report),
      failed: (message) => this.#finish(message),
    });
    try {
      await this.#sound.open();
    } catch (error) {
      this.#finish(error.message);
      return;
    }
    if (this.#over) {
      await this.#sound.close();
      return;
    }
    this.#handlers.state("connecting");
    this.#socket = new WebSocket(this.#url);
    this.#socket.binaryType = "arraybuffer";
    let accepted = false;
    this.#socket.onopen = () => {
      accepted = true;
      this.#handlers.state("warming");
    };
    this.#socket.onmessage = ({ data }) => this.#receive(data);
    this.#socket.onclose = async ({ code, reason }) => {
      const refused = accepted ? "" : await this.#whyRefused();
      this.#finish(this.#words || reason || refused || CLOSE_WORDS[code]
        || `The service closed the connection (code ${code}).`);
    };
  }

  // Browsers tell scripts nothing about an upgrade that was refused, so the question is asked again.
  async #whyRefused() {
    const url = new URL(this.#url);
    url.protocol = url.protocol.replace("ws", "http");
    url.pathname = url.pathname.replace(/chat$/, "admission");
    try {
      const answer = await fetch(url, { cache: "no-store" });
      if (answer.status === 204) return "The service was busy. Try again.";
      return answer.headers.get("content-type")?.startsWith("text/plain") ? (await answer.text()).trim() : "";
    } catch {
      return ""; // it cannot be reached at all
    }
  }

  close() {
    this.#finish(null);
  }

  set muted(muted) {
    this.#sound.muted = muted;
  }

  #receive(data) {
    const bytes = new Uint8Array(data);
    const payload = bytes.subarray(1);
    clearTimeout(this.#timer);
    if (this.#granule || bytes[0] === Kind.HANDSHAKE) {
      this.#timer = setTimeout(() => this.#finish("The service has fallen silent."), PATIENCE_MS);
    }
    try {
      switch (bytes[0]) {
        case Kind.HANDSHAKE: return this.#start();
        case Kind.AUDIO: return this.#hear(payload);
        case Kind.TEXT: return this.#handlers.text(new TextDecoder().decode(payload));
        case Kind.METADATA: return this.#learn(JSON.parse(new TextDecoder().decode(payload)));
        case Kind.ERROR: this.#words = new TextDecoder().decode(payload);
      }
    } catch (error) {
      this.#finish(error.message);
    }
  }

  #start() {
    this.#live = true;
    this.#handlers.state("live");
    for (const page of this.#muxer.headers(PRE_SKIP, SAMPLE_RATE)) this.#send(page);
    this.#sound.start();
  }

  #learn(details) {
    if (details.type === "session" && details.recorded) this.#handlers.recorded();
    if (this.#live) return;
    if (details.type === "queue" && details.position > 0) this.#handlers.state("queued", details.position);
    else if (details.type === "queue" || details.type === "session") this.#handlers.state("warming");
  }

  #speak(packet) {
    this.#packets.push(packet);
    if (this.#packets.length < PACKETS_PER_PAGE) return;
    this.#granule += PACKETS_PER_PAGE * PACKET_SAMPLES;
    this.#send(this.#muxer.page(this.#packets, this.#granule));
    this.#packets = [];
    if (this.#granule % FRAME_SAMPLES === 0) this.#frameSent.push(performance.now());
  }

  #hear(payload) {
    for (const { granule, packets } of audioPages(payload)) {
      for (const packet of packets) this.#sound.play(packet);
      const sent = this.#frameSent[Math.round(granule / FRAME_SAMPLES) - 1];
      if (sent !== undefined) this.#handlers.latency(performance.now() - sent);
    }
  }

  #send(page) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return;
    const message = new Uint8Array(1 + page.length);
    message[0] = Kind.AUDIO;
    message.set(page, 1);
    this.#socket.send(message);
  }

  #finish(message) {
    if (this.#over) return;
    this.#over = true;
    clearTimeout(this.#timer);
    if (this.#socket) {
      this.#socket.onmessage = this.#socket.onclose = null;
      this.#socket.close();
    }
    this.#sound?.close();
    this.#handlers.end(message);
  }
}
