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
  const own = sessionStorage.getItem("conversation");
  let known = own ? [own] : [];
  if (!own && navigator.locks) {
    const all = await records("readonly").then((store) => promised(store.getAll())).catch(() => []);
    known = all.sort((one, other) => other.saved - one.saved).map((record) => record.id);
  }
  for (const id of known) {
    for (let attempt = 0; attempt < (id === own ? 5 : 1); attempt += 1) { // after a reload the old page may still hold it
      if (await hold(id)) {
        sessionStorage.setItem("conversation", id);
        return id;
      }
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
  }
  const id = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;
  await hold(id);
  sessionStorage.setItem("conversation", id);
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
      localStorage.removeItem(`draft ${id}`);
    }
    return true;
  } catch {
    return false;
  }
}

export const draft = {
  read: (id) => localStorage.getItem(`draft ${id}`) ?? "",
  write: (id, text) => {
    try {
      if (text) localStorage.setItem(`draft ${id}`, text);
      else localStorage.removeItem(`draft ${id}`);
    } catch {
      // the browser keeps nothing; the text stays in the box
    }
  },
};

/** Delete everything that the page keeps in this browser, except this tab's hold of its conversation. */
export async function forget() {
  for (const key of Object.keys(localStorage)) {
    if (key.startsWith("draft ") || key === "options") localStorage.removeItem(key);
  }
  await records("readwrite").then((store) => promised(store.clear())).catch(() => {});
}
