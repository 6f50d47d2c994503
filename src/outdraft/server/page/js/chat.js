// One answer on the page: its tokens as they come, what it took, and the tip over a token.
// A run is {drafting, model, text, thinking, tokens: [text, drafted, prob, ms][], timings, finish,
// error}; it is what the store keeps and everything here is drawn from.

import { $, figure, h } from "./dom.js";
import { render } from "./markdown.js";

export function newRun(drafting, model) {
  return {
    drafting, model, text: "", thinking: "", tokens: [], timings: null, finish: null, error: null,
  };
}

/** Take a chunk of a stream into a run; the tokens that are new, as [entry, thinking][]. */
export function take(run, chunk, ms) {
  const choice = chunk.choices?.[0] ?? {};
  const delta = choice.delta ?? {};
  const thought = delta.reasoning ?? delta.reasoning_content ?? "";
  const text = delta.content ?? choice.text ?? "";
  if (choice.finish_reason) run.finish = choice.finish_reason;
  if (chunk.timings) run.timings = chunk.timings;
  if (chunk.usage) run.usage = chunk.usage;
  run.thinking += thought;
  run.text += text;
  const told = chunk.outdraft?.tokens;
  const shown = (told ?? []).map((t) => t.text).join("");
  // Texts that a parser took out or changed are shown as they were sent, in one piece.
  const fits = told && (shown === text || shown === thought);
  const entries = fits
    ? told.map((t) => [t.text, t.drafted ? 1 : 0, t.prob ?? null, ms])
    : text || thought ? [[text || thought, 0, null, ms]] : [];
  if (!thought) run.tokens.push(...entries);
  return entries.map((entry) => [entry, Boolean(thought)]);
}

/** Tokens a second of a run: the server's figure, or from the times of arrival. */
export function rate(run) {
  if (run.timings?.predicted_per_second) return run.timings.predicted_per_second;
  const [first, last] = [run.tokens[0]?.[3], run.tokens.at(-1)?.[3]];
  return run.tokens.length > 2 && last > first ? (1000 * (run.tokens.length - 1)) / (last - first)
    : NaN;
}

/** What a run took, in a line. */
export function summary(run) {
  const t = run.timings;
  const parts = [run.drafting === "off" ? "plain" : "drafting"];
  if (Number.isFinite(rate(run))) parts.push(`${figure(rate(run), 0)} tokens/s`);
  if (t) parts.push(`${t.predicted_n} tokens`);
  if (t?.draft_n) {
    const share = Math.round((100 * t.draft_n_accepted) / t.draft_n);
    parts.push(`${t.draft_n_accepted} of ${t.draft_n} drafts accepted (${share} %)`);
  }
  if (run.finish === "length") parts.push("ended at the token limit");
  if (run.finish === "stopped") parts.push("stopped");
  return parts;
}

export class Answer {
  /** `actions`: [label, function(run)] shown below when the run has ended. */
  constructor(run, { view, actions = [] }) {
    this.run = run;
    this.view = view;
    this.actions = actions;
    this.thinking = h("div", { class: "thinking tokens" });
    this.thought = h("details", { hidden: true }, h("summary", {}, "Thinking"), this.thinking);
    this.body = h("div", {
      class: "body", tabIndex: 0, role: "group", "aria-label": "Answer",
      onkeydown: (event) => this.#key(event),
    });
    this.footer = h("footer");
    this.element = h("article", { class: "message answer" },
      h("header", {}, run.model || "Model"), this.thought, this.body, this.footer);
    this.redraw();
  }

  setView(view) {
    this.view = view;
    this.redraw();
  }

  redraw() {
    const { run, body } = this;
    const tokens = this.view === "tokens" && run.tokens.length > 0;
    body.className = `body ${tokens ? "tokens" : "rendered"}`;
    if (tokens) body.replaceChildren(...run.tokens.map(span));
    else body.replaceChildren(...render(run.text));
    if (run.thinking && !this.thinking.childNodes.length) {
      this.thinking.append(run.thinking);
      this.thought.hidden = false;
    }
    if (run.finish || run.error) this.#end();
  }

