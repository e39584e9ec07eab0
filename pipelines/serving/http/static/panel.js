// One model's side of the page: its tokens at a pass, statistics and text.

import { Trace, boardColumns, boxRows, summary, uncertainty } from "./canvas.js";
import { Inspector, visible } from "./inspector.js";

const FLIP = 0.59; // where black and white both have a contrast of at least 4.5 to the background

export class Panel {
  /** template: the text with masks of an infill, else null. prompt: what a text continues, where the form does not say. */
  constructor(title, note, template, prompt = null) {
    const root = document.getElementById("panel").content.cloneNode(true).firstElementChild;
    this.root = root;
    this.title = title;
    this.note = note;
    this.prompt = prompt;
    this.trace = new Trace(template);
    this.columns = template === null ? 0 : boardColumns(template);
    this.canvas = root.querySelector(".canvas");
    this.answer = root.querySelector(".answer");
    this.verdict = root.querySelector(".verdict");
    this.texts = []; // {text, after: passes}: the final text, as it grew
    this.rows = root.querySelector("tbody");
    this.table = root.querySelector("details.table");
    this.result = null; // the answer's `rcd`
    this.tokens = null; // the server's count
    this.valid = null; // whether the answer is right; null where the server cannot tell
    this.shown = 0;
    root.querySelector("h2").textContent = title;
    root.querySelector(".note").textContent = note;
    root.setAttribute("aria-label", title);
    root.querySelector(".prompt").textContent = template === null ? prompt ?? "" : "";
    this.inspector = new Inspector(this.canvas, root.querySelector(".inspector"), this.columns);
    this.canvas.classList.toggle("board", this.columns > 0);
    this.canvas.style.setProperty("--columns", this.columns);
    this.table.addEventListener("toggle", () => this.#numbers());
    this.show(0);
  }

  /** Text that is final after the passes so far. It is shown when the replay gets there. */
  append(text) {
    this.texts.push({ text, after: this.trace.length });
  }

  finish(result) {
    this.result = result;
  }

  /** What else is known at the end. */
  #rest() {
    const { forwards: f, seconds, settings, reference_failures: failures } = this.result;
    const rest = ["prefill", "store"].filter((kind) => f[kind]).map((kind) => `${f[kind]} ${kind}`);
    const parts = [`${seconds.toFixed(2)} s`];
    if (settings?.seed !== undefined) parts.push(`seed ${settings.seed}`);
    if (rest.length) parts.unshift(`passes that fill the cache, not counted: ${rest.join(", ")}`);
    if (f.reference) {
      const how = this.result.tokens_per_pass == null ? "not counted: its size is not known" : "counted by their FLOPs";
      parts.unshift(`${f.denoise} passes and ${f.reference} of the reference, ${how}`);
    }
    if (failures) parts.push(`reference failed ${failures} times: those blocks started from zero`);
    return parts.join(" · ");
  }

  /** Tokens per pass of the complete answer, with reference passes by their FLOPs, where the server knows their size. */
  get rate() {
    return this.result.tokens_per_pass ?? this.result.tokens_per_forward;
  }

  /** The passes that `rate` counts. */
  get passes() {
    const { forwards, tokens_per_pass: known } = this.result;
    return forwards.reference && known && this.tokens ? this.tokens / known : forwards.denoise;
  }

  /** Whether the display is at the end of a complete answer. */
  get ended() {
    return this.result !== null && this.shown === this.trace.length;
  }

