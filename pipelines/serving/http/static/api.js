// Requests and their streams, as the HTTP interface has them.

/** A failure that the server explained, in its own words. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Path and body of a request. settings: what the form gives, empty values left out. */
export function request(mode, model, text, settings) {
  const body = { model, stream: true, return_trace: "steps", stream_options: { include_usage: true }, ...settings };
  if (mode === "chat") return ["v1/chat/completions", { ...body, messages: [{ role: "user", content: text }] }];
  if (mode === "infill") {
    delete body.max_tokens; // every mask is filled, nothing is added
    body.infill = true;
  }
  return ["v1/completions", { ...body, prompt: text }];
}

export async function getJson(path, key) {
  const answer = await fetch(path, { headers: headers(key) });
  if (!answer.ok) throw await failure(answer);
  return answer.json();
}

/** Post and yield {text}, {step} and, towards the end, {tokens} and {done: what the server says under `rcd`}. Throws
 *  ApiError. */
export async function* decode(path, body, key, signal) {
  const answer = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify(body),
    signal,
  });
  if (!answer.ok) throw await failure(answer);
  for await (const data of serverSentEvents(answer.body)) {
    if (data === "[DONE]") return;
    yield* understood(JSON.parse(data));
  }
  throw new ApiError("the stream broke off before its end");
}

export function* understood(chunk) {
  if (chunk.error) throw new ApiError(chunk.error.message);
  const [choice] = chunk.choices ?? [];
  const text = choice?.delta?.content ?? choice?.text;
  if (text) yield { text };
  if (chunk.usage) yield { tokens: chunk.usage.completion_tokens };
  if (chunk.rcd?.type === "trace") yield { step: chunk.rcd.step ?? chunk.rcd };
  else if (chunk.rcd?.forwards) yield { done: chunk.rcd };
}

/** The data of each event of a byte stream, however it is cut. */
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

async function failure(answer) {
  const body = await answer.json().catch(() => ({}));
  return new ApiError(body.error?.message ?? `the server answered ${answer.status}`, answer.status);
}
