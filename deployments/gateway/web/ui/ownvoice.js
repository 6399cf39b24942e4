// A voice from a recording of the user's: by microphone or from a file, with consent. Hidden where the service takes
// none. The service forgets it after a while, and so does this page.

import { Sound, SoundError } from "../audio/sound.js";
import { RATE } from "../audio/codec.js";
import { has, t } from "../i18n.js";
import { decibels } from "../levels.js";
import { clock } from "../transcript.js";
import { $, bytes, h, roughly } from "./dom.js";
import { chosenDevices, showLevel } from "./soundcheck.js";

const UPLOAD_RATE = 24_000; // of the model

/** A mono wav of 16 bits of samples at 48 kHz, at UPLOAD_RATE. */
async function toWav(samples) {
  const length = Math.max(1, Math.floor((samples.length * UPLOAD_RATE) / RATE));
  const context = new OfflineAudioContext(1, length, UPLOAD_RATE);
  const buffer = new AudioBuffer({ length: samples.length, numberOfChannels: 1, sampleRate: RATE });
  buffer.copyToChannel(samples, 0);
  const source = new AudioBufferSourceNode(context, { buffer });
  source.connect(context.destination);
  source.start();
  const pcm = (await context.startRendering()).getChannelData(0);
  const view = new DataView(new ArrayBuffer(44 + 2 * length));
  for (const [at, text] of [[0, "RIFF"], [8, "WAVEfmt "], [36, "data"]]) {
    for (let n = 0; n < text.length; n++) view.setUint8(at + n, text.charCodeAt(n));
  }
  for (const [at, value] of [[4, 36 + 2 * length], [16, 16], [24, UPLOAD_RATE], [28, 2 * UPLOAD_RATE], [40, 2 * length]]) {
    view.setUint32(at, value, true);
  }
  for (const [at, value] of [[20, 1], [22, 1], [32, 2], [34, 16]]) view.setUint16(at, value, true);
  pcm.forEach((sample, n) => view.setInt16(44 + 2 * n, Math.max(-1, Math.min(1, sample)) * 32_767, true));
  return new Blob([view.buffer], { type: "audio/wav" });
}

export class OwnVoice {
  #made;
  #limits = null; // of the service: {seconds, bytes}
  #file = null; // {blob, words}
  #voice = null;
  #sound = null;
  #parts = [];
  #status = ""; // words

  /** `made({name})` when there is a voice, `made(null)` when it was forgotten. */
  constructor(made) {
    this.#made = made;
  }

