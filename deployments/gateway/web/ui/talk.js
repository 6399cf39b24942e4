// The view of one conversation, from the click that starts it to the choices after its end.

import { current, t } from "../i18n.js";
import { chatUrl } from "../service.js";
import { Talk } from "../talk.js";
import { clock } from "../transcript.js";
import { $, paint, roughly, setIcon } from "./dom.js";
import { Figures } from "./figures.js";
import { LiveLanes } from "./lanes.js";
import { clear, notice } from "./notices.js";
import { PushToTalk } from "./pushtotalk.js";
import { chosenDevices } from "./soundcheck.js";
import { TranscriptView } from "./transcript.js";
import { Awake } from "./awake.js";
import { endWords, isOrdinary } from "./words.js";

const KINDS = { microphone: "busy", connecting: "busy", queued: "busy", warming: "busy", live: "live", lost: "busy", over: "idle" };
const WARN_S = 60; // before the end

/** One at a time. */
export class TalkView {
  #talk = null;
  #persona;
  #info;
  #lanes = null;
  #figures;
  #words; // the view of the transcript
  #timer;
  #awake = new Awake();
  #push;
  #changed;
  #ended;
  #endsAt = null; // seconds of the conversation
  #title;
  #state = ["over"];

  /** `changed()` when it becomes live, `ended(ending)` when it is over, for the page. */
  constructor(changed, ended) {
    [this.#changed, this.#ended] = [changed, ended];
    this.#push = new PushToTalk({ hold: (held) => this.#showMute(held), end: () => this.end(), mute: () => this.#toggleMute() });
    $("mute").addEventListener("click", () => this.#toggleMute());
    $("end").addEventListener("click", () => this.end());
    $("copy").addEventListener("click", () => this.#copy());
    window.addEventListener("pagehide", () => {
      this.#talk?.flush();
      this.#talk?.end();
    });
  }

  get going() {
    return this.#talk !== null;
  }

  /** Whether it holds a slot of the service. */
  get holds() {
    return this.#talk?.live ?? false;
  }

  /** Begins a conversation. `info` of the service; `title` of the role; `history` to write it into, or null. */
  start(persona, { info, title, voice, history }) {
    this.#persona = persona;
    this.#info = info;
    this.#title = [title, voice];
    this.#endsAt = info.session_limit_s ?? null;
    const talk = new Talk(chatUrl(persona), chosenDevices(), history && { history, talk: this.#record() }, {
      state: (name, detail) => this.#show(name, detail),
      details: (details) => this.#learn(details),
      entry: (entry, index) => this.#words.show(entry, index, talk.transcript.entries),
      metadata: (metadata) => this.#hear(metadata),
      notice: (key) => notice("talk", t(key)),
      end: (ending) => this.#end(ending),
    });
    this.#talk = talk;
    this.#dress();
    this.#lanes?.close();
    this.#lanes = new LiveLanes($("lanes"), talk);
    this.#timer = setInterval(() => this.#tick(), 1_000);
    this.#push.start(talk);
    this.#showMute();
    this.#awake.start({ title, artist: this.#title[1], end: () => this.end(), mute: () => this.#toggleMute() });
    talk.start();
  }

  #dress() {
    clear("end", "talk", "sample");
    const [title, voice] = this.#title;
    $("talk-title").textContent = title;
    paint($("talk-avatar"), this.#persona.voice ?? "");
    $("talk-voice").textContent = t("start.voice", { voice });
    this.#words = new TranscriptView($("transcript"));
    this.#figures = new Figures($("figures"));
    $("session-line").textContent = t("session.waiting");
    $("copy").hidden = true;
    $("recorded").hidden = true;
    $("controls").hidden = false;
    $("after").hidden = true;
    $("clock").textContent = "0:00";
    $("left").textContent = "";
  }

  end() {
    this.#talk?.end();
  }

  /** Words in another language. */
  relabel() {
    this.#show(...this.#state);
    this.#showMute();
    if (!this.#figures) return;
    this.#figures = new Figures($("figures"));
    if (this.#talk) this.#figures.show(this.#talk.timing);
  }

  #record() {
    const { role, voice, sampling, record } = this.#persona;
    return {
      id: crypto.randomUUID(),
      name: "",
      started: Date.now(),
      role,
      voice,
      sampling,
      recorded: record,
      model: this.#info.model ?? null,
      version: this.#info.version ?? null,
      language: current(),
    };
  }

  #show(name, detail) {
    this.#state = [name, detail];
    $("state").dataset.state = KINDS[name];
    const { position, wait_s: wait } = detail ?? {};
    $("state").textContent = name === "queued" && wait > 0
      ? t("state.queuedFor", { position, time: roughly(wait) })
      : t(`state.${name}`, { position });
    if (name === "live") {
      this.#showMute();
      this.#changed();
    }
  }

  #learn(details) {
    $("recorded").hidden = !details.recorded;
    const parts = {
      session: details.session,
      model: this.#info.model,
      version: this.#info.version,
      voice: details.voice ?? this.#persona.voice,
      text_seed: details.text_seed,
      audio_seed: details.audio_seed,
      at: new Date().toISOString().replace(/\.\d+/, ""),
    };
    const named = Object.entries(parts).filter(([, value]) => value !== undefined && value !== null);
    $("session-line").textContent = named.map(([name, value]) => `${name}=${value}`).join(" ");
    $("copy").hidden = false;
  }

  #hear(metadata) {
    if (metadata.type === "ending" && metadata.in_s >= 0) {
      this.#endsAt = this.#talk.seconds + metadata.in_s;
      notice("ending", t("talk.ending", { time: roughly(metadata.in_s) }));
    } else if (metadata.type === "recording" && metadata.recorded === false) {
      $("recorded").hidden = true;
      notice("talk", t("talk.unrecorded"));
    } else if (metadata.type === "interrupted") this.#show("lost");
    else if (metadata.type === "continued") this.#show("live");
    else if (metadata.type === "window") notice("talk", t("talk.window"));
  }

  #tick() {
    const talk = this.#talk;
    if (!talk?.live) return;
    talk.timing.tick();
    this.#figures.show(talk.timing);
    $("clock").textContent = clock(talk.seconds);
    const left = this.#endsAt === null ? null : Math.max(0, this.#endsAt - talk.seconds);
    $("left").textContent = left === null ? "" : t("talk.left", { time: clock(left) });
    $("left").classList.toggle("warn", left !== null && left < WARN_S);
  }

