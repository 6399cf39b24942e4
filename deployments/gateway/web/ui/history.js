// The view of talks kept in this browser: a list with search, and one talk to hear, read, rename, export and delete.

import * as settings from "../settings.js";
import { t } from "../i18n.js";
import { download, fileName, json, wav } from "../store/export.js";
import { recover } from "../store/history.js";
import { clock } from "../transcript.js";
import { $, ask, bytes, h, icon, moment, paint } from "./dom.js";
import { notice } from "./notices.js";
import { TalkPlayer } from "./player.js";
import { voiceName } from "./words.js";

export class HistoryView {
  #history;
  #again;
  #player = null;
  #talks = [];
  #chosen = null; // id
  #words = "";

  /** `again(talk, seeds)` starts a conversation with a talk's persona, with its seeds too where `seeds`. */
  constructor(history, again) {
    this.#history = history;
    this.#again = again;
  }

  async show(id) {
    this.leave();
    this.#chosen = id;
    await recover(this.#history);
    this.#talks = await this.#history.talks();
    await this.draw();
  }

  leave() {
    this.#player?.close();
    this.#player = null;
  }

  async draw() {
    this.leave();
    const list = h("section", { class: "card list", "aria-labelledby": "history-title" },
      h("h1", { id: "history-title" }, t("history.title")),
      h("p", { class: "hint" }, t(settings.get("keep") ? "history.lead" : "history.off")),
      this.#search(),
      h("ul", { id: "talks", class: "talks" }),
      h("div", { class: "row foot" }, h("p", { id: "usage", class: "hint" }),
        this.#talks.length > 0 && h("button", { id: "delete-all", type: "button", class: "quiet", onclick: () => this.#removeAll() }, t("history.deleteAll"))));
    const detail = h("section", { id: "detail", class: "card detail", "aria-label": t("history.about") });
    $("history").replaceChildren(list, detail);
    $("history").classList.toggle("chosen", Boolean(this.#chosen));
    this.#fill();
    this.#usage();
    await this.#showDetail(detail);
  }

  #search() {
    const input = h("input", { type: "search", id: "talk-search", placeholder: t("history.search"), "aria-label": t("history.search"), value: this.#words, autocomplete: "off" });
    input.addEventListener("input", () => {
      this.#words = input.value;
      this.#fill();
    });
    return h("div", { class: "search" }, icon("search"), input);
  }

  #fill() {
    const words = this.#words.toLowerCase().split(/\s+/).filter(Boolean);
    const found = this.#talks.filter((talk) => {
      const text = [title(talk), talk.role.text, talk.voice, ...talk.entries.map((entry) => entry.text)].join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    const rows = found.map((talk) => this.#row(talk));
    const none = h("li", { class: "hint" }, t(this.#talks.length ? "history.none" : "history.empty"));
    $("talks").replaceChildren(...(rows.length ? rows : [none]));
  }

  #row(talk) {
    const avatar = h("span", { class: "avatar small", "aria-hidden": "true" });
    paint(avatar, talk.voice ?? "");
    const note = talk.ended ? talk.cause === "cut" && t("history.cut") : t("history.going");
    return h("li", {}, h("a", { href: `#history/${talk.id}`, class: "talk-row", "aria-current": talk.id === this.#chosen && "true" },
      avatar,
      h("span", { class: "name" }, title(talk)),
      h("span", { class: "excerpt" }, `${voiceName(talk.voice)} · ${moment(talk.started)}`),
      h("span", { class: "length" }, clock(talk.seconds), note && h("span", { class: "badge" }, note))));
  }

  async #usage() {
    const size = this.#talks.reduce((sum, talk) => sum + talk.bytes, 0);
    let words = t("history.usage", { count: this.#talks.length, size: bytes(size) });
    const { quota, usage } = (await navigator.storage?.estimate?.().catch(() => null)) ?? {};
    if (quota > usage && this.#history.kept) words += ` ${t("history.room", { room: bytes(quota - usage) })}`;
    if ($("usage")) $("usage").textContent = words;
  }

  async #showDetail(detail) {
    if (!this.#chosen) return detail.replaceChildren(h("p", { class: "hint select" }, t("history.select")));
    const talk = this.#talks.find(({ id }) => id === this.#chosen);
    const back = h("a", { href: "#history", class: "back" }, icon("back"), t("history.back"));
    if (!talk) return detail.replaceChildren(back, h("p", {}, t("history.missing")));
    const avatar = h("span", { class: "avatar", "aria-hidden": "true" });
    paint(avatar, talk.voice ?? "");
    const button = (id, name, words, action, kind = "quiet") =>
      h("button", { id, type: "button", class: kind, onclick: action }, icon(name), h("span", {}, words));
    const head = h("div", { class: "persona" }, avatar, h("div", {},
      h("h2", { id: "talk-name" }, title(talk)),
      h("p", { class: "hint" }, `${voiceName(talk.voice)} · ${moment(talk.started)} · ${clock(talk.seconds)}`)),
    button("rename", "pen", t("history.rename"), () => this.#rename(talk)),
    button("delete", "bin", t("history.delete"), () => this.#remove(talk), "quiet danger"));
    const stage = h("div", { class: "stage" });
    const actions = h("div", { class: "row actions" },
      button("again", "again", t("after.persona"), () => this.#again(talk, false)),
      talk.text_seed !== null && talk.text_seed !== undefined && button("again-seed", "again", t("after.seed"), () => this.#again(talk, true)),
      button("export-wav", "down", t("history.wav"), () => this.#export(talk)),
      button("export-json", "down", t("history.json"), () => download(json(talk), `${fileName(talk)}.json`)));
    detail.replaceChildren(back, head, stage, actions, about(talk));
    const chunks = await this.#history.chunks(talk.id);
    if (detail.isConnected) this.#player = new TalkPlayer(stage, talk, chunks); // else another one was chosen meanwhile
  }

  async #export(talk) {
    const button = $("export-wav");
    button.disabled = true;
    try {
      const percent = (share) => notice("export", t("history.exporting", { percent: Math.round(100 * share) }));
      download(await wav(await this.#history.chunks(talk.id), percent), `${fileName(talk)}.wav`);
      notice("export", "");
    } catch (error) {
      notice("export", t("history.broken", { words: error.message }), { bad: true });
    } finally {
      button.disabled = false;
    }
  }

  async #rename(talk) {
    const name = await ask({ title: t("history.name"), label: t("common.save"), value: title(talk) });
    if (!name) return;
    await this.#history.put({ ...talk, name });
    await this.show(talk.id);
    $("rename").focus();
  }

  async #remove(talk) {
    const sure = await ask({ title: t("history.confirm"), text: t("history.forever"), label: t("history.delete"), danger: true });
    if (!sure) return;
    this.leave();
    await this.#history.remove(talk.id);
    location.hash = "#history";
  }

  async #removeAll() {
    const text = t("history.confirmAll", { count: this.#talks.length });
    const sure = await ask({ title: text, text: t("history.forever"), label: t("history.deleteAll"), danger: true });
    if (!sure) return;
    this.leave();
    for (const talk of this.#talks) await this.#history.remove(talk.id);
    if (location.hash === "#history") await this.show(null);
    else location.hash = "#history";
  }
}

function title(talk) {
  return talk.name || talk.role.label;
}

function about(talk) {
  const { timing } = talk;
  const facts = {
    role: talk.role.text,
    cause: talk.cause && t(`cause.${talk.cause}`),
    model: [talk.model, talk.version].filter(Boolean).join(" · "),
    seed: talk.text_seed === null || talk.text_seed === undefined ? "" : `${talk.text_seed}, ${talk.audio_seed}`,
    session: talk.session,
    timing: timing?.latency_p50_ms && t("about.latency", { p50: timing.latency_p50_ms, p95: timing.latency_p95_ms, underruns: timing.underruns }),
  };
  const rows = Object.entries(facts).filter(([, value]) => value)
    .map(([name, value]) => h("div", {}, h("dt", {}, t(`about.${name}`)), h("dd", {}, String(value))));
  return h("dl", { class: "about" }, ...rows);
}
