import { CHECKSUMS } from "./checksums.js";
import { cutOff, eachPart, networkWords, wholeOf, type Ask, type Rest } from "./download.js";
import { FileFailure, Unreachable, type BundleFile, type BundleFiles, type LocalFile, type Range } from "./files.js";
import { MANIFEST } from "./manifest.js";
import type { Loading } from "./progress.js";

/** What a first request for parts takes: mostly the whole header of a blob. */
const FIRST_BYTES = 16_384;
/** Parts that are so near are asked for as one: a request costs more than these bytes. */
const NEAR_BYTES = 16_384;
/** Requests at a time; browsers allow no more of HTTP/1.1 either. */
const AT_ONCE = 6;
/** Ranges of one request; servers limit the length of a header. */
const MOST_RANGES = 100;
/** Files of more bytes are read once more where they are asked for again. */
const REMEMBERED_BYTES = 1 << 20;
const OTHER_PART = "the server sent another part than was asked for";
const NO_RANGES = "serve the bundle from a server that answers requests for parts of files";

const AGAIN = "open the bundle again";
/** What tells one bundle from another: with these, everything else has its checksum. */
const HEADS = [MANIFEST, CHECKSUMS];

/** By name, the files that tell one bundle from another. */
export type Heads = ReadonlyMap<string, Uint8Array>;

/** Keeps files of a bundle on a server, by their URLs. */
export interface FileStore {
  /** Those of the bundle that was kept last with all that opening needs; null where none was. */
  heads(): Promise<Heads | null>;
  /** Finds and keeps from here on what belongs to these heads, and to no other bundle. */
  choose(heads: Heads): Promise<void>;
  /** A file that was kept before; null where it was not. */
  find(path: string): Promise<LocalFile | null>;
  /** All bytes of one; null where it was not kept. */
  read(path: string): Promise<Uint8Array | null>;
  /** Keeps a file, or parts of it, no longer. */
  forget(path: string): Promise<void>;
  /** A file of which single parts are asked for, and may be kept. */
  keepParts(path: string, open: () => Promise<BundleFile>): Promise<BundleFile>;
  /** Keeps a small file, where it can. */
  keepWhole(path: string, bytes: Uint8Array): Promise<void>;
  /**
   * Takes a file's bytes as they come, to read parts of it at once. What came of it before a break, and
   * matches the checksums of its chunks, is not asked for again.
   */
  keep(path: string, ask: Ask, checksums: readonly string[]): Promise<LocalFile>;
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
  /** Whether the server did not answer, and what was kept of the bundle was taken. */
  isOffline = false;
  private heads: Promise<ReadonlyMap<string, Uint8Array | FileFailure>> | null = null;
  private readonly locals = new Map<string, Promise<LocalFile>>();
  private readonly wholes = new Map<string, Promise<Uint8Array>>();

  /** @param url of the bundle's folder. */
  constructor(
    url: string,
    private readonly store: FileStore,
    private readonly loading: Loading | null = null,
  ) {
    this.path = url.replace(/\/+$/, "");
  }

  async open(name: string): Promise<BundleFile> {
    const path = `${this.path}/${name}`;
    return this.store.keepParts(path, () => HttpFile.open(path, this.traffic));
  }

  async forget(name: string): Promise<void> {
    this.locals.delete(name);
    this.wholes.delete(name);
    await this.store.forget(`${this.path}/${name}`);
  }

  openLocal(name: string, checksums: readonly string[] = []): Promise<LocalFile> {
    const path = `${this.path}/${name}`;
    return remembered(this.locals, name, async () => {
      const kept = await this.store.find(path);
      if (kept !== null) {
        this.loading?.kept(name, kept.size);
        return shared(kept);
      }
      return shared(await this.store.keep(path, (from) => this.fetched(name, from), checksums));
    });
  }

  readWhole(name: string, isKept = true): Promise<Uint8Array> {
    const read = async (): Promise<Uint8Array> => {
      if (HEADS.includes(name)) {
        const head = (await (this.heads ??= this.chosenHeads())).get(name)!;
        if (head instanceof FileFailure) throw head;
        return head;
      }
      const path = `${this.path}/${name}`;
      const kept = isKept ? await this.store.read(path) : null;
      if (kept !== null) {
        this.loading?.kept(name, kept.length);
        return kept;
      }
      const bytes = await wholeOf(await this.fetched(name));
      if (isKept) await this.store.keepWhole(path, bytes);
      return bytes;
    };
    if (!isKept) return read();
    const whole = remembered(this.wholes, name, read);
    // Who reads a large one makes something of it, once.
    whole.then(({ length }) => length <= REMEMBERED_BYTES || this.wholes.delete(name), () => {});
    return whole;
  }