  /** Draw the state after `count` passes, at most all of them. */
  show(count) {
    this.shown = Math.min(count, this.trace.length);
    const tokens = this.trace.at(this.shown);
    if (count > this.shown) for (const token of tokens) token.fresh = false; // another panel's pass is on display
    const counts = summary(tokens, this.shown);
    const { ended } = this;
    // At the end the server's counts, which include passes without a trace and exclude tokens after the stop.
    const passes = ended ? this.passes : counts.passes;
    const rate = ended ? this.rate : counts.committed / Math.max(1, counts.passes);
    this.#figure("passes", count1(passes));
    this.#figure("tokens", ended ? this.tokens ?? counts.committed : counts.committed);
    this.#figure("rate", passes ? rate.toFixed(2) : "–");
    this.#text(ended);
    this.canvas.setAttribute("aria-label", label(counts));
    this.canvas.replaceChildren(...this.#draw(tokens));
    this.inspector.update(tokens);
    this.#numbers();
  }

  #draw(tokens) {
    const current = Math.max(-1, ...tokens.map((t) => t.block ?? -1));
    const groups = [];
    for (const [index, token] of tokens.entries()) {
      token.index = index;
      const last = groups.at(-1);
      if (last && last.block === token.block) last.tokens.push(token);
      else groups.push({ block: token.block, tokens: [token] });
    }
    return groups.map(({ block, tokens }) => {
      const group = document.createElement("span");
      group.className = "block";
      group.classList.toggle("current", block === current && tokens.some((t) => t.state === "guess"));
      const boxes = tokens.map((token) => this.#box(drawToken(token), token.index));
      // A line may end between two tokens, but not within one, whose first character is often a space.
      group.append(...(this.columns ? boxes : boxes.flatMap((box) => [document.createElement("wbr"), box])));
      return group;
    });
  }

  /** Mark the edges of a board's boxes. */
  #box(span, index) {
    span.dataset.index = index;
    const [row, column, rows] = [Math.floor(index / this.columns), index % this.columns, boxRows(this.columns || 1)];
    if (rows > 1) {
      span.classList.toggle("box-top", row > 0 && row % rows === 0);
      span.classList.toggle("box-left", column > 0 && column % (this.columns / rows) === 0);
    }
    return span;
  }

  #text(ended) {
    const final = this.texts.filter((part) => ended || part.after <= this.shown).map((part) => part.text).join("");
    const before = this.answer.textContent;
    // Appended where it grows, so that a screen reader reads only the new text.
    if (final.startsWith(before)) this.answer.append(final.slice(before.length));
    else this.answer.textContent = final;
    const valid = ended ? this.valid : null;
    this.verdict.textContent = valid === null ? "" : valid ? "✓ right: it solves the problem" : "✗ wrong: it does not solve the problem";
    this.root.querySelector(".rest").textContent = ended ? this.#rest() : "";
    this.verdict.classList.toggle("right", valid === true);
    this.verdict.classList.toggle("wrong", valid === false);
  }

  #figure(name, value) {
    this.root.querySelector(`[data-figure=${name}]`).textContent = value;
  }

  #numbers() {
    const step = this.table.open && this.trace.steps[this.shown - 1];
    const committed = new Set(step ? step.committed : []);
    const rows = !step ? [] : step.masked.map((position, n) => {
      const row = document.createElement("tr");
      const cells = [position, step.argmax_text?.[n] ?? step.argmax[n], step.confidence[n].toFixed(3),
        step.entropy[n].toFixed(3), step.alpha[n].toFixed(3), committed.has(position) ? "✓" : "–"];
      row.append(...cells.map((value) => Object.assign(document.createElement("td"), { textContent: value })));
      row.cells[1].title = cells[1]; // a long one is cut
      return row;
    });
    this.rows.replaceChildren(...rows);
  }
}

function drawToken(token) {
  const span = document.createElement("span");
  span.className = `token ${token.state}`;
  span.classList.toggle("fresh", Boolean(token.fresh));
  const masked = token.state === "guess" || token.state === "unseen";
  span.textContent = masked ? visible(token.text) : token.text;
  if (masked) shade(span, token.state === "unseen" ? 1 : uncertainty(token.entropy), token.confidence);
  return span;
}

/** Shade a token: darker means less certain. The text turns white on dark shades. */
export function shade(span, u, confidence) {
  span.style.setProperty("--u", u.toFixed(3));
  span.style.setProperty("--confidence", confidence);
  span.classList.toggle("dark", u > FLIP);
}

/** Whole numbers as they are, others with one decimal. */
export function count1(number) {
  return Number.isInteger(number) ? String(number) : number.toFixed(1);
}

function label({ passes, committed, fresh, masked }) {
  if (!passes) return masked ? `${masked} masked tokens` : "No tokens yet";
  return `After pass ${passes}: ${committed} tokens committed, ${fresh} of them in this pass, ${masked} masked`;
}
