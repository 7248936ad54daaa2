// What the page shows. Texts of models and bundles are put in as text, never as HTML.

/** An element of index.html. */
export function element<T extends HTMLElement>(id: string, kind: new () => T): T {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`no ${kind.name} \`${id}\``);
  return found;
}

function made(tag: string, kind: string, text = ""): HTMLElement {
  const found = document.createElement(tag);
  found.className = kind;
  found.textContent = text;
  return found;
}

/** A paragraph of a sentence, whose `names` are shown as such. */
function sentence(kind: string, text: string): HTMLElement {
  const found = made("p", kind);
  found.append(...text.split("`").map((part, i) => (i % 2 === 1 ? made("code", "", part) : part)));
  return found;
}

const log = element("log", HTMLElement);
const said = element("said", HTMLElement);
/** So near to the end, a reader follows what comes. */
const NEAR_END = 80;

/** Shows what a text is about to change, at its end where the reader is there. */
function following(change: () => void): void {
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END;
  change();
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

/** Says something to those who hear the page. */
export function say(text: string): void {
  said.textContent = text;
}

/** One answer, which grows. */
export class Answer {
  private readonly text: HTMLElement;
  private unsaid = "";

  /** @param place to write into. */
  constructor(
    private readonly turn: HTMLElement,
    place: HTMLElement,
  ) {
    this.text = place;
    turn.classList.add("working");
    turn.setAttribute("aria-busy", "true");
  }

  append(piece: string): void {
    following(() => this.text.append(piece));
    // Heard by the sentence: a word at a time is no speech.
    this.unsaid += piece;
    const end = this.unsaid.search(/[.!?:;]\s|\n/);
    if (end < 0) return;
    say(this.unsaid.slice(0, end + 1));
    this.unsaid = this.unsaid.slice(end + 1);
  }

  /** @param note of how it ended. */
  end(note: string): void {
    say(`${this.unsaid} ${note}`);
    following(() => {
      this.settle();
      this.turn.querySelector(".meta")?.remove();
      if (note !== "") this.turn.append(made("p", "meta", note));
    });
  }

  fail(words: string): void {
    following(() => {
      this.settle();
      const wrong = sentence("wrong", words);
      wrong.setAttribute("role", "alert");
      this.turn.append(wrong);
    });
  }

  private settle(): void {
    this.turn.classList.remove("working");
    this.turn.removeAttribute("aria-busy");
  }
}

/** Adds what was asked, and gives the place for the answer. */
export function addTurns(question: string): Answer {
  const asked = made("article", "turn user");
  asked.setAttribute("aria-label", "You");
  asked.append(made("div", "text", question));
  const answer = made("article", "turn model");
  answer.setAttribute("aria-label", "The model");
  const text = made("div", "text");
  answer.append(text);
  log.append(asked, answer);
  log.scrollTop = log.scrollHeight;
  return new Answer(answer, text);
}

/** Adds to the one text what the reader wrote, and gives the place for what follows. */
export function addToText(written: string): Answer {
  let turn = log.querySelector<HTMLElement>(".one");
  if (turn === null) {
    turn = made("article", "turn one");
    turn.append(made("div", "text"));
    log.append(turn);
  }
  for (const old of turn.querySelectorAll(".meta, .wrong")) old.remove();
  const text = turn.querySelector<HTMLElement>(".text")!;
  const own = written.trimStart();
  text.append(written.slice(0, written.length - own.length));
  if (own !== "") text.append(made("mark", "own", own));
  const place = made("span", "model");
  text.append(place);
  log.scrollTop = log.scrollHeight;
  return new Answer(turn, place);
}

export function clearLog(): void {
  log.replaceChildren();
}

/** Shows a list of notes, some with something to do about them. */
export function showNotes(notes: readonly (readonly [string, (() => void)?])[]): void {
  element("notes", HTMLUListElement).replaceChildren(
    ...notes.map(([text, act]) => {
      const item = made("li", "");
      item.append(sentence("", text));
      if (act !== undefined) {
        const button = made("button", "", "Reload");
        button.addEventListener("click", act);
        item.append(button);
      }
      return item;
    }),
  );
}

/** Shows names with values, in this order. */
export function showFacts(facts: readonly (readonly [string, string])[]): void {
  element("facts", HTMLElement).replaceChildren(
    ...facts.map(([name, value]) => {
      const pair = made("div", "");
      pair.append(made("dt", "", name), made("dd", "", value));
      return pair;
    }),
  );
}

/** Shows buttons with texts to begin with. */
export function showExamples(texts: readonly string[], take: (text: string) => void): void {
  element("examples", HTMLUListElement).replaceChildren(
    ...texts.map((text) => {
      const button = made("button", "", text);
      button.setAttribute("type", "button");
      button.addEventListener("click", () => take(text));
      const item = made("li", "");
      item.append(button);
      return item;
    }),
  );
}

/** Shows in place of everything what went wrong. */
export function showFailure(words: string, hint: string, again: (() => void) | null): void {
  const place = element("failure", HTMLElement);
  place.replaceChildren(made("h2", "", "The model is not here"), sentence("", words), sentence("quiet", hint));
  if (again !== null) {
    const button = made("button", "main", "Try again");
    button.addEventListener("click", again);
    place.append(button);
  }
  place.hidden = false;
}
