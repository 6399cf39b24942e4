// The WebSocket protocol of /api/chat: one conversation, which may outlive its sockets. Knows no sound and no page.
//
// A service that offers to resume sends a token with the session's details. When the socket is lost, `Session` connects
// again with the newest token, with back-off, until the grace that came with it is over. A service that asks its clients
// over to another server (`reconnect`) is obeyed at once, without a word to the user unless that fails.

const Kind = { HANDSHAKE: 0, AUDIO: 1, TEXT: 2, METADATA: 4, ERROR: 5 };
const PATIENCE_MS = 10_000; // without a message, once live
const BACK_SOON = 4000; // close code of ours
const RESUMABLE = new Set([1001, 1006, 1011, 1012, 1013]); // close codes: a socket or a server is gone, or has no slot
const FINAL = new Set([400, 401, 403, 410]); // refusals that no other try would change
const BACKOFF_MS = { first: 250, most: 4_000 };
const GRACE_S = 30; // where the service names none
const SETTLED_MS = 1_000; // a socket that is asked over sooner comes over with back-off: two servers may disagree

/** How a conversation ended: `kind` is asked, over, full, refused, lost, silent or failed; `words` are the service's. */
function ending(kind, { code = null, status = null, words = "" } = {}) {
  return { kind, code, status, words };
}

function kindOfClose(code) {
  if (code === 1000) return "over";
  if (code === 1013) return "full";
  return code === 1006 || code === 1001 ? "lost" : "failed";
}

export class Session {
  #url;
  #handlers;
  #socket;
  #words = ""; // the service's own about its error
  #patience;
  #retry;
  #token = null;
  #graceS = GRACE_S;
  #deadline = null; // of the tries to resume
  #liveSince = 0;
  #tries = 0;
  #live = false;
  #over = false;
  heard = 0; // frames of the agent that arrived, as the service numbers them
  #read = 0; // frames of which all the text arrived, or was told after a loss: it follows their sound

  /**
   * Handlers: `state(name, detail)` with connecting, queued ({position, wait_s}), warming, live ({resumed}) or lost
   * ({deadline} by performance.now()); `details(object)` of the session; `audio(bytes)`, whole Ogg pages;
   * `text(piece)` of the agent; `metadata(object)` of any other type; `end(ending)`, last of all and once. Who takes the
   * audio keeps `heard`.
   */
  constructor(url, handlers) {
    this.#url = new URL(url);
    this.#handlers = handlers;
  }

  open() {
    this.#handlers.state("connecting");
    this.#connect(this.#url);
  }

  close() {
    this.#finish(ending("asked"));
  }

  /** Whether what is sent now is heard. */
  get live() {
    return this.#live && this.#socket?.readyState === WebSocket.OPEN;
  }

  /** Sends one piece of an Ogg stream; what is sent while not live is lost. */
  send(page) {
    if (!this.live) return;
    const message = new Uint8Array(1 + page.length);
    message[0] = Kind.AUDIO;
    message.set(page, 1);
    this.#socket.send(message);
  }

  #connect(url) {
    const socket = new WebSocket(url);
    let accepted = false;
    this.#socket = socket;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      accepted = true;
      clearTimeout(this.#patience);
      if (!this.#deadline) this.#handlers.state("warming");
    };
    socket.onmessage = ({ data }) => this.#receive(data);
    socket.onclose = ({ code, reason }) => this.#closed(accepted, code, this.#words || reason);
  }

