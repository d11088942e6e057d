// What the browser keeps: conversations in IndexedDB, the draft in localStorage. Each tab has a conversation of its own.

const MOST_KEPT = 5; // conversations
const LARGEST_CLIP = 8e6; // bytes
const LARGEST_CLIPS = 64e6; // bytes of a conversation

function promised(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** A storage that loses what it is given where the browser allows none, instead of failing. */
function lenient(name) {
  const attempt = (action) => {
    try {
      return action(window[name]);
    } catch {
      return null; // blocked, or full
    }
  };
  return {
    get: (key) => attempt((storage) => storage.getItem(key)),
    set: (key, value) => attempt((storage) => storage.setItem(key, value)),
    remove: (key) => attempt((storage) => storage.removeItem(key)),
    keys: () => attempt((storage) => Object.keys(storage)) ?? [],
  };
}

const local = lenient("localStorage");
const session = lenient("sessionStorage");

let database = null;

async function records(mode) {
  database ??= (() => {
    const request = indexedDB.open("empathic", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    return promised(request);
  })();
  return (await database).transaction("conversations", mode).objectStore("conversations");
}

/** Hold a conversation for this tab; false if another tab has it. */
function hold(id) {
  if (!navigator.locks) return Promise.resolve(true);
  return new Promise((resolve) => {
    navigator.locks.request(`empathic ${id}`, { ifAvailable: true }, (lock) => {
      resolve(Boolean(lock));
      return lock ? new Promise(() => {}) : undefined; // held until the tab is closed
    });
  });
}

/** Choose this tab's conversation: its own before a reload, else the newest that no other tab has, else a new one. */
export async function claim() {
  const own = session.get("conversation");
  let known = own ? [own] : [];
  if (!own && navigator.locks) {
    const all = await records("readonly").then((store) => promised(store.getAll())).catch(() => []);
    known = all.sort((one, other) => other.saved - one.saved).map((record) => record.id);
  }
  for (const id of known) {
    for (let attempt = 0; attempt < (id === own ? 5 : 1); attempt += 1) { // after a reload the old page may still hold it
      if (await hold(id)) {
        session.set("conversation", id);
        return id;
      }
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
  }
  const id = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;
  await hold(id);
  session.set("conversation", id);
  return id;
}

/** The kept conversation; null if there is none. */
export async function read(id) {
  try {
    return (await promised((await records("readonly")).get(id))) ?? null;
  } catch {
    return null;
  }
}

/** Leave out clips that are too large to keep; the newest clips come first. */
function light(turns) {
  let left = LARGEST_CLIPS;
  return turns.toReversed().map((turn) => ({
    ...turn,
    clips: turn.clips.map((clip) => {
      if (!clip.blob || clip.blob.size > Math.min(LARGEST_CLIP, left)) return { ...clip, blob: null };
      left -= clip.blob.size;
      return clip;
    }),
  })).toReversed();
}

/** Keep a conversation `{id, turns, memory, undo, attachments}`; return false if the browser refuses. */
export async function write(record) {
  try {
    const undo = record.undo && { ...record.undo, turns: light(record.undo.turns) };
    const kept = { ...record, turns: light(record.turns), undo, saved: Date.now() };
    await promised((await records("readwrite")).put(kept));
    const all = await promised((await records("readonly")).getAll());
    const old = all.sort((one, other) => other.saved - one.saved).slice(MOST_KEPT).filter(({ id }) => id !== record.id);
    for (const { id } of old) {
      await promised((await records("readwrite")).delete(id));
      local.remove(`draft ${id}`);
    }
    return true;
  } catch {
    return false;
  }
}

export const draft = {
  read: (id) => local.get(`draft ${id}`) ?? "",
  write: (id, text) => (text ? local.set(`draft ${id}`, text) : local.remove(`draft ${id}`)),
};

/** The visitor's choices. */
export const choices = {
  read: () => {
    try {
      return JSON.parse(local.get("options")) ?? {};
    } catch {
      return {};
    }
  },
  write: (options) => local.set("options", JSON.stringify(options)),
};

/** Delete everything that the page keeps in this browser, except this tab's hold of its conversation. */
export async function forget() {
  for (const key of local.keys()) {
    if (key.startsWith("draft ") || key === "options") local.remove(key);
  }
  await records("readwrite").then((store) => promised(store.clear())).catch(() => {});
}
