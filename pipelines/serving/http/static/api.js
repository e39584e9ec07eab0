// HTTP requests and the events of their streams.

/** An error with the server's message. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const CANDIDATES = 5; // of a token, unless the form says otherwise

/** Path and body of a request. settings: values of the form, without empty ones. */
export function request(mode, model, text, settings) {
  const trace = { return_trace: "steps", trace_candidates: CANDIDATES };
  const body = { model, stream: true, ...trace, stream_options: { include_usage: true }, ...settings };
  if (mode === "chat") return ["v1/chat/completions", { ...body, messages: [{ role: "user", content: text }] }];
  if (mode === "infill") {
    delete body.max_tokens; // an infill adds nothing
    body.infill = true;
  }
  return ["v1/completions", { ...body, prompt: text }];
}

export async function getJson(path, key) {
  const response = await fetch(path, { headers: headers(key) });
  if (!response.ok) throw await failure(response);
  return response.json();
}

/** POST a request and yield {text}, {step} and, at the end, {valid}, {tokens} and {done: the answer's `rcd`}. Throws ApiError. */
export async function* decode(path, body, key, signal) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await failure(response);
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    yield* parseChunk(JSON.parse(data));
  }
  throw new ApiError("the stream ended before the answer did");
}

export function* parseChunk(chunk) {
  if (chunk.error) throw new ApiError(chunk.error.message);
  const [choice] = chunk.choices ?? [];
  const text = choice?.delta?.content ?? choice?.text;
  if (text) yield { text };
  if (choice?.rcd?.valid !== undefined) yield { valid: choice.rcd.valid };
  if (chunk.usage) yield { tokens: chunk.usage.completion_tokens };
  if (chunk.rcd?.type === "trace") yield { step: chunk.rcd.step ?? chunk.rcd };
  else if (chunk.rcd?.forwards) yield { done: chunk.rcd };
}

/** The data of each event of a byte stream. */
export async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function failure(response) {
  const body = await response.json().catch(() => ({}));
  return new ApiError(body.error?.message ?? `the server answered ${response.status}`, response.status);
}
