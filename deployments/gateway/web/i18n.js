// Words of the page in the user's language. `t(key, values)` fills `{name}` in; a key that a language lacks is taken
// from English. Elements with `data-t`, `data-t-label` or `data-t-placeholder` are filled by `apply`.

import * as settings from "./settings.js";
import en from "./words/en.js";
import zh from "./words/zh.js";

export const LANGUAGES = { en, zh };

let language = choose();

function choose() {
  const wanted = [settings.get("language"), ...(navigator.languages ?? [])];
  return wanted.map((tag) => tag?.split("-")[0]).find((tag) => tag in LANGUAGES) ?? "en";
}

export function current() {
  return language;
}

/** The language tag for dates, numbers and the document. */
export function locale() {
  return language === "zh" ? "zh-CN" : "en";
}

export function use(name) {
  language = name;
  settings.set("language", name);
}

export function t(key, values = {}) {
  const words = LANGUAGES[language][key] ?? en[key] ?? key;
  return words.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

export function has(key) {
  return key in LANGUAGES[language];
}

export function apply(root = document) {
  for (const element of root.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of root.querySelectorAll("[data-t-label]")) {
    element.setAttribute("aria-label", t(element.dataset.tLabel));
    if (element.tagName === "BUTTON") element.title = t(element.dataset.tLabel);
  }
  for (const element of root.querySelectorAll("[data-t-placeholder]")) element.placeholder = t(element.dataset.tPlaceholder);
  document.documentElement.lang = locale();
}
