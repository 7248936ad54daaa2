import { Unreachable } from "./files.js";

/** The bytes of a file from one on. */
export interface Rest {
  readonly from: number;
  /** How long the file is; null where the server does not say it. */
  readonly size: number | null;
  /**
   * Hands the bytes on as they come. They are gone when `take` returns.
   *
   * @throws Unreachable the connection ended too early.
   */
  each(take: (bytes: Uint8Array) => void): Promise<void>;
}

/** Of one read from a server. */
const READ_BYTES = 1 << 18;
/** Room is made ahead for as many bytes as a server says, up to these. */
const BELIEVED_BYTES = 64 << 20;

/** Asks for the bytes from one on; a server may send all of them all the same. */
export type Ask = (from: number) => Promise<Rest>;

/**
 * Writes a file as it comes. Where a connection ends too early, the rest is asked for, as long as each
 * answer brings it further.
 *
 * @param begin how many bytes are here already.
 * @returns how many there are.
 * @throws FileFailure nothing more comes, or it cannot be written.
 */
export async function download(
  ask: Ask,
  begin: number,
  write: (bytes: Uint8Array, at: number) => void,
): Promise<number> {
  let broken: Unreachable | null = null;
  for (let [at, most] = [begin, begin]; ; most = at) {
    const rest = await ask(at).catch((err: unknown) => {
      throw broken ?? err;
    });
    at = rest.from;
    try {
      await rest.each((bytes) => {
        write(bytes, at);
        at += bytes.length;
      });
      return at;
    } catch (err) {
      if (!(err instanceof Unreachable) || at <= most) throw err;
      broken = err;
    }
  }
}

/**
 * Hands the bytes of an answer on as they come.
 *
 * @param take must not keep them.
 * @throws Unreachable the connection ended too early.
 */
export async function eachPart({ body }: Response, take: (bytes: Uint8Array) => void): Promise<void> {
  const read = readerOf(body!);
  for (;;) {
    const { done, value } = await read().catch((err: unknown) => {
      throw cutOff(err);
    });
    if (done) return;
    take(value);
  }
}

type Read = () => Promise<ReadableStreamReadResult<Uint8Array>>;

/** Reads into one buffer where a browser can: of a large file, it keeps arrays of its own for long. */
function readerOf(body: ReadableStream<Uint8Array>): Read {
  let reader: ReadableStreamBYOBReader;
  try {
    reader = body.getReader({ mode: "byob" });
  } catch {
    const plain = body.getReader();
    return () => plain.read();
  }
  let buffer = new ArrayBuffer(READ_BYTES);
  return async () => {
    const { done, value } = await reader.read(new Uint8Array(buffer));
    if (done) return { done, value: undefined };
    buffer = value.buffer;
    return { done, value };
  };
}

/** All bytes of the rest of a file. */
export async function wholeOf(rest: Rest): Promise<Uint8Array<ArrayBuffer>> {
  let whole = new Uint8Array(Math.min(rest.size ?? 0, BELIEVED_BYTES));
  let end = 0;
  await rest.each((bytes) => {
    if (end + bytes.length > whole.length) {
      const longer = new Uint8Array(Math.max(2 * whole.length, end + bytes.length));
      longer.set(whole.subarray(0, end));
      whole = longer;
    }
    whole.set(bytes, end);
    end += bytes.length;
  });
  return end === whole.length ? whole : whole.slice(0, end);
}

/** What is said of a connection that ended too early. */
export function cutOff(err: unknown): Unreachable {
  const reason = `the connection ended too early: ${networkWords(err)}`;
  return new Unreachable(reason, false, "try again; look at the network if it happens again", { cause: err });
}

/** What a browser or Node says of a network. */
export function networkWords(err: unknown): string {
  const { message, cause } = err as Error;
  return cause instanceof Error && cause.message !== "" ? cause.message : message;
}
