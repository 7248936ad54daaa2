import type { GenerationOptions, Message, WorkerRunner } from "pleexport-web/client";

/** What was written and answered so far, in the form that the bundle takes. */
export class Conversation {
  private messages: Message[] = [];
  private text = "";

  /** @param isChat whether the bundle has a form for conversations; otherwise it continues one text. */
  constructor(
    private readonly runner: WorkerRunner,
    readonly isChat: boolean,
  ) {}

  get isEmpty(): boolean {
    return this.messages.length === 0 && this.text === "";
  }

  clear(): void {
    this.messages = [];
    this.text = "";
  }

  /**
   * What is shown of what a reader wrote: in a text, with the space that it needs before it.
   */
  joined(written: string): string {
    const needsSpace = !this.isChat && /\S$/.test(this.text) && /^[\p{L}\p{N}"'(]/u.test(written);
    return needsSpace ? ` ${written}` : written;
  }

  /**
   * Answers, or goes on with the text. What has come stays when it is stopped or fails; a question that got
   * no word of answer is taken back.
   */
  async *ask(written: string, options: GenerationOptions): AsyncGenerator<string, void, undefined> {
    let answer = "";
    try {
      for await (const piece of this.pieces(written, options)) {
        answer += piece;
        yield piece;
      }
    } finally {
      if (!this.isChat) this.text += written + answer;
      else if (answer !== "") {
        this.messages.push({ role: "user", content: written }, { role: "assistant", content: answer });
      }
    }
  }

  private async *pieces(written: string, options: GenerationOptions): AsyncGenerator<string, void, undefined> {
    if (this.isChat) {
      yield* this.runner.chat([...this.messages, { role: "user", content: written }], options);
    } else {
      for await (const token of this.runner.generate(this.text + written, options)) yield token.text;
    }
  }
}
