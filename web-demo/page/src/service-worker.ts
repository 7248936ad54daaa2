// Keeps the page's own files, so that it opens without a network. What a bundle is made of is kept by the
// package, and never passes here.

/** Of service workers only, so TypeScript has them in another library than that of pages. */
interface LifeEvent extends Event {
  waitUntil(done: Promise<unknown>): void;
}
interface AskedEvent extends LifeEvent {
  readonly request: Request;
  respondWith(answer: Promise<Response>): void;
}
interface Scope {
  readonly registration: { readonly scope: string };
  readonly clients: { claim(): Promise<void> };
  skipWaiting(): Promise<void>;
  addEventListener(type: "install" | "activate", take: (event: LifeEvent) => void): void;
  addEventListener(type: "fetch", take: (event: AskedEvent) => void): void;
  addEventListener(type: "message", take: (event: LifeEvent & MessageEvent) => void): void;
}

/** By name the digest of each. */
type Files = Readonly<Record<string, string>>;

// The build puts them in: the files of this version, those that bundles of one kind need by the kind, and a
// digest of all.
declare const FILES: Files;
declare const RUNTIMES: Readonly<Record<string, Files>>;
declare const VERSION: string;

const INDEX = "index.html";
const PREFIX = "pleexport-page-";
const NAME = PREFIX + VERSION;
const ALL: Files = Object.assign({}, FILES, ...Object.values(RUNTIMES));
const scope = globalThis as unknown as Scope;

scope.addEventListener("install", (event) => event.waitUntil(install()));
scope.addEventListener("activate", (event) => event.waitUntil(activate()));
scope.addEventListener("message", (event) => {
  const { data } = event;
  // The page asks for it when its reader has asked for the new version.
  if (data === "take over") void scope.skipWaiting();
  // It says so when it has opened a bundle.
  else if (data in RUNTIMES) event.waitUntil(keep(RUNTIMES[data]!));
});
scope.addEventListener("fetch", (event) => {
  const name = nameOf(event.request);
  if (name !== null) event.respondWith(answer(event.request, name));
});

/** Fetches all files of this version that are needed; where one is of another, none is taken. */
async function install(): Promise<void> {
  const before = await Promise.all((await ownCaches()).map(async (name) => (await caches.open(name)).keys()));
  const places = new Set(before.flat().map(({ url }) => url));
  const used = Object.values(RUNTIMES).filter((files) => Object.keys(files).every((name) => places.has(urlOf(name))));
  await keep(Object.assign({}, FILES, ...used));
}

/** Fetches those of some files that are not kept yet. */
async function keep(files: Files): Promise<void> {
  const cache = await caches.open(NAME);
  const kept = new Set((await cache.keys()).map(({ url }) => url));
  await cache.addAll(
    Object.entries(files)
      .filter(([name]) => !kept.has(urlOf(name)))
      .map(([name, integrity]) => new Request(urlOf(name), { integrity, cache: "no-cache" })),
  );
}

async function ownCaches(): Promise<string[]> {
  return (await caches.keys()).filter((name) => name.startsWith(PREFIX));
}

async function activate(): Promise<void> {
  for (const name of await ownCaches()) if (name !== NAME) await caches.delete(name);
  await scope.clients.claim();
}

function urlOf(name: string): string {
  return new URL(name === INDEX ? "./" : name, scope.registration.scope).href;
}

/** Which of the page's files a request is for; null for all else. */
function nameOf({ method, url }: Request): string | null {
  const { scope: base } = scope.registration;
  const place = url.split(/[?#]/, 1)[0]!;
  if (method !== "GET" || !place.startsWith(base)) return null;
  const name = place.slice(base.length) || INDEX;
  return name in ALL ? name : null;
}

async function answer(request: Request, name: string): Promise<Response> {
  const cache = await caches.open(NAME);
  return (await cache.match(urlOf(name))) ?? fetch(request);
}