  /** Manifest and checksums of the server, or those that were kept where it does not answer: never a mix. */
  private async chosenHeads(): Promise<ReadonlyMap<string, Uint8Array | FileFailure>> {
    const answers = await Promise.all(
      HEADS.map((name) => this.fetched(name).then(wholeOf).catch((err: unknown) => {
        if (err instanceof FileFailure) return err;
        throw err;
      })),
    );
    if (answers.some((answer) => answer instanceof Unreachable)) {
      const kept = await this.store.heads();
      if (kept !== null) {
        this.isOffline = true;
        await this.store.choose(kept);
        return kept;
      }
    }
    const found = HEADS.map((name, i) => [name, answers[i]!] as const);
    await this.store.choose(
      new Map(found.flatMap(([name, answer]) => (answer instanceof FileFailure ? [] : [[name, answer]]))),
    );
    return new Map(found);
  }

  /** A file's bytes as they come from the server, from one on. */
  private async fetched(name: string, wanted = 0): Promise<Rest> {
    const headers: Record<string, string> = wanted > 0 ? { Range: `bytes=${wanted}-` } : {};
    const response = await answered(`${this.path}/${name}`, headers, this.traffic);
    const from = response.status === 206 ? firstByteOf(response) : 0;
    if (from !== 0 && from !== wanted) throw new FileFailure(OTHER_PART);
    const length = response.headers.has("content-encoding") ? null : response.headers.get("content-length");
    const size = length === null ? null : from + Number(length);
    this.loading?.begin(name, size, from);
    const each: Rest["each"] = (take) =>
      eachPart(response, (bytes) => {
        this.traffic.bytes += bytes.length;
        this.loading?.arrived(name, bytes.length);
        take(bytes);
      });
    return { from, size, each };
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
    private readonly start: Start,
    private readonly traffic: Traffic,
  ) {}

  static async open(path: string, traffic: Traffic): Promise<HttpFile> {
    return new HttpFile(path, await startOf(path, traffic), traffic);
  }

  get size(): number {
    return this.start.size;
  }

  private get first(): Uint8Array {
    return this.start.first;
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
    if (firstByteOf(response) !== offset) throw new FileFailure(OTHER_PART);
    const bytes = await bytesOf(response, this.traffic);
    await this.checkVersion(response);
    return { offset, bytes };
  }

  /**
   * Refuses parts of another file than the one that was opened: a server may have a new bundle by now, whose
   * rows would match their checksums. Servers of one host may tag the same file in different ways, so the
   * first bytes tell.
   */
  private async checkVersion(response: Response): Promise<void> {
    if (versionOf(response) === this.start.version) return;
    const now = await startOf(this.path, this.traffic);
    if (!isSameStart(now, this.start)) throw changed();
    this.start.version = now.version;
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
    await this.checkVersion(response);
    this.answersSeveral = found !== null;
    return found;
  }
}

/** Size and first bytes of a file on a server. */
interface Start {
  readonly size: number;
  readonly first: Uint8Array;
  /** What the server says to tell it from others of that name. */
  version: string | null;
}

async function startOf(path: string, traffic: Traffic): Promise<Start> {
  const response = await answered(path, { Range: `bytes=0-${FIRST_BYTES - 1}` }, traffic);
  const total = /^bytes 0-\d+\/(\d+)$/.exec(response.headers.get("content-range") ?? "")?.[1];
  if (response.status !== 206 || total === undefined) {
    await response.body?.cancel();
    throw wholeFile(path, response);
  }
  return { size: Number(total), first: await bytesOf(response, traffic), version: versionOf(response) };
}

/** Where a part of a file begins; not a number where that is not said. */
function firstByteOf({ headers }: Response): number {
  return Number(/^bytes (\d+)-/.exec(headers.get("content-range") ?? "")?.[1]);
}

function versionOf({ headers }: Response): string | null {
  return headers.get("etag") ?? headers.get("last-modified");
}

function isSameStart(one: Start, other: Start): boolean {
  const { first } = other;
  return one.size === other.size && one.first.every((byte, i) => byte === first[i]);
}

/** What is said where a server has another file by now. */
export function changed(): FileFailure {
  return new FileFailure("the server has another bundle by now", false, AGAIN);
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
    const ask = (): Promise<Response> => fetch(path, { headers, cache: "no-store" });
    // That a server has closed a connection which nobody used for a while may be seen only when it is used.
    response = await ask().catch(ask);
  } catch (err) {
    const reason = `the server cannot be reached: ${networkWords(err)}`;
    throw new Unreachable(reason, false, "look at the address, and whether there is a network", { cause: err });
  }
  if (response.ok) return response;
  await response.body?.cancel();
  const isMissing = response.status === 404 || response.status === 410;
  throw new FileFailure(`the server answered ${response.status}`, isMissing, isMissing ? null : "ask who runs the server");
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
