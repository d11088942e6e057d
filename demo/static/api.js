// The server's API: OpenAI's chat completions, with the extension `details`, and the emotion of clips alone.

import { visitorHeaders } from "./visitor.js";

export class ApiError extends Error {}

async function post(path, body, signal, headers = {}) {
  let response;
  try {
    response = await fetch(path, {
      method: "POST",
      headers: { ...headers, "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Your message is kept: try again when it is back.");
  }
  if (!response.ok) {
    const found = await response.json().catch(() => null);
    throw new ApiError(found?.error?.message || `The server answered with the status ${response.status}. Try again.`);
  }
  return response;
}

/** A blob as a data URL. */
export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new ApiError("The clip cannot be read any more. Attach it again."));
    reader.readAsDataURL(blob);
  });
}

async function parts(text, clips) {
  const found = await Promise.all(
    clips.map(async ({ kind, blob }) => ({ type: `${kind}_url`, [`${kind}_url`]: { url: await dataUrl(blob) } })),
  );
  return text ? [...found, { type: "text", text }] : found;
}

/**
 * Ask for a reply; yield the events of its stream: `{progress}`, `{emotion}`, `{text}`, `{memory}`.
 * `history` are messages, `clips` are `{kind, blob}`.
 */
export async function* ask({ model, history, text, clips, another, signal }) {
  const sampling = another ? { temperature: 1, top_p: 0.95 } : { temperature: 0 };
  const messages = [...history, { role: "user", content: await parts(text, clips) }];
  const body = { model, messages, stream: true, details: true, ...sampling };
  const response = await post("v1/chat/completions", body, signal, await visitorHeaders());
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let isDone = false;
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The connection to the server broke. Try again.");
    });
    if (done) break;
    const pieces = (rest + value).split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) {
      const data = piece.replace(/^data: /, "");
      if (data === "[DONE]") {
        isDone = true;
        continue;
      }
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.message);
      if (event.progress) yield { progress: event.progress };
      if (event.emotion) yield { emotion: event.emotion };
      if (event.memory) yield { memory: event.memory };
      const delta = event.choices?.[0]?.delta;
      if (delta?.content) yield { text: delta.content };
    }
  }
  if (!isDone) throw new ApiError("The connection to the server broke. Try again.");
}

/** The emotion of clips or of a text; null if the server has no time for it. */
export async function feel({ model, text = "", clips = [], ifIdle, signal }) {
  const response = await post("v1/emotion", { model, content: await parts(text, clips), if_idle: ifIdle }, signal);
  return (await response.json()).emotion ?? null;
}
