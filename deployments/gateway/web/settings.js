// What the page remembers of its user's choices: in localStorage, or for this visit only where that is blocked.

const KEY = "personaplex.settings";
const DEFAULTS = {
  language: null, // null: the browser's
  theme: "auto", // auto, light or dark
  voice: null,
  role: null, // id of a role of the service, or of a saved one
  text: null, // role text where it is of one's own
  saved: [], // roles of one's own: {id, label, text}
  sampling: {},
  microphone: "",
  loudspeaker: "",
  echo: true,
  noise: true,
  gain: true,
  pushToTalk: false,
  shortcuts: true,
  keep: true, // talks in the history
  key: "", // API key, kept only when asked to
};

let values = { ...DEFAULTS, ...read() };

function read() {
  try {
    const stored = JSON.parse(localStorage.getItem(KEY) ?? "{}");
    return Object.fromEntries(Object.entries(stored).filter(([name]) => name in DEFAULTS));
  } catch {
    return {};
  }
}

export function get(name) {
  return values[name];
}

export function set(name, value) {
  values[name] = value;
  try {
    localStorage.setItem(KEY, JSON.stringify(values));
  } catch {
    // blocked or full: it holds for this visit
  }
}
