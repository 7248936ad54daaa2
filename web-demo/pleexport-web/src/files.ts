/** A part of a file. */
export interface Range {
  readonly offset: number;
  readonly length: number;
}

/** A file of a bundle, of which parts are read. */
export interface BundleFile {
  /** Path or URL, as people see it. */
  readonly path: string;
  /** Bytes. */
  readonly size: number;

  /**
   * Parts of the file, each in an array of its own.
   *
   * @throws FileFailure they cannot be read.
   */
  read(ranges: readonly Range[]): Promise<Uint8Array[]>;

  /** Reads these parts from their source again, where they were kept elsewhere: they are damaged. */
  forget?(ranges: readonly Range[]): void;

  /** How many parts that were read are kept; missing where none ever is. */
  readonly numKept?: number;

  /** Keeps a part that came another way as if it had been read. */
  take?(offset: number, part: Uint8Array): void;

  close(): void;
}

/** A file that can be read while nothing else happens, as a runtime does that loads weights. */
export interface LocalFile extends BundleFile {
  /**
   * Fills an array with the bytes from `offset` on.
   *
   * @throws FileFailure they cannot be read.
   */
  readInto(offset: number, into: Uint8Array): void;
}

/** Where the files of a bundle lie: a folder, or a server. */
export interface BundleFiles {
  /** Folder or URL, without a slash at its end. */
  readonly path: string;

  /**
   * A file to read parts of.
   *
   * @throws FileFailure there is none, or it cannot be read.
   */
  open(name: string): Promise<BundleFile>;

  /**
   * A file that is here as a whole; one on a server is brought here first.
   *
   * @param checksums of its chunks, which tell whether what came of it before a break can be used.
   */
  openLocal(name: string, checksums?: readonly string[]): Promise<LocalFile>;

  /** Brings a file here again when it is opened next; it is damaged. */
  forget?(name: string): Promise<void>;

  /**
   * All bytes of a file.
   *
   * @param isKept whether one of a server is kept where such are kept; true by default.
   */
  readWhole(name: string, isKept?: boolean): Promise<Uint8Array>;

  /**
   * Bytes of a file, where that can be told without reading it.
   *
   * @throws FileFailure there is none.
   */
  sizeOf(name: string): Promise<number | null>;

  /** Gives back what was kept of the files. */
  close(): void;
}

/** A file cannot be read; those who know what it is make an error of it. */
export class FileFailure extends Error {
  /**
   * @param reason as the end of a sentence.
   * @param isMissing there is no such file.
   * @param hint what to do, where that is known here.
   */
  constructor(
    readonly reason: string,
    readonly isMissing = false,
    readonly hint: string | null = null,
    options?: ErrorOptions,
  ) {
    super(reason, options);
  }
}

/** Whoever has the file does not answer at all. */
export class Unreachable extends FileFailure {}

/** Parts of a file that is here, each in an array of its own. */
export function readParts(file: Pick<LocalFile, "readInto">, ranges: readonly Range[]): Uint8Array[] {
  return ranges.map(({ offset, length }) => {
    const bytes = new Uint8Array(length);
    file.readInto(offset, bytes);
    return bytes;
  });
}

/** One part of a file. */
export async function readRange(file: BundleFile, offset: number, length: number): Promise<Uint8Array> {
  return (await file.read([{ offset, length }]))[0]!;
}
