// Muting, and talking only while a button or the space bar is held; the keys M, E and Space where they are wanted.

import * as settings from "../settings.js";
import { $ } from "./dom.js";

export class PushToTalk {
  muted = false;
  held = false;
  #talk = null;
  #handlers;

  /** Handlers: `hold(held)`, `mute()` and `end()` for the keys. */
  constructor(handlers) {
    this.#handlers = handlers;
    const button = $("hold");
    button.addEventListener("pointerdown", (event) => {
      button.setPointerCapture(event.pointerId);
      this.#hold(true);
    });
    for (const name of ["pointerup", "pointercancel"]) button.addEventListener(name, () => this.#hold(false));
    button.addEventListener("contextmenu", (event) => event.preventDefault()); // of a long touch
    document.addEventListener("keydown", (event) => this.#down(event));
    document.addEventListener("keyup", (event) => this.#up(event));
    window.addEventListener("blur", () => this.#hold(false));
  }

  get byHolding() {
    return settings.get("pushToTalk");
  }

  start(talk) {
    this.#talk = talk;
    this.muted = this.held = false;
    this.#apply();
  }

  stop() {
    this.#talk = null;
    this.muted = this.held = false;
  }

  toggle() {
    this.muted = !this.muted;
    this.#apply();
  }

  #apply() {
    if (this.#talk) this.#talk.muted = this.byHolding ? !this.held : this.muted;
  }

  #hold(held) {
    if (!this.#talk || this.held === held) return;
    this.held = held;
    this.#apply();
    this.#handlers.hold(held);
  }

  #wanted(event) {
    if (!this.#talk || event.ctrlKey || event.metaKey || event.altKey) return false;
    return !event.target.closest?.("input, textarea, select, dialog, [contenteditable]");
  }

  #down(event) {
    const onButton = event.target === $("hold") && (event.key === " " || event.key === "Enter");
    if (!this.#wanted(event) || (!settings.get("shortcuts") && !onButton)) return;
    const otherButton = event.target.closest?.("button, a") && !onButton;
    if (this.byHolding && (onButton || (event.key === " " && !otherButton))) {
      event.preventDefault();
      this.#hold(true);
    } else if (event.repeat) return;
    else if (event.key === "m" || event.key === "M") this.#handlers.mute();
    else if (event.key === "e" || event.key === "E") this.#handlers.end();
  }

  #up(event) {
    if (event.key === " " || event.key === "Enter") this.#hold(false);
  }
}
