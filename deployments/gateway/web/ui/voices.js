// Voices by family, with words about each, a sample to hear, and the user's own.

import * as settings from "../settings.js";
import { t } from "../i18n.js";
import { $, h, icon, paint } from "./dom.js";
import { notice } from "./notices.js";
import { Sample } from "./sample.js";
import { voiceName } from "./words.js";

const PUBLISHED = /^(NAT|VAR)[FM][0-4]$/;

export class Voices {
  #voices = [];
  #chosen = null;
  #first = null; // of the service's own choice
  #advised = [];
  #own = null; // {name, seconds}
  #sample = null;
  #samples = { shown: false };
  #changed;

  constructor(changed) {
    this.#changed = changed;
  }

  fill({ voices, default: first }) {
    [this.#voices, this.#first] = [voices, first];
    this.#chosen = this.#known(settings.get("voice")) ?? first;
    this.draw();
  }

  /** `{shown, model, history}`: whether samples can be made, and by what. */
  offer(samples) {
    this.#samples = samples;
    this.draw();
  }

  get voice() {
    return this.#chosen;
  }

  /** Voices that suit the role; the best is taken unless one was chosen by hand. */
  advise(names) {
    this.#advised = names.filter((name) => this.#known(name));
    if (settings.get("voice") === null && this.#advised.length) this.#chosen = this.#advised[0];
    this.draw();
  }

  use(name) {
    if (!this.#known(name) && name !== this.#own?.name) return;
    this.#chosen = name;
    if (name !== this.#own?.name) settings.set("voice", name);
    this.draw();
    this.#changed();
  }

  /** A voice made from a recording, or null when it was forgotten. */
  own(voice) {
    this.#own = voice;
    if (voice) this.#chosen = voice.name;
    else if (!this.#known(this.#chosen)) this.#chosen = this.#known(settings.get("voice")) ?? this.#advised[0] ?? this.#first;
    this.draw();
    this.#changed();
  }

  #known(name) {
    return this.#voices.some((voice) => voice.name === name) ? name : null;
  }

  stop() {
    this.#sample?.stop();
  }

  draw() {
    const focused = document.activeElement?.closest?.("#voice-list") ? document.activeElement.id : null;
    const families = group(this.#voices, familyOf);
    const parts = [...families].map(([family, voices]) => this.#family(family, voices));
    if (this.#own) parts.unshift(this.#family("mine", [{ name: this.#own.name }]));
    $("voice-list").replaceChildren(...parts);
    $("advice").hidden = !this.#advised.length;
    if (focused) $(focused)?.focus();
  }

  #family(family, voices) {
    const title = family === "mine" ? t("own.title") : t(`voice.family.${family}`);
    return h("fieldset", { class: "family" }, h("legend", {}, title), ...voices.map((voice) => this.#card(voice)));
  }

  #card({ name }) {
    const avatar = h("span", { class: "avatar small", "aria-hidden": "true" });
    paint(avatar, name);
    const input = h("input", { type: "radio", name: "voice", value: name, id: `voice-${name}`, checked: name === this.#chosen });
    input.addEventListener("change", () => this.use(name));
    const advised = this.#advised.includes(name) && h("span", { class: "advised" }, t("voice.advised"));
    const label = h("label", { class: "voice" }, input, avatar,
      h("span", { class: "name" }, voiceName(name)), h("span", { class: "excerpt" }, manner(name)), advised);
    return h("div", { class: "voice-row" }, label, this.#samples.shown && this.#hear(name));
  }

  #hear(name) {
    const playing = this.#sample?.voice === name;
    const words = (key) => t(`voice.${key}`, { voice: voiceName(name) });
    const button = h("button", { type: "button", class: "hear", id: `hear-${name}`, "aria-label": words(playing ? "stop" : "hear") });
    button.title = button.getAttribute("aria-label");
    button.append(icon(playing ? "stop" : "play"));
    button.addEventListener("click", () => this.#play(name));
    return button;
  }

  async #play(name) {
    const again = this.#sample?.voice === name;
    this.#sample?.stop();
    this.#sample = null;
    notice("sample", "");
    if (!again) await this.#start(name);
    this.draw();
  }

  async #start(name) {
    const sample = new Sample(name, { ...this.#samples, key: $("key").value });
    this.#sample = sample;
    this.draw();
    try {
      await sample.play(() => notice("sample", t("voice.making")));
      notice("sample", "");
    } catch (error) {
      notice("sample", t("voice.failed", { words: error.message }), { bad: true });
    }
    if (this.#sample === sample) this.#sample = null;
  }
}

function familyOf({ name }) {
  return PUBLISHED.test(name) ? name.slice(0, 4) : "own";
}

function manner(name) {
  if (!PUBLISHED.test(name)) return name.startsWith("own:") ? "" : t("voice.manner.own");
  return name.startsWith("NAT") ? t(`voice.manner.${name.at(-1)}`) : t("voice.manner.character");
}

function group(items, keyOf) {
  const groups = new Map();
  for (const item of items) groups.set(keyOf(item), [...(groups.get(keyOf(item)) ?? []), item]);
  return groups;
}

