// What the tokens look like after each pass, from the trace: no DOM, so that it can be tested by itself.

export const MASK = "<|MASK|>";

/** Share in [0, 1) of an entropy in nats: 0 for one candidate, 1/2 for two that are equally likely, 0.9 for ten. */
export function uncertainty(nats) {
  return 1 - Math.exp(-Math.max(0, nats));
}

/** The columns of a square board of digits (a Sudoku), 0 for any other text. A leading # is no cell. */
export function boardColumns(template) {
  const cells = template.replace(/^#/, "").replaceAll(MASK, ".");
  const side = Math.sqrt(cells.length);
  return side >= 2 && Number.isInteger(side) && /^[0-9.]+$/.test(cells) ? side : 0;
}

/** The steps of one request. template: the text with its masks for an infill, null for text that is added. */
export class Trace {
  constructor(template = null) {
    this.template = template;
    this.steps = [];
  }

  add(step) {
    this.steps.push(step);
  }

  get length() {
    return this.steps.length;
  }

  /** The tokens after `count` passes, in order, each with its state: given, unseen, guess or committed. `fresh`:
   *  committed in the last of these passes. `block` counts up from 0. */
  at(count) {
    const found = new Map();
    let block = -1;
    for (const [i, step] of this.steps.slice(0, count).entries()) {
      const committed = new Set(step.committed);
      block += step.masked.some((position) => !found.has(position));
      step.masked.forEach((position, n) => {
        const done = committed.has(position);
        found.set(position, {
          position,
          block: found.get(position)?.block ?? block,
          state: done ? "committed" : "guess",
          fresh: done && i === count - 1,
          pass: i + 1,
          text: step.argmax_text?.[n] ?? `[${step.argmax[n]}]`,
          confidence: step.confidence[n],
          entropy: step.entropy[n],
          alpha: step.alpha[n],
        });
      });
    }
    const tokens = [...found.values()].sort((a, b) => a.position - b.position);
    return this.template === null ? tokens : this.#filled(tokens);
  }

  // Blocks come in order and the first pass of each sees all of its masks: the n-th position is the n-th mask.
  #filled(tokens) {
    const board = boardColumns(this.template) > 0;
    const texts = (board ? this.template.replace(/^#/, "") : this.template).split(MASK);
    const all = [];
    texts.forEach((text, n) => {
      if (board) all.push(...Array.from(text, (digit) => ({ state: "given", text: digit })));
      else if (text) all.push({ state: "given", text });
      if (n < texts.length - 1) all.push(tokens[n] ?? { state: "unseen", text: "·", entropy: 0, confidence: 0 });
    });
    return all;
  }
}

/** What is told of a pass: its number, tokens committed so far and in it, and those still masked. */
export function summary(tokens, count) {
  const of = (test) => tokens.filter(test).length;
  return {
    passes: count,
    committed: of((t) => t.state === "committed"),
    fresh: of((t) => t.fresh),
    masked: of((t) => t.state === "guess" || t.state === "unseen"),
  };
}
