import { Bundle, type BundleOptions } from "./bundle.js";
import { HttpFiles } from "./http-files.js";
import { Folder, TemporaryFiles } from "./node-files.js";

export * from "./index.js";
export { Folder, TemporaryFiles } from "./node-files.js";

/**
 * Opens a bundle in Node.
 *
 * @param place a folder, or the URL of one. Of a URL the weights are brought here, into a file that ends
 *   with the process; rows are fetched when a text needs them.
 * @throws BundleError no bundle, another schema, a malformed manifest, or a missing file.
 * @throws CheckFailed a file is damaged.
 */
export function openBundle(place: string | URL, options?: BundleOptions): Promise<Bundle> {
  const path = place instanceof URL ? place.href : place;
  const files = /^https?:\/\//i.test(path)
    ? new HttpFiles(path, new TemporaryFiles())
    : new Folder(path.length > 1 ? path.replace(/\/+$/, "") : path);
  return Bundle.openFiles(files, options);
}
