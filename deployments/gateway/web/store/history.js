// Talks kept in this browser: IndexedDB, or memory where that is blocked (`kept` is false then).
//
// A talk is one record and any number of chunks of a few seconds each, written while it goes on, so that a crash or a
// closed tab loses the last of them at most. A talk holds a Web Lock of its name while it goes on: a record without an
// end whose lock is free was cut off.

const NAME = "personaplex";
const TALKS = "talks"; // key: id
const CHUNKS = "chunks"; // key: [id, number]
const SAMPLES = "samples"; // key: model and voice

function settle(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function openDatabase() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore(TALKS, { keyPath: "id" });
    request.result.createObjectStore(CHUNKS, { keyPath: ["id", "number"] });
    request.result.createObjectStore(SAMPLES, { keyPath: "name" });
  };
  request.onblocked = () => {};
  return settle(request);
}

/** The history of this browser. */
export async function openHistory() {
  try {
    return new History(await openDatabase());
  } catch {
    return new MemoryHistory();
  }
}

class History {
  kept = true;
  #database;

  constructor(database) {
    this.#database = database;
    database.onversionchange = () => database.close();
  }

  /** All talks, newest first. */
  async talks() {
    const talks = await settle(this.#on(TALKS).getAll());
    return talks.sort((one, other) => other.started - one.started);
  }

  talk(id) {
    return settle(this.#on(TALKS).get(id));
  }

  chunks(id) {
    return settle(this.#on(CHUNKS).getAll(IDBKeyRange.bound([id, 0], [id, Infinity])));
  }

  /** Writes a talk's record and, with it or not at all, one more chunk. Rejects with QuotaExceededError. */
  async put(talk, chunk = null) {
    const transaction = this.#database.transaction([TALKS, CHUNKS], "readwrite");
    const done = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    transaction.objectStore(TALKS).put(talk);
    if (chunk) transaction.objectStore(CHUNKS).put(chunk);
    await done;
  }

  async remove(id) {
    const transaction = this.#database.transaction([TALKS, CHUNKS], "readwrite");
    transaction.objectStore(TALKS).delete(id);
    await settle(transaction.objectStore(CHUNKS).delete(IDBKeyRange.bound([id, 0], [id, Infinity])));
  }

  async sample(name) {
    return (await settle(this.#on(SAMPLES).get(name)))?.packets;
  }

  async putSample(name, packets) {
    await settle(this.#on(SAMPLES, "readwrite").put({ name, packets }));
  }

  #on(store, mode = "readonly") {
    return this.#database.transaction(store, mode).objectStore(store);
  }
}

class MemoryHistory {
  kept = false;
  #talks = new Map();
  #chunks = new Map();
  #samples = new Map();

  async talks() {
    return [...this.#talks.values()].sort((one, other) => other.started - one.started);
  }

  async talk(id) {
    return this.#talks.get(id);
  }

  async chunks(id) {
    return this.#chunks.get(id) ?? [];
  }

  async put(talk, chunk = null) {
    this.#talks.set(talk.id, structuredClone(talk));
    if (chunk) this.#chunks.set(talk.id, [...(this.#chunks.get(talk.id) ?? []), chunk]);
  }

  async remove(id) {
    this.#talks.delete(id);
    this.#chunks.delete(id);
  }

  async sample(name) {
    return this.#samples.get(name);
  }

  async putSample(name, packets) {
    this.#samples.set(name, packets);
  }
}

const lockOf = (id) => `${NAME}-talk-${id}`;

/** Holds a talk's lock until the function it gives is called. */
export function holdTalk(id) {
  let release;
  const held = new Promise((resolve) => (release = resolve));
  navigator.locks?.request(lockOf(id), () => held);
  return release;
}

/** Gives an end to talks that a crash or a closed tab cut off. */
export async function recover(history) {
  const { held = [] } = (await navigator.locks?.query()) ?? {};
  const going = new Set(held.map(({ name }) => name));
  for (const talk of await history.talks()) {
    if (talk.ended || going.has(lockOf(talk.id))) continue;
    await history.put({ ...talk, ended: talk.started + 1e3 * talk.seconds, cause: "cut" });
  }
}
