import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { getSystemErrorMap } from "node:util";

import { download, type Ask } from "./download.js";
import { FileFailure, readParts, type BundleFile, type BundleFiles, type LocalFile, type Range } from "./files.js";
import type { FileStore } from "./http-files.js";

/** A folder of this computer. */
export class Folder implements BundleFiles {
  constructor(readonly path: string) {}

  async open(name: string): Promise<LocalFile> {
    return new NodeFile(join(this.path, name));
  }

  openLocal(name: string): Promise<LocalFile> {
    return this.open(name);
  }

  async readWhole(name: string): Promise<Uint8Array> {
    return orFailure(() => new Uint8Array(fs.readFileSync(join(this.path, name))));
  }

  async sizeOf(name: string): Promise<number | null> {
    const found = orFailure(() => fs.statSync(join(this.path, name)));
    if (!found.isFile()) throw new FileFailure("it is no file", true);
    return found.size;
  }

  close(): void {}
}

/** An open file. */
export class NodeFile implements LocalFile {
  readonly size: number;
  private readonly opened: number;

  /** @param path as people see it, where that is another. */
  constructor(
    place: string,
    readonly path: string = place,
  ) {
    this.opened = orFailure(() => fs.openSync(place, "r"));
    this.size = fs.fstatSync(this.opened).size;
  }

  async read(ranges: readonly Range[]): Promise<Uint8Array[]> {
    return readParts(this, ranges);
  }

  readInto(offset: number, into: Uint8Array): void {
    let filled = 0;
    while (filled < into.length) {
      const got = orFailure(() =>
        fs.readSync(this.opened, into, filled, into.length - filled, offset + filled),
      );
      if (got === 0) throw new FileFailure(`\`${basename(this.path)}\` ends too early`);
      filled += got;
    }
  }

  close(): void {
    fs.closeSync(this.opened);
  }
}

/** Says in the system's words why a file cannot be read. */
export function orFailure<T>(read: () => T): T {
  try {
    return read();
  } catch (err) {
    const { code, errno } = err as NodeJS.ErrnoException;
    const words = errno === undefined ? undefined : getSystemErrorMap().get(errno)?.[1];
    const reason = words ?? String((err as Error).message);
    throw new FileFailure(
      reason.charAt(0).toUpperCase() + reason.slice(1),
      code === "ENOENT" || code === "ENOTDIR",
      null,
      { cause: err },
    );
  }
}

/** Keeps files of a server in the system's folder for what is temporary; they end with the process. */
export class TemporaryFiles implements FileStore {
  private readonly kept: NodeFile[] = [];

  async heads(): Promise<null> {
    return null;
  }

  async choose(): Promise<void> {}

  async find(): Promise<null> {
    return null;
  }

  async read(): Promise<null> {
    return null;
  }

  async forget(): Promise<void> {}

  keepParts(_: string, open: () => Promise<BundleFile>): Promise<BundleFile> {
    return open();
  }

  async keepWhole(): Promise<void> {}

  async keep(path: string, ask: Ask): Promise<LocalFile> {
    const folder = orFailure(() => fs.mkdtempSync(join(tmpdir(), "pleexport-web-")));
    const place = join(folder, "file");
    try {
      const out = orFailure(() => fs.openSync(place, "wx"));
      try {
        await download(ask, 0, (bytes, begin) => {
          orFailure(() => {
            for (let at = 0; at < bytes.length; ) at += fs.writeSync(out, bytes, at, bytes.length - at, begin + at);
          });
        });
      } finally {
        fs.closeSync(out);
      }
      const file = new NodeFile(place, path);
      this.kept.push(file);
      return file;
    } finally {
      // It lasts as long as it is open.
      fs.rmSync(folder, { recursive: true, force: true });
    }
  }

  close(): void {
    for (const file of this.kept.splice(0)) file.close();
  }
}
