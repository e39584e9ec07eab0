// The page: the form, its one or two requests, and the pass on display.

import { ApiError, decode, getJson, request } from "./api.js";
import { MASK } from "./canvas.js";
import { setupFiles } from "./files.js";
import { Panel, count1, shade } from "./panel.js";
import { parseTrace, traceText } from "./trace_file.js";

const $ = (id) => document.getElementById(id);
const form = $("form");
const NO_TEMPLATE = "no chat template";

const narrow = matchMedia("(max-width: 56rem)"); // as in style.css, which then puts the output below the form

let models = []; // {id, baseline, settings}
let panels = [];
let running = null; // AbortController of the running requests
let playing = false; // the display follows the passes
let last = 0; // time of the last display, ms
let masked = ""; // the text with masks that another mode put away
let remark = ""; // what the status says besides the totals

// -- the requests

function mode() {
  return form.elements.mode.value;
}

function settings() {
  const values = {};
  for (const field of document.querySelectorAll(".settings [name]")) {
    if (field.value === "" || field.closest("[hidden]")) continue;
    if (field.dataset.kind === "boolean") values[field.name] = field.value === "true";
    else values[field.name] = field.type === "number" ? Number(field.value) : field.value;
  }
  return values;
}

function chosen() {
  return models.find((m) => m.id === $("model").value);
}

function sides() {
  const model = chosen();
  // The chosen model, and to compare with, its deployed baseline or else itself without residuals.
  const main = { model: model.id, title: model.id, note: residualNote(model, settings()), settings: settings() };
  if (!$("compare").checked || $("compare-field").hidden) return [main];
  const other = { ...settings(), residual: false };
  delete other.start;
  if (model.baseline) {
    return [main, { model: model.baseline, title: model.baseline, note: "baseline model, trained without residuals",
      settings: other }];
  }
  const title = `${model.id}, residual off`;
  return [main, { model: model.id, title, note: "the same checkpoint with residual off; no baseline is deployed",
    settings: other }];
}

function residualNote(model, values) {
  const on = values.residual ?? model.settings.residual;
  return on ? `residual on, start ${values.start ?? model.settings.start ?? "of the checkpoint"}` : "residual off";
}

// -- running

async function run() {
  running?.abort();
  const controller = (running = new AbortController());
  $("alert").textContent = remark = "";
  $("run").disabled = true;
  $("stop").disabled = false;
  const template = mode() === "infill" ? $("prompt").value : null;
  const requests = sides();
  display(requests.map((side) => new Panel(side.title, side.note, template, $("prompt").value)));
  if (narrow.matches) $("outputs").scrollIntoView();
  try {
    await Promise.all(requests.map((side, i) => follow(side, panels[i], controller.signal)));
    if (playing && $("pace").value === "0") show(Number($("pass").max));
  } catch (error) {
    controller.abort(); // the other side too
    if (error instanceof ApiError && error.message.includes(NO_TEMPLATE) && mode() === "chat") {
      setMode($("prompt").value.includes(MASK) ? "infill" : "completion");
      const again = run();
      remark = "This model has no chat template, so it does not chat: the prompt was continued.";
      return again;
    }
    const stopped = error.name === "AbortError";
    if (running === controller) remark = stopped ? "Stopped" : "";
    $("alert").textContent = stopped ? "" : `Error: ${error.message}`;
    if (error.status === 401) askForKey();
  } finally {
    if (running === controller) {
      running = null;
      $("run").disabled = false;
      $("stop").disabled = true;
      status();
    }
  }
}

async function follow(side, panel, signal) {
  const [path, body] = request(mode(), side.model, $("prompt").value, side.settings);
  for await (const event of decode(path, body, $("key").value, signal)) {
    if (event.step) panel.trace.add(event.step);
    if (event.text) panel.append(event.text);
    if (event.valid !== undefined) panel.valid = event.valid;
    if (event.tokens !== undefined) panel.tokens = event.tokens;
    if (event.done) panel.finish(event.done);
    updateRange();
  }
}

