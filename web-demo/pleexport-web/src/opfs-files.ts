import { CHECKSUMS, CHUNK_BYTES } from "./checksums.js";
import { download, type Ask } from "./download.js";
import { FileFailure, readParts, readRange, Unreachable, type BundleFile, type LocalFile, type Range } from "./files.js";
import { changed, type FileStore, type Heads } from "./http-files.js";
import { MANIFEST } from "./manifest.js";
import { CHECKSUM_BYTES, viewOf } from "./safetensors.js";
import { isChecksum, xxh3, xxh3Hex } from "./xxh3.js";

/** Where everything is kept. */
const FOLDER = "pleexport";
/** In the folder of a bundle: all that opening it needs was kept. */
const COMPLETE = "complete";
/** A file that has not grown for so long is written by nobody any more. */
const STALE_MS = 60_000;
const PARTIAL = ".partial";
const OF_ONE_TAB = /\..+\.partial$/;
const PARTS = ".rows";
const NO_SPACE = "no space is left on this device";
const FULL = "free space on this device, or let the browser forget other sites";

/** Of workers only, so TypeScript has it in another library than that of pages. */
export interface SyncHandle {
  read(into: ArrayBufferView, options: { at: number }): number;
  write(bytes: ArrayBufferView, options: { at: number }): number;
  getSize(): number;
  truncate(size: number): void;
  flush(): void;
  close(): void;
}

interface SyncFile extends FileSystemFileHandle {
  createSyncAccessHandle(options?: { mode: "read-only" | "readwrite" }): Promise<SyncHandle>;
  move(name: string): Promise<void>;
}

/**
 * Keeps files of one bundle's URL in the browser's private file system. For workers only.
 *
 * Each bundle that the URL has had has a folder of its own, named by its heads, so that files of two are
 * never mixed; when one was opened the folders of others go.
 */
export class PrivateFiles implements FileStore {
  /** Why not all is kept; null where it is. */
  notKept: string | null = null;
  /** By path. */
  private readonly opened = new Map<string, { close(): void }>();
  /** By path, how many bytes are kept of a file. */
  private readonly kept = new Map<string, () => number>();
  private chosen = "";
  private folder: FileSystemDirectoryHandle | null = null;

  private constructor(private readonly all: FileSystemDirectoryHandle) {}

  /**
   * @param url of the bundle.
   * @throws FileFailure the browser has no such file system, or lets no one use it.
   */
  static async open(url: string): Promise<PrivateFiles> {
    try {
      const root = await navigator.storage.getDirectory();
      const folder = await root.getDirectoryHandle(FOLDER, { create: true });
      return new PrivateFiles(await folder.getDirectoryHandle(nameOf(url), { create: true }));
    } catch (err) {
      throw new FileFailure("the browser keeps no files here", false, "leave the private window", { cause: err });
    }
  }

  /** Bytes that are kept of the bundle. */
  get keptBytes(): number {
    return [...this.kept.values()].reduce((sum, bytes) => sum + bytes(), 0);
  }

  async heads(): Promise<Heads | null> {
    let last: { folder: FileSystemDirectoryHandle; since: number } | null = null;
    for (const folder of await this.folders()) {
      const mark = await folder.getFileHandle(COMPLETE).catch(() => null);
      const since = (await mark?.getFile())?.lastModified ?? 0;
      if (since > (last?.since ?? 0)) last = { folder, since };
    }
    if (last === null) return null;
    const { folder } = last;
    const heads = await Promise.all(
      [MANIFEST, CHECKSUMS].map(async (name) => [name, await contentOf(folder, name)] as const),
    );
    return heads.some(([, bytes]) => bytes === null) ? null : (new Map(heads) as Heads);
  }

  async choose(heads: Heads): Promise<void> {
    this.chosen = xxh3Hex(...heads.values());
    try {
      this.folder = await this.all.getDirectoryHandle(this.chosen, { create: true });
      await this.removeStale(this.folder);
      for (const [name, bytes] of heads) {
        const kept = await contentOf(this.folder, name);
        if (kept?.length !== bytes.length || kept.some((byte, i) => byte !== bytes[i])) {
          await writeWhole(this.folder, name, bytes);
        }
      }
    } catch (err) {
      this.keepsNot(err);
    }
  }

  /** All that opening needs was kept: it opens without a network from now on, and what was before goes. */
  async complete(): Promise<void> {
    if (this.folder === null || this.notKept !== null) return;
    for (const folder of await this.folders()) {
      if (folder.name === this.chosen) continue;
      await folder.removeEntry(COMPLETE).catch(() => {});
      // Another tab may have it open still.
      await this.all.removeEntry(folder.name, { recursive: true }).catch(() => {});
    }
    await this.folder.getFileHandle(COMPLETE, { create: true });
  }

