// One conversation: a Session, the Sound of this machine, the codecs between them, and what is written down of it.
// Knows no page: it tells its handlers.

import { PACKET, RATE, makeDecoder, makeEncoder } from "./audio/codec.js";
import { OggMuxer, audioPages } from "./audio/ogg.js";
import { Sound, SoundError } from "./audio/sound.js";
import { Levels, SpeechDetector, decibels } from "./levels.js";
import { Session } from "./session.js";
import { Recorder } from "./store/recorder.js";
import { Timing } from "./timing.js";
import { Transcript } from "./transcript.js";

const PACKETS_PER_PAGE = 4; // 80 ms: one frame of the service
// Declared to be none, though libopus looks 6.5 ms ahead: so a frame of the service ends where a page of ours does,
// and none waits for the next.
const PRE_SKIP = 0;
const DRIFT = RATE / 100; // frames that the microphone's clock may be off before it is written down

export class Talk {
  levels = { user: new Levels(), agent: new Levels() };
  speech = { user: new SpeechDetector(), agent: new SpeechDetector() };
  transcript;
  timing = new Timing();
  details = {}; // of the session, as the service tells them
  #handlers;
  #sound;
  #session;
  #encoder;
  #decoder;
  #recorder = null;
  #muxer = null;
  #packets = []; // of the page that is not full yet
  #pages = 0; // of this socket
  #encoded = 0; // samples
  #decoded = 0;
  #nextFrame = null; // of the microphone, where it goes on without a gap
  #zero = null; // the clock's frame at which the conversation began
  #stored = 0; // samples in the jitter buffer
  #resumed = null; // what the service said of the resume that is going on
  #told = []; // [seconds, ms]: where the service's clock of the user stands, for each socket
  #url;
  #devices;
  #keep;
  #muted = false;
  #over = false;

  /**
   * `url`: of the chat; `devices`: {microphone, loudspeaker, echo, noise, gain}; `keep`: null, or {history, talk} to
   * write it down. Handlers: `state(name, detail)` as Session's and "microphone"; `details(object)`;
   * `entry(entry, index)` of the transcript; `metadata(object)`; `notice(key)` of something that changed on the way;
   * `end(ending)`, once.
   */
  constructor(url, devices, keep, handlers) {
    this.#url = url;
    this.#devices = devices;
    this.#keep = keep;
    this.#handlers = handlers;
    this.transcript = new Transcript((entry, index) => handlers.entry(entry, index));
  }

