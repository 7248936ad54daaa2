import { giveBack } from "./arrays.js";
import { Blob } from "./blob.js";
import {
  checkBytes,
  checkFile,
  CHECKSUMS,
  CHUNK_BYTES,
  readChecksums,
  unreadable,
  type Checksums,
} from "./checksums.js";
import type { Artifact } from "./contract.js";
import { BlobError, BundleError, CheckFailed, COPY_AGAIN, PleexportError } from "./errors.js";
import { FileFailure, type BundleFile, type BundleFiles, type LocalFile } from "./files.js";
import { blobFiles, DECODER, MANIFEST, modelFiles, readManifest, type FileRecord, type Manifest } from "./manifest.js";
import { readStarter, STARTER } from "./starter.js";
import { TIED, TiedRows } from "./tied.js";
import { TOKENIZER_FILES } from "./tokenizer.js";

const INCOMPLETE = "the copy is incomplete; copy the bundle again, or rebuild it";

export interface BundleOptions {
  /** Compare with its checksums what is read, now and when weights are loaded; true by default. */
  readonly verify?: boolean;
}

/** A bundle: the folder that ships, or its copy on a server. */
export class Bundle {
  /** What is not as it should be, and no reason to stop: sentences without a full stop. */
  readonly notes: string[] = [];
  /** Files of a server that were compared since they came here. */
  private readonly checked = new Set<string>();

  private constructor(
    private readonly files: BundleFiles,
    readonly manifest: Manifest,
    /** Null where nothing is compared. */
    private readonly checksums: Checksums | null,
  ) {}

  /**
   * Reads the manifest, checks that the files have their sizes, and compares the small ones that
   * are no part of the model.
   *
   * @throws BundleError no bundle, another schema, a malformed manifest, or a missing file.
   * @throws CheckFailed the manifest is damaged, a file has another size than it says, or a small
   *   one does not match its checksum.
   */
  static async openFiles(files: BundleFiles, { verify = true }: BundleOptions = {}): Promise<Bundle> {
    const found = verify ? await readChecksums(files) : null;
    const checksums = found instanceof FileFailure ? null : found;
    const path = `${files.path}/${MANIFEST}`;
    const raw = await readRawManifest(files);
    if (checksums !== null) checkBytes(raw, path, checksums.get(MANIFEST) ?? []);
    const manifest = readManifest(raw, path);
    if (found instanceof FileFailure) throw unreadable(`${files.path}/${CHECKSUMS}`, found);
    const bundle = new Bundle(files, manifest, checksums);
    bundle.checkNames();
    await Promise.all(manifest.files.map((record) => bundle.checkSize(record)));
    if (checksums !== null) {
      for (const { name } of bundle.smallFiles()) await bundle.readWhole(name);
    }
    return bundle;
  }

  /** Folder or URL. */
  get path(): string {
    return this.files.path;
  }

  /** The graph that computes logits. */
  get decoder(): Artifact {
    return this.manifest.graphs.get(DECODER)!;
  }

  /** Size of all files, the manifest left out. */
  get bytes(): number {
    return this.manifest.files.reduce((sum, { size }) => sum + size, 0);
  }

  /** What is read before a text can begin; of the blob, parts come later. */
  get neededFiles(): FileRecord[] {
    const own = new Set([...this.decoder.files, ...TOKENIZER_FILES]);
    return this.manifest.files.filter((file) => own.has(file.name) || this.smallFiles().includes(file));
  }

  /** Whether the manifest lists a file of that name. */
  has(name: string): boolean {
    return this.manifest.files.some((record) => record.name === name);
  }

  /** Path or URL of a file. */
  pathOf(name: string): string {
    return `${this.path}/${name}`;
  }