  #toggleMute() {
    this.#push.toggle();
    this.#showMute();
  }

  #showMute() {
    const { muted, held, byHolding } = this.#push;
    $("hold").hidden = !byHolding;
    $("mute").hidden = byHolding;
    $("mute").setAttribute("aria-pressed", String(muted));
    $("mute").lastElementChild.textContent = t(muted ? "talk.muted" : "talk.mute");
    setIcon($("mute"), muted ? "mic-off" : "mic");
    $("hold").classList.toggle("held", held);
    $("hold").lastElementChild.textContent = t(held ? "talk.talking" : "talk.hold");
    this.#awake.muted = byHolding ? !held : muted;
  }

  #end(ending) {
    const talk = this.#talk;
    this.#lanes.freeze();
    this.#talk = null;
    clearInterval(this.#timer);
    this.#push.stop();
    this.#awake.stop();
    clear("ending");
    this.#show("over");
    $("recorded").hidden = true;
    $("left").textContent = "";
    if (talk) {
      this.#figures.show(talk.timing);
      $("clock").textContent = clock(ending.seconds ?? 0);
    }
    notice("end", endWords(ending), { bad: !isOrdinary(ending) });
    const { talk: record } = ending;
    $("controls").hidden = true;
    $("after").hidden = false;
    $("after-listen").hidden = !record;
    $("after-seed").hidden = !record || record.text_seed === null;
    if (record) $("after-listen").href = `#history/${record.id}`;
    this.#ended({ ...ending, persona: this.#persona });
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText($("session-line").textContent);
    } catch {
      getSelection().selectAllChildren($("session-line")); // no clipboard: it is ready to be copied by hand
      return;
    }
    $("copy").lastElementChild.textContent = t("session.copied");
    setTimeout(() => ($("copy").lastElementChild.textContent = t("session.copy")), 2_000);
  }
}