  async #closed(accepted, code, words) {
    this.#live = false;
    clearTimeout(this.#patience);
    if (this.#token && (accepted ? RESUMABLE.has(code) : this.#deadline)) return this.#resume(accepted, code, words);
    if (accepted) return this.#finish(ending(kindOfClose(code), { code, words }));
    this.#finish(await this.#whyRefused());
  }

  async #resume(accepted, code, words) {
    this.#deadline ??= performance.now() + 1e3 * this.#graceS;
    this.#handlers.state("lost", { deadline: this.#deadline });
    if (!accepted) {
      const refusal = await this.#whyRefused();
      const final = FINAL.has(refusal.status); // a proxy that has just begun answers with others, such as 404
      if (this.#over) return;
      if (final) return this.#finish(refusal.status === 410 ? ending("lost") : refusal);
    }
    const rest = this.#deadline - performance.now();
    if (rest <= 0) return this.#finish(code === 1013 ? ending("full", { code, words }) : ending("lost"));
    const delay = Math.min(BACKOFF_MS.first * 2 ** this.#tries++, BACKOFF_MS.most) * (0.75 + Math.random() / 2);
    this.#retry = setTimeout(() => this.#again(), Math.min(delay, rest));
    window.addEventListener("online", this.#again, { once: true });
  }

  #again = () => {
    clearTimeout(this.#retry);
    window.removeEventListener("online", this.#again);
    if (this.#over) return;
    const url = new URL(this.#url);
    url.searchParams.set("resume", this.#token);
    url.searchParams.set("heard", this.heard);
    url.searchParams.set("read", this.#read);
    this.#connect(url);
    this.#wait(); // for the upgrade: a try that gets no answer makes room for the next
  };

  /** The service asks to come over to another server; the old socket says nothing more. */
  #comeOver() {
    if (!this.#token) return; // it cannot be done: the service will say how it ends
    this.#drop();
    const settled = performance.now() - this.#liveSince > SETTLED_MS;
    if (!this.#live || !settled) return this.#closed(true, 1012, "");
    this.#live = false;
    this.#deadline = performance.now() + 1e3 * this.#graceS;
    this.#again();
  }

  // Browsers tell scripts nothing about an upgrade that was refused, so the question is asked again.
  async #whyRefused() {
    const url = new URL(this.#socket.url);
    url.protocol = url.protocol.replace("ws", "http");
    url.pathname = url.pathname.replace(/chat$/, "admission");
    try {
      const answer = await fetch(url, { cache: "no-store" });
      if (answer.status === 204) return ending("full", { status: 503 }); // it was, a moment ago
      const plain = answer.headers.get("content-type")?.startsWith("text/plain");
      const full = answer.status === 503 || answer.status === 429;
      const words = plain ? (await answer.text()).trim() : "";
      return ending(full ? "full" : "refused", { status: answer.status, words });
    } catch {
      return ending("lost"); // it cannot be reached at all
    }
  }

  #receive(data) {
    const bytes = new Uint8Array(data);
    const payload = bytes.subarray(1);
    if (this.#live || bytes[0] === Kind.HANDSHAKE) this.#wait();
    try {
      switch (bytes[0]) {
        case Kind.HANDSHAKE: return this.#start();
        case Kind.AUDIO: return this.#hear(payload);
        case Kind.TEXT: return this.#show(new TextDecoder().decode(payload));
        case Kind.METADATA: return this.#learn(JSON.parse(new TextDecoder().decode(payload)));
        case Kind.ERROR: this.#words = new TextDecoder().decode(payload);
      }
    } catch (error) {
      this.#finish(ending("failed", { words: error.message }));
    }
  }

  #hear(payload) {
    const before = this.heard;
    this.#handlers.audio(payload);
    if (this.heard > before) this.#read = Math.max(this.#read, before);
  }

  #show(piece) {
    this.#read = Math.max(this.#read, this.heard);
    this.#handlers.text(piece);
  }

  #wait() {
    clearTimeout(this.#patience);
    this.#patience = setTimeout(() => this.#silent(), PATIENCE_MS);
  }

  #silent() {
    if (!this.#token) return this.#finish(ending("silent"));
    this.#drop();
    this.#closed(true, 1006, "");
  }

  #start() {
    const resumed = this.#deadline !== null;
    this.#live = true;
    this.#liveSince = performance.now();
    this.#deadline = null;
    this.#tries = 0;
    this.#words = "";
    this.#handlers.state("live", { resumed });
  }

  #learn(details) {
    if (typeof details.resume === "string") this.#token = details.resume; // after each resume, failover and move
    if (details.type === "session") {
      if (details.grace_s > 0) this.#graceS = details.grace_s;
      this.#handlers.details(details);
      this.#read = Math.max(this.#read, details.resumed?.frame ?? 0);
    } else if (details.type === "reconnect") this.#comeOver();
    else if (details.type !== "queue") this.#handlers.metadata(details);
    if (this.#live || this.#deadline) return;
    if (details.type === "queue" && details.position > 0) this.#handlers.state("queued", details);
    else if (details.type === "queue" || details.type === "session") this.#handlers.state("warming");
  }

  // 1000 says that we leave for good; with any other code the session is kept for us to come back to.
  #drop(code = BACK_SOON) {
    this.#socket.onmessage = this.#socket.onclose = null;
    this.#socket.close(code);
  }

  #finish(how) {
    if (this.#over) return;
    this.#over = true;
    this.#live = false;
    clearTimeout(this.#patience);
    clearTimeout(this.#retry);
    window.removeEventListener("online", this.#again);
    if (this.#socket) this.#drop(1000);
    this.#handlers.end(how);
  }
}
