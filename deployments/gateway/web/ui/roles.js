// Roles to choose from, of the service and of one's own, with search, an editor and a meter of its length.

import * as settings from "../settings.js";
import { has, t } from "../i18n.js";
import { countTokens, estimateTokens } from "../service.js";
import { $, ask, h } from "./dom.js";

const OWN = "own"; // the text in the editor, which no role of the list has
const COUNT_AFTER_MS = 400; // without another key

export class Roles {
  #prompts = [];
  #chosen = OWN;
  #limit = null;
  #exact = false; // the service counts tokens
  #timer = null;
  #changed;

  /** `changed()` when another role or text is chosen. */
  constructor(changed) {
    this.#changed = changed;
    $("role-search").addEventListener("input", () => this.#filter());
    $("role-text").addEventListener("input", () => this.#edited());
    $("role-save").addEventListener("click", () => this.#save());
    $("role-delete").addEventListener("click", () => this.#delete());
  }

  fill({ prompts, default: first }) {
    this.#prompts = prompts;
    const known = this.#all().some(({ id }) => id === settings.get("role"));
    const own = settings.get("role") === OWN && settings.get("text") !== null;
    this.#chosen = known || own ? settings.get("role") : first;
    $("role-text").value = own ? settings.get("text") : this.#find(this.#chosen)?.text ?? "";
    this.draw();
  }

  /** `limit` in tokens or null; `exact`: whether the service counts them. */
  measure(limit, exact) {
    [this.#limit, this.#exact] = [limit, exact];
    this.#meter();
  }

  /** `{id, label, text, voices}` as it is now. */
  get role() {
    const { voices = [] } = this.#find(this.#chosen) ?? {};
    return { id: this.#chosen, label: this.label(this.#find(this.#chosen)), text: $("role-text").value, voices };
  }

  /** Puts a role of an older talk in. */
  use({ id, text }) {
    const known = this.#find(id);
    this.#choose(known?.text === text ? id : this.#all().find((role) => role.text === text)?.id ?? OWN, text);
    this.draw();
  }

  label(role) {
    if (!role) return t("role.own");
    return has(`role.label.${role.id}`) ? t(`role.label.${role.id}`) : role.label;
  }

  draw() {
    $("role-list").replaceChildren(...this.#all().map((role) => this.#card(role)), this.#card({ id: OWN, text: "" }));
    $("role-list").append(h("p", { id: "role-none", class: "hint", hidden: true }, t("role.none")));
    this.#filter();
    this.#meter();
    $("role-delete").hidden = !settings.get("saved").some(({ id }) => id === this.#chosen);
    $("role-list").querySelector(":checked")?.closest("label").scrollIntoView({ block: "nearest" });
  }

  #all() {
    return [...settings.get("saved"), ...this.#prompts];
  }

  #find(id) {
    return this.#all().find((role) => role.id === id);
  }

  #card(role) {
    const own = role.id === OWN;
    const input = h("input", { type: "radio", name: "role", value: role.id, checked: role.id === this.#chosen });
    input.addEventListener("change", () => {
      this.#choose(role.id, own ? $("role-text").value : role.text);
      if (own) $("role-text").focus();
    });
    const name = own ? t("role.own") : this.label(role);
    return h("label", { class: "role" }, input, h("span", { class: "name" }, name), !own && h("span", { class: "excerpt" }, role.text));
  }

  #choose(id, text) {
    this.#chosen = id;
    $("role-text").value = text;
    settings.set("role", id);
    settings.set("text", id === OWN ? text : null);
    $("role-delete").hidden = !settings.get("saved").some((role) => role.id === id);
    this.#meter();
    this.#changed();
  }

  #edited() {
    const input = $("role-list").querySelector(`input[value="${OWN}"]`);
    if (input) input.checked = true;
    this.#choose(OWN, $("role-text").value);
  }

  #filter() {
    const words = $("role-search").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const card of $("role-list").querySelectorAll(".role")) {
      const text = card.textContent.toLowerCase();
      card.hidden = !words.every((word) => text.includes(word));
      shown += !card.hidden;
    }
    $("role-none").hidden = shown > 0;
  }

  async #save() {
    const label = await ask({ title: t("role.name"), label: t("common.save"), value: "" });
    if (!label) return;
    const role = { id: `mine-${crypto.randomUUID?.() ?? Date.now()}`, label, text: $("role-text").value };
    settings.set("saved", [...settings.get("saved"), role]);
    this.#choose(role.id, role.text);
    this.draw();
  }

  #delete() {
    settings.set("saved", settings.get("saved").filter(({ id }) => id !== this.#chosen));
    this.#choose(OWN, $("role-text").value);
    this.draw();
  }

  #meter() {
    const text = $("role-text").value;
    this.#showTokens(estimateTokens(text), false);
    clearTimeout(this.#timer);
    if (!this.#exact) return;
    this.#timer = setTimeout(async () => {
      const count = await countTokens(text, $("key").value);
      if (count && $("role-text").value === text) this.#showTokens(count.tokens, true);
    }, COUNT_AFTER_MS);
  }

  #showTokens(tokens, exact) {
    const limit = this.#limit;
    const long = limit !== null && tokens > limit;
    const key = limit === null ? "unlimited" : long ? "long" : exact ? "exact" : "about";
    $("role-tokens").textContent = t(`role.${key}`, { tokens, limit });
    $("role-tokens").classList.toggle("warn", long);
    Object.assign($("role-meter"), { max: limit ?? 1_000, value: tokens, hidden: limit === null });
  }
}
