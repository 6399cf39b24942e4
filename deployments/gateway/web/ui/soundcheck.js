// Devices to choose, and a check of them before a conversation.

import * as settings from "../settings.js";
import { Sound, SoundError, canChooseLoudspeaker, listDevices } from "../audio/sound.js";
import { t } from "../i18n.js";
import { FLOOR_DB, decibels } from "../levels.js";
import { $, h } from "./dom.js";

const SWITCHES = ["echo", "noise", "gain"];
const HEARD_DB = -40;

/** What Sound needs to know of the devices. */
export function chosenDevices() {
  return Object.fromEntries(["microphone", "loudspeaker", ...SWITCHES].map((name) => [name, settings.get(name)]));
}

export function showLevel(meter, db) {
  meter.firstElementChild.style.transform = `scaleX(${1 - db / FLOOR_DB})`;
  meter.setAttribute("aria-valuenow", Math.round(db));
}

export class SoundCheck {
  #sound = null;

  constructor() {
    for (const name of SWITCHES) {
      $(name).checked = settings.get(name);
      $(name).addEventListener("change", () => this.#set(name, $(name).checked));
    }
    for (const name of ["microphone", "loudspeaker"]) {
      $(name).addEventListener("change", () => this.#set(name, $(name).value));
    }
    $("check").addEventListener("click", () => (this.#sound ? this.stop() : this.#start()));
    navigator.mediaDevices?.addEventListener?.("devicechange", () => this.draw());
    this.draw();
  }

  async draw() {
    const { microphones, loudspeakers } = await listDevices();
    fill($("microphone"), microphones, settings.get("microphone"), "sound.default");
    fill($("loudspeaker"), canChooseLoudspeaker ? loudspeakers : [], settings.get("loudspeaker"),
      canChooseLoudspeaker ? "sound.default" : "sound.fixed");
    $("check").textContent = t(this.#sound ? "sound.checking" : "sound.check");
  }

  async #start() {
    let best = FLOOR_DB;
    const sound = new Sound({
      captured: ({ level }) => {
        const db = decibels(level);
        showLevel($("check-level"), db);
        if (db > HEARD_DB && best <= HEARD_DB) $("check-words").textContent = t("sound.heard");
        best = Math.max(best, db);
      },
      failed: () => this.stop(),
    });
    this.#sound = sound;
    $("check").setAttribute("aria-pressed", "true");
    try {
      await sound.open(chosenDevices());
      sound.tone();
      await sound.listen(chosenDevices());
      if (this.#sound === sound && best <= HEARD_DB) $("check-words").textContent = t("sound.speak");
    } catch (error) {
      if (!(error instanceof SoundError)) throw error;
      this.stop();
      $("check-words").textContent = t(error.key, { words: error.detail, origin: location.origin });
    }
    this.draw(); // devices have names once the microphone was allowed
  }

  stop() {
    this.#sound?.close();
    this.#sound = null;
    $("check").setAttribute("aria-pressed", "false");
    $("check-words").textContent = "";
    showLevel($("check-level"), FLOOR_DB);
    this.draw();
  }

  async #set(name, value) {
    settings.set(name, value);
    if (!this.#sound) return;
    if (name === "loudspeaker") {
      await this.#sound.useLoudspeaker(value);
      this.#sound.tone();
    } else await this.#sound.listen(chosenDevices()).catch(() => this.stop());
  }
}

function fill(select, devices, chosen, standard) {
  const named = devices.filter(({ id }) => id !== "default" && id !== "communications");
  const options = named.map(({ id, label }, number) =>
    h("option", { value: id }, label || t("sound.numbered", { number: number + 1 })));
  select.replaceChildren(h("option", { value: "" }, t(standard)), ...options);
  select.value = named.some(({ id }) => id === chosen) ? chosen : "";
  select.disabled = standard === "sound.fixed";
}