  async find(path: string): Promise<LocalFile | null> {
    try {
      return await this.openKept(path);
    } catch (err) {
      if (isMissing(err)) return null;
      throw failureOf(err);
    }
  }

  async read(path: string): Promise<Uint8Array | null> {
    const bytes = await contentOf(this.own, nameOf(path));
    if (bytes !== null) this.kept.set(path, () => bytes.length);
    return bytes;
  }

  async keepWhole(path: string, bytes: Uint8Array): Promise<void> {
    try {
      await writeWhole(this.own, nameOf(path), bytes);
      this.kept.set(path, () => bytes.length);
    } catch (err) {
      this.keepsNot(err);
    }
  }

  async keep(path: string, ask: Ask, checksums: readonly string[]): Promise<LocalFile> {
    // Only a file that is complete gets its name: a tab may be closed meanwhile.
    const { name, out } = await this.openPartial(path);
    try {
      try {
        const begin = intactBytes(out, checksums);
        out.truncate(begin);
        out.truncate(await download(ask, begin, (bytes, at) => {
          if (!wrote(out, bytes, at)) throw new NoSpace();
        }));
        out.flush();
      } finally {
        out.close();
      }
      const handle = (await this.own.getFileHandle(name)) as SyncFile;
      await handle.move(nameOf(path)).catch((err: unknown) => {
        // A second tab was faster, and has it open.
        if (!isLocked(err)) throw err;
        return this.own.removeEntry(name);
      });
    } catch (err) {
      // What came before a break is gone on with; what is in the way of other files is not.
      if (!(err instanceof Unreachable)) await this.own.removeEntry(name).catch(() => {});
      throw failureOf(err);
    }
    return this.openKept(path);
  }

  /** The file that another is written to until it is complete: the one of the last time, unless a tab has that. */
  private async openPartial(path: string): Promise<{ name: string; out: SyncHandle }> {
    const names = [`${nameOf(path)}${PARTIAL}`, `${nameOf(path)}.${crypto.randomUUID()}${PARTIAL}`] as const;
    const open = async (name: string): Promise<{ name: string; out: SyncHandle }> => {
      const file = (await this.own.getFileHandle(name, { create: true })) as SyncFile;
      return { name, out: await file.createSyncAccessHandle() };
    };
    try {
      return await open(names[0]).catch((err: unknown) => {
        if (!isLocked(err)) throw err;
        return open(names[1]);
      });
    } catch (err) {
      throw failureOf(err);
    }
  }

  async forget(path: string): Promise<void> {
    this.opened.get(path)?.close();
    this.opened.delete(path);
    this.kept.delete(path);
    await this.own.removeEntry(nameOf(path)).catch(() => {});
    await this.own.removeEntry(`${nameOf(path)}${PARTS}`).catch(() => {});
  }

  async keepParts(path: string, open: () => Promise<BundleFile>): Promise<BundleFile> {
    let handle: SyncHandle;
    try {
      const file = (await this.own.getFileHandle(`${nameOf(path)}${PARTS}`, { create: true })) as SyncFile;
      handle = await file.createSyncAccessHandle();
    } catch (err) {
      this.notKept = isLocked(err) ? "another tab keeps them" : String((err as Error).message);
      return open();
    }
    const parts = new KeptParts(path, handle, open, (why) => (this.notKept = why));
    this.opened.set(path, parts);
    this.kept.set(path, () => parts.keptBytes);
    await parts.begin();
    return parts;
  }

  close(): void {
    for (const file of this.opened.values()) file.close();
    this.opened.clear();
  }

  /** A small file cannot be kept, which is no reason to stop; a tab beside this one writes the same. */
  private keepsNot(err: unknown): void {
    if (isLocked(err)) return;
    const failure = failureOf(err);
    if (!(failure instanceof FileFailure)) throw err;
    this.notKept = failure instanceof NoSpace ? NO_SPACE : failure.reason;
  }

  /** The folder of the bundle that was chosen. */
  private get own(): FileSystemDirectoryHandle {
    if (this.folder === null) throw new FileFailure("nothing says which bundle it belongs to");
    return this.folder;
  }

  private async openKept(path: string): Promise<LocalFile> {
    const handle = (await this.own.getFileHandle(nameOf(path))) as SyncFile;
    const file = new PrivateFile(path, await handle.createSyncAccessHandle({ mode: "read-only" }));
    this.opened.set(path, file);
    this.kept.set(path, () => file.size);
    return file;
  }

  private async folders(): Promise<FileSystemDirectoryHandle[]> {
    const found: FileSystemDirectoryHandle[] = [];
    for await (const entry of this.all.values()) if (entry.kind === "directory") found.push(entry);
    return found;
  }

