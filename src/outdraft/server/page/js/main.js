// The page: conversations, sending and stopping, comparing, settings, and the server's state.

import { Api } from "./api.js";
import { Answer, newRun, rate, showTips } from "./chat.js";
import { $, download, figure, h } from "./dom.js";
import { Gauges } from "./gauges.js";
import { ModemView } from "./modem.js";
import {
  DEFAULTS, apiKey, asMarkdown, chats, newChat, removeChat, saveChats, saveSettings, settings,
} from "./store.js";

const api = new Api(apiKey.get());
const gauges = new Gauges();
const modem = new ModemView();
const page = { chat: null, answers: [], stopper: null, models: [], serverModel: "" };

// ---- conversations ----

function openChat(chat) {
  page.chat = chat;
  page.answers = [];
  const log = $("log");
  log.replaceChildren();
  if (!chat.turns.length) {
    log.append(h("p", { class: "empty" },
      "Ask something. Tokens on a green ground were drafted by the small model and accepted by " +
      "the large one; the text is the same without drafting. Compare shows both."));
  }
  for (const turn of chat.turns) {
    if (turn.runs) showRuns(turn);
    else showMine(turn.text);
  }
  listChats();
  log.scrollTop = log.scrollHeight;
}

function listChats() {
  $("chats").replaceChildren(...chats.filter((c) => c.turns.length || c === page.chat).map((chat) =>
    h("li", {},
      h("button", {
        type: "button", "aria-current": chat === page.chat ? "true" : null,
        onclick: () => {
          if (page.stopper) page.stopper.abort();
          openChat(chat);
          closePanels();
        },
      }, chat.title || "New conversation"),
      h("button", {
        type: "button", class: "remove", "aria-label": `Delete ${chat.title || "conversation"}`,
        onclick: () => forget(chat),
      }, "×"))));
}

function forget(chat) {
  if (chat === page.chat) page.stopper?.abort();
  removeChat(chat.id);
  if (chat === page.chat) openChat(chats[0] ?? newChat());
  else listChats();
}

function keep() {
  if (!saveChats()) say("The browser's room is full: old answers keep their text, not their tokens.");
}

function showMine(text) {
  $("log").querySelector(".empty")?.remove();
  $("log").append(h("article", { class: "message mine" },
    h("header", {}, settings.mode === "continue" ? "Text" : "You"), h("div", { class: "body" }, text)));
}

function showRuns(turn) {
  const answers = turn.runs.map((run) => new Answer(run, {
    view: settings.view, actions: [["Modem view", (r) => modem.open(r)], ["Copy", copy]],
  }));
  page.answers.push(...answers);
  const box = turn.runs.length > 1 ? h("div", { class: "pair" }) : h("div");
  box.append(...answers.map((a) => a.element));
  $("log").append(box);
  if (turn.runs.length > 1 && turn.runs.every((r) => r.finish)) box.append(verdict(turn, answers));
  return { answers, box };
}

async function copy(run) {
  try {
    await navigator.clipboard.writeText(run.text);
    say("Copied.");
  } catch {
    say("The browser did not allow copying; mark the text instead.");
  }
}

// ---- asking ----

function conversation(chat) {
  const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const turn of chat.turns) {
    if (!turn.runs) messages.push({ role: "user", content: turn.text });
    else if (turn.runs[0].text) messages.push({ role: "assistant", content: turn.runs[0].text });
  }
  return messages;
}

function requestBody(chat, drafting, seed) {
  const body = {
    model: settings.model || page.serverModel,
    temperature: settings.temperature, top_p: settings.top_p, top_k: settings.top_k,
    min_p: settings.min_p, max_tokens: settings.max_tokens,
    presence_penalty: settings.presence_penalty, frequency_penalty: settings.frequency_penalty,
    stream_options: { include_usage: true }, outdraft: { tokens: true, drafting },
  };
  if (seed !== null) body.seed = seed;
  if (settings.mode === "continue") body.prompt = chat.turns.findLast((t) => !t.runs).text;
  else body.messages = conversation(chat);
  return body;
}

