import { InputError } from "./errors.js";

/** Of all commands. */
const VALUED = ["threads"];
const FLAGS = ["no-verify"];

/** What follows a command: a bundle, and options. */
export class Options {
  private readonly values = new Map<string, string>();
  private readonly set = new Set<string>();
  private readonly places: string[] = [];

  /**
   * @param valued names of the options that this command has, and that have a value.
   * @param flags names of those without one.
   * @throws InputError an option that this command does not have, or one without a value.
   */
  constructor(words: readonly string[], valued: readonly string[], flags: readonly string[] = []) {
    const rest = [...words];
    for (let word = rest.shift(); word !== undefined; word = rest.shift()) {
      if (!word.startsWith("--")) {
        this.places.push(word);
        continue;
      }
      const equals = word.indexOf("=");
      const name = word.slice(2, equals < 0 ? undefined : equals);
      if ([...FLAGS, ...flags].includes(name)) this.set.add(name);
      else if (![...VALUED, ...valued].includes(name)) {
        throw new InputError(`\`--${name}\` is no option of this command`, "`--help` lists all");
      } else {
        const value = equals < 0 ? rest.shift() : word.slice(equals + 1);
        if (value === undefined) throw new InputError(`\`--${name}\` has no value`, "`--help` shows an example");
        this.values.set(name, value);
      }
    }
  }

  /** The value of an option; null where it is not given. */
  get(name: string): string | null {
    return this.values.get(name) ?? null;
  }

  /** @throws InputError the option is not given. */
  needed(name: string): string {
    const value = this.get(name);
    if (value === null) throw new InputError(`\`--${name}\` is missing`, "`--help` shows an example");
    return value;
  }

  has(flag: string): boolean {
    return this.set.has(flag);
  }

  /** Numbers separated by commas; null where the option is not given. */
  ids(name: string): number[] | null {
    return this.get(name) === null ? null : this.neededIds(name);
  }

  /** The same of an option that has to be given. */
  neededIds(name: string): number[] {
    const text = this.needed(name);
    const parts = text.split(",").map((part) => part.trim());
    if (!parts.every((part) => /^-?\d{1,15}$/.test(part))) {
      throw new InputError(`\`${text}\` is not a list of numbers separated by commas`, "e.g. `2,651,9456`");
    }
    return parts.map(Number);
  }

  /** A number; null where the option is not given. */
  number(name: string): number | null {
    return this.numberLike(name, /^-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i);
  }

  /** A whole number; null where the option is not given. */
  integer(name: string): number | null {
    return this.numberLike(name, /^-?\d{1,15}$/);
  }

  /** The bundle's folder or URL. */
  get place(): string {
    if (this.places.length === 1) return this.places[0]!;
    throw new InputError("a command takes one bundle", "`--help` shows an example");
  }

  private numberLike(name: string, form: RegExp): number | null {
    const text = this.get(name);
    if (text === null) return null;
    if (form.test(text)) return Number(text);
    throw new InputError(`\`--${name}\` is \`${text}\`, which is no such number`, `e.g. \`--${name} 1\``);
  }
}
