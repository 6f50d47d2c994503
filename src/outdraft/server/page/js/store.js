// What this browser keeps: conversations and settings. The API key lives as long as the tab.

const CHATS = "outdraft.chats";
const SETTINGS = "outdraft.settings";
const KEY = "outdraft.key";

export const DEFAULTS = {
  model: "", system: "", temperature: 0, top_p: 1, top_k: 0, min_p: 0, max_tokens: 512,
  seed: null, presence_penalty: 0, frequency_penalty: 0,
  drafting: "auto", view: "tokens", mode: "chat", theme: "",
};

function read(storage, name, otherwise) {
  try {
    return JSON.parse(storage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export const settings = { ...DEFAULTS, ...read(localStorage, SETTINGS, {}) };

export function saveSettings(changes) {
  Object.assign(settings, changes);
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // private windows may refuse: settings then last as long as the page
  }
}

export const apiKey = {
  get: () => read(sessionStorage, KEY, ""),
  set: (value) => sessionStorage.setItem(KEY, JSON.stringify(value)),
};

/** Conversations, newest first: {id, title, turns}. A turn is {text} of the user, or {runs}. */
export const chats = (() => {
  const found = read(localStorage, CHATS, []);
  return Array.isArray(found) ? found.filter((c) => c && Array.isArray(c.turns)) : [];
})();

export function newChat() {
  const chat = { id: crypto.randomUUID?.() ?? String(Math.random()), title: "", turns: [] };
  chats.unshift(chat);
  return chat;
}

export function removeChat(id) {
  const at = chats.findIndex((c) => c.id === id);
  if (at >= 0) chats.splice(at, 1);
  return saveChats();
}

/** Write them; false when room ran out and details of old answers had to go. */
export function saveChats() {
  const kept = chats.filter((c) => c.turns.length > 0);
  for (let n = kept.length; n >= 0; n--) {
    try {
      localStorage.setItem(CHATS, JSON.stringify(kept.map((c, i) => (i < n ? c : bare(c)))));
      return n === kept.length;
    } catch {
      // out of room: the oldest answers lose their tokens, then the next oldest
    }
  }
  return false;
}

function bare(chat) {
  const without = (run) => ({ ...run, tokens: [] });
  const turns = chat.turns.map((t) => (t.runs ? { ...t, runs: t.runs.map(without) } : t));
  return { ...chat, turns };
}

/** A conversation as Markdown. */
export function asMarkdown(chat) {
  const parts = [`# ${chat.title || "Conversation"}`];
  for (const turn of chat.turns) {
    if (!turn.runs) {
      parts.push(`**You**\n\n${turn.text}`);
      continue;
    }
    for (const run of turn.runs) {
      const how = run.drafting === "off" ? "plain" : "drafting";
      parts.push(`**${run.model || "Model"}** (${how})\n\n${run.text}`);
    }
  }
  return parts.join("\n\n") + "\n";
}