  /**
   * The blob, with the table that the decoder's files hold where they hold one.
   *
   * @throws BlobError a file breaks a rule of docs/blob-format.md.
   * @throws CheckFailed a header does not match its checksum.
   * @throws BundleError files of two bundles are mixed.
   */
  async openBlob(): Promise<Blob> {
    const tied = this.decoder.files.includes(TIED)
      ? await TiedRows.open(await this.openTied())
      : null;
    if (tied !== null && tied.weightsDigest !== this.decoder.weightsDigest) {
      throw new BundleError(
        `\`${tied.file.path}\` is of another bundle: its graph is not that of the manifest`,
        COPY_AGAIN,
      );
    }
    const blob = await this.openRows(tied);
    if (blob.sourceDigest !== this.manifest.tablesDigest) {
      throw new BundleError(
        `\`${blob.path}\` is the blob of another bundle: its tables are not those of the manifest`,
        COPY_AGAIN,
      );
    }
    if (blob.wantsStarter) await this.takeStarter(blob);
    return blob;
  }

  /** The blob; one whose header is damaged, which may have been kept so, is asked for once more. */
  private async openRows(tied: TiedRows | null): Promise<Blob> {
    const names = blobFiles(this.manifest);
    const open = async (): Promise<Blob> =>
      Blob.open(await Promise.all(names.map((name) => this.openFile(name))), tied);
    try {
      return await open();
    } catch (err) {
      const isDamaged = err instanceof CheckFailed || err instanceof BlobError;
      if (!isDamaged || this.files.forget === undefined) throw err;
      for (const name of names) await this.files.forget(name);
      return open();
    }
  }

  /**
   * Rows that texts use most come by one request, where whoever serves the bundle has them. All of them
   * can come later too, so nothing of it is a reason to stop.
   */
  private async takeStarter(blob: Blob): Promise<void> {
    try {
      const bytes = await this.files.readWhole(STARTER, false);
      blob.takeStarter(await readStarter(bytes, this.pathOf(STARTER)));
      giveBack(bytes.buffer);
    } catch (err) {
      if (err instanceof FileFailure && err.isMissing) return;
      const said = this.errorOf(STARTER, err);
      if (!(said instanceof PleexportError)) throw said;
      this.notes.push(`${said.message}; rows come when texts need them`);
    }
  }

  /** Rows have checksums of their own; of a server's file, all that was brought here is compared first. */
  private openTied(): Promise<LocalFile> {
    return this.files.forget === undefined ? this.openLocal(TIED) : this.openChecked(TIED);
  }

  /** A file to read parts of, which have checksums of their own. */
  async openFile(name: string): Promise<BundleFile> {
    return this.sized(name, await this.orError(name, this.files.open(name)));
  }

  /** A file that is here as a whole; a URL's is brought here first. Nothing of it is compared. */
  async openLocal(name: string): Promise<LocalFile> {
    return this.sized(name, await this.orError(name, this.files.openLocal(name, this.checksums?.get(name))));
  }

  /**
   * A file that is here as a whole, compared with its checksums. One that was kept and is damaged is
   * brought here once more.
   *
   * @throws CheckFailed names the first chunk that differs.
   */
  async openChecked(name: string): Promise<LocalFile> {
    return this.orAgain(name, () => this.openCheckedOnce(name));
  }

  private async orAgain<T>(name: string, read: () => Promise<T>): Promise<T> {
    try {
      return await read();
    } catch (err) {
      if (!(err instanceof CheckFailed) || this.files.forget === undefined) throw err;
      await this.files.forget(name);
      return read();
    }
  }

  private async openCheckedOnce(name: string): Promise<LocalFile> {
    const file = await this.openLocal(name);
    const expected = this.checksums?.get(name);
    if (this.checksums === null || this.checked.has(name)) return file;
    try {
      this.orErrorNow(name, () => checkFile(file, expected ?? []));
      if (this.files.forget !== undefined) this.checked.add(name);
      return file;
    } catch (err) {
      file.close();
      throw err;
    }
  }

  /**
   * All bytes of a file, compared with its checksums. What came or was kept damaged is asked for once more.
   *
   * @throws CheckFailed they do not match.
   */
  async readWhole(name: string): Promise<Uint8Array> {
    return this.orAgain(name, () => this.readWholeOnce(name));
  }

