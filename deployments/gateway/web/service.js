// What the service says of itself, and addresses of it.

/** The service does not answer, or not as expected. */
export class ServiceError extends Error {}

export async function load(path) {
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { cache: "no-store" });
  } catch (error) {
    throw new ServiceError(error.message);
  }
  if (!response.ok) throw new ServiceError(`HTTP ${response.status}, ${path}`);
  return response.json();
}

/** The words about a model that is none to use in earnest, or null for the others. */
export function toyNotice(model) {
  return { tiny: "notice.toy", echo: "notice.echo", talk: "notice.talk" }[model] ?? null;
}

/** The address of a conversation with a persona: {voice, role: {text}, sampling, record, key}. */
export function chatUrl({ voice, role, sampling = {}, record = false, key = "" }) {
  const url = new URL("api/chat", document.baseURI);
  url.protocol = url.protocol.replace("http", "ws");
  const query = url.searchParams;
  if (voice) query.set("voice_prompt", voice);
  query.set("text_prompt", role.text);
  for (const [name, value] of Object.entries(sampling)) {
    if (value !== "" && value !== null && value !== undefined) query.set(name, value);
  }
  if (record) query.set("record", "1");
  if (key) query.set("worker_auth_id", key);
  query.set("status", "1"); // the place in the queue, details of the session, offers to resume
  return url;
}

/** `{tokens, limit, left}` as the model counts, or null where nobody answers. */
export async function countTokens(text, key = "") {
  try {
    const headers = { "content-type": "application/json", ...(key ? { "x-api-key": key } : {}) };
    const body = JSON.stringify({ text_prompt: text });
    const answer = await fetch(new URL("api/tokens", document.baseURI), { method: "POST", headers, body });
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

/** About how many tokens a role text has: exact counts need the model's vocabulary, which stays on the service. */
export function estimateTokens(text) {
  const wide = text.match(/[\u2e80-\u9fff\uac00-\ud7af\uff00-\uffef]/g)?.length ?? 0;
  const rest = text.replace(/[\u2e80-\u9fff\uac00-\ud7af\uff00-\uffef]/g, " ");
  const words = rest.match(/[A-Za-z\u00c0-\u024f]+|[0-9]|[^\s\w]/g) ?? [];
  return Math.ceil(words.reduce((sum, word) => sum + Math.max(1, word.length / 5), 0) + 3 * wide);
}