function sentence(panel) {
  return `${panel.title}: ${count1(panel.passes)} passes, ${panel.rate.toFixed(2)} tokens per pass.`;
}

/** The totals, once the replay has got there. */
function status() {
  const ended = panels.length > 0 && panels.every((panel) => panel.ended);
  const text = [running ? "Running" : "", remark, ...(ended && !running ? panels.map(sentence) : [])];
  const line = text.filter(Boolean).join(" ");
  if ($("status").textContent !== line) $("status").textContent = line; // a screen reader reads each change
}

/** Show panels from their beginning. */
function display(shown) {
  panels = shown;
  $("panels").replaceChildren(...panels.map((panel) => panel.root));
  updateRange();
  show(0);
  play(true);
}

/** Show the trace of a file. Throws an Error if it is none. */
function openTrace(text, name) {
  const answers = parseTrace(text, name);
  const opened = answers.map((answer) => {
    const panel = new Panel(answer.title, answer.note, answer.template, answer.prompt);
    for (const step of answer.steps) panel.trace.add(step);
    panel.append(answer.text);
    panel.valid = answer.valid ?? null;
    panel.tokens = answer.num_tokens ?? null;
    panel.finish(answer.rcd);
    return panel;
  });
  running?.abort();
  running = null;
  $("run").disabled = false;
  $("stop").disabled = true;
  $("alert").textContent = "";
  remark = `Opened ${name}.`;
  display(opened);
  if (narrow.matches) $("outputs").scrollIntoView();
}

// -- the pass on display

function updateRange() {
  const most = Math.max(0, ...panels.map((panel) => panel.trace.length));
  $("pass").max = most;
  $("pass").disabled = $("play").disabled = most === 0;
  $("save").disabled = !panels.length || panels.some((panel) => panel.result === null);
  updateNumber();
}

function updateNumber() {
  $("pass-number").textContent = `${$("pass").value} / ${$("pass").max}`;
  $("pass").setAttribute("aria-valuetext", `pass ${$("pass").value} of ${$("pass").max}`);
}

function show(pass) {
  $("pass").value = pass;
  updateNumber();
  for (const panel of panels) panel.show(pass);
  status();
  play(playing);
}

function play(on) {
  playing = on;
  for (const panel of panels) panel.inspector.quiet = on;
  $("play").textContent = on ? "Pause" : $("pass").value === $("pass").max ? "Replay" : "Play";
}

function tick(now) {
  const [pass, most, pace] = [Number($("pass").value), Number($("pass").max), Number($("pace").value)];
  if (playing && pass < most && now - last >= pace) {
    show(pace ? pass + 1 : most);
    last = now;
  } else if (playing && pass >= most && running === null) {
    playing = false;
    show(most); // with the server's statistics
  }
  requestAnimationFrame(tick);
}

// -- the form

function setMode(value) {
  form.elements.mode.value = value;
  const infill = value === "infill";
  $("prompt-label").textContent = value === "chat" ? "Message" : infill ? `Text with ${MASK}` : "Text to continue";
  $("mask").hidden = !infill;
  form.elements.max_tokens.disabled = infill;
}

/** Put a model's example, or the server's, into the form. */
function useExample(prompt, infill, chat) {
  $("prompt").value = prompt;
  setMode(infill ? "infill" : chat ? "chat" : "completion");
}

function describe() {
  const model = chosen();
  const trained = model?.trained;
  const about = trained && (trained.about ?? `the task ${trained.task}${trained.infill ? ", which fills masks in" : ""}.`);
  $("trained").textContent = trained ? `This model was trained for ${about}` : "";
  $("example").hidden = !trained?.example;
  const defaults = model?.settings ?? {};
  $("compare-field").hidden = !model?.baseline && !defaults.residual; // nothing to compare with
  $("compare-label").textContent = `Compare with ${model?.baseline ?? "residual off"}`;
  for (const field of document.querySelectorAll(".settings [name]")) {
    const value = defaults[field.name === "max_tokens" ? "max_new_tokens" : field.name] ?? null;
    if (field.name === "trace_candidates") continue; // the page's, not the model's
    const text = typeof value === "boolean" ? (value ? "on" : "off") : String(value ?? "default");
    if (field.tagName === "SELECT") field.options[0].textContent = value === null ? "default" : `(${text})`;
    else field.placeholder = text;
  }
  entropyBound();
}

