// Requests to the server: JSON, and streams of server-sent events.

let csrf = "";

export class ServerError extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}

async function ask(method, path, body, signal) {
  const headers = { "X-CSRF-Token": csrf };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  if (response.status === 401) location.replace("/login");
  if (!response.ok) {
    const found = await response.json().catch(() => ({}));
    const wait = response.headers.get("Retry-After");
    const message = found.error?.message ?? `the server answered ${response.status}`;
    throw new ServerError(wait ? `${message}; try again in ${wait} s` : message, found.error?.code);
  }
  return response;
}

export async function call(method, path, body) {
  return (await ask(method, path, body)).json();
}

export async function whoAmI() {
  const me = await call("GET", "/api/me");
  csrf = me.csrf ?? "";
  return me;
}

// Yields the parsed data of each event. Bytes of a character may come in two pieces.
export async function* stream(path, body, signal) {
  const response = await ask("POST", path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let pending = "", isComplete = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done && isComplete) return;
    if (done) throw new ServerError("the connection broke off");
    const lines = (pending + decoder.decode(value, { stream: true })).split("\n");
    pending = lines.pop();
    for (const line of lines) {
      isComplete ||= line === "data: [DONE]";
      if (!line.startsWith("data: ") || isComplete) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ServerError(event.error.message);
      yield event;
    }
  }
}
