// The gauges beside the conversation, from /v1/outdraft/stats.

import { $, figure, h } from "./dom.js";

const KEPT = 60;
const SVG = "http://www.w3.org/2000/svg";

export class Gauges {
  constructor() {
    this.rates = [];
    this.line = document.createElementNS(SVG, "polyline");
    $("g-rate-line").append(this.line);
    /** Speed-up of the last comparison made on this page, which the server cannot know. */
    this.compared = null;
  }

  show(stats) {
    $("g-rate").textContent = figure(stats.tok_s, 0);
    $("g-per-pass").textContent = figure(stats.tokens_per_pass, 2);
    const speedup = this.compared ?? stats.speedup_measured;
    $("g-speedup").textContent = Number.isFinite(speedup) ? `${figure(speedup, 2)} ×` : "–";
    $("g-draft-n").textContent = figure(stats.draft_n_now, 0);
    $("g-reason").textContent = stats.draft_reason ?? "";
    this.#rate(stats.tok_s ?? 0);
    this.#acceptance(stats.acceptance_by_position ?? []);
    const pages = stats.pages ?? {};
    const facts = [
      ["drafter", stats.drafter ?? "none"],
      ["answering", stats.running],
      ["waiting", stats.waiting],
      ["pages free", pages.free],
      ["pages used", pages.used],
      ["pages cached", pages.cached],
    ].filter(([, value]) => value !== undefined && value !== null);
    $("g-facts").replaceChildren(...facts.flatMap(([name, value]) =>
      [h("dt", {}, name), h("dd", {}, String(value))]));
  }

  #rate(value) {
    this.rates.push(value);
    if (this.rates.length > KEPT) this.rates.shift();
    const top = Math.max(1, ...this.rates);
    this.line.setAttribute("points", this.rates.map((r, i) =>
      `${(240 * i) / (KEPT - 1)},${46 - (44 * r) / top}`).join(" "));
  }

  #acceptance(shares) {
    const bars = $("g-acceptance");
    while (bars.children.length > shares.length) bars.lastChild.remove();
    shares.forEach((share, i) => {
      if (!bars.children[i]) {
        bars.append(h("div", { role: "listitem" }, h("span", {}, String(i + 1)),
          h("span", { class: "track" }, h("span", { class: "fill" })), h("span", {})));
      }
      const [, track, label] = bars.children[i].children;
      const known = Number.isFinite(share);
      track.firstChild.style.display = "block";
      track.firstChild.style.width = `${known ? 100 * share : 0}%`;
      label.textContent = known ? `${Math.round(100 * share)} %` : "–";
    });
  }
}
