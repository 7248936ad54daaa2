import { Template } from "@huggingface/jinja";

import type { Message } from "./chat-format.js";
import { InputError, wordsOf } from "./errors.js";
import "./template-limit.js";
import type { TokenizerConfig } from "./tokenizer.js";

/**
 * The text of a conversation by a chat template, up to where the answer begins.
 *
 * @param thinking whether the model should; null leaves it to the template.
 * @param config has special tokens, which templates know by name.
 * @throws InputError the template refuses, is malformed, or takes too long.
 */
export function renderTemplate(
  template: string,
  messages: readonly Message[],
  thinking: boolean | null,
  config: TokenizerConfig,
): string {
  const tokens = Object.entries(config).filter(([name, value]) => {
    return name.endsWith("_token") && typeof value === "string";
  });
  try {
    return new Template(template).render({
      messages: messages.map(({ role, content }) => ({ role, content })),
      tools: null,
      documents: null,
      add_generation_prompt: true,
      ...Object.fromEntries(tokens),
      ...(thinking === null ? {} : { enable_thinking: thinking }),
    });
  } catch (err) {
    throw new InputError(
      `the chat template cannot render this conversation: ${wordsOf(err)}`,
      "add `--no-chat` to continue plain text",
      { cause: err },
    );
  }
}
