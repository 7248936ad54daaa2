import { FileFailure, type BundleFile, type BundleFiles, type LocalFile, type Range } from "./files.js";

/** What a first request for parts takes: mostly the whole header of a blob. */
const FIRST_BYTES = 16_384;
/** Parts that are so near are asked for as one: a request costs more than these bytes. */
const NEAR_BYTES = 16_384;
/** Requests at a time; browsers allow no more of HTTP/1.1 either. */
const AT_ONCE = 6;
/** Ranges of one request; servers limit the length of a header. */
const MOST_RANGES = 100;
const NO_RANGES = "serve the bundle from a server that answers requests for parts of files";

/** Keeps whole files of a server where parts of them can be read at once. */
export interface FileStore {
  /** A file that was kept before; null where it was not. */
  find(path: string): Promise<LocalFile | null>;
  /** Keeps a file no longer. */
  forget(path: string): Promise<void>;
  /** A file of which single parts are asked for, and may be kept. */
  keepParts(file: BundleFile): Promise<BundleFile>;
  /** Takes a file's bytes as they come. */
  keep(path: string, body: ReadableStream<Uint8Array>): Promise<LocalFile>;
  close(): void;
}

/** What was asked of servers. */
export interface Traffic {
  requests: number;
  bytes: number;
}

/** A bundle on a server. */
export class HttpFiles implements BundleFiles {
  readonly path: string;
  readonly traffic: Traffic = { requests: 0, bytes: 0 };
  private readonly locals = new Map<string, Promise<LocalFile>>();
  private readonly wholes = new Map<string, Promise<Uint8Array>>();

  /** @param url of the bundle's folder. */
  constructor(
    url: string,
    private readonly store: FileStore,
  ) {
    this.path = url.replace(/\/+$/, "");
  }

  async open(name: string): Promise<BundleFile> {
    return this.store.keepParts(await HttpFile.open(`${this.path}/${name}`, this.traffic));
  }

  async forget(name: string): Promise<void> {
    this.locals.delete(name);
    this.wholes.delete(name);
    await this.store.forget(`${this.path}/${name}`);
  }

  openLocal(name: string): Promise<LocalFile> {
    const path = `${this.path}/${name}`;
    return remembered(this.locals, name, async () => {
      const kept = await this.store.find(path);
      if (kept !== null) return shared(kept);
      const response = await answered(path, {}, this.traffic);
      return shared(await this.store.keep(path, counted(response, this.traffic)));
    });
  }

  readWhole(name: string): Promise<Uint8Array> {
    return remembered(this.wholes, name, async () => {
      const response = await answered(`${this.path}/${name}`, {}, this.traffic);
      return bytesOf(response, this.traffic);
    });
  }

  /** Nothing is asked: the size is compared when a file is read. */
  async sizeOf(): Promise<number | null> {
    return null;
  }

  close(): void {
    this.wholes.clear();
    this.locals.clear();
    this.store.close();
  }
}

/** The file for all who open it: the store closes it. */
function shared(file: LocalFile): LocalFile {
  return {
    path: file.path,
    size: file.size,
    read: (ranges) => file.read(ranges),
    readInto: (offset, into) => file.readInto(offset, into),
    close: () => {},
  };
}

function remembered<T>(known: Map<string, Promise<T>>, name: string, get: () => Promise<T>): Promise<T> {
  const own = known.get(name) ?? get();
  known.set(name, own);
  own.catch(() => known.delete(name));
  return own;
}

/** A file on a server, of which parts are asked for. */
class HttpFile implements BundleFile {
  /** Whether the server answers several parts at once; null before one was asked. */
  private answersSeveral: boolean | null = null;

  private constructor(
    readonly path: string,
    readonly size: number,
    private readonly first: Uint8Array,
    private readonly traffic: Traffic,
  ) {}

  static async open(path: string, traffic: Traffic): Promise<HttpFile> {
    const response = await answered(path, { Range: `bytes=0-${FIRST_BYTES - 1}` }, traffic);
    const total = /^bytes 0-\d+\/(\d+)$/.exec(response.headers.get("content-range") ?? "")?.[1];
    if (response.status !== 206 || total === undefined) {
      await response.body?.cancel();
      throw wholeFile(path, response);
    }
    return new HttpFile(path, Number(total), await bytesOf(response, traffic), traffic);
  }

  async read(ranges: readonly Range[]): Promise<Uint8Array[]> {
    const parts = merged(ranges.filter(({ offset, length }) => offset + length > this.first.length));
    const fetched = await this.fetchAll(parts);
    const known = [{ offset: 0, bytes: this.first }, ...fetched];
    return ranges.map(({ offset, length }) => {
      const part = known.find((own) => own.offset <= offset && offset + length <= own.offset + own.bytes.length);
      if (part === undefined) throw new FileFailure("the server sent too few bytes");
      // A copy: a row that is kept must not keep its neighbours.
      return part.bytes.slice(offset - part.offset, offset - part.offset + length);
    });
  }

  /** Nothing of it is kept but the header: a request is made again. */
  forget(): void {}

  close(): void {}

  private async fetchAll(parts: readonly Range[]): Promise<Part[]> {
    if (parts.length > 1 && this.answersSeveral !== false) {
      const found: Part[] = [];
      for (let begin = 0; begin < parts.length; begin += MOST_RANGES) {
        const several = await this.fetchSeveral(parts.slice(begin, begin + MOST_RANGES));
        if (several === null) return this.fetchSingles(parts);
        found.push(...several);
      }
      return found;
    }
    return this.fetchSingles(parts);
  }

