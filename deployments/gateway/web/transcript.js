// What was said, as turns of both sides in the order they began. Pure: a model, without a page.

const SAME_TURN_S = 3; // a longer pause of the agent begins a new turn of it
const YIELD_S = 0.8; // a pause this long does, where the user spoke meanwhile
const SAME_SPEECH_S = 1.2; // between two pieces of the user's speech in one turn
const NEAR_S = 1; // between words of the user and the speech they belong to

/**
 * `entries`: `{side, start, end, text, overlap}`, seconds from the start of the conversation. The user's text is empty
 * where the service does not write it down. `overlap`: the user began while the agent spoke. `changed(entry, index)`
 * is called for each new or changed one.
 */
export class Transcript {
  entries = [];
  #speech = null; // {start, turn} of the user's newest
  #changed;

  constructor(changed = () => {}) {
    this.#changed = changed;
  }

  agentText(time, piece) {
    let turn = this.#last("agent");
    if (!turn || this.#isNewTurn(turn, time)) {
      if (!piece.trim()) return;
      turn = this.#add({ side: "agent", start: time, end: time, text: "", overlap: false });
    }
    turn.text += turn.text ? piece : piece.trimStart();
    turn.end = Math.max(turn.end, time + 0.08);
    this.#tell(turn);
  }

  /** Speech of the user by its level; `end` is null when it begins. */
  userSpeech(start, end, agentSpeaks) {
    const turn = this.#speech?.start === start ? this.#speech.turn : this.#turnAt(start, agentSpeaks);
    this.#speech = { start, turn };
    turn.end = Math.max(turn.end, end ?? start);
    this.#tell(turn);
  }

  #turnAt(start, overlap) {
    const turn = this.#last("user");
    const agent = this.#last("agent");
    const yielded = turn && agent && agent.start > turn.end;
    if (turn && !yielded && start <= turn.end + SAME_SPEECH_S) return turn;
    return this.#add({ side: "user", start, end: start, text: "", overlap });
  }

  /** Words of the user, as the service heard them. */
  userText(start, end, text) {
    const near = this.entries.filter((entry) => entry.side === "user"
      && start < entry.end + NEAR_S && end > entry.start - NEAR_S);
    const distance = (entry) => Math.abs((entry.start + entry.end - start - end) / 2);
    let turn = near.sort((one, other) => distance(one) - distance(other))[0];
    turn ??= this.#add({ side: "user", start, end, text: "", overlap: false });
    turn.text = [turn.text, text.trim()].filter(Boolean).join(" ");
    turn.end = Math.max(turn.end, end);
    this.#tell(turn);
  }

  #isNewTurn(turn, time) {
    const pause = time - turn.end;
    return pause > SAME_TURN_S || (pause > YIELD_S && this.entries.at(-1).side === "user");
  }

  #last(side) {
    return this.entries.findLast((entry) => entry.side === side);
  }

  #add(entry) {
    const after = this.entries.findLastIndex(({ start }) => start <= entry.start);
    this.entries.splice(after + 1, 0, entry);
    return entry;
  }

  #tell(entry) {
    this.#changed(entry, this.entries.indexOf(entry));
  }
}

/** `m:ss`, or `h:mm:ss`. */
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const [h, m, s] = [Math.floor(whole / 3_600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (number) => String(number).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}
