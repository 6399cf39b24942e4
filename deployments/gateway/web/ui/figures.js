// Figures of the connection with a trend of the last minute each.

import { t } from "../i18n.js";
import { h } from "./dom.js";

const SPACE = "http://www.w3.org/2000/svg";
const WIDTH = 120;
const HEIGHT = 28;
const POINTS = 60;
const NAMES = ["latency", "jitter", "buffer", "underruns"];
const LEAST = { latency: 300, jitter: 20, buffer: 200, underruns: 1 }; // top of the trend, at least

function path(values, least) {
  const most = Math.max(least, ...values.filter((value) => value !== null));
  let [line, pen] = ["", "M"];
  values.forEach((value, number) => {
    if (value === null) return void (pen = "M");
    const x = ((POINTS - values.length + number) / (POINTS - 1)) * WIDTH;
    line += `${pen}${x.toFixed(1)} ${(HEIGHT - 2 - (value / most) * (HEIGHT - 4)).toFixed(1)}`;
    pen = "L";
  });
  return line;
}

export class Figures {
  #rows = {};

  constructor(element) {
    element.replaceChildren(...NAMES.map((name) => {
      const value = h("span", { class: "value", id: `figure-${name}` }, "–");
      const svg = document.createElementNS(SPACE, "svg");
      const line = document.createElementNS(SPACE, "path");
      svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
      svg.setAttribute("preserveAspectRatio", "none");
      svg.setAttribute("role", "img");
      svg.setAttribute("aria-label", t("figures.trend", { name: t(`figures.${name}`) }));
      svg.append(line);
      this.#rows[name] = { value, line };
      return h("div", { class: "figure" }, h("span", { class: "name" }, t(`figures.${name}`)), value, svg);
    }));
  }

  show({ now, trends }) {
    for (const name of NAMES) {
      this.#rows[name].value.textContent = this.#words(name, now);
      this.#rows[name].line.setAttribute("d", path(trends[name], LEAST[name]));
    }
  }

  #words(name, now) {
    if (name === "underruns") {
      return now.dropped >= 1 ? t("figures.dropped", { count: now.underruns, ms: Math.round(now.dropped) }) : `${now.underruns}`;
    }
    return now[name] === null ? "–" : t("figures.ms", { value: Math.round(now[name]) });
  }
}
