// Messages above the views: `bad` for faults, else for information. One of each name at a time.

import { t } from "../i18n.js";
import { $, h } from "./dom.js";

/** Shows `words` under `name`; no words take it away. A `fixed` one cannot be closed. */
export function notice(name, words, { bad = false, fixed = false } = {}) {
  const id = `notice-${name}`;
  $(id)?.remove();
  if (!words) return;
  const remove = () => $(id)?.remove();
  const close = h("button", { type: "button", class: "close", "aria-label": t("notice.close"), onclick: remove }, "×");
  const kind = bad ? "notice bad" : "notice info";
  $("notices").append(h("div", { id, class: kind, role: bad ? "alert" : "status" }, h("p", {}, words), !fixed && close));
}

export function clear(...names) {
  for (const name of names) $(`notice-${name}`)?.remove();
}
