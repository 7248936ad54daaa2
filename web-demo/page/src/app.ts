import { PleexportError, WorkerRunner, type Facts, type Progress } from "pleexport-web/client";

import { keepPage, missingFeature, moduleWorker, NO_MODULES } from "./browser.js";
import { Conversation } from "./conversation.js";
import { bytesText, countText, several } from "./format.js";
import { generationOptions, prepareSettings } from "./settings.js";
import {
  addToText,
  addTurns,
  clearLog,
  element,
  say,
  showExamples,
  showFacts,
  showFailure,
  showNotes,
} from "./view.js";

/** Where the bundle lies; `?bundle=URL` names another. */
const BUNDLE = new URLSearchParams(location.search).get("bundle") ?? "model";
const EXAMPLES = {
  chat: ["Why is the sky blue?", "Write a haiku about rain.", "What should I cook today?"],
  text: ["In the beginning", "And the king said", "The children of the city"],
};
/** How often what a text takes is shown anew while it comes. */
const FACTS_MS = 500;

const message = element("message", HTMLTextAreaElement);
const send = element("send", HTMLButtonElement);
const stop = element("stop", HTMLButtonElement);
const fresh = element("new", HTMLButtonElement);
const log = element("log", HTMLElement);
const settings = element("settings", HTMLDialogElement);
const keep = element("keep", HTMLButtonElement);
const keepProgress = element("keep-progress", HTMLProgressElement);
const keepWords = element("keep-words", HTMLElement);

let runner: WorkerRunner;
let conversation: Conversation;
/** Of the text or the keeping that is at work. */
let stopping: AbortController | null = null;
let keeping: AbortController | null = null;
let update: (() => void) | null = null;
/** That the bundle is made for what is not here. */
let misfit: string | null = null;

async function start(): Promise<void> {
  element("failure", HTMLElement).hidden = true;
  const missing = missingFeature();
  const worker = missing === null ? moduleWorker("worker.js") : null;
  if (worker === null) {
    const { sentence, hint } = missing ?? NO_MODULES;
    failed(sentence, hint, null);
    return;
  }
  element("loading", HTMLElement).hidden = false;
  runner = new WorkerRunner(worker);
  try {
    ready(await runner.open(BUNDLE, { onProgress: showProgress, onNote: showMisfit }));
  } catch (err) {
    worker.terminate();
    failed(wordsOf(err), hintOf(err), () => void start());
  }
}

function showMisfit(note: string): void {
  misfit = sentenceOf(note);
  showNotes([[misfit]]);
}

function failed(sentence: string, hint: string, again: (() => void) | null): void {
  element("loading", HTMLElement).hidden = true;
  message.placeholder = "";
  showFailure(sentenceOf(sentence), sentenceOf(hint), again);
}

function showProgress({ neededBytes, hereBytes, keptBytes }: Progress): void {
  const progress = element("progress", HTMLProgressElement);
  progress.value = hereBytes / Math.max(1, neededBytes);
  const kept = keptBytes > 0 ? `, ${bytesText(keptBytes)} of them kept from before` : "";
  const words =
    hereBytes < neededBytes
      ? `${bytesText(hereBytes)} of ${bytesText(neededBytes)}${kept}`
      : `${bytesText(neededBytes)} are here${kept}; the model is being opened`;
  progress.textContent = words;
  element("progress-words", HTMLElement).textContent = words;
}

function ready(facts: Facts): void {
  if (!facts.hasTokenizer) {
    failed("This bundle has no tokenizer, so it cannot read texts.", "Build it with `--tokenizer PATH`.", null);
    return;
  }
  conversation = new Conversation(runner, facts.hasChatTemplate);
  prepareSettings(facts.hasSamplingAdvice);
  element("loading", HTMLElement).hidden = true;
  element("model", HTMLElement).textContent = `${facts.family}, ${bytesText(facts.bundleBytes)}. `;
  const { isChat } = conversation;
  element("welcome-title", HTMLElement).textContent = isChat ? "What would you like to know?" : "Begin a text";
  element("welcome-words", HTMLElement).textContent = isChat
    ? "The model answers from what it learned, and may be wrong."
    : "This model was not made for conversations: it goes on with what you write.";
  element("message-label", HTMLElement).textContent = isChat ? "Your message" : "The text to go on with";
  showExamples(isChat ? EXAMPLES.chat : EXAMPLES.text, (text) => void ask(text));
  element("settings-open", HTMLButtonElement).disabled = false;
  showState(facts);
  begin();
  say("The model is ready.");
  void navigator.storage.persist?.().catch(() => false);
  keepPage(facts.heapBytes === null ? "gpu" : "cpu", (change) => {
    update = change;
    showState(facts);
  }).catch(() => {}); // the page works without
}

