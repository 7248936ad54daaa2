import { FileFailure, type BundleFile, type LocalFile, type Range } from "./files.js";
import { cutOff, type FileStore } from "./http-files.js";
import { xxh3Hex } from "./xxh3.js";

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

/** Keeps files of servers in the browser's private file system. For workers only. */
export class PrivateFiles implements FileStore {
  /** Why parts are not kept; null where they are. */
  notKept: string | null = null;
  /** By path. */
  private readonly opened = new Map<string, { close(): void }>();

  private constructor(private readonly folder: FileSystemDirectoryHandle) {}

  /** @throws FileFailure the browser has no such file system, or lets no one use it. */
  static async open(): Promise<PrivateFiles> {
    try {
      const root = await navigator.storage.getDirectory();
      return new PrivateFiles(await root.getDirectoryHandle("pleexport", { create: true }));
    } catch (err) {
      throw new FileFailure("the browser keeps no files here", false, "leave the private window", { cause: err });
    }
  }

  async find(path: string): Promise<LocalFile | null> {
    try {
      return await this.read(path);
    } catch (err) {
      if (err instanceof DOMException && err.name === "NotFoundError") return null;
      throw failureOf(err);
    }
  }

  async keep(path: string, body: ReadableStream<Uint8Array>): Promise<LocalFile> {
    // Only a file that is complete gets its name: a tab may be closed meanwhile.
    const partial = `${nameOf(path)}.${crypto.randomUUID()}.partial`;
    const handle = (await this.folder.getFileHandle(partial, { create: true })) as SyncFile;
    try {
      const out = await handle.createSyncAccessHandle();
      try {
        await copy(body, out);
      } finally {
        out.close();
      }
      await handle.move(nameOf(path));
    } catch (err) {
      await this.folder.removeEntry(partial).catch(() => {});
      throw failureOf(err);
    }
    return this.read(path);
  }

  async forget(path: string): Promise<void> {
    this.opened.get(path)?.close();
    this.opened.delete(path);
    await this.folder.removeEntry(nameOf(path)).catch(() => {});
  }

  async keepParts(file: BundleFile): Promise<BundleFile> {
    try {
      const handle = (await this.folder.getFileHandle(`${nameOf(file.path)}.rows`, { create: true })) as SyncFile;
      const kept = new KeptParts(file, await handle.createSyncAccessHandle(), (why) => (this.notKept = why));
      this.opened.set(file.path, kept);
      return kept;
    } catch (err) {
      // Another tab keeps rows of the same bundle.
      this.notKept = err instanceof Error ? err.message : String(err);
      return file;
    }
  }

  close(): void {
    for (const file of this.opened.values()) file.close();
    this.opened.clear();
  }

  private async read(path: string): Promise<LocalFile> {
    const handle = (await this.folder.getFileHandle(nameOf(path))) as SyncFile;
    const file = new PrivateFile(path, await handle.createSyncAccessHandle({ mode: "read-only" }));
    this.opened.set(path, file);
    return file;
  }
}

/** A name for a URL. */
function nameOf(path: string): string {
  return xxh3Hex(new TextEncoder().encode(path));
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
    return ranges.map(({ offset, length }) => {
      const bytes = new Uint8Array(length);
      this.readInto(offset, bytes);
      return bytes;
    });
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

/** Before each part that is kept: where it lies in the file, and how long it is. */
const HEAD_BYTES = 16;

/** A file on a server, of which each part that was read is kept, one behind the other. */
export class KeptParts implements BundleFile {
  /** By offset, the length of a part and where it is kept. */
  private readonly index = new Map<number, { readonly length: number; readonly at: number }>();
  private end = 0;
  private isFull = false;

  /** @param tell is told why no more is kept. */
  constructor(
    private readonly file: BundleFile,
    private readonly handle: SyncHandle,
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

  get path(): string {
    return this.file.path;
  }

  get size(): number {
    return this.file.size;
  }

  get keepsNothingYet(): boolean {
    return this.index.size === 0;
  }

  take(offset: number, part: Uint8Array): void {
    this.append(offset, part);
  }

  async read(ranges: readonly Range[]): Promise<Uint8Array[]> {
    const missing = ranges.filter(({ offset, length }) => this.index.get(offset)?.length !== length);
    const fetched = await this.file.read(missing);
    const parts = new Map(missing.map(({ offset }, i) => [offset, fetched[i]!]));
    for (const [offset, part] of parts) this.append(offset, part);
    return ranges.map(({ offset, length }) => parts.get(offset) ?? this.kept(offset, length));
  }

  forget(ranges: readonly Range[]): void {
    for (const { offset } of ranges) this.index.delete(offset);
  }

  close(): void {
    this.handle.close();
    this.file.close();
  }

  private kept(offset: number, length: number): Uint8Array {
    const bytes = new Uint8Array(length);
    this.handle.read(bytes, { at: this.index.get(offset)!.at });
    return bytes;
  }

  private append(offset: number, part: Uint8Array): void {
    // The header, which every opening asks for, tells whether the file is still the same.
    if (this.isFull || offset === 0) return;
    const record = new Uint8Array(HEAD_BYTES + part.length);
    const head = new DataView(record.buffer);
    head.setFloat64(0, offset);
    head.setFloat64(8, part.length);
    record.set(part, HEAD_BYTES);
    if (!wrote(this.handle, record, this.end)) {
      this.isFull = true;
      this.handle.truncate(this.end);
      this.tell("no space is left on this device");
      return;
    }
    this.index.set(offset, { length: part.length, at: this.end + HEAD_BYTES });
    this.end += record.length;
  }
}

async function copy(body: ReadableStream<Uint8Array>, out: SyncHandle): Promise<void> {
  const reader = body.getReader();
  for (let at = 0; ; ) {
    const { done, value } = await reader.read().catch((err: unknown) => {
      throw cutOff(err);
    });
    if (done) break;
    if (!wrote(out, value, at)) throw new FileFailure("no space is left on this device", false, FULL);
    at += value.length;
  }
  out.flush();
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
  if (err.name === "QuotaExceededError") {
    return new FileFailure("no space is left on this device", false, FULL, { cause: err });
  }
  return new FileFailure(err.message, false, "close other tabs with this page", { cause: err });
}
