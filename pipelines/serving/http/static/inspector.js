// What a panel says about one token: its candidates, on hover, on a tap and with the arrow keys.

const HINT = "Hover, tap or press arrow keys to see a token's candidates.";

/** Chooses a token of a canvas and describes it in `box`. */
export class Inspector {
  constructor(canvas, box, columns) {
    this.canvas = canvas;
    this.columns = columns; // of a board; 0: a text
    this.facts = box.querySelector(".facts");
    this.list = box.querySelector("ol");
    this.box = box;
    this.tokens = [];
    this.hovered = null; // index in tokens
    this.cursor = null; // the same, chosen by a key or a tap
    const at = (event) => event.target.closest(".token")?.dataset.index ?? null;
    canvas.addEventListener("mouseover", (event) => this.#hover(at(event)));
    canvas.addEventListener("mouseleave", () => this.#hover(null));
    canvas.addEventListener("click", (event) => at(event) !== null && this.#move(Number(at(event))));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("focus", () => {
      if (this.cursor === null && canvas.matches(":focus-visible")) this.#move(this.#first());
    });
  }

  /** After each drawing. tokens: of Trace.at, in the order of the canvas's `.token` elements. */
  update(tokens) {
    this.tokens = tokens;
    this.#draw();
  }

  /** Whether changes are read aloud: not during a replay. */
  set quiet(on) {
    this.box.setAttribute("aria-live", on ? "off" : "polite");
  }

  #hover(index) {
    this.hovered = index === null ? null : Number(index);
    this.#draw();
  }

  #move(index) {
    if (!this.tokens.length) return;
    this.cursor = Math.min(Math.max(index, 0), this.tokens.length - 1);
    this.hovered = null;
    this.#draw();
  }

  #first() {
    const masked = this.tokens.findIndex((token) => token.state === "guess");
    return Math.max(0, masked);
  }

  #key(event) {
    const row = this.columns || 0;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -row, ArrowDown: row };
    if (event.key === "Escape") this.cursor = null;
    else if (this.cursor === null && steps[event.key]) this.cursor = this.#first();
    else if (event.key === "Home") this.#move(0);
    else if (event.key === "End") this.#move(this.tokens.length - 1);
    else if (steps[event.key]) {
      const next = this.cursor + steps[event.key];
      if (next >= 0 && next < this.tokens.length) this.#move(next);
    } else return; // Up and Down scroll where there are no rows
    event.preventDefault();
    this.#draw();
  }

  #draw() {
    const index = this.hovered ?? this.cursor;
    const token = index === null ? undefined : this.tokens[index];
    const spans = this.canvas.querySelectorAll(".token");
    for (const span of this.canvas.querySelectorAll(".inspected")) span.classList.remove("inspected");
    if (token) spans[index]?.classList.add("inspected");
    this.box.classList.toggle("idle", !token);
    say(this.facts, token ? describe(token, index, this.columns) : HINT);
    this.list.replaceChildren(...(token?.candidates ?? []).map(item));
  }
}

function say(element, text) {
  if (element.textContent !== text) element.textContent = text; // a screen reader reads each change
}

function place(token, index, columns) {
  return columns ? `Row ${Math.floor(index / columns) + 1}, column ${(index % columns) + 1}` : `Position ${token.position}`;
}

function describe(token, index, columns) {
  const where = columns || token.pass ? place(token, index, columns) : token.state === "given" ? "Text" : "Token";
  if (token.state === "given") return `${where}: given.`;
  if (token.state === "unseen") return `${where}: masked; no pass has predicted it yet.`;
  const [confidence, alpha] = [token.confidence.toFixed(2), token.alpha.toFixed(2)];
  const numbers = `Confidence ${confidence}, entropy ${token.entropy.toFixed(2)} nats, alpha ${alpha}.`;
  const what = token.state === "committed" ? "committed in" : "masked,";
  return `${where}: ${what} pass ${token.pass}. ${numbers}`;
}

function item({ text, probability }) {
  const entry = document.createElement("li");
  const percent = probability < 0.001 ? "<0.1" : probability < 0.0995 ? (100 * probability).toFixed(1) : Math.round(100 * probability);
  for (const [name, value] of [["text", visible(text)], ["share", `${percent} %`]]) {
    entry.append(Object.assign(document.createElement("span"), { className: name, textContent: value }), " ");
  }
  entry.style.setProperty("--share", probability);
  entry.title = text; // a long one is cut
  return entry;
}

/** A token's text with what cannot be seen in it. */
export function visible(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "␣") || "·";
}