/** Shows what is so, and what it takes. */
function showState(facts: Facts): void {
  const notes: [string, (() => void)?][] = facts.notes.map((note) => [sentenceOf(note)]);
  if (misfit !== null) notes.push([misfit]);
  if (facts.isOffline) notes.push(["There is no network: this is what was kept on this device."]);
  if (!crossOriginIsolated) {
    notes.push(["One thread only: the server does not send what lets a page have more (COOP and COEP)."]);
  }
  if (facts.notKept !== null) notes.push([`Rows are not kept for the next time: ${facts.notKept}.`]);
  if (update !== null) notes.push(["A new version of this page is here.", update]);
  showNotes(notes);
  const speed = runner.stats.decodeTokensPerSecond ?? 0;
  showFacts([
    ["Speed", speed > 0 ? `${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s` : "–"],
    ["Memory", facts.heapBytes === null ? `GPU, of it ${bytesText(facts.heldBytes)} caches` : bytesText(facts.heapBytes)],
    ["Rows read", countText(facts.rowsRead)],
    ["Requests", countText(facts.requests)],
    ["Loaded", bytesText(facts.bytes)],
    ["Kept", bytesText(facts.keptBytes)],
  ]);
  element("kept", HTMLElement).textContent =
    `${bytesText(facts.keptBytes)} are kept, with ${countText(facts.rowsKept)} of ${several(facts.numRows, "row")}. ` +
    "A text without a network can use these rows only.";
  const isAll = facts.rowsKept >= facts.numRows;
  keep.disabled = isAll || facts.notKept !== null;
  if (isAll) keepWords.textContent = "All rows are kept.";
}

/** Begins a conversation. */
function begin(): void {
  conversation.clear();
  clearLog();
  log.hidden = true;
  element("welcome", HTMLElement).hidden = false;
  setBusy(false);
  message.focus();
}

function setBusy(isBusy: boolean): void {
  message.disabled = false;
  send.disabled = isBusy;
  send.hidden = isBusy;
  stop.hidden = !isBusy;
  fresh.disabled = isBusy || conversation.isEmpty;
  message.placeholder = conversation.isChat
    ? "Write a message"
    : conversation.isEmpty
      ? "Write a beginning"
      : "Write on, or just press Enter";
}

async function ask(given: string): Promise<void> {
  const isGoingOn = !conversation.isChat && !conversation.isEmpty;
  if (stopping !== null || (given === "" && !isGoingOn)) return;
  const written = conversation.joined(given);
  element("welcome", HTMLElement).hidden = true;
  log.hidden = false;
  message.value = "";
  stopping = new AbortController();
  setBusy(true);
  const answer = conversation.isChat ? addTurns(given) : addToText(written);
  const timer = setInterval(() => void runner.facts().then(showState, () => {}), FACTS_MS);
  let hasText = false;
  try {
    const options = { ...generationOptions(), signal: stopping.signal };
    for await (const piece of conversation.ask(written, options)) {
      hasText ||= piece !== "";
      answer.append(piece);
    }
    answer.end(endWords());
  } catch (err) {
    if (stopping.signal.aborted) answer.end("Stopped.");
    else answer.fail(`${sentenceOf(wordsOf(err))} ${sentenceOf(hintOf(err))}`.trim());
    if (!hasText && conversation.isChat && message.value === "") message.value = given;
  } finally {
    clearInterval(timer);
    stopping = null;
    setBusy(false);
    await runner.facts().then(showState, () => {});
  }
}

/** How a text ended, where that is not its own end. */
function endWords(): string {
  switch (runner.stats.finishReason) {
    case "length":
      return `It ends here because of its length, ${several(runner.stats.generatedTokens ?? 0, "token")}.`;
    case "context":
      return "The model can read no longer text than this. Begin a new one.";
    default:
      return "";
  }
}

async function keepRows(): Promise<void> {
  if (keeping !== null) {
    keeping.abort();
    return;
  }
  keeping = new AbortController();
  keep.textContent = "Stop";
  keepProgress.hidden = false;
  try {
    const { numRows } = await runner.facts();
    const show = (rows: number): void => {
      keepProgress.value = rows / numRows;
      keepProgress.textContent = keepWords.textContent = `${countText(rows)} of ${several(numRows, "row")}`;
    };
    show(0);
    await runner.keepRows(show, keeping.signal);
  } catch (err) {
    keepWords.textContent = keeping.signal.aborted ? "Stopped. What is here stays." : sentenceOf(wordsOf(err));
  } finally {
    keeping = null;
    keep.textContent = "Keep all rows";
    keepProgress.hidden = true;
    await runner.facts().then(showState, () => {});
  }
}

/** Removes what is kept of all bundles, and opens the page anew. */
async function forget(): Promise<void> {
  keeping?.abort();
  stopping?.abort();
  await runner.close();
  try {
    await (await navigator.storage.getDirectory()).removeEntry("pleexport", { recursive: true });
  } catch {
    // Another tab has some of it open, and goes on with it.
  }
  location.reload();
}

/** As people read a sentence. */
function sentenceOf(words: string): string {
  const text = words.charAt(0).toUpperCase() + words.slice(1);
  return text === "" || /[.!?…]$/.test(text) ? text : `${text}.`;
}

function wordsOf(err: unknown): string {
  return err instanceof Error ? err.message : String(err);
}

function hintOf(err: unknown): string {
  return err instanceof PleexportError ? err.hint : "";
}

element("composer", HTMLFormElement).addEventListener("submit", (event) => {
  event.preventDefault();
  void ask(message.value.trim());
});
message.addEventListener("keydown", (event) => {
  // While letters are being composed, Enter chooses among them.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  void ask(message.value.trim());
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !settings.open) stopping?.abort();
});
stop.addEventListener("click", () => {
  stopping?.abort();
  message.focus();
});
fresh.addEventListener("click", begin);
element("settings-open", HTMLButtonElement).addEventListener("click", () => settings.showModal());
keep.addEventListener("click", () => void keepRows());
element("forget", HTMLButtonElement).addEventListener("click", () => void forget());

void start();
