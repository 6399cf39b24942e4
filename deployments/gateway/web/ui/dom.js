// Small tools for the page's elements, and words for lengths, sizes and times that several views use.

import { locale, t } from "../i18n.js";

export const $ = (id) => document.getElementById(id);

/** An element: `h("button", { type: "button", class: "quiet", onclick }, "words", child)`. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "role") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Shows another icon in an element that holds one. */
export function setIcon(element, name) {
  element.querySelector("use").setAttribute("href", `#i-${name}`);
}

/** "40 s", "12 min", "3 h": rounded, for people who wait. */
export function roughly(seconds) {
  if (seconds < 90) return t("time.seconds", { n: Math.max(1, Math.round(seconds)) });
  if (seconds < 5_400) return t("time.minutes", { n: Math.round(seconds / 60) });
  return t("time.hours", { n: Math.round(seconds / 3_600) });
}

export function bytes(count) {
  const [value, unit] = count < 1e6 ? [count / 1e3, "kB"] : count < 1e9 ? [count / 1e6, "MB"] : [count / 1e9, "GB"];
  return `${new Intl.NumberFormat(locale(), { maximumSignificantDigits: 2 }).format(value)} ${unit}`;
}

export function moment(time) {
  return new Intl.DateTimeFormat(locale(), { dateStyle: "medium", timeStyle: "short" }).format(time);
}

/** Gives an avatar the colours of a voice: always the same for one name. */
export function paint(avatar, voice) {
  let hash = 2_166_136_261;
  for (const letter of voice) hash = Math.imul(hash ^ letter.charCodeAt(0), 16_777_619) >>> 0;
  avatar.style.setProperty("--hue", 150 + (hash % 190));
  avatar.style.setProperty("--turn", `${hash % 360}deg`);
}

/**
 * Asks in a dialog: `title`, `text`, the `label` of the answer, and a `value` for one line of text. Resolves to true or
 * the text, null when cancelled.
 */
export function ask({ title, text = "", label, danger = false, value = null }) {
  const dialog = $("dialog");
  const input = value === null ? null : h("input", { value, maxLength: 80, required: true, "aria-labelledby": "dialog-title" });
  const cancel = h("button", { type: "button", class: "quiet", onclick: () => dialog.close("") }, t("common.cancel"));
  const yes = h("button", { type: "submit", value: "yes", class: danger ? "danger" : "primary" }, label);
  dialog.replaceChildren(h("form", { method: "dialog" },
    h("h2", { id: "dialog-title" }, title),
    text && h("p", {}, text),
    input,
    h("div", { class: "row end" }, cancel, yes)));
  dialog.returnValue = "";
  dialog.showModal();
  input?.select();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue === "yes" ? input?.value.trim() ?? true : null);
  });
}
