import * as fs from "node:fs";

import { InputError, wordsOf } from "./errors.js";

/** Writes a NumPy file of binary32 numbers `[rows, columns]`, piece by piece. */
export class NpyWriter {
  private readonly out: number;

  /** @throws InputError the file cannot be written. */
  constructor(
    private readonly path: string,
    rows: number,
    columns: number,
  ) {
    this.out = this.orError(() => fs.openSync(path, "w"));
    const text = `{'descr': '<f4', 'fortran_order': False, 'shape': (${rows}, ${columns}), }`;
    // The data begin at a multiple of 64: 10 bytes, this text, and a line's end.
    const padded = text.padEnd(Math.ceil((text.length + 11) / 64) * 64 - 11) + "\n";
    const head = Buffer.alloc(10);
    head.write("\x93NUMPY\x01\x00", "latin1");
    head.writeUInt16LE(padded.length, 8);
    this.bytes(Buffer.concat([head, Buffer.from(padded, "latin1")]));
  }

  write(values: Float32Array): void {
    // All that Node runs on is little-endian. Shared memory is copied first.
    this.bytes(new Uint8Array(values.slice().buffer));
  }

  close(): void {
    fs.closeSync(this.out);
  }

  private bytes(bytes: Uint8Array): void {
    this.orError(() => {
      for (let at = 0; at < bytes.length; ) at += fs.writeSync(this.out, bytes, at);
    });
  }

  private orError<T>(write: () => T): T {
    try {
      return write();
    } catch (err) {
      throw new InputError(`\`${this.path}\` cannot be written: ${wordsOf(err)}`, "choose another file", { cause: err });
    }
  }
}
