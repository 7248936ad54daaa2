interface Gpu {
  requestAdapter(): Promise<object | null>;
}

/** Whether this browser has WebGPU, and a GPU for it. */
export async function hasWebGpu(): Promise<boolean> {
  const { gpu } = (globalThis.navigator ?? {}) as { gpu?: Gpu };
  try {
    return gpu !== undefined && (await gpu.requestAdapter()) !== null;
  } catch {
    return false;
  }
}
