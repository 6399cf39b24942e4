// The view before a conversation: role, voice, sound and the rest of the choices. `persona()` is what was chosen.

import * as settings from "../settings.js";
import { opusKind } from "../audio/codec.js";
import { t } from "../i18n.js";
import { toyNotice } from "../service.js";
import { $, paint, roughly } from "./dom.js";
import { notice } from "./notices.js";
import { OwnVoice } from "./ownvoice.js";
import { Roles } from "./roles.js";
import { SoundCheck } from "./soundcheck.js";
import { Voices } from "./voices.js";
import { voiceName } from "./words.js";

const SAMPLING = { text_temperature: 0.7, text_topk: 25, audio_temperature: 0.8, audio_topk: 250 };
const SWITCHES = { keep: "keep", "push-to-talk": "pushToTalk", shortcuts: "shortcuts" };

/** Why this page cannot talk here, as the name of its words, or null. */
async function obstacle() {
  if (!window.isSecureContext) return "sound.insecure";
  if (!navigator.mediaDevices?.getUserMedia) return "sound.absent";
  return "AudioWorkletNode" in window && (await opusKind()) ? null : "sound.unable";
}

export class Start {
  #roles = new Roles(() => this.#changed());
  #voices = new Voices(() => this.#summarise());
  #check = new SoundCheck();
  #own = new OwnVoice((voice) => this.#voices.own(voice));
  #history;
  #info = {};
  #obstacle = null; // name of the words for why nothing can be started

  /** `go(persona)` when a conversation is asked for. */
  constructor(history, go) {
    this.#history = history;
    for (const [id, name] of Object.entries(SWITCHES)) {
      $(id).checked = settings.get(name);
      $(id).addEventListener("change", () => settings.set(name, $(id).checked));
    }
    for (const [name, value] of Object.entries(SAMPLING)) {
      $(name).value = settings.get("sampling")[name] ?? value;
      $(name).addEventListener("change", () => settings.set("sampling", this.#sampling()));
    }
    $("start").addEventListener("submit", (event) => {
      event.preventDefault();
      this.leave();
      go(this.persona());
    });
    $("connect").addEventListener("click", () => {
      if (!$("start").checkValidity()) $("sampling").open = true; // a browser cannot point at what is folded away
    });
  }

  /** Fills in what the service offers. */
  async fill(voices, prompts) {
    this.#voices.fill(voices);
    this.#roles.fill(prompts);
    this.#changed();
    this.#obstacle = await obstacle();
    this.#tellObstacle();
    $("connect").disabled = this.#obstacle !== null;
  }

  #tellObstacle() {
    notice("obstacle", this.#obstacle && t(this.#obstacle, { origin: location.origin }), { bad: true, fixed: true });
  }

  describe(info) {
    const changed = info.model !== this.#info.model;
    this.#info = info;
    $("key-field").hidden = !info.key_needed;
    $("record-field").hidden = info.record !== "allowed";
    $("always-recorded").hidden = info.record !== "always";
    this.#roles.measure(info.prompt_tokens ?? null, "prompt_tokens" in info);
    this.#own.offer(info.own_voices);
    if (changed) this.#offerSamples();
    this.#tell();
  }

  #offerSamples() {
    const { model } = this.#info;
    this.#voices.offer({ shown: Boolean(model) && model !== "echo", model, history: this.#history });
  }

  #tell() {
    const { model, slots, used, wait_s: wait } = this.#info;
    const toy = toyNotice(model);
    notice("toy", toy && t(toy, { model }), { fixed: true });
    const full = slots > 0 && used >= slots;
    notice("full", full && (wait ? t("notice.wait", { time: roughly(wait) }) : t("notice.full")), { fixed: true });
  }

  /** Words in another language. */
  relabel() {
    this.#roles.draw();
    this.#voices.draw();
    this.#check.draw();
    this.#own.draw();
    this.#tell();
    this.#summarise();
    this.#tellObstacle();
  }

  /** Puts the persona of an older talk in. */
  use(talk) {
    this.#roles.use(talk.role);
    if (talk.voice) this.#voices.use(talk.voice);
    this.#changed();
  }

  leave() {
    this.#check.stop();
    this.#voices.stop();
  }

  persona() {
    const { id, label, text } = this.#roles.role;
    const sampling = this.#sampling();
    const seed = $("seed").value;
    return {
      role: { id, label, text },
      voice: this.#voices.voice,
      sampling: seed === "" ? sampling : { ...sampling, seed },
      record: !$("record-field").hidden && $("record").checked,
      key: $("key-field").hidden ? "" : $("key").value,
    };
  }

  #sampling() {
    return Object.fromEntries(Object.keys(SAMPLING).map((name) => [name, $(name).value]));
  }

  #changed() {
    this.#voices.advise(this.#roles.role.voices ?? []);
    this.#summarise();
  }

  #summarise() {
    const voice = this.#voices.voice ?? "";
    paint($("start-avatar"), voice);
    const [role, words] = $("start-summary").children;
    role.textContent = this.#roles.role.label;
    words.textContent = t("start.voice", { voice: voiceName(voice) });
  }
}