async function ask(text) {
  if (page.stopper) return;
  const { chat } = page;
  chat.title ||= text.replace(/\s+/g, " ").slice(0, 60);
  const compare = settings.drafting === "compare";
  const kinds = compare ? ["auto", "off"] : [settings.drafting];
  // A comparison of sampled text needs the same random numbers on both sides.
  const seed = settings.seed ?? (compare ? Math.floor(Math.random() * 2 ** 31) : null);
  chat.turns.push({ text });
  showMine(text);
  const bodies = kinds.map((kind) => requestBody(chat, kind, seed));
  const turn = { runs: kinds.map((kind) => newRun(kind, bodies[0].model)) };
  chat.turns.push(turn);
  const { answers, box } = showRuns(turn);
  listChats();
  $("log").scrollTop = $("log").scrollHeight;
  busy(new AbortController());
  const path = settings.mode === "continue" ? "/v1/completions" : "/v1/chat/completions";
  try {
    // One after the other: side by side they would take each other's time.
    for (const [i, answer] of answers.entries()) {
      if (!(await run(path, bodies[i], answer))) break;
    }
    if (compare && turn.runs.every((r) => r.finish && r.finish !== "stopped")) {
      following(() => box.append(verdict(turn, answers)));
      const factor = rate(turn.runs[0]) / rate(turn.runs[1]);
      if (Number.isFinite(factor)) gauges.compared = factor;
    }
    $("announce").textContent = `Answer: ${turn.runs[0].text.slice(0, 2000)}`;
  } finally {
    busy(null);
    keep();
    refresh();
  }
}

/** A change of the log: who is at its end stays there, who reads above is left alone. */
function following(change) {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

/** One request to its end; whether it ended by itself. */
async function run(path, body, answer) {
  const start = performance.now();
  const signal = page.stopper.signal;
  try {
    for await (const chunk of api.stream(path, body, signal)) {
      following(() => answer.push(chunk, performance.now() - start));
    }
    answer.run.finish ??= "stop";
    following(() => answer.finish());
    return true;
  } catch (error) {
    if (error.name === "AbortError") {
      answer.run.finish = "stopped";
      following(() => answer.finish());
    } else {
      following(() => answer.finish(error.message));
      if (error.kind === "gone") gone();
      if (error.kind === "key") openSettings();
    }
    return false;
  }
}

function verdict(turn, answers) {
  const [drafted, plain] = turn.runs;
  const same = drafted.text === plain.text;
  const factor = rate(drafted) / rate(plain);
  const text = (same ? "The same text" : "The texts differ") +
    (Number.isFinite(factor) ? `, ${figure(factor, 2)} × the speed of plain decoding.` : ".");
  const replay = h("button", { type: "button", class: "quiet", onclick: () => replayBoth(answers) },
    "Replay side by side");
  return h("p", { class: "verdict" }, text, " ", replay);
}

function replayBoth(answers) {
  const start = performance.now();
  const tick = (now) => {
    const done = answers.map((a) => a.replay(Math.max(0, now - start)));
    if (done.every(Boolean)) answers.forEach((a) => a.redraw());
    else requestAnimationFrame(tick);
  };
  requestAnimationFrame(tick);
}

function busy(stopper) {
  page.stopper = stopper;
  $("send").disabled = stopper !== null;
  $("stop").disabled = stopper === null;
}

// ---- the server ----

function say(text) {
  $("announce").textContent = text;
  $("banner-text").textContent = text;
  $("banner-retry").hidden = true;
  $("banner").hidden = false;
  setTimeout(() => {
    if ($("banner-text").textContent === text) $("banner").hidden = true;
  }, 4000);
}

function gone(message) {
  $("server-state").textContent = "no answer";
  $("server-state").className = "state gone";
  $("banner-text").textContent = message ??
    "The server does not answer. Start it with “outdraft serve”; your conversations are kept here.";
  $("banner-retry").hidden = false;
  $("banner").hidden = false;
}

async function refresh() {
  try {
    if (!page.models.length) await loadModels();
    gauges.show(await api.get("/v1/outdraft/stats"));
    $("server-state").textContent = "ready";
    $("server-state").className = "state good";
    if (!$("banner-retry").hidden) $("banner").hidden = true;
  } catch (error) {
    if (error.kind === "key") {
      $("server-state").textContent = "needs a key";
      $("server-state").className = "state gone";
    } else if (error.kind === "busy") {
      gone(error.message);
    } else {
      gone();
    }
  }
}

async function loadModels() {
  const { data } = await api.get("/v1/models");
  page.models = data.map((m) => m.id);
  page.serverModel = page.models[0] ?? "";
  if (!page.models.includes(settings.model)) settings.model = page.serverModel;
  $("model-name").textContent = settings.model;
}

async function poll() {
  if (!document.hidden) await refresh();
  setTimeout(poll, page.stopper ? 500 : 3000);
}

// ---- settings ----

const NUMBERS = [
  "temperature", "top_p", "top_k", "min_p", "max_tokens", "presence_penalty", "frequency_penalty",
];

function fillSettings(values) {
  const form = $("settings-form");
  $("s-model").replaceChildren(...page.models.map((id) => h("option", { value: id }, id)));
  for (const name of ["model", "system", ...NUMBERS]) form.elements[name].value = values[name];
  form.elements.seed.value = values.seed ?? "";
  form.elements.api_key.value = apiKey.get();
}

function openSettings() {
  if ($("settings").open) return;
  fillSettings(settings);
  $("settings-error").textContent = "";
  $("settings").showModal();
}

function storeSettings() {
  const form = $("settings-form");
  const changes = { model: form.elements.model.value, system: form.elements.system.value.trim() };
  for (const name of NUMBERS) {
    const value = form.elements[name].valueAsNumber;
    changes[name] = Number.isNaN(value) ? DEFAULTS[name] : value;
  }
  const seed = form.elements.seed.valueAsNumber;
  changes.seed = Number.isNaN(seed) ? null : seed;
  saveSettings(changes);
  apiKey.set(form.elements.api_key.value);
  api.key = form.elements.api_key.value;
  $("model-name").textContent = settings.model;
  refresh();
}

function theme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
}

