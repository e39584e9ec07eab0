// A trace as a file: what `rcd generate --trace_file` writes, and what the page saves and opens. Without DOM.
//
// {"rcd_trace": 1, "answers": [{title, note, prompt, template, text, num_tokens, valid, rcd, steps}]}
// template: the text with masks of an infill, else null. rcd: of an answer of the API. steps: as in `rcd.steps` of a choice.

export const VERSION = 1;
const REMEDY = "save one with `rcd generate --trace_file FILE` or with “Save trace” on this page";
const ALIGNED = ["argmax", "confidence", "entropy", "alpha"];

/** The file of some panels. */
export function traceText(panels) {
  const answers = panels.map((panel) => ({
    title: panel.title,
    note: panel.note,
    prompt: panel.prompt,
    template: panel.trace.template,
    text: panel.texts.map((part) => part.text).join(""),
    num_tokens: panel.tokens,
    valid: panel.valid,
    rcd: panel.result,
    steps: panel.trace.steps,
  }));
  return JSON.stringify({ rcd_trace: VERSION, answers });
}

/** The answers of a file's text. Throws an Error that names the file and the remedy. */
export function parseTrace(text, name) {
  let file;
  try {
    file = JSON.parse(text);
  } catch (error) {
    throw new Error(`${name} is not JSON (${error.message}), so it is no trace; ${REMEDY}`);
  }
  if (!isObject(file) || file.rcd_trace === undefined) {
    throw new Error(`${name} is no trace: it has no field rcd_trace; ${REMEDY}`);
  }
  if (file.rcd_trace !== VERSION) {
    throw new Error(`${name}: rcd_trace is ${JSON.stringify(file.rcd_trace)}, but this page reads ${VERSION}; ${REMEDY}`);
  }
  if (!Array.isArray(file.answers) || !file.answers.length) {
    throw new Error(`${name}: answers must be a list with at least one answer; ${REMEDY}`);
  }
  file.answers.forEach((answer, n) => {
    const problem = problemOf(answer);
    if (problem) throw new Error(`${name}: answers[${n}]${problem}; ${REMEDY}`);
  });
  return file.answers;
}

function problemOf(answer) {
  if (!isObject(answer)) return " is not an object";
  for (const field of ["title", "note", "text"]) {
    if (typeof answer[field] !== "string") return `.${field} is not a text`;
  }
  for (const field of ["prompt", "template"]) {
    if (answer[field] !== null && typeof answer[field] !== "string") return `.${field} is neither a text nor null`;
  }
  const { rcd } = answer;
  const counts = isObject(rcd) && isObject(rcd.forwards) && typeof rcd.forwards.denoise === "number";
  if (!counts || typeof rcd.seconds !== "number" || typeof rcd.tokens_per_forward !== "number") {
    return ".rcd lacks forwards, tokens_per_forward or seconds";
  }
  if (!Array.isArray(answer.steps)) return ".steps is not a list";
  const bad = answer.steps.findIndex((step) => !isStep(step));
  return bad < 0 ? "" : `.steps[${bad}] is not a pass: masked, ${ALIGNED.join(", ")} and committed do not fit together`;
}

function isStep(step) {
  if (!isObject(step) || !isNumbers(step.masked) || !isNumbers(step.committed)) return false;
  const several = step.candidates ?? step.masked;
  const texts = step.argmax_text ?? step.masked;
  return (
    ALIGNED.every((name) => isNumbers(step[name]) && step[name].length === step.masked.length) &&
    Array.isArray(texts) && texts.length === step.masked.length &&
    Array.isArray(several) && several.length === step.masked.length && (!step.candidates || several.every(isCandidates))
  );
}

function isCandidates(top) {
  const fits = (one) => isObject(one) && typeof one.text === "string" && typeof one.probability === "number";
  return Array.isArray(top) && top.every(fits);
}

function isNumbers(list) {
  return Array.isArray(list) && list.every((value) => typeof value === "number");
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
