// Two lanes of a canvas: the user above, the agent below, the loudness of each as bars around its middle, and a band
// across both where they spoke at once.

import { FLOOR_DB, STEP_S } from "../levels.js";

const BAR = 3; // CSS pixels
const PITCH = 5;
const SILENT = 2; // height of a bar of silence
const LATE_S = 0.06; // levels of the newest moment are still on their way

function colours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(["you", "agent", "both", "line", "quiet", "card"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

class Lanes {
  #canvas;
  #colours = colours();
  #repaint = () => (this.#colours = colours());

  constructor(canvas) {
    this.#canvas = canvas;
    document.addEventListener("theme", this.#repaint);
  }

  close() {
    document.removeEventListener("theme", this.#repaint);
  }

  /** Fits the canvas to its size on the screen; gives `{context, width, height}` in CSS pixels. */
  begin() {
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    const ratio = window.devicePixelRatio || 1;
    const [w, tall] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.#canvas.width !== w || this.#canvas.height !== tall) Object.assign(this.#canvas, { width: w, height: tall });
    const context = this.#canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    return { context, width, height, colours: this.#colours };
  }
}

/** Draws bars for the steps [from, from + perBar * bars), the first at `x`. */
function drawBars({ context, height, colours }, levels, from, perBar, bars, x) {
  const loud = (side, step) => {
    let [db, speaks] = [FLOOR_DB, false];
    for (let at = Math.floor(step); at < step + perBar; at++) {
      db = Math.max(db, levels[side].db(at));
      speaks ||= levels[side].speaks(at);
    }
    return [Math.max(0, 1 - (db + 6) / (FLOOR_DB + 6)), speaks];
  };
  const half = height / 2;
  let both = null; // where the band begins that is going on
  const band = (end) => {
    if (both !== null) drawBand(context, both, end, height, colours.both);
    both = null;
  };
  for (let bar = 0; bar < bars; bar++) {
    const step = from + bar * perBar;
    if (step < 0) continue;
    const left = x + bar * PITCH;
    const user = loud("user", step);
    const agent = loud("agent", step);
    if (user[1] && agent[1]) both ??= left - (PITCH - BAR) / 2;
    else band(left - (PITCH - BAR) / 2);
    for (const [lane, [value, speaks], colour] of [[0, user, colours.you], [1, agent, colours.agent]]) {
      const size = Math.max(SILENT, value ** 1.5 * (half - 18));
      context.globalAlpha = speaks ? 1 : 0.38;
      context.fillStyle = colour;
      context.beginPath();
      context.roundRect?.(left, half * lane + (half - size) / 2, BAR, size, BAR / 2);
      if (!context.roundRect) context.rect(left, half * lane + (half - size) / 2, BAR, size);
      context.fill();
    }
  }
  band(x + bars * PITCH);
  context.globalAlpha = 1;
}

/** Behind the bars that are there already. */
function drawBand(context, left, right, height, colour) {
  context.globalCompositeOperation = "destination-over";
  context.globalAlpha = 0.28;
  context.fillStyle = colour;
  context.beginPath();
  if (context.roundRect) context.roundRect(left, 4, right - left, height - 8, 6);
  else context.rect(left, 4, right - left, height - 8);
  context.fill();
  context.globalCompositeOperation = "source-over";
}

/** The last seconds of a conversation that goes on; `talk` has `levels`, `seconds` and `live`. */
export class LiveLanes {
  static SECONDS_PER_PIXEL = 1 / 72;
  #lanes;
  #talk;
  #timer = null;
  #slow = matchMedia("(prefers-reduced-motion: reduce)");
  #drawn = 0;

  constructor(canvas, talk) {
    this.#lanes = new Lanes(canvas);
    this.#talk = talk;
    this.#next();
  }

  /** The last moment stays. */
  freeze() {
    cancelAnimationFrame(this.#timer);
    this.draw();
    window.addEventListener("resize", this.#redraw);
    document.addEventListener("theme", this.#redraw);
  }

  close() {
    cancelAnimationFrame(this.#timer);
    window.removeEventListener("resize", this.#redraw);
    document.removeEventListener("theme", this.#redraw);
    this.#lanes.close();
  }

  #redraw = () => this.draw();

  #next() {
    this.#timer = requestAnimationFrame((now) => {
      if (now - this.#drawn >= (this.#slow.matches ? 250 : 0)) {
        this.#drawn = now;
        this.draw();
      }
      this.#next();
    });
  }

  draw() {
    const sheet = this.#lanes.begin();
    const { context, width, height, colours } = sheet;
    const perBar = (PITCH * LiveLanes.SECONDS_PER_PIXEL) / STEP_S;
    const now = this.#talk.live ? this.#talk.seconds - LATE_S : Math.min(this.#talk.levels.user.length, this.#talk.levels.agent.length) * STEP_S;
    const right = width - 26;
    const bars = Math.ceil(right / PITCH) + 1;
    const last = Math.max(0, now) / STEP_S / perBar; // in bars, with a fraction
    const first = Math.floor(last) - bars;
    drawBars(sheet, this.#talk.levels, first * perBar, perBar, bars, right - (last - first) * PITCH);
    this.#fade(context, height);
    for (const [lane, side, colour] of [[0, "user", colours.you], [1, "agent", colours.agent]]) {
      const step = Math.floor(now / STEP_S) - 1;
      const db = this.#talk.live ? Math.max(this.#talk.levels[side].db(step), this.#talk.levels[side].db(step - 2)) : FLOOR_DB;
      drawHead(context, width - 14, (height / 2) * (lane + 0.5), colour, 1 - db / FLOOR_DB, this.#talk.levels[side].speaks(step));
    }
  }

  #fade(context, height) {
    const gradient = context.createLinearGradient(0, 0, 60, 0);
    gradient.addColorStop(0, "#000");
    gradient.addColorStop(1, "#0000");
    context.globalCompositeOperation = "destination-out";
    context.fillStyle = gradient;
    context.fillRect(0, 0, 60, height);
    context.globalCompositeOperation = "source-over";
  }
}

function drawHead(context, x, y, colour, loud, speaks) {
  context.fillStyle = colour;
  context.globalAlpha = 0.22;
  context.beginPath();
  context.arc(x, y, 5 + 9 * Math.max(0, loud - 0.15), 0, 2 * Math.PI);
  context.fill();
  context.globalAlpha = speaks ? 1 : 0.55;
  context.beginPath();
  context.arc(x, y, 4.5, 0, 2 * Math.PI);
  context.fill();
  context.globalAlpha = 1;
}

/** A whole stored talk; `position` is told in seconds, `choose(seconds)` when a place is pointed at. */
export class WholeLanes {
  #lanes;
  #canvas;
  #levels;
  #steps;
  #observer;
  #position = 0;

  constructor(canvas, levels, choose) {
    this.#lanes = new Lanes(canvas);
    this.#canvas = canvas;
    this.#levels = levels;
    this.#steps = Math.max(1, levels.user.length, levels.agent.length);
    canvas.onclick = ({ offsetX }) => choose((offsetX / canvas.clientWidth) * this.#steps * STEP_S);
    this.#observer = new ResizeObserver(() => this.draw());
    this.#observer.observe(canvas);
    document.addEventListener("theme", this.#redraw);
  }

  #redraw = () => this.draw();

  close() {
    this.#observer.disconnect();
    this.#lanes.close();
    document.removeEventListener("theme", this.#redraw);
  }

  set position(seconds) {
    this.#position = seconds;
    this.draw();
  }

  draw() {
    const sheet = this.#lanes.begin();
    const { context, width, height, colours } = sheet;
    const bars = Math.max(1, Math.floor(width / PITCH));
    drawBars(sheet, this.#levels, 0, this.#steps / bars, bars, 1);
    const x = Math.min(width - 2, (this.#position / (this.#steps * STEP_S)) * width);
    context.fillStyle = colours.quiet;
    context.fillRect(x, 0, 2, height);
  }
}
