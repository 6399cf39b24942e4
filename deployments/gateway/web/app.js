// The page: fills in voices and roles, opens and closes sessions, shows what happens.

import { SAMPLE_RATE, obstacle } from "./audio.js";
import { Session } from "./session.js";

const $ = (id) => document.getElementById(id);
const CUSTOM = ""; // value of the role list's entry for a text of one's own
const NOTHING = "–";
const FLOOR_DB = -60;
const REFRESH_MS = 15_000; // of the number of free slots, while not connected

const STATES = {
  idle: ["idle", () => "Not connected"],
  blocked: ["failed", () => "Cannot connect"],
  microphone: ["busy", () => "Waiting for the microphone"],
  connecting: ["busy", () => "Connecting"],
  queued: ["busy", (position) => `In the queue, position ${position}`],
  warming: ["busy", () => "Warming up"],
  live: ["live", () => "Live"],
};

let session = null;
let prompts = [];
let voices = [];
let voiceChosen = false; // by hand, so a role's advice does not change it
let liveSince = null;
let latency = null; // smoothed, ms

function show(name, detail) {
  const [kind, words] = STATES[name];
  $("state").dataset.state = kind;
  $("state").textContent = words(detail);
}

function complain(message) {
  $("problem").textContent = message ?? "";
  $("problem").hidden = !message;
}

async function load(path) {
  const response = await fetch(new URL(path, document.baseURI));
  if (!response.ok) throw new Error(`The service does not answer (HTTP ${response.status} for ${path}).`);
  return response.json();
}

function option(value, label) {
  return Object.assign(document.createElement("option"), { value, textContent: label });
}

function fillVoices(list, chosen) {
  voices = list;
  for (const family of new Set(voices.map((voice) => voice.family))) {
    const group = Object.assign(document.createElement("optgroup"), { label: family });
    group.append(...voices.filter((voice) => voice.family === family).map(({ name }) => option(name, name)));
    $("voice").append(group);
  }
  chooseVoice(chosen);
}

function chooseVoice(name) {
  if (voices.some((voice) => voice.name === name)) $("voice").value = name;
  $("voice-about").textContent = voices.find((voice) => voice.name === $("voice").value)?.description ?? "";
}

function fillPrompts(list, chosen) {
  prompts = list;
  $("preset").append(...prompts.map(({ id, label }) => option(id, label)), option(CUSTOM, "A role of your own"));
  $("preset").value = chosen;
  choosePrompt();
}

function choosePrompt() {
  const prompt = prompts.find(({ id }) => id === $("preset").value);
  if (!prompt) return $("role").focus();
  $("role").value = prompt.text;
  if (!voiceChosen && prompt.voices.length) chooseVoice(prompt.voices[0]);
}

function describe(info) {
  const model = info.model ? `${info.model} · ` : "";
  $("service").textContent = info.slots ? `${model}${info.slots - info.used} of ${info.slots} slots free` : "";
  $("key-field").hidden = !info.key_needed;
  $("record-field").hidden = info.record !== "allowed";
  $("always-recorded").hidden = info.record !== "always";
}

async function refresh() {
  if (session || document.hidden) return;
  try {
    describe(await load("api/info"));
  } catch {
    $("service").textContent = "The service does not answer";
  }
}

function chatUrl() {
  const url = new URL("api/chat", document.baseURI);
  url.protocol = url.protocol.replace("http", "ws");
  for (const [name, value] of new FormData($("persona"))) {
    // An empty role is a role; every other empty field leaves the choice to the service.
    if (value || name === "text_prompt") url.searchParams.set(name, value);
  }
  url.searchParams.set("status", "1"); // the place in the queue, before the handshake
  return url;
}

function connect() {
  if (!$("persona").checkValidity()) {
    document.querySelector("details").open = true; // a browser cannot point at a field that is folded away
    $("persona").reportValidity();
    return;
  }
  complain(null);
  $("transcript").replaceChildren(document.createElement("p"));
  latency = liveSince = null;
  session = new Session(chatUrl(), {
    state: (name, detail) => {
      show(name, detail);
      $("mute").hidden = name !== "live";
      if (name === "live") liveSince = performance.now();
    },
    recorded: () => ($("recorded").hidden = false),
    text: write,
    latency: (ms) => (latency = latency === null ? ms : latency + (ms - latency) / 16),
    spoken: (level) => showLevel($("you"), level),
    heard: hear,
    end: (message) => {
      session = null;
      $("recorded").hidden = true;
      show("idle");
      complain(message);
      setBusy(false);
      refresh();
    },
  });
  setBusy(true);
  session.open();
}

function setBusy(busy) {
  for (const control of $("persona").elements) control.disabled = busy;
  $("connect").textContent = busy ? "Disconnect" : "Connect";
  $("connect").classList.toggle("leave", busy);
  $("mute").hidden = true;
  mute(false);
  if (!busy) for (const id of ["you", "agent"]) showLevel($(id), 0);
}

function mute(muted) {
  $("mute").setAttribute("aria-pressed", muted);
  $("mute").textContent = muted ? "Muted" : "Mute";
}

function write(piece) {
  const log = $("transcript");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  const paragraph = log.lastElementChild;
  paragraph.append(paragraph.textContent ? piece : piece.trimStart());
  if (follows) log.scrollTop = log.scrollHeight;
}

function showLevel(meter, level) {
  const decibels = Math.max(FLOOR_DB, Math.min(0, 10 * Math.log10(level || 1e-12)));
  meter.firstElementChild.style.transform = `scaleX(${1 - decibels / FLOOR_DB})`;
  meter.setAttribute("aria-valuenow", Math.round(decibels));
}

function hear({ level, stored, gaps, dropped }) {
  showLevel($("agent"), level);
  if (liveSince === null) return;
  const buffered = (1e3 * stored) / SAMPLE_RATE;
  const seconds = Math.floor((performance.now() - liveSince) / 1e3);
  $("latency").textContent = latency === null ? NOTHING : `${Math.round(latency + buffered)} ms`;
  $("buffered").textContent = `${Math.round(buffered)} ms`;
  $("gaps").textContent = dropped ? `${gaps} (${Math.round((1e3 * dropped) / SAMPLE_RATE)} ms cut)` : `${gaps}`;
  $("duration").textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
}

$("connect").addEventListener("click", () => (session ? session.close() : connect()));
$("mute").addEventListener("click", () => {
  const muted = $("mute").getAttribute("aria-pressed") !== "true";
  session.muted = muted;
  mute(muted);
});
$("voice").addEventListener("change", () => {
  voiceChosen = true;
  chooseVoice($("voice").value);
});
$("preset").addEventListener("change", choosePrompt);
$("role").addEventListener("input", () => ($("preset").value = CUSTOM));
$("persona").addEventListener("submit", (event) => event.preventDefault());
window.addEventListener("pagehide", () => session?.close());

try {
  const [info, voiceList, promptList] = await Promise.all(["api/info", "api/voices", "api/prompts"].map(load));
  fillVoices(voiceList.voices, voiceList.default);
  fillPrompts(promptList.prompts, promptList.default);
  describe(info);
  const reason = await obstacle();
  complain(reason);
  show(reason ? "blocked" : "idle");
  $("connect").disabled = Boolean(reason);
  setInterval(refresh, REFRESH_MS);
} catch (error) {
  show("blocked");
  complain(error.message);
}