  /** Removes what a second tab was writing when it was closed: nobody goes on with it. */
  private async removeStale(folder: FileSystemDirectoryHandle): Promise<void> {
    for await (const entry of folder.values()) {
      if (entry.kind !== "file" || !OF_ONE_TAB.test(entry.name)) continue;
      const { lastModified } = await entry.getFile();
      if (Date.now() - lastModified > STALE_MS) await folder.removeEntry(entry.name).catch(() => {});
    }
  }
}

/** A name for a URL. */
function nameOf(path: string): string {
  return xxh3Hex(new TextEncoder().encode(path));
}

async function contentOf(folder: FileSystemDirectoryHandle, name: string): Promise<Uint8Array | null> {
  try {
    const file = await (await folder.getFileHandle(name)).getFile();
    return new Uint8Array(await file.arrayBuffer());
  } catch (err) {
    if (isMissing(err)) return null;
    throw failureOf(err);
  }
}

async function writeWhole(folder: FileSystemDirectoryHandle, name: string, bytes: Uint8Array): Promise<void> {
  const out = await ((await folder.getFileHandle(name, { create: true })) as SyncFile).createSyncAccessHandle();
  try {
    out.truncate(0);
    if (wrote(out, bytes, 0)) return;
    out.truncate(0);
    throw new NoSpace();
  } finally {
    out.close();
  }
}

function isMissing(err: unknown): boolean {
  return err instanceof DOMException && err.name === "NotFoundError";
}

/** Whether another tab has a file open. */
function isLocked(err: unknown): boolean {
  return err instanceof DOMException && err.name === "NoModificationAllowedError";
}

class PrivateFile implements LocalFile {
  readonly size: number;

  constructor(
    readonly path: string,
    private readonly handle: SyncHandle,
  ) {
    this.size = handle.getSize();
  }

  async read(ranges: readonly Range[]): Promise<Uint8Array[]> {
    return readParts(this, ranges);
  }

  readInto(offset: number, into: Uint8Array): void {
    if (this.handle.read(into, { at: offset }) !== into.length) {
      throw new FileFailure("what was kept of it ends too early");
    }
  }

  close(): void {
    this.handle.close();
  }
}

/** Before each part that is kept: where it lies in the file, how long it is, and its checksum. */
const HEAD_BYTES = 16 + CHECKSUM_BYTES;
/** In place of an offset: the part says how long the file is. */
const SIZE = -1;
/** The first part of a file, which tells it from others. */
const START_BYTES = 16_384;

/**
 * A file on a server, of which each part that was read is kept, one behind the other. The server is asked
 * for nothing where all is kept.
 */
export class KeptParts implements BundleFile {
  size = 0;
  /** By offset, the length of a part and where it is kept. */
  private readonly index = new Map<number, { readonly length: number; readonly at: number }>();
  private end = 0;
  private record = new Uint8Array(0);
  private isFull = false;
  private source: Promise<BundleFile> | null = null;

  /**
   * @param open asks the server for the file.
   * @param tell is told why no more is kept.
   */
  constructor(
    readonly path: string,
    private readonly handle: SyncHandle,
    private readonly open: () => Promise<BundleFile>,
    private readonly tell: (why: string) => void,
  ) {
    const size = handle.getSize();
    const head = new DataView(new ArrayBuffer(HEAD_BYTES));
    while (this.end + HEAD_BYTES <= size) {
      handle.read(head, { at: this.end });
      const [offset, length] = [head.getFloat64(0), head.getFloat64(8)];
      const at = this.end + HEAD_BYTES;
      // A part that was being written when the page was closed.
      if (!(length > 0 && at + length <= size)) break;
      this.index.set(offset, { length, at });
      this.end = at + length;
    }
    handle.truncate(this.end);
  }

  /** Learns how long the file is, and how it begins: from what was kept, or from the server. */
  async begin(): Promise<void> {
    const size = this.kept(SIZE, 8);
    if (size !== null && this.kept(0, 1) !== null) {
      this.size = viewOf(size).getFloat64(0);
      return;
    }
    this.index.clear();
    this.end = 0;
    this.handle.truncate(0);
    const file = await this.asked();
    this.size = file.size;
    const number = new Uint8Array(8);
    viewOf(number).setFloat64(0, file.size);
    this.append(SIZE, number);
    this.append(0, await readRange(file, 0, Math.min(START_BYTES, file.size)));
  }

  /** Parts but for the first. */
  get numKept(): number {
    return Math.max(0, this.index.size - 2);
  }

  get keptBytes(): number {
    return this.end;
  }

  take(offset: number, part: Uint8Array): void {
    this.append(offset, part);
  }

