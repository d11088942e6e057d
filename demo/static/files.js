// Conversation files. Clips are not part of them. The files of earlier versions of the page are read too.

const VERSION = 2;
const MOST_TURNS = 1000;
const LONGEST_TEXT = 32000;
export const LARGEST_FILE = 8e6;

/** The content of a conversation file. */
export function toFile(turns, memory) {
  const said = turns.map(({ text, clips, emotion, replies }) => ({
    text,
    shown: clips.map((clip) => clip.kind),
    emotion: emotion ?? null,
    replies: replies.map(({ key, label, text: reply, state, first, seconds }) => ({ key, label, text: reply, state, first, seconds })),
  }));
  return JSON.stringify({ empathic_conversation: VERSION, turns: said, memory: memory ?? null }, null, 1);
}

function check(holds) {
  if (!holds) throw new Error("This saved conversation is damaged.");
}

function string(value) {
  check(typeof value === "string" && value.length <= LONGEST_TEXT);
  return value.toWellFormed?.() ?? value;
}

function number(value) {
  if (value === null || value === undefined) return null;
  check(Number.isFinite(value) && value >= 0 && value <= 2 ** 31);
  return value;
}

function probabilities(value) {
  check(value && typeof value === "object" && !Array.isArray(value));
  const pairs = Object.entries(value);
  check(pairs.length >= 1 && pairs.length <= 20);
  return Object.fromEntries(pairs.map(([name, share]) => [string(name), Math.min(1, number(share))]));
}

function feeling(value) {
  const found = { probabilities: probabilities(value.probabilities) };
  found.label = Object.entries(found.probabilities).reduce((best, pair) => (pair[1] > best[1] ? pair : best))[0];
  return found;
}

function emotion(value) {
  if (value === null || value === undefined) return null;
  const alone = Object.entries(value.alone ?? {}).filter(([kind]) => ["audio", "video"].includes(kind));
  return { ...feeling(value), ...(alone.length ? { alone: Object.fromEntries(alone.map(([kind, found]) => [kind, feeling(found)])) } : {}) };
}

function turn(record, version, place) {
  const kinds = ["audio", "video"].filter((kind) => record.shown.includes(kind));
  const replies = version === 1
    ? record.answers.map((answer, number) => ({ ...answer, key: number ? `column${number}` : "main", state: "done" }))
    : record.replies;
  check(Array.isArray(replies) && replies.length >= 1 && replies.length <= 6);
  return {
    id: `${Date.now()}-${place}`,
    text: string(record.text),
    clips: kinds.map((kind) => ({ kind, name: "", blob: null })),
    emotion: version === 1 ? emotion(record.emotions && { probabilities: record.emotions }) : emotion(record.emotion),
    replies: replies.map((reply) => ({
      key: string(reply.key),
      label: string(reply.label),
      text: string(reply.text),
      state: ["done", "stopped", "failed"].includes(reply.state) ? reply.state : "stopped",
      first: number(reply.first),
      seconds: number(reply.seconds),
    })),
  };
}

/** Read a conversation file; it is untrusted. Throws an error whose message is for the visitor. */
export function fromFile(content) {
  let record;
  try {
    record = JSON.parse(content);
  } catch {
    throw new Error("This file is not a saved conversation: it is not JSON.");
  }
  const version = record?.empathic_conversation;
  if (version !== 1 && version !== VERSION) throw new Error("This is not a conversation saved by this page.");
  const { turns } = record;
  if (!Array.isArray(turns) || turns.length > MOST_TURNS) {
    throw new Error(`A saved conversation must have a list of at most ${MOST_TURNS} turns.`);
  }
  try {
    const memory = record.memory && { vectors: number(record.memory.vectors), text_tokens: number(record.memory.text_tokens), digest: string(record.memory.digest) };
    return { turns: turns.map((said, place) => turn(said, version, place)), memory: memory ?? null };
  } catch {
    throw new Error("This saved conversation is damaged.");
  }
}
