/** JSON that is not what its reader expects; those who know the file make an error of it. */
export class MalformedJson extends Error {}

/** A value of JSON: integers are `bigint`, all other numbers `number`, and objects keep any key. */
export type Json = null | boolean | bigint | number | string | Json[] | Map<string, Json>;

const MOST_LEVELS = 200;
const NUMBER = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/y;
const MOST_DIGITS = 400;

/**
 * Reads a JSON text strictly: no key twice, nothing behind the value.
 *
 * @throws MalformedJson it is no JSON.
 */
export function parseJson(text: string | Uint8Array): Json {
  return new JsonText(typeof text === "string" ? text : decodeUtf8(text)).whole();
}

/** @throws MalformedJson the bytes are not UTF-8. */
export function decodeUtf8(bytes: Uint8Array): string {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new MalformedJson("it is not UTF-8");
  }
}

class JsonText {
  private at = 0;
  private level = 0;

  constructor(private readonly text: string) {}

  whole(): Json {
    const value = this.value();
    this.space();
    if (this.at < this.text.length) throw new MalformedJson("extra data behind the value");
    return value;
  }

  private value(): Json {
    this.space();
    const first = this.text[this.at];
    switch (first) {
      case "{":
        return this.object();
      case "[":
        return this.array();
      case '"':
        return this.string();
      case "t":
        return this.word("true", true);
      case "f":
        return this.word("false", false);
      case "n":
        return this.word("null", null);
      default:
        return this.number();
    }
  }

  private object(): Map<string, Json> {
    const found = new Map<string, Json>();
    this.members("}", () => {
      this.space();
      if (this.text[this.at] !== '"') throw this.malformed();
      const name = this.string();
      if (found.has(name)) throw new MalformedJson("a key appears twice");
      this.space();
      if (this.text[this.at] !== ":") throw this.malformed();
      this.at++;
      found.set(name, this.value());
    });
    return found;
  }

  private array(): Json[] {
    const found: Json[] = [];
    this.members("]", () => void found.push(this.value()));
    return found;
  }

  private members(end: string, each: () => void): void {
    if (++this.level > MOST_LEVELS) throw new MalformedJson("it is nested too deeply");
    this.at++;
    this.space();
    if (this.text[this.at] === end) this.at++;
    else {
      for (;;) {
        each();
        this.space();
        const next = this.text[this.at++];
        if (next === end) break;
        if (next !== ",") throw this.malformed(this.at - 1);
      }
    }
    this.level--;
  }

  private string(): string {
    const begin = this.at++;
    for (; this.at < this.text.length; this.at++) {
      const code = this.text.charCodeAt(this.at);
      if (code === 0x5c) this.at++;
      else if (code === 0x22) {
        this.at++;
        try {
          return JSON.parse(this.text.slice(begin, this.at)) as string;
        } catch {
          throw this.malformed(begin);
        }
      }
    }
    throw new MalformedJson("it ends too early");
  }

  private number(): number | bigint {
    NUMBER.lastIndex = this.at;
    const found = NUMBER.exec(this.text);
    if (found === null) throw this.malformed();
    if (found[0].length > MOST_DIGITS) throw new MalformedJson("a number is out of range");
    this.at += found[0].length;
    return found[1] === undefined && found[2] === undefined ? BigInt(found[0]) : Number(found[0]);
  }

  private word<T>(word: string, value: T): T {
    if (!this.text.startsWith(word, this.at)) throw this.malformed();
    this.at += word.length;
    return value;
  }

  private space(): void {
    while (" \t\n\r".includes(this.text[this.at] ?? "x")) this.at++;
  }

  private malformed(at: number = this.at): MalformedJson {
    if (at >= this.text.length) return new MalformedJson("it ends too early");
    return new MalformedJson(`it is no JSON at character ${at}`);
  }
}

/** Makes something of a value, or throws `MalformedJson` with its path. */
export type Convert<T> = (value: Json, path: string) => T;

/**
 * An object whose fields are read one by one; the words of its errors are those of the Python
 * library's reader.
 */
export class Fields {
  private readonly map: Map<string, Json>;
  private readonly read = new Set<string>();

  constructor(
    value: Json,
    private readonly path: string,
  ) {
    if (!(value instanceof Map)) throw expected("object", value, path);
    this.map = value;
  }

  /** A field that has to be there. */
  required<T>(name: string, convert: Convert<T>): T {
    this.read.add(name);
    const value = this.map.get(name);
    if (value === undefined) {
      throw new MalformedJson(`Object missing required field \`${name}\`${at(this.path)}`);
    }
    return convert(value, `${this.path}.${name}`);
  }

