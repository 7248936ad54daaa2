import { InputError } from "./errors.js";
import { boolean, integer, list, object, oneOf, text, type Convert } from "./json.js";

export const ROLES = ["system", "user", "assistant"] as const;
const MOST_JOINTS = 16;

/** A message of a conversation: `system`, `user` or `assistant`, and what was said. */
export interface Message {
  readonly role: string;
  readonly content: string;
}

/** What stands between two messages, before the first, or before the answer. */
interface Joint {
  /** Roles of the messages around it; `start` and `answer` at the ends. */
  readonly previous: string;
  readonly next: string;
  readonly text: string;
  /** Characters that are taken off the end of the message before it. */
  readonly trimPrevious: string;
  /** Characters that are taken off the beginning of the message behind it. */
  readonly trimNext: string;
}

/** How thoughts are taken out of what the assistant said before. */
interface Thoughts {
  /** What a thought begins with; null where all up to the last `close` is one. */
  readonly open: string | null;
  readonly close: string;
  readonly trimStart: string;
  readonly trimEnd: string;
}

/** A chat template as data: docs/bundle-format.md, ChatFormat. */
export interface ChatFormat {
  readonly joints: readonly Joint[];
  readonly thinkingOn: readonly Joint[];
  readonly thinkingOff: readonly Joint[];
  readonly thoughts: Thoughts | null;
  readonly needText: readonly string[];
  readonly systemMoves: boolean;
}

const joint = object<Joint>((fields) => ({
  previous: fields.required("previous", oneOf("start", ...ROLES)),
  next: fields.required("next", oneOf(...ROLES, "answer")),
  text: fields.required("text", text(0, 1 << 16)),
  trimPrevious: fields.orElse("trim_previous", "", text(0, 64)),
  trimNext: fields.orElse("trim_next", "", text(0, 64)),
}));

const thoughts = object<Thoughts>((fields) => ({
  open: fields.optional("open", text(1, 64)),
  close: fields.required("close", text(1, 64)),
  trimStart: fields.orElse("trim_start", "", text(0, 64)),
  trimEnd: fields.orElse("trim_end", "", text(0, 64)),
}));

export const chatFormat: Convert<ChatFormat> = object((fields) => {
  const joints = list(joint, MOST_JOINTS);
  fields.orElse("end_ids", [], list(integer, 16));
  return {
    joints: fields.required("joints", joints),
    thinkingOn: fields.orElse("thinking_on", [], joints),
    thinkingOff: fields.orElse("thinking_off", [], joints),
    thoughts: fields.optional("thoughts", thoughts),
    needText: fields.orElse<string[]>("need_text", [], list(oneOf(...ROLES), 3)),
    systemMoves: fields.orElse("system_moves", false, boolean),
  };
});

/** What contradicts itself, as a clause; null where nothing does. */
export function contradiction(format: ChatFormat): string | null {
  const lists: [string, readonly Joint[]][] = [
    ["joints", format.joints],
    ["thinking_on", format.thinkingOn],
    ["thinking_off", format.thinkingOff],
  ];
  for (const [name, own] of lists) {
    const seen = new Set<string>();
    for (const { previous, next } of own) {
      const both = `from \`${previous}\` to \`${next}\``;
      if (seen.has(both)) return `\`${name}\` has two joints ${both}`;
      seen.add(both);
    }
  }
  return null;
}

/**
 * The text of a conversation, up to where the answer begins.
 *
 * @param thinking whether the model should; null leaves it to the format.
 * @throws InputError the format has no place for a message.
 */
export function render(
  format: ChatFormat,
  messages: readonly Message[],
  thinking: boolean | null = null,
): string {
  const switched = thinking === null ? [] : thinking ? format.thinkingOn : format.thinkingOff;
  const between = new Map([...format.joints, ...switched].map((own) => [`${own.previous} ${own.next}`, own]));
  messages.forEach(checkMessage);
  const said = format.systemMoves ? moved(messages) : messages;
  let rendered = "";
  let previous = "start";
  let content = "";
  let trimStart = "";
  for (const { role, content: following } of [...said, { role: "answer", content: "" }]) {
    const own = between.get(`${previous} ${role}`);
    if (own === undefined) throw noPlace(named(role), behind(previous));
    content = strip(content, trimStart, own.trimPrevious);
    if (previous === "assistant" && format.thoughts !== null) content = cut(format.thoughts, content);
    if (content === "" && format.needText.includes(previous)) {
      throw new InputError(
        `the bundle's chat format has no place for an empty message of \`${previous}\``,
        "leave the message out, or write something in it",
      );
    }
    rendered += content + own.text;
    previous = role;
    content = following;
    trimStart = own.trimNext;
  }
  return rendered;
}

/** An answer without its thoughts. */
function cut({ open, close, trimStart, trimEnd }: Thoughts, content: string): string {
  const parts = content.split(close);
  const left =
    open === null ? parts[parts.length - 1]! : parts.map((part) => part.split(open, 1)[0]).join("");
  return left === content ? content : strip(left, trimStart, trimEnd);
}

/** Messages with the system's before the last of the user's. */
function moved(messages: readonly Message[]): readonly Message[] {
  if (messages.slice(1).some(({ role }) => role === "system")) {
    throw new InputError(
      "the bundle's chat format has no place for a message of `system` after another",
      "let the system speak first, and once",
    );
  }
  const last = messages.map(({ role }) => role).lastIndexOf("user");
  if (last <= 0 || messages[0]!.role !== "system") return messages;
  return [...messages.slice(1, last), messages[0]!, ...messages.slice(last)];
}

function checkMessage(message: Message): void {
  const { role, content, ...others } = message;
  if (!(ROLES as readonly string[]).includes(role)) {
    throw new InputError(
      `the bundle's chat format knows no role \`${role}\``,
      `roles are ${ROLES.join(", ")}`,
    );
  }
  if (typeof content !== "string") {
    throw new InputError(
      `the \`content\` of a message of \`${role}\` is no text`,
      "the bundle's chat format knows no parts; write their text as one string",
    );
  }
  const [other] = Object.keys(others).sort();
  if (other !== undefined) {
    throw new InputError(
      `the bundle's chat format knows \`role\` and \`content\` of a message, not \`${other}\``,
      "tools and the like need a program with a template engine",
    );
  }
}

function noPlace(what: string, where: string): InputError {
  return new InputError(
    `the bundle's chat format has no place for ${what} ${where}`,
    "after the system's message, user and assistant take turns",
  );
}

function named(role: string): string {
  return role === "answer" ? "an answer" : `a message of \`${role}\``;
}

function behind(previous: string): string {
  return previous === "start" ? "at the beginning" : `after one of \`${previous}\``;
}

/** A text without these characters at its start and its end, taken off one by one. */
function strip(content: string, start: string, end: string): string {
  const characters = [...content];
  const isStart = new Set(start);
  const isEnd = new Set(end);
  let first = 0;
  let last = characters.length;
  while (first < last && isStart.has(characters[first]!)) first++;
  while (last > first && isEnd.has(characters[last - 1]!)) last--;
  return characters.slice(first, last).join("");
}