  async read(ranges: readonly Range[]): Promise<Uint8Array[]> {
    const found = ranges.map(({ offset, length }) => this.kept(offset, length)?.subarray(0, length) ?? null);
    const missing = ranges.filter((_, i) => found[i] === null);
    if (missing.length === 0) return found as Uint8Array[];
    const fetched = (await this.fetch(missing)).values();
    return found.map((part, i) => {
      if (part !== null) return part;
      const own = fetched.next().value!;
      this.append(ranges[i]!.offset, own);
      return own;
    });
  }

  forget(ranges: readonly Range[]): void {
    for (const { offset } of ranges) this.index.delete(offset);
  }

  close(): void {
    this.handle.close();
    void this.source?.then((file) => file.close()).catch(() => {});
  }

  private async fetch(missing: readonly Range[]): Promise<Uint8Array[]> {
    try {
      return await (await this.asked()).read(missing);
    } catch (err) {
      if (!(err instanceof Unreachable)) throw err;
      throw new Unreachable(`they are not kept on this device yet, and ${err.reason}`, false, err.hint, { cause: err });
    }
  }

  /** The file on the server, which has to be the one whose parts are kept. */
  private asked(): Promise<BundleFile> {
    this.source ??= this.openSame();
    this.source.catch(() => (this.source = null));
    return this.source;
  }

  private async openSame(): Promise<BundleFile> {
    const start = this.kept(0, 1);
    const file = await this.open();
    if (start === null || (await this.beginsSo(file, start))) return file;
    file.close();
    // What came may be damaged: it is asked for once more.
    const again = await this.open();
    if (await this.beginsSo(again, start)) return again;
    again.close();
    throw changed();
  }

  private async beginsSo(file: BundleFile, start: Uint8Array): Promise<boolean> {
    const now = await readRange(file, 0, Math.min(start.length, START_BYTES, file.size));
    return file.size === this.size && now.every((byte, i) => byte === start[i]);
  }

  /** The part at this offset, of `least` bytes or more; null where it is not kept, or damaged. */
  private kept(offset: number, least: number): Uint8Array | null {
    const { length, at } = this.index.get(offset) ?? { length: 0, at: 0 };
    if (length < least) return null;
    const record = this.recordOf(length);
    this.handle.read(record, { at: at - HEAD_BYTES });
    const part = record.slice(HEAD_BYTES);
    if (isChecksum(record.subarray(16, HEAD_BYTES), record.subarray(0, 16), part)) return part;
    this.index.delete(offset);
    return null;
  }

  /** Room for a part and what stands before it; always the same, since arrays that the file system has seen stay for long. */
  private recordOf(length: number): Uint8Array {
    if (this.record.length < HEAD_BYTES + length) this.record = new Uint8Array(HEAD_BYTES + length);
    return this.record.subarray(0, HEAD_BYTES + length);
  }

  private append(offset: number, part: Uint8Array): void {
    if (this.isFull) return;
    const record = this.recordOf(part.length);
    const head = viewOf(record);
    head.setFloat64(0, offset);
    head.setFloat64(8, part.length);
    record.set(xxh3(record.subarray(0, 16), part), 16);
    record.set(part, HEAD_BYTES);
    if (!wrote(this.handle, record, this.end)) {
      this.isFull = true;
      this.handle.truncate(this.end);
      this.tell(NO_SPACE);
      return;
    }
    this.index.set(offset, { length: part.length, at: this.end + HEAD_BYTES });
    this.end += record.length;
  }
}

/** How many bytes a partial file begins with that match the checksums; of the last chunk, none. */
function intactBytes(handle: SyncHandle, checksums: readonly string[]): number {
  const most = Math.min(Math.floor(handle.getSize() / CHUNK_BYTES), checksums.length - 1);
  const chunk = new Uint8Array(CHUNK_BYTES);
  for (let i = 0; i < most; i++) {
    handle.read(chunk, { at: i * CHUNK_BYTES });
    if (xxh3Hex(chunk) !== checksums[i]) return i * CHUNK_BYTES;
  }
  return Math.max(0, most) * CHUNK_BYTES;
}

/** Whether all was written: where space is short, some browsers throw, and others return a number. */
function wrote(handle: SyncHandle, bytes: Uint8Array, at: number): boolean {
  try {
    return handle.write(bytes, { at }) === bytes.length;
  } catch {
    return false;
  }
}

function failureOf(err: unknown): unknown {
  if (!(err instanceof DOMException)) return err;
  if (err.name === "QuotaExceededError") return new NoSpace({ cause: err });
  return new FileFailure(err.message, false, "close other tabs with this page", { cause: err });
}

class NoSpace extends FileFailure {
  constructor(options?: ErrorOptions) {
    super(`${NO_SPACE} to keep it`, false, FULL, options);
  }
}
