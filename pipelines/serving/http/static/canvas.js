// The state of the tokens after each pass, from the trace. Without DOM, so that it can be tested alone.

export const MASK = "<|MASK|>";

/** An entropy in nats, mapped to [0, 1): 0 for one candidate, 0.5 for two equally likely ones, 0.9 for ten. */
export function uncertainty(nats) {
  return 1 - Math.exp(-Math.max(0, nats));
}

/** Columns of a square board of digits (a Sudoku), 0 for other texts. A leading # is not a cell. */
export function boardColumns(template) {
  const cells = template.replace(/^#/, "").replaceAll(MASK, ".");
  const side = Math.sqrt(cells.length);
  return side >= 2 && Number.isInteger(side) && /^[0-9.]+$/.test(cells) ? side : 0;
}

/** Rows of a box of a board with so many columns; its columns are the rest of the side. 1: the side has no divisor. */
export function boxRows(side) {
  let rows = Math.floor(Math.sqrt(side));
  while (side % rows) rows--;
  return rows;
}

/** The steps of one request. template: the text with masks of an infill, else null. */
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

  /** The tokens after `count` passes, in order, each with its state: given, unseen, guess or committed. fresh:
   *  committed in the last of these passes. candidates: the most probable ones, if the trace has them. block: number of its block, from 0. */
  at(count) {
    const byPosition = new Map();
    let block = -1;
    for (const [i, step] of this.steps.slice(0, count).entries()) {
      const committed = new Set(step.committed);
      block += step.masked.some((position) => !byPosition.has(position));
      step.masked.forEach((position, n) => {
        const done = committed.has(position);
        if (!done && byPosition.get(position)?.state === "committed") return; // predicted again, and kept
        byPosition.set(position, {
          position,
          block: byPosition.get(position)?.block ?? block,
          state: done ? "committed" : "guess",
          fresh: done && i === count - 1,
          pass: i + 1,
          text: step.argmax_text?.[n] ?? `[${step.argmax[n]}]`,
          confidence: step.confidence[n],
          entropy: step.entropy[n],
          alpha: step.alpha[n],
          candidates: step.candidates?.[n] ?? [],
        });
      });
    }
    const tokens = [...byPosition.values()].sort((a, b) => a.position - b.position);
    return this.template === null ? tokens : this.#filled(tokens);
  }

  // Blocks come in order, and the first pass of each has all of its masks, so the n-th position is the n-th mask.
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

/** Counts after a pass: its number, tokens committed so far and in it, tokens still masked. */
export function summary(tokens, count) {
  const of = (test) => tokens.filter(test).length;
  return {
    passes: count,
    committed: of((t) => t.state === "committed"),
    fresh: of((t) => t.fresh),
    masked: of((t) => t.state === "guess" || t.state === "unseen"),
  };
}
