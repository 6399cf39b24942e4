// The view of a Transcript: turns with times, pauses between them, speech of the user as words or as marks.

import { t } from "../i18n.js";
import { clock } from "../transcript.js";
import { h } from "./dom.js";

const PAUSE_S = 2; // a silence this long is shown
const NEAR_END = 60; // pixels

export class TranscriptView {
  #log;
  #rows = new Map(); // entry -> {row, parts}
  #choose;
  #atEnd = true; // what is shown, since somebody scrolled last

  /** `choose(seconds)`: what a click on a time does; without it times are plain. */
  constructor(log, choose = null) {
    this.#log = log;
    this.#choose = choose;
    log.replaceChildren(h("p", { class: "hint empty" }, t("words.empty")));
    log.onscroll = () => (this.#atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END);
    if (!choose) this.#stayAtEnd();
  }

  /** Where the end is shown it still is when the log takes another shape. */
  #stayAtEnd() {
    const observer = new ResizeObserver(() => {
      const [first] = this.#rows.values();
      if (first && !first.row.isConnected) return observer.disconnect(); // another talk has the log
      if (this.#atEnd) this.#log.scrollTop = this.#log.scrollHeight;
    });
    observer.observe(this.#log);
  }

  /** Shows a new or changed entry of `entries`, which is at `index`. */
  show(entry, index, entries) {
    const follows = this.#atEnd;
    if (!this.#rows.has(entry)) this.#insert(entry, index, entries);
    this.#fill(entry);
    if (follows) this.#log.scrollTop = this.#log.scrollHeight;
  }

  /** Marks the entry that is heard at `seconds`. */
  follow(seconds) {
    for (const [entry, { row }] of this.#rows) row.classList.toggle("now", entry.start <= seconds && seconds < entry.end + 0.3);
  }

  #insert(entry, index, entries) {
    this.#log.querySelector(".empty")?.remove();
    const time = this.#choose
      ? h("button", { type: "button", class: "time", onclick: () => this.#choose(entry.start) }, clock(entry.start))
      : h("span", { class: "time" }, clock(entry.start));
    const text = h("p", { class: "said" });
    const who = h("span", { class: "who" }, t(entry.side === "user" ? "lanes.you" : "lanes.agent"));
    const note = entry.overlap ? h("span", { class: "overlap" }, t("words.overlap")) : null;
    const row = h("div", { class: `turn ${entry.side}` }, h("div", { class: "meta" }, who, time, note), text);
    this.#rows.set(entry, { row, text });
    const before = this.#rows.get(entries[index + 1])?.row;
    this.#log.insertBefore(row, before?.previousElementSibling?.matches(".pause") ? before.previousElementSibling : before ?? null);
    const silence = entry.start - Math.max(0, ...entries.slice(0, index).map(({ end }) => end));
    if (silence >= PAUSE_S && !before) {
      row.before(h("p", { class: "pause" }, t("words.pause", { seconds: silence.toFixed(1) })));
    }
  }

  #fill(entry) {
    const { row, text } = this.#rows.get(entry);
    row.classList.toggle("mark", !entry.text);
    if (entry.text) text.textContent = entry.text;
    else {
      const seconds = entry.end - entry.start;
      text.textContent = seconds > 0 ? t("words.spoke", { seconds: seconds.toFixed(1) }) : t("words.speaking");
    }
  }
}
