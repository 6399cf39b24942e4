// The page: which view is shown, what the service says of itself, language and colours.

import * as i18n from "./i18n.js";
import * as settings from "./settings.js";
import { t } from "./i18n.js";
import { ServiceError, load } from "./service.js";
import { openHistory, recover } from "./store/history.js";
import { $ } from "./ui/dom.js";
import { HistoryView } from "./ui/history.js";
import { notice } from "./ui/notices.js";
import { Start } from "./ui/start.js";
import { TalkView } from "./ui/talk.js";
import { voiceName } from "./ui/words.js";

const REFRESH_MS = 15_000; // of what the service says
const THEMES = ["auto", "light", "dark"];

let info = {};
let offers = null; // voices and prompts, once they are known
let after = false; // a conversation is over and still shown
let lastTalk = null; // its record, or its persona where none was kept

i18n.apply();
const history = await openHistory();
const start = new Start(history, talkWith);
const view = new TalkView(refresh, ({ persona, talk }) => {
  after = true;
  lastTalk = talk ?? persona;
  refresh();
});
const past = new HistoryView(history, again);

function talkWith(persona) {
  after = false;
  location.hash = "#talk";
  const kept = settings.get("keep") ? history : null;
  view.start(persona, { info, title: persona.role.label, voice: voiceName(persona.voice), history: kept });
  route();
}

/** A conversation with the persona of another one; with its seeds too where `seeds`. */
function again(talk, seeds) {
  if (view.going) return notice("busy", t("talk.busy"));
  start.use(talk);
  const persona = { ...start.persona(), role: talk.role, voice: talk.voice, sampling: { ...talk.sampling } };
  for (const name of ["seed", "text_seed", "audio_seed"]) delete persona.sampling[name];
  if (seeds) Object.assign(persona.sampling, { text_seed: talk.text_seed, audio_seed: talk.audio_seed });
  talkWith(persona);
}

/** Resolves when the view is drawn. */
async function route() {
  const [name, id] = location.hash.slice(1).split("/");
  const wanted = name === "history" ? "history" : view.going || after ? "talk" : "start";
  document.body.dataset.view = wanted;
  for (const one of ["start", "talk", "history"]) $(one).hidden = one !== wanted;
  for (const one of ["talk", "history"]) {
    const here = (name === "history" ? "history" : "talk") === one;
    if (here) $(`nav-${one}`).setAttribute("aria-current", "page");
    else $(`nav-${one}`).removeAttribute("aria-current");
  }
  if (wanted !== "start") start.leave();
  if (wanted === "history") return past.show(id ?? null);
  past.leave();
}

function describe() {
  const { model, slots, used, queued } = info;
  if (!slots) return t("service.none");
  const places = view.holds && used > 0
    ? t("service.yours", { used, slots })
    : used >= slots ? t("service.full", { slots }) : t("service.free", { free: slots - used, slots });
  return [model, places, queued > 0 && t("service.waiting", { queued })].filter(Boolean).join(" · ");
}

async function refresh() {
  try {
    info = await load("api/info");
    if (!offers) {
      const [voices, prompts] = await Promise.all(["api/voices", "api/prompts"].map(load));
      await start.fill(voices, prompts);
      if (voices.voices.length) offers = { voices, prompts }; // none: no replica yet
    }
    start.describe(info);
    notice("away", "");
    $("service").textContent = describe();
  } catch (error) {
    if (!(error instanceof ServiceError)) throw error;
    $("service").textContent = t("service.away");
    if (!offers) notice("away", `${t("service.away")} (${error.message})`, { bad: true, fixed: true });
  }
}

function labelButtons() {
  const other = i18n.current() === "en" ? "zh" : "en";
  $("language").lastElementChild.textContent = i18n.LANGUAGES[other].name;
  $("language").setAttribute("aria-label", t("nav.language"));
  $("theme").setAttribute("aria-label", t(`theme.${settings.get("theme")}`));
  for (const id of ["language", "theme"]) $(id).title = $(id).getAttribute("aria-label");
}

function relabel() {
  i18n.apply();
  labelButtons();
  if (offers) start.relabel();
  view.relabel();
  $("service").textContent = describe();
  if (!history.kept) notice("memory", t("notice.memory"));
  route();
}

$("language").addEventListener("click", () => {
  i18n.use(i18n.current() === "en" ? "zh" : "en");
  relabel();
});
$("theme").addEventListener("click", () => {
  settings.set("theme", THEMES[(THEMES.indexOf(settings.get("theme")) + 1) % THEMES.length]);
  document.dispatchEvent(new Event("themechosen"));
  labelButtons();
});
$("after-new").addEventListener("click", () => {
  after = false;
  notice("end", "");
  route();
  $("connect").focus();
});
$("after-persona").addEventListener("click", () => again(lastTalk, false));
$("after-seed").addEventListener("click", () => again(lastTalk, true));
window.addEventListener("hashchange", route);

labelButtons();
if (!history.kept) notice("memory", t("notice.memory"));
await recover(history);
await refresh();
await route();
setInterval(() => document.hidden || refresh(), REFRESH_MS);
document.documentElement.dataset.ready = "";

