// One stored talk on the stage: its lanes, a player, and the transcript that follows it.

import { t } from "../i18n.js";
import { Player } from "../store/player.js";
import { clock } from "../transcript.js";
import { h, icon, setIcon } from "./dom.js";
import { WholeLanes } from "./lanes.js";
import { notice } from "./notices.js";
import { TranscriptView } from "./transcript.js";

export class TalkPlayer {
  #player;
  #lanes;
  #view;
  #button;
  #range;
  #time;
  #frame = null;

  constructor(stage, talk, chunks) {
    this.#player = new Player(chunks, () => this.#changed(), (error) => {
      notice("player", t("history.broken", { words: error.message }), { bad: true });
    });
    const canvas = h("canvas", { class: "whole", role: "img", "aria-label": t("lanes.all") });
    this.#button = h("button", { id: "play", type: "button", class: "round small", "aria-label": t("history.play") }, icon("play"));
    this.#button.addEventListener("click", () => (this.#player.playing ? this.#player.pause() : this.#player.play()));
    this.#range = h("input", { type: "range", id: "position", min: 0, max: this.#player.seconds.toFixed(2), step: 0.1, value: 0, "aria-label": t("history.position") });
    this.#range.addEventListener("input", () => this.#seek(Number(this.#range.value)));
    this.#time = h("span", { class: "time" });
    const log = h("div", { id: "stored-words", class: "transcript", role: "region", "aria-label": t("words.title"), tabIndex: 0 });
    stage.replaceChildren(canvas, h("div", { class: "playbar" }, this.#button, this.#range, this.#time), log);
    this.#lanes = new WholeLanes(canvas, this.#player.levels, (seconds) => this.#seek(seconds));
    this.#view = new TranscriptView(log, (seconds) => this.#seek(seconds));
    talk.entries.forEach((entry, index) => this.#view.show(entry, index, talk.entries));
    log.scrollTop = 0;
    this.#show();
  }

  close() {
    cancelAnimationFrame(this.#frame);
    this.#player.close();
    this.#lanes.close();
  }

  #seek(seconds) {
    this.#player.seek(seconds);
    this.#show();
  }

  #changed() {
    if (!this.#view) return;
    setIcon(this.#button, this.#player.playing ? "pause" : "play");
    this.#button.setAttribute("aria-label", t(this.#player.playing ? "history.pause" : "history.play"));
    cancelAnimationFrame(this.#frame);
    if (this.#player.playing) this.#follow();
    else this.#show();
  }

  #follow() {
    this.#show();
    this.#frame = requestAnimationFrame(() => this.#follow());
  }

  #show() {
    const { position, seconds } = this.#player;
    this.#range.value = position;
    this.#range.setAttribute("aria-valuetext", `${clock(position)} / ${clock(seconds)}`);
    this.#time.textContent = `${clock(position)} / ${clock(seconds)}`;
    this.#lanes.position = position;
    this.#view.follow(this.#player.playing || position > 0 ? position : -1);
  }
}
