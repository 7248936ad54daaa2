import { Unreachable } from "./files.js";

/** The bytes of a file from one on. */
export interface Rest {
  readonly from: number;
  readonly body: ReadableStream<Uint8Array>;
}

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
      for (const reader = rest.body.getReader(); ; ) {
        const { done, value } = await reader.read().catch((err: unknown) => {
          throw cutOff(err);
        });
        if (done) return at;
        write(value, at);
        at += value.length;
      }
    } catch (err) {
      if (!(err instanceof Unreachable) || at <= most) throw err;
      broken = err;
    }
  }
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