  /** What `/api/info` says of own voices. */
  async offer(offer) {
    const allowed = offer?.allowed === "yes" || (offer?.allowed === "keys" && (await this.#keyAllows()));
    if (Boolean(this.#limits) === allowed) return;
    this.#limits = allowed ? offer : null;
    this.draw();
  }

  async #keyAllows() {
    if (!$("key").value) return false;
    const answer = await fetch(new URL("api/key", document.baseURI), { headers: this.#headers() }).catch(() => null);
    return answer?.ok ? Boolean((await answer.json()).own_voices) : false;
  }

  #headers() {
    return $("key").value ? { "x-api-key": $("key").value } : {};
  }

  draw() {
    const box = $("own-voice");
    box.hidden = !this.#limits;
    if (!this.#limits) return box.replaceChildren();
    const recording = Boolean(this.#sound);
    const record = h("button", { type: "button", class: "quiet", id: "own-record", "aria-pressed": String(recording), onclick: () => this.#toggle() },
      recording ? t("own.stop", { time: "0:00" }) : t("own.record"));
    const input = h("input", { type: "file", id: "own-file", accept: "audio/*", onchange: () => this.#choose(input.files[0]) });
    const pick = h("label", { class: "button quiet" }, t("own.upload"), input);
    const consent = h("input", { type: "checkbox", id: "own-consent" });
    const use = h("button", { type: "button", id: "own-use", onclick: () => this.#send(), disabled: true }, t("own.use"));
    consent.addEventListener("change", () => (use.disabled = !consent.checked || !this.#file));
    const level = h("div", { id: "own-level", class: "level", role: "meter", "aria-label": t("sound.level"), "aria-valuemin": -60, "aria-valuemax": 0, "aria-valuenow": -60 }, h("span"));
    box.replaceChildren(h("details", { open: recording || Boolean(this.#file || this.#voice) },
      h("summary", {}, t("own.title")),
      h("p", { class: "hint" }, t("own.lead", { most: this.#limits.seconds })),
      h("div", { class: "row" }, record, pick),
      level,
      this.#file && h("p", {}, this.#file.words),
      h("label", { class: "consent" }, consent, h("span", {}, t("own.consent"))),
      h("div", { class: "row" }, use, this.#voice && h("button", { type: "button", class: "quiet", id: "own-forget", onclick: () => this.#forget() }, t("own.forget"))),
      h("p", { id: "own-status", role: "status", class: "hint" }, this.#status)));
  }

  async #toggle() {
    if (this.#sound) return this.#stop();
    this.#parts = [];
    this.#status = "";
    this.#sound = new Sound({ captured: (block) => this.#captured(block), failed: () => this.#stop() });
    this.draw();
    try {
      await this.#sound.open();
      // As it is: what makes a call clearer takes a voice its character.
      await this.#sound.listen({ ...chosenDevices(), echo: false, noise: false, gain: false });
    } catch (error) {
      if (!(error instanceof SoundError)) throw error;
      this.#sound.close();
      this.#sound = null;
      this.#status = t(error.key, { words: error.detail, origin: location.origin });
      this.draw();
    }
  }

  #captured({ samples, level }) {
    this.#parts.push(samples);
    showLevel($("own-level"), decibels(level));
    const seconds = this.#parts.length / 50;
    $("own-record").textContent = t("own.stop", { time: clock(seconds) });
    if (seconds >= this.#limits.seconds - 0.1) this.#stop();
  }

  async #stop() {
    const sound = this.#sound;
    if (!sound) return;
    this.#sound = null;
    sound.close();
    const samples = new Float32Array(this.#parts.reduce((sum, { length }) => sum + length, 0));
    this.#parts.forEach((part, number) => samples.set(part, number * part.length));
    this.#parts = [];
    if (samples.length) {
      const level = decibels(samples.reduce((sum, sample) => sum + sample * sample, 0) / samples.length);
      const words = t("own.recorded", { seconds: (samples.length / RATE).toFixed(1), level: Math.round(level) });
      this.#file = { blob: await toWav(samples), words };
    }
    this.draw();
  }

  async #choose(file) {
    if (!file) return;
    const size = bytes(file.size);
    const large = file.size > this.#limits.bytes;
    this.#status = large ? t("own.large", { name: file.name, size, most: bytes(this.#limits.bytes) }) : "";
    this.#file = large ? null : { blob: file, words: await this.#describe(file, size) };
    this.draw();
  }

  async #describe(file, size) {
    try {
      const context = new OfflineAudioContext(1, 1, RATE);
      const sound = await context.decodeAudioData(await file.arrayBuffer());
      const level = decibels(sound.getChannelData(0).reduce((sum, one) => sum + one * one, 0) / sound.length);
      return t("own.read", { name: file.name, seconds: sound.duration.toFixed(1), level: Math.round(level) });
    } catch {
      return t("own.unread", { name: file.name, size }); // the service reads more than browsers do
    }
  }

  async #send() {
    $("own-use").disabled = true;
    $("own-status").textContent = t("own.sending");
    const url = new URL("api/voices?consent=1", document.baseURI);
    try {
      const answer = await fetch(url, { method: "POST", headers: this.#headers(), body: await this.#file.blob.arrayBuffer() });
      if (!answer.ok) throw new Error((await answer.text()).trim() || `HTTP ${answer.status}`);
      this.#accept(await answer.json());
    } catch (error) {
      this.#status = t("own.failed", { words: error.message });
      this.draw();
    }
  }

  #accept({ voice, seconds, loudness, expires_s: expires, problems = [] }) {
    this.#voice = voice;
    const ready = t("own.ready", { seconds: seconds.toFixed(1), loudness: loudness.toFixed(0), time: roughly(expires) });
    const advice = problems.map(({ kind, text }) => (has(`own.problem.${kind}`) ? t(`own.problem.${kind}`) : text));
    this.#status = [ready, ...advice].join(" ");
    setTimeout(() => this.#voice === voice && this.#drop(), 1e3 * expires);
    this.draw();
    this.#made({ name: voice });
  }

  async #forget() {
    await fetch(new URL(`api/voices/${this.#voice}`, document.baseURI), { method: "DELETE", headers: this.#headers() }).catch(() => {});
    this.#drop();
  }

  #drop() {
    this.#voice = this.#file = null;
    this.#status = "";
    this.draw();
    this.#made(null);
  }
}