  private async readWholeOnce(name: string): Promise<Uint8Array> {
    const bytes = await this.orError(name, this.files.readWhole(name));
    this.checkLength(name, bytes.length);
    if (this.checksums !== null) checkBytes(bytes, this.pathOf(name), this.checksums.get(name) ?? []);
    return bytes;
  }

  /**
   * Compares every file with its checksums, and every row with its own.
   *
   * @throws CheckFailed names the first that differs.
   */
  async verify(): Promise<void> {
    let checksums = this.checksums ?? (await readChecksums(this.files));
    if (checksums instanceof FileFailure) throw unreadable(this.pathOf(CHECKSUMS), checksums);
    for (const { name } of this.manifest.files) {
      const file = await this.openLocal(name);
      try {
        this.orErrorNow(name, () => checkFile(file, (checksums as Checksums).get(name) ?? []));
      } finally {
        file.close();
      }
    }
    const blob = await this.openBlob();
    try {
      await blob.verify();
    } finally {
      blob.close();
    }
  }

  /** Gives back what was kept of its files. */
  close(): void {
    this.files.close();
  }

  /** What is small and no part of the model; nothing else would compare most of it. */
  private smallFiles(): FileRecord[] {
    const own = new Set(modelFiles(this.manifest));
    return this.manifest.files.filter(({ name, size }) => !own.has(name) && size <= CHUNK_BYTES);
  }

  /** Refuses checksums of other files than those of the bundle. */
  private checkNames(): void {
    if (this.checksums === null) return;
    const names = new Set([MANIFEST, ...this.manifest.files.map(({ name }) => name)]);
    const other = [...names, ...this.checksums.keys()]
      .filter((name) => !names.has(name) || !this.checksums!.has(name))
      .sort()[0];
    if (other === undefined) return;
    throw new CheckFailed(
      `\`${this.pathOf(CHECKSUMS)}\` is damaged: it and the manifest disagree about \`${other}\``,
      COPY_AGAIN,
    );
  }

  private async checkSize({ name }: FileRecord): Promise<void> {
    const size = await this.orError(name, this.files.sizeOf(name));
    if (size !== null) this.checkLength(name, size);
  }

  private checkLength(name: string, size: number): void {
    const expected = this.manifest.files.find((record) => record.name === name)?.size;
    if (size === expected) return;
    throw new CheckFailed(
      `\`${this.pathOf(name)}\` has ${size} bytes; the manifest says ${expected}`,
      INCOMPLETE,
    );
  }

  private sized<T extends BundleFile>(name: string, file: T): T {
    try {
      this.checkLength(name, file.size);
    } catch (err) {
      file.close();
      throw err;
    }
    return file;
  }

  private async orError<T>(name: string, reading: Promise<T>): Promise<T> {
    try {
      return await reading;
    } catch (err) {
      throw this.errorOf(name, err);
    }
  }

  private orErrorNow<T>(name: string, read: () => T): T {
    try {
      return read();
    } catch (err) {
      throw this.errorOf(name, err);
    }
  }

  private errorOf(name: string, err: unknown): PleexportError | unknown {
    if (!(err instanceof FileFailure)) return err;
    if (err.isMissing) {
      const what = `\`${this.path}\` lacks \`${name}\`, which its manifest lists`;
      return new BundleError(what, INCOMPLETE, { cause: err });
    }
    const what = `\`${this.pathOf(name)}\` cannot be read (${err.reason})`;
    return new BundleError(what, err.hint ?? COPY_AGAIN, { cause: err });
  }
}

async function readRawManifest(files: BundleFiles): Promise<Uint8Array> {
  try {
    return await files.readWhole(MANIFEST);
  } catch (err) {
    if (!(err instanceof FileFailure)) throw err;
    throw new BundleError(
      `\`${files.path}\` is not a bundle: \`${MANIFEST}\` cannot be read (${err.reason})`,
      err.hint ?? "`pleexport build CHECKPOINT --target NAME` writes a bundle",
      { cause: err },
    );
  }
}
