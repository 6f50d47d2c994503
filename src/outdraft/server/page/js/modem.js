// The modem view: an answer replayed at the speed of telephone lines beside the real stream.
// A character is 10 bits on the line: start, 8 data, stop. A "56K" modem carries 53,000 bit/s,
// the most that FCC part 68 allowed.

import { $, h } from "./dom.js";

export const LINES = [
  { name: "300", bits: 300 },
  { name: "1200", bits: 1200 },
  { name: "2400", bits: 2400 },
  { name: "14.4K", bits: 14_400 },
  { name: "33.6K", bits: 33_600 },
  { name: "56K", bits: 53_000 },
];

/** Seconds that so many characters take on a line. */
export const seconds = (characters, line) => (characters * 10) / line.bits;

/** 78.9 → "1m 19s", 9.87 → "9.9 s", 0.7048 → "705 ms". */
export function duration(s) {
  if (s < 0.9995) return `${Math.round(s * 1000)} ms`;
  if (s < 59.95) return `${s.toFixed(1)} s`;
  const whole = Math.round(s);
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor((whole % 3600) / 60);
  return hours ? `${hours}h ${minutes}m` : `${minutes}m ${whole % 60}s`;
}

/** Table rows of an answer: {name, rate (characters a second), seconds, time}. */
export function table(characters) {
  return LINES.map((line) => {
    const s = seconds(characters, line);
    return { name: line.name, rate: line.bits / 10, seconds: s, time: duration(s) };
  });
}

/** How many characters of a run were there after so many seconds. */
export function arrived(run, s) {
  let n = 0;
  for (const [text, , , at] of run.tokens) {
    if (at > s * 1000) break;
    n += [...text].length;
  }
  return n;
}

export class ModemView {
  constructor() {
    this.dialog = $("modem");
    this.timer = 0;
    $("modem-play").addEventListener("click", () => this.#toggle());
    $("modem-end").addEventListener("click", () => this.#show(Infinity));
    $("modem-close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => this.#pause());
  }

  open(run) {
    const characters = [...run.text];
    this.length = characters.length;
    const realS = (run.tokens.at(-1)?.[3] ?? 0) / 1000;
    const rows = table(this.length);
    const real = realS > 0 ? [{
      name: "outdraft", rate: this.length / realS, seconds: realS, time: duration(realS),
    }] : [];
    this.total = Math.max(...[...rows, ...real].map((r) => r.seconds));
    $("modem-about").textContent =
      `${this.length} characters, 10 bits each. A 56K modem carries 53,000 bit/s.`;
    $("modem-table").tBodies[0].replaceChildren(...[...real, ...rows].map((r) => h("tr", {},
      h("th", { scope: "row" }, r.name), h("td", {}, r.rate.toFixed(0)), h("td", {}, r.time))));
    this.screens = [...real, ...rows].map((r) => {
      const pre = h("pre", { tabIndex: 0, "aria-label": `${r.name}: text so far` });
      const node = document.createTextNode("");
      pre.append(node);
      const upTo = r.name === "outdraft" ? (s) => (s >= r.seconds ? this.length : arrived(run, s))
        : (s) => Math.floor(s * r.rate);
      return { name: r.name, pre, node, upTo, n: 0, characters };
    });
    $("modem-terminals").replaceChildren(...this.screens.map((s) =>
      h("section", {}, h("h3", {}, s.name), s.pre)));
    this.at = 0;
    this.#draw();
    this.dialog.showModal();
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) this.#play();
  }

  #toggle() {
    if (this.timer) this.#pause();
    else this.#play();
  }

  #play() {
    if (this.at >= this.total) this.#show(0);
    let last = performance.now();
    const tick = (now) => {
      // a frame's time may lie before the moment it was asked for
      this.at = Math.min(this.total, this.at + Math.max(0, now - last) / 1000);
      last = now;
      this.#draw();
      if (this.at >= this.total) this.#pause();
      else this.timer = requestAnimationFrame(tick);
    };
    this.timer = requestAnimationFrame(tick);
    $("modem-play").textContent = "Pause";
  }

  #pause() {
    cancelAnimationFrame(this.timer);
    this.timer = 0;
    $("modem-play").textContent = this.at >= this.total ? "Play again" : "Play";
  }

  #show(s) {
    this.#pause();
    this.at = Math.min(this.total, s);
    this.#draw();
    this.#pause();
  }

  #draw() {
    for (const screen of this.screens) {
      const n = Math.min(this.length, this.at >= this.total ? this.length : screen.upTo(this.at));
      if (n === screen.n) continue;
      if (n > screen.n) screen.node.appendData(screen.characters.slice(screen.n, n).join(""));
      else screen.node.data = screen.characters.slice(0, n).join("");
      screen.n = n;
      screen.pre.scrollTop = screen.pre.scrollHeight;
    }
    $("modem-progress").value = this.total ? this.at / this.total : 1;
    $("modem-clock").textContent = duration(this.at);
  }
}
