// The server: one place that fetches. Streams are server-sent events; errors are `ApiError`.

export class ApiError extends Error {
  /** `kind`: gone (no answer), busy (try again in `retryS`), key (not authorised), refused. */
  constructor(kind, message, { status = 0, retryS = null } = {}) {
    super(message);
    this.kind = kind;
    this.status = status;
    this.retryS = retryS;
  }
}

const GONE = "The server does not answer. Start it with `outdraft serve`; nothing here is lost.";

export class Api {
  constructor(key = "") {
    this.key = key;
  }

  async get(path) {
    return (await this.#fetch(path, {})).json();
  }

  async getText(path) {
    return (await this.#fetch(path, {})).text();
  }

  /** Parsed events of a streaming request until [DONE]; ending the loop early closes it. */
  async *stream(path, body, signal) {
    const response = await this.#fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...body, stream: true }),
      signal,
    });
    let done = false;
    try {
      for await (const data of events(response.body)) {
        if (data === "[DONE]") {
          done = true;
          return;
        }
        const event = JSON.parse(data);
        if (event.error) {
          throw new ApiError("refused", event.error.message ?? "the request failed");
        }
        yield event;
      }
    } catch (error) {
      if (error instanceof ApiError || error.name === "AbortError") throw error;
      throw new ApiError("gone", `The answer broke off: ${GONE}`);
    }
    if (!done) throw new ApiError("gone", `The answer broke off. ${GONE}`);
  }

  async #fetch(path, options) {
    const headers = { ...options.headers };
    if (this.key) headers.authorization = `Bearer ${this.key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("gone", GONE);
    }
    if (response.ok) return response;
    const said = await response.json().catch(() => ({}));
    const message = said.error?.message ?? `the server answered ${response.status}`;
    const { status } = response;
    const retryS = Number(response.headers.get("retry-after")) || null;
    if (status === 401 || status === 403) {
      throw new ApiError("key", `${message}. Give the API key under Settings.`, { status });
    }
    if (status === 429 || status === 503) {
      const when = retryS ? ` Try again in ${retryS} s.` : "";
      throw new ApiError("busy", `The server is busy: ${message}.${when}`, { status, retryS });
    }
    throw new ApiError("refused", message, { status });
  }
}

/** The data of each server-sent event of a byte stream (WHATWG HTML, 9.2). */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = rest.split(/\r\n|\n|\r/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
