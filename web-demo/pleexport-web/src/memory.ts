import * as fs from "node:fs";

/** Resident memory of this process in bytes: its own, and pages of files, which can be dropped. */
export interface ResidentMemory {
  readonly anonymous: number;
  readonly fileBacked: number;
}

/** Resident memory; null where the system does not tell. */
export function residentMemory(): ResidentMemory | null {
  let status: string;
  try {
    status = fs.readFileSync("/proc/self/status", "utf8");
  } catch {
    return null;
  }
  const bytes = (name: string): number | null => {
    const found = new RegExp(`^${name}:\\s*(\\d+) kB$`, "m").exec(status);
    return found === null ? null : Number(found[1]) * 1024;
  };
  const [anonymous, fileBacked] = [bytes("RssAnon"), bytes("RssFile")];
  // Of shared memory, which WebAssembly with threads has, the system counts apart.
  return anonymous === null || fileBacked === null
    ? null
    : { anonymous: anonymous + (bytes("RssShmem") ?? 0), fileBacked };
}