  private async fetchSingles(parts: readonly Range[]): Promise<Part[]> {
    const found: Part[] = [];
    const waiting = [...parts];
    const work = async (): Promise<void> => {
      for (let next = waiting.pop(); next !== undefined; next = waiting.pop()) {
        found.push(await this.fetchOne(next));
      }
    };
    await Promise.all(Array.from({ length: Math.min(AT_ONCE, parts.length) }, work));
    return found;
  }

  private async fetchOne({ offset, length }: Range): Promise<Part> {
    const range = `bytes=${offset}-${offset + length - 1}`;
    const response = await answered(this.path, { Range: range }, this.traffic);
    if (response.status !== 206) {
      await response.body?.cancel();
      throw wholeFile(this.path, response);
    }
    const begin = /^bytes (\d+)-/.exec(response.headers.get("content-range") ?? "")?.[1];
    if (Number(begin) !== offset) throw new FileFailure("the server sent another part than was asked for");
    return { offset, bytes: await bytesOf(response, this.traffic) };
  }

  /** Several parts by one request; null where the server does not answer so. */
  private async fetchSeveral(parts: readonly Range[]): Promise<Part[] | null> {
    const list = parts.map(({ offset, length }) => `${offset}-${offset + length - 1}`).join(",");
    const response = await answered(this.path, { Range: `bytes=${list}` }, this.traffic);
    const type = response.headers.get("content-type") ?? "";
    const boundary = /^multipart\/byteranges\s*;.*boundary="?([^";]+)"?/i.exec(type)?.[1];
    if (response.status !== 206 || boundary === undefined) {
      // The whole file, or the first part only: it is not waited for.
      await response.body?.cancel();
      this.answersSeveral = false;
      return null;
    }
    const found = partsOf(await bytesOf(response, this.traffic), boundary);
    this.answersSeveral = found !== null;
    return found;
  }
}

interface Part {
  readonly offset: number;
  readonly bytes: Uint8Array;
}

/** Ranges in order, near ones as one. */
function merged(ranges: readonly Range[]): Range[] {
  const found: { offset: number; length: number }[] = [];
  for (const { offset, length } of [...ranges].sort((a, b) => a.offset - b.offset)) {
    const last = found.at(-1);
    if (last !== undefined && offset <= last.offset + last.length + NEAR_BYTES) {
      last.length = Math.max(last.length, offset + length - last.offset);
    } else found.push({ offset, length });
  }
  return found;
}

/** The parts of a multipart body; null where it is none. */
function partsOf(body: Uint8Array, boundary: string): Part[] | null {
  const text = new TextDecoder("latin1").decode(body);
  const found: Part[] = [];
  for (let at = text.indexOf(`--${boundary}`); at >= 0; at = text.indexOf(`--${boundary}`, at)) {
    const end = text.indexOf("\r\n\r\n", at);
    const head = text.slice(at, end);
    if (head.startsWith(`--${boundary}--`)) return found;
    const range = /\r\ncontent-range:\s*bytes (\d+)-(\d+)\//i.exec(head);
    if (end < 0 || range === null) return null;
    const offset = Number(range[1]);
    const length = Number(range[2]) - offset + 1;
    at = end + 4;
    found.push({ offset, bytes: body.subarray(at, at + length) });
    at += length;
  }
  return null;
}

async function answered(path: string, headers: Record<string, string>, traffic: Traffic): Promise<Response> {
  let response: Response;
  traffic.requests++;
  try {
    // A browser's own cache lets one request at a time to a file.
    response = await fetch(path, { headers, cache: "no-store" });
  } catch (err) {
    const reason = `the server cannot be reached: ${networkWords(err)}`;
    throw new FileFailure(reason, false, "look at the address, and whether there is a network", { cause: err });
  }
  if (response.ok) return response;
  await response.body?.cancel();
  const isMissing = response.status === 404 || response.status === 410;
  throw new FileFailure(`the server answered ${response.status}`, isMissing, isMissing ? null : "ask who runs the server");
}

function networkWords(err: unknown): string {
  const { message, cause } = err as Error;
  return cause instanceof Error && cause.message !== "" ? cause.message : message;
}

function wholeFile(path: string, { status }: Response): FileFailure {
  const name = path.slice(path.lastIndexOf("/") + 1);
  return new FileFailure(
    `the server answers a request for a part of \`${name}\` with the whole file, ${status} in place of 206`,
    false,
    NO_RANGES,
  );
}

async function bytesOf(response: Response, traffic: Traffic): Promise<Uint8Array> {
  try {
    const bytes = new Uint8Array(await response.arrayBuffer());
    traffic.bytes += bytes.length;
    return bytes;
  } catch (err) {
    throw cutOff(err);
  }
}

function counted(response: Response, traffic: Traffic): ReadableStream<Uint8Array> {
  const counter = new TransformStream<Uint8Array, Uint8Array>({
    transform(chunk, controller) {
      traffic.bytes += chunk.length;
      controller.enqueue(chunk);
    },
  });
  return response.body!.pipeThrough(counter);
}

/** What is said of a connection that ended too early. */
export function cutOff(err: unknown): FileFailure {
  const reason = `the connection ended too early: ${networkWords(err)}`;
  return new FileFailure(reason, false, "try again; look at the network if it happens again", { cause: err });
}