function entropyBound() {
  const policy = form.elements.policy.value || chosen()?.settings.policy;
  $("entropy-bound").hidden = policy !== "entropy_bounded";
}

function askForKey() {
  $("key-field").hidden = false;
  $("key").focus();
}

/** `rcd trace`: the page has a trace and no model. */
async function openServed({ path, name }) {
  document.body.classList.add("viewer");
  openTrace(await (await fetch(path)).text(), name);
}

async function load() {
  let first = false;
  try {
    const served = await getJson("playground/models.json", $("key").value);
    if (served.trace) return await openServed(served.trace);
    models = served.models;
    const about = await getJson("version", $("key").value);
    $("release").textContent = about.version ? `Version ${about.version}` : "";
    if (about.example && !$("prompt").value) {
      const { body } = about.example;
      useExample(body.prompt ?? body.messages[0].content, body.infill, body.messages);
      first = true;
    }
    $("alert").textContent = "";
  } catch (error) {
    const missing = error.status === 401 && !$("key").value;
    $("alert").textContent = missing ? "This server needs an API key." : `Error: ${error.message}`;
    if (error.status === 401) askForKey();
    return;
  }
  $("model").replaceChildren(...models.map((m) => new Option(m.id, m.id)));
  describe();
  if (first && location.hash !== "#wait") run(); // something to see at first view
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!models.length) await load(); // Enter in the field of the key
  if (models.length) run();
});
$("schema").addEventListener("click", async (event) => {
  if (!$("key").value) return;
  event.preventDefault(); // a link cannot send the key
  const schema = JSON.stringify(await getJson("openapi.json", $("key").value), null, 2);
  open(URL.createObjectURL(new Blob([schema], { type: "application/json" })));
});
for (const radio of form.elements.mode) {
  radio.addEventListener("change", () => {
    const text = $("prompt").value;
    if (mode() !== "infill" && text.includes(MASK)) {
      masked = text; // masks make no sense elsewhere; they come back with the mode
      $("prompt").value = "";
    } else if (mode() === "infill" && !text && masked) $("prompt").value = masked;
    setMode(mode());
  });
}
$("example").addEventListener("click", () => {
  const { example, infill } = chosen().trained;
  useExample(example, infill, mode() === "chat");
});
for (const kind of ["focusin", "mouseover"]) {
  document.querySelector(".settings").addEventListener(kind, (event) => {
    const about = event.target.closest("label[title]")?.title;
    if (about) $("explain").textContent = about;
  });
}
$("prompt").addEventListener("input", () => {
  if ($("prompt").value.includes(MASK) && mode() !== "infill") setMode("infill");
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
$("mask").addEventListener("click", () => {
  $("prompt").setRangeText(MASK, $("prompt").selectionStart, $("prompt").selectionEnd, "end");
  $("prompt").focus();
});
$("stop").addEventListener("click", () => running?.abort());
setupFiles({
  save: () => traceText(panels),
  open: openTrace,
  failed: (message) => ($("alert").textContent = `Error: ${message}`),
});
$("model").addEventListener("change", describe);
form.elements.policy.addEventListener("change", entropyBound);
$("key").addEventListener("change", () => models.length || load());
$("play").addEventListener("click", () => {
  if (!playing && $("pass").value === $("pass").max) show(0);
  play(!playing);
});
$("pass").addEventListener("input", () => {
  playing = false;
  show(Number($("pass").value));
});
for (const span of document.querySelectorAll(".legend [data-u]")) {
  shade(span, Number(span.dataset.u), 1 - Number(span.dataset.u));
}
$("more").open = !narrow.matches;
setMode(mode());
load();
requestAnimationFrame(tick);
