// What is said of the end of a conversation, and of its voice.

import { t } from "../i18n.js";
import { clock } from "../transcript.js";

export function voiceName(voice) {
  return voice?.startsWith("own:") ? t("own.voice") : voice ?? "";
}

/** Whether an end is an ordinary one. */
export function isOrdinary({ kind }) {
  return kind === "asked" || kind === "over";
}

export function endWords({ kind, status, code, key, words, seconds = 0 }) {
  const said = words || t("end.nowords");
  if (kind === "sound") return t(key, { words: words ?? "", origin: location.origin });
  if (kind === "asked") return seconds ? t("end.asked", { time: clock(seconds) }) : t("end.begun");
  if (kind === "over") return t("end.over", { words: said, time: clock(seconds) });
  if (kind === "lost") return t(seconds ? "end.lost" : "end.unreachable");
  if (kind === "refused") return status === 401 ? t("end.key") : t("end.refused", { words: said });
  if (kind === "failed") return code === 1012 && !words ? t("end.restart") : t("end.failed", { words: said });
  return t(`end.${kind}`, { words: said });
}
