#!/usr/bin/env node
import * as fs from "node:fs";

import { runCommand } from "./cli.js";

/** Writes at once: what is asked to be written later is lost where the process ends. */
function write(descriptor: number, text: string): void {
  const bytes = Buffer.from(text, "utf8");
  for (let at = 0; at < bytes.length; ) {
    try {
      at += fs.writeSync(descriptor, bytes, at);
    } catch (err) {
      const { code } = err as NodeJS.ErrnoException;
      if (code === "EPIPE") process.exit(0); // nobody reads on
      if (code !== "EAGAIN") throw err;
    }
  }
}

const output = { data: (text: string) => write(1, text), note: (text: string) => write(2, text) };
// Threads of the runtime would keep the process alive.
process.exit(await runCommand(process.argv.slice(2), output));