  /** A field that may be missing, or null. */
  optional<T>(name: string, convert: Convert<T>): T | null {
    return this.map.has(name) ? this.required(name, orNull(convert)) : null;
  }

  /** A field that may be missing, and is not null. */
  orElse<T>(name: string, missing: T, convert: Convert<T>): T {
    return this.map.has(name) ? this.required(name, convert) : missing;
  }

  /** Refuses what nobody has asked for. */
  end(): void {
    for (const name of this.map.keys()) {
      if (!this.read.has(name)) {
        throw new MalformedJson(`Object contains unknown field \`${name}\`${at(this.path)}`);
      }
    }
  }
}

/** Reads all fields of an object, and no others. */
export function object<T>(read: (fields: Fields) => T): Convert<T> {
  return (value, path) => {
    const fields = new Fields(value, path);
    const found = read(fields);
    fields.end();
    return found;
  };
}

export const string: Convert<string> = (value, path) => {
  if (typeof value !== "string") throw expected("str", value, path);
  return value;
};

export const boolean: Convert<boolean> = (value, path) => {
  if (typeof value !== "boolean") throw expected("bool", value, path);
  return value;
};

/** An integer that a binary64 number holds. */
export const integer: Convert<number> = (value, path) => {
  if (typeof value !== "bigint") throw expected("int", value, path);
  if (!Number.isSafeInteger(Number(value))) {
    throw new MalformedJson(`Integer value out of range${at(path)}`);
  }
  return Number(value);
};

export function atLeast(least: number): Convert<number> {
  return (value, path) => {
    const found = integer(value, path);
    if (found < least) throw new MalformedJson(`Expected \`int\` >= ${least}${at(path)}`);
    return found;
  };
}

/** An integer that counts something. */
export const count: Convert<number> = atLeast(1);

export const number: Convert<number> = (value, path) => {
  if (typeof value !== "number" && typeof value !== "bigint") throw expected("float", value, path);
  return Number(value);
};

export function list<T>(each: Convert<T>, most = Infinity): Convert<T[]> {
  return (value, path) => {
    if (!Array.isArray(value)) throw expected("array", value, path);
    if (value.length > most) {
      throw new MalformedJson(`Expected \`array\` of length <= ${most}${at(path)}`);
    }
    return value.map((held, i) => each(held, `${path}[${i}]`));
  };
}

export function pair<A, B>(first: Convert<A>, second: Convert<B>): Convert<[A, B]> {
  return (value, path) => {
    if (!Array.isArray(value)) throw expected("array", value, path);
    if (value.length !== 2) throw new MalformedJson(`Expected \`array\` of length 2${at(path)}`);
    return [first(value[0]!, `${path}[0]`), second(value[1]!, `${path}[1]`)];
  };
}

export function map<T>(each: Convert<T>): Convert<Map<string, T>> {
  return (value, path) => {
    if (!(value instanceof Map)) throw expected("object", value, path);
    return new Map([...value].map(([name, held]) => [name, each(held, `${path}[...]`)]));
  };
}

export function orNull<T>(convert: Convert<T>): Convert<T | null> {
  return (value, path) => (value === null ? null : convert(value, path));
}

export function oneOf<T extends string>(...choices: T[]): Convert<T> {
  return (value, path) => {
    const found = string(value, path);
    if (!(choices as string[]).includes(found)) {
      throw new MalformedJson(`Invalid enum value '${found}'${at(path)}`);
    }
    return found as T;
  };
}

/** A string of some length, in characters as Unicode counts them. */
export function text(least: number, most: number): Convert<string> {
  return (value, path) => {
    const found = string(value, path);
    const length = [...found].length;
    if (length < least || length > most) {
      throw new MalformedJson(`Expected \`str\` of length ${least} to ${most}${at(path)}`);
    }
    return found;
  };
}

function expected(kind: string, value: Json, path: string): MalformedJson {
  return new MalformedJson(`Expected \`${kind}\`, got \`${kindOf(value)}\`${at(path)}`);
}

function kindOf(value: Json): string {
  if (value === null) return "null";
  if (Array.isArray(value)) return "array";
  const kinds: Record<string, string> = {
    string: "str",
    boolean: "bool",
    bigint: "int",
    number: "float",
  };
  return kinds[typeof value] ?? "object";
}

function at(path: string): string {
  return path === "$" ? "" : ` - at \`${path}\``;
}