  /** A chunk has come. */
  push(chunk, ms) {
    for (const [entry, thinking] of take(this.run, chunk, ms)) {
      if (thinking) {
        this.thought.hidden = false;
        this.thinking.append(span(entry));
      } else if (this.view === "tokens") {
        this.body.append(span(entry));
      }
    }
    if (this.view !== "tokens") this.body.replaceChildren(...render(this.run.text));
    this.footer.replaceChildren(...summary(this.run).map((part) => h("span", {}, part)));
  }

  /** No more will come. */
  finish(error = null) {
    if (error) this.run.error = error;
    this.redraw();
  }

  /** Show what was there after so many milliseconds; true when that is all. */
  replay(ms) {
    const shown = this.run.tokens.filter((t) => t[3] <= ms);
    if (this.view === "tokens") {
      while (this.body.children.length > shown.length) this.body.lastChild.remove();
      for (let i = this.body.children.length; i < shown.length; i++) this.body.append(span(shown[i]));
    } else {
      this.body.replaceChildren(...render(shown.map((t) => t[0]).join("")));
    }
    return shown.length === this.run.tokens.length;
  }

  #end() {
    const { run } = this;
    const parts = summary(run).map((part) => h("span", {}, part));
    if (run.error) parts.push(h("span", { class: "problem", role: "alert" }, run.error));
    const buttons = run.text ? this.actions.map(([label, act]) =>
      h("button", { type: "button", onclick: () => act(run) }, label)) : [];
    this.footer.replaceChildren(...parts, ...buttons);
  }

  #key(event) {
    if (event.key === "Escape") return tip.hide();
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || this.view !== "tokens") return;
    event.preventDefault();
    const spans = [...this.body.querySelectorAll(".tok")];
    const at = spans.findIndex((s) => s.classList.contains("current"));
    const next = spans[Math.max(0, Math.min(spans.length - 1, at + step))];
    if (!next) return;
    spans[at]?.classList.remove("current");
    next.classList.add("current");
    next.scrollIntoView({ block: "nearest" });
    tip.show(next, true);
  }
}

function span([text, drafted, prob]) {
  const element = h("span", { class: drafted ? "tok drafted" : "tok" }, text);
  if (prob !== null) element.dataset.prob = prob;
  return element;
}

/** A probability for people: 99.97 %, 4.2 %, 0.003 %. */
export function percent(p) {
  const value = 100 * p;
  if (value >= 99.995) return "100 %";
  return `${value >= 99 ? value.toFixed(2) : value >= 1 ? value.toFixed(1) : value.toPrecision(2)} %`;
}

export const tip = {
  show(token, spoken = false) {
    const how = token.classList.contains("drafted") ? "drafted and accepted"
      : "chosen by the model itself";
    const prob = token.dataset.prob;
    const text = JSON.stringify(token.textContent) +
      `, ${how}${prob === undefined ? "" : `, probability ${percent(Number(prob))}`}`;
    const box = $("tip");
    box.textContent = text;
    box.hidden = false;
    const at = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const own = box.getBoundingClientRect();
    box.style.left = `${Math.max(4, Math.min(innerWidth - own.width - 4, at.left))}px`;
    box.style.top = `${at.top > own.height + 8 ? at.top - own.height - 5 : at.bottom + 5}px`;
    if (spoken) $("announce").textContent = text;
  },
  hide() {
    $("tip").hidden = true;
  },
};

/** Tips for every token below an element. */
export function showTips(root) {
  root.addEventListener("mouseover", (event) => {
    const token = event.target.closest?.(".tok");
    if (token && root.contains(token)) tip.show(token);
    else tip.hide();
  });
  root.addEventListener("mouseleave", () => tip.hide());
  root.addEventListener("scroll", () => tip.hide(), { passive: true });
  root.addEventListener("focusout", () => tip.hide());
}