function closePanels() {
  for (const name of ["history", "gauges"]) {
    $(name).classList.remove("open");
    $(`open-${name}`).setAttribute("aria-expanded", "false");
  }
}

// ---- wiring ----

function wire() {
  const prompt = $("prompt");
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = settings.mode === "continue" ? prompt.value : prompt.value.trim();
    if (!text || page.stopper) return;
    prompt.value = "";
    ask(text);
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("ask").requestSubmit();
    }
  });
  $("stop").addEventListener("click", () => page.stopper?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
      page.stopper?.abort();
      closePanels();
    }
  });
  for (const name of ["drafting", "view", "mode"]) {
    for (const input of document.getElementsByName(name)) {
      input.checked = input.value === settings[name];
      input.addEventListener("change", () => {
        saveSettings({ [name]: input.value });
        if (name === "view") page.answers.forEach((a) => a.setView(input.value));
      });
    }
  }
  $("new-chat").addEventListener("click", () => {
    page.stopper?.abort();
    openChat(chats.find((c) => !c.turns.length) ?? newChat());
    closePanels();
    prompt.focus();
  });
  $("forget-all").addEventListener("click", () => {
    if (!confirm("Delete all conversations of this browser?")) return;
    page.stopper?.abort();
    for (const chat of [...chats]) removeChat(chat.id);
    openChat(newChat());
  });
  $("export-md").addEventListener("click", () =>
    download("conversation.md", "text/markdown", asMarkdown(page.chat)));
  $("export-json").addEventListener("click", () =>
    download("conversation.json", "application/json", JSON.stringify(page.chat, null, 1)));
  $("open-settings").addEventListener("click", openSettings);
  $("settings-default").addEventListener("click", () =>
    fillSettings({ ...DEFAULTS, model: page.serverModel }));
  $("settings").addEventListener("close", () => {
    if ($("settings").returnValue === "save") storeSettings();
  });
  $("theme").addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = settings.theme || (dark ? "dark" : "light");
    saveSettings({ theme: now === "dark" ? "light" : "dark" });
    theme(settings.theme);
  });
  for (const name of ["history", "gauges"]) {
    $(`open-${name}`).addEventListener("click", () => {
      const open = $(name).classList.toggle("open");
      $(`open-${name}`).setAttribute("aria-expanded", String(open));
    });
  }
  $("banner-retry").addEventListener("click", refresh);
  showTips($("log"));
}

theme(settings.theme);
wire();
openChat(chats[0] ?? newChat());
$("prompt").focus();
poll();
