import type { GenerationOptions } from "pleexport-web/client";

import { element } from "./view.js";

const KEY = "pleexport-settings";
/** Where a bundle says nothing: what the likeliest words alone would say repeats itself. */
const TEMPERATURE = 0.8;
const TOP_P = 0.95;
const LENGTH = 256;

const own = element("own", HTMLInputElement);
const temperature = element("temperature", HTMLInputElement);
const length = element("length", HTMLInputElement);

/** What a text is to be like, as the reader has set it. */
export function generationOptions(): GenerationOptions {
  const maxNewTokens = length.validity.valid ? length.valueAsNumber : LENGTH;
  if (own.checked) return { maxNewTokens };
  return { maxNewTokens, temperature: temperature.valueAsNumber, topP: TOP_P };
}

/**
 * Makes the settings those of the last time, and keeps them when they change.
 *
 * @param hasAdvice whether the bundle says how to choose words.
 */
export function prepareSettings(hasAdvice: boolean): void {
  const kept = readKept();
  own.checked = hasAdvice && kept.own !== false;
  own.parentElement!.hidden = !hasAdvice;
  temperature.value = String(kept.temperature ?? TEMPERATURE);
  length.value = String(kept.length ?? LENGTH);
  show();
  for (const input of [own, temperature, length]) {
    input.addEventListener("input", () => {
      show();
      const state = { own: own.checked, temperature: temperature.valueAsNumber, length: length.valueAsNumber };
      localStorage.setItem(KEY, JSON.stringify(state));
    });
  }
}

function show(): void {
  temperature.disabled = own.checked;
  element("temperature-value", HTMLOutputElement).value = own.checked ? "" : temperature.valueAsNumber.toFixed(1);
}

function readKept(): { own?: unknown; temperature?: unknown; length?: unknown } {
  try {
    return (JSON.parse(localStorage.getItem(KEY) ?? "{}") ?? {}) as object;
  } catch {
    return {};
  }
}
