// A sample of a voice, said by the running model itself: a short session with silence in place of the user. It is kept
// in the browser, so that it costs one session only once.

import { PACKET, RATE, makeDecoder, makeEncoder } from "../audio/codec.js";
import { OggMuxer, audioPages } from "../audio/ogg.js";
import { Sound } from "../audio/sound.js";
import { t } from "../i18n.js";
import { chatUrl } from "../service.js";
import { Session } from "../session.js";
import { pack, unpack } from "../store/packets.js";
import { endWords } from "./words.js";

const ROLE = "You enjoy having a good conversation.";
const SECONDS = 6;
const PER_PAGE = 4;
const AUDIBLE = 1e-5; // mean square

export class Sample {
  voice;
  #options;
  #sound;
  #decoder;
  #encoder;
  #session;
  #over;
  #end;
  #decoded = 0;
  #loudest = 0;

  /** `options`: {model, history, key}. */
  constructor(voice, options) {
    this.voice = voice;
    this.#options = options;
    this.#over = new Promise((resolve, reject) => (this.#end = { resolve, reject }));
    this.#over.catch(() => {}); // who waits for it is told
  }

  stop() {
    this.#end.resolve();
  }

  /** Until it was heard; `making()` when the model has to make it first. Throws an Error with words. */
  async play(making) {
    const name = `${this.#options.model}/${this.voice}`;
    try {
      const kept = await this.#options.history.sample(name);
      await this.#open();
      if (kept) this.#replay(unpack(kept));
      else {
        making();
        this.#make(name);
      }
      await this.#over;
    } finally {
      this.#session?.close();
      this.#encoder?.close();
      this.#decoder?.close();
      this.#sound?.close();
    }
  }

  #tick = () => {};

  async #open() {
    const failed = (error) => this.#end.reject(error);
    this.#sound = new Sound({ played: () => this.#tick() });
    this.#decoder = await makeDecoder((samples) => {
      this.#loudest = Math.max(this.#loudest, samples.reduce((sum, sample) => sum + sample * sample, 0) / samples.length);
      const at = this.#decoded;
      this.#decoded += samples.length;
      this.#sound.play(samples, at);
    }, failed);
    await this.#sound.open();
  }

  /** Calls `step()` for each 80 ms of the loudspeaker's clock. */
  #every80ms(step) {
    let next = this.#sound.now;
    this.#tick = () => {
      for (; this.#sound.now >= next; next += PER_PAGE * PACKET) step();
    };
  }

  #replay(packets) {
    let at = 0;
    const pages = packets.length;
    this.#every80ms(() => {
      if (at < pages) this.#decoder.decode(packets[at++]);
      else if (this.#sound.now && at++ > pages + 4) this.#end.resolve();
    });
  }

  async #make(name) {
    const muxer = new OggMuxer(crypto.getRandomValues(new Uint32Array(1))[0]);
    const heard = [];
    let [packets, pages] = [[], 0];
    this.#encoder = await makeEncoder((packet) => {
      packets.push(packet);
      if (packets.length < PER_PAGE) return;
      this.#session.send(muxer.page(packets, ++pages * PER_PAGE * PACKET));
      packets = [];
    }, (error) => this.#end.reject(error));
    this.#session = new Session(chatUrl({ voice: this.voice, role: { text: ROLE }, key: this.#options.key }), {
      state: (state) => {
        if (state !== "live") return;
        for (const page of muxer.headers(0, RATE)) this.#session.send(page);
        this.#every80ms(() => {
          for (let n = 0; n < PER_PAGE; n++) this.#encoder.encode(new Float32Array(PACKET));
        });
      },
      details: () => {},
      text: () => {},
      metadata: () => {},
      audio: (payload) => {
        for (const page of audioPages(payload)) {
          for (const packet of page.packets) {
            heard.push(packet.slice());
            this.#decoder.decode(packet);
          }
        }
        if (this.#decoded >= SECONDS * RATE) this.#finish(name, heard);
      },
      end: (ending) => this.#end.reject(new Error(endWords(ending))),
    });
    this.#session.open();
  }

  #finish(name, heard) {
    if (this.#loudest < AUDIBLE) return this.#end.reject(new Error(t("voice.silent", { seconds: SECONDS })));
    this.#options.history.putSample(name, pack(heard)).catch(() => {}); // no room: it is made again next time
    this.#end.resolve();
  }
}