  async start() {
    this.#handlers.state("microphone");
    this.#sound = new Sound({
      captured: (block) => this.#captured(block),
      played: (report) => this.#played(report),
      failed: () => this.#microphoneTaken(),
    });
    this.#sound.muted = this.#muted;
    const failed = (error) => this.#end({ kind: "sound", key: "sound.codec", words: error.message });
    try {
      await this.#sound.open(this.#devices);
      await this.#sound.listen(this.#devices);
      this.#encoder = await makeEncoder((packet) => this.#send(packet), failed);
      this.#decoder = await makeDecoder((samples) => this.#play(samples), failed);
    } catch (error) {
      if (!(error instanceof SoundError)) return failed(error);
      return this.#end({ kind: "sound", key: error.key, words: error.detail });
    }
    if (this.#over) return this.#closeSound();
    this.#session = new Session(this.#url, {
      state: (name, detail) => this.#state(name, detail),
      details: (details) => this.#learn(details),
      audio: (payload) => this.#hear(payload),
      text: (piece) => this.transcript.agentText(this.seconds + this.#stored / RATE, piece),
      metadata: (metadata) => this.#metadata(metadata),
      end: (ending) => this.#end(ending),
    });
    this.#session.open();
  }

  end() {
    if (this.#session) this.#session.close();
    else this.#end({ kind: "asked" });
  }

  /** Seconds since the conversation began; 0 before. */
  get seconds() {
    return this.#zero === null ? 0 : (this.#sound.now - this.#zero) / RATE;
  }

  get live() {
    return this.#zero !== null && !this.#over;
  }

  set muted(muted) {
    this.#muted = muted;
    if (this.#sound) this.#sound.muted = muted;
  }

  async useDevices(devices) {
    this.#devices = devices;
    await this.#sound.useLoudspeaker(devices.loudspeaker);
    await this.#listenAgain();
  }

  /** For a page that is about to go. */
  flush() {
    this.#recorder?.flush();
  }

  async #microphoneTaken() {
    this.#devices = { ...this.#devices, microphone: "" };
    if (await this.#listenAgain()) this.#handlers.notice("sound.switched");
  }

  async #listenAgain() {
    this.#nextFrame = null;
    try {
      await this.#sound.listen(this.#devices);
      return true;
    } catch (error) {
      this.#end({ kind: "sound", key: error.key, words: error.detail });
      return false;
    }
  }

  #state(name, detail) {
    if (name === "live") this.#begin();
    this.#handlers.state(name, detail);
  }

  #begin() {
    if (this.#zero === null) {
      this.#zero = this.#sound.now;
      this.#startRecord();
    }
    this.#muxer = new OggMuxer(crypto.getRandomValues(new Uint32Array(1))[0]);
    this.#packets = [];
    this.#pages = 0;
    this.#nextFrame = null;
    this.timing.restart();
    this.#told.push([this.seconds, 80 * (this.#resumed?.frame ?? 0)]);
    this.#resumed = null;
    for (const page of this.#muxer.headers(PRE_SKIP, RATE)) this.#session.send(page);
  }

  #startRecord() {
    if (!this.#keep) return;
    const { history, talk } = this.#keep;
    this.#recorder = new Recorder(history, { ...talk, ...this.#named(this.details) }, this.levels, (error) => {
      this.#handlers.notice(error?.name === "QuotaExceededError" ? "history.full" : "history.failed");
    });
  }

  #named({ session = null, voice, text_seed = null, audio_seed = null, recorded = false }) {
    return { session, text_seed, audio_seed, recorded, ...(voice ? { voice } : {}) };
  }

  #learn(details) {
    const { resumed } = details;
    if (resumed) {
      this.#resumed = resumed;
      if (resumed.lost_text) this.transcript.agentText(this.seconds, resumed.lost_text);
    }
    this.details = { ...this.details, ...details };
    this.#recorder?.note(this.#named(this.details));
    this.#handlers.details(this.details);
  }

  #metadata(metadata) {
    if (metadata.type === "user_text") {
      const at = (ms) => this.#secondsOf(ms);
      this.transcript.userText(at(metadata.start_ms), at(metadata.end_ms), String(metadata.text ?? ""));
    }
    this.#handlers.metadata(metadata);
  }

  /** Seconds of the conversation at which the service's clock of the user shows `ms`. */
  #secondsOf(ms) {
    const [seconds, from] = this.#told.findLast(([, start]) => start <= ms) ?? [0, 0];
    return seconds + (ms - from) / 1e3;
  }

  #captured({ samples, frame, level }) {
    const db = decibels(level);
    if (this.#zero === null || this.#over) return;
    const seconds = (frame - this.#zero) / RATE;
    this.#note("user", seconds, PACKET / RATE, db);
    if (this.#session.live) {
      if (this.#nextFrame === null || Math.abs(frame - this.#nextFrame) > DRIFT) {
        this.#recorder?.mark("sent", seconds, this.#encoded);
        this.#nextFrame = frame;
      }
      this.#nextFrame += PACKET;
      this.#encoded += PACKET;
      this.#encoder.encode(samples);
    } else this.#nextFrame = null;
    this.#recorder?.advance(this.seconds, this.transcript.entries);
  }

  #note(side, seconds, lasts, db) {
    this.levels[side].put(seconds, lasts, db);
    const speech = this.speech[side].push(seconds, lasts, db);
    if (speech && side === "user") this.transcript.userSpeech(speech.start, speech.end, this.speech.agent.loudAt(seconds));
    if (this.speech[side].speaking) this.levels[side].mark(speech ? speech.start : seconds, seconds + lasts);
    else if (speech) this.levels[side].mark(speech.end, seconds + lasts, false); // the hangover was none
  }

  #send(packet) {
    if (this.#over) return;
    this.#recorder?.sent(packet);
    this.#packets.push(packet);
    if (this.#packets.length < PACKETS_PER_PAGE) return;
    this.#pages++;
    this.#session.send(this.#muxer.page(this.#packets, this.#pages * PACKETS_PER_PAGE * PACKET));
    this.#packets = [];
    this.timing.sent();
  }

  #hear(payload) {
    for (const { sequence, granule, packets } of audioPages(payload)) {
      this.#session.heard = sequence - 1; // the first page with audio has number 2
      this.timing.received(granule / (PACKETS_PER_PAGE * PACKET));
      for (const packet of packets) {
        this.#recorder?.heard(packet.slice());
        this.#decoder.decode(packet);
      }
    }
  }

  #play(samples) {
    if (this.#over) return;
    const at = this.#decoded;
    this.#decoded += samples.length;
    this.#sound.play(samples, at);
  }

  #played({ frame, level, stored, target, underruns, dropped, marks }) {
    if (this.#zero === null || this.#over) return;
    this.#stored = stored;
    const db = decibels(level);
    this.#note("agent", (frame - this.#zero) / RATE, 1_024 / RATE, db);
    for (const [at, place] of marks) this.#recorder?.mark("heard", (at - this.#zero) / RATE, place);
    this.timing.buffer({ stored, target, underruns, dropped });
  }

  async #end(ending) {
    if (this.#over) return;
    const seconds = this.#sound && this.#zero !== null ? this.seconds : 0;
    this.#over = true;
    const last = this.speech.user.stop();
    if (last) this.transcript.userSpeech(last.start, last.end, false);
    if (this.#recorder) {
      this.#recorder.note({ seconds, entries: this.transcript.entries, timing: this.timing.summary() });
      await this.#recorder.finish(ending.kind);
    }
    this.#session?.close();
    this.#closeSound();
    this.#handlers.end({ ...ending, seconds, talk: this.#recorder?.talk ?? null });
  }

  #closeSound() {
    this.#encoder?.close();
    this.#decoder?.close();
    this.#sound.close();
  }
}

