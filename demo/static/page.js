// The page: what is sent, kept and undone.

import { ApiError, ask, feel } from "./api.js";
import { $, face, iconButton, make, percent } from "./dom.js";
import { fromFile, LARGEST_FILE, toFile } from "./files.js";
import { explain, Recording, utteranceEnd } from "./media.js";
import { answerTo, canSpeak, hush, speak } from "./speech.js";
import * as store from "./store.js";
import { player, stageText, TurnView } from "./view.js";
import { watchFrame } from "./visitor.js";

const SAVE_EVERY = 1000; // milliseconds, while a reply grows
const NEAR_END = 120; // pixels within which the conversation follows the reply

const settings = await (await fetch("settings.json")).json();
const options = { columns: [], speak: false, ...store.choices.read() };
watchFrame(settings.quota_from);
const views = new Map(); // id of a turn -> its view
const urls = new Map(); // blob -> its URL
const state = {
  id: await store.claim(),
  turns: [],
  memory: null, // of the conversation, as the server reported it last
  attachments: [],
  undo: null, // what Undo brings back
  editing: null, // {id, draft, attachments}
  running: null, // {abort}
  recording: null,
  handsFree: false,
};

// ------------------------------------------------------------------ what is shown

const box = $("text");
const conversation = $("conversation");

function urlOf(blob) {
  if (!blob) return null;
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

function announce(text) {
  $("status").textContent = text;
}

function notify(text, { error = false, undo = null } = {}) {
  $("notice").hidden = !text;
  $("notice").className = error ? "error" : "";
  $("notice-text").textContent = text;
  $("notice").setAttribute("role", error ? "alert" : "status");
  $("undo").hidden = !undo;
  $("undo").onclick = undo;
}

/** Take a message away; what can be undone is offered again. */
function clearNotice() {
  if (state.undo) notify(state.undo.text, { undo });
  else notify("");
}

function actionsOf(turn) {
  const current = () => state.turns.find(({ id }) => id === turn.id) ?? turn;
  const reply = (key) => current().replies.find((each) => each.key === key);
  return {
    copy: () => copy(current().text),
    edit: () => edit(current()),
    retry: () => retry(current()),
    copyReply: (key) => copy(reply(key).text),
    speak: (key) => speakReply(current(), reply(key)),
  };
}

let drawing = null;

/** Bring the page up to date, at most once a frame. */
function draw() {
  drawing ??= requestAnimationFrame(() => {
    drawing = null;
    drawNow();
  });
}

function drawNow() {
  const follows = conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight < NEAR_END;
  const ids = new Set(state.turns.map((turn) => turn.id));
  for (const [id, view] of views) {
    if (!ids.has(id)) {
      view.element.remove();
      views.delete(id);
    }
  }
  const busy = Boolean(state.running);
  let place = null;
  for (const turn of state.turns) {
    if (!views.has(turn.id)) views.set(turn.id, new TurnView(turn, actionsOf(turn), urlOf));
    const { element } = views.get(turn.id);
    views.get(turn.id).update(turn, { busy, canSpeak });
    if (element.previousSibling !== place || element.parentNode !== $("turns")) $("turns").insertBefore(element, place ? place.nextSibling : $("turns").firstChild);
    place = element;
  }
  $("empty").hidden = state.turns.length > 0;
  document.body.classList.toggle("comparing", state.turns.some((turn) => turn.replies.length > 1));
  drawMeter();
  drawComposer();
  if (!state.turns.length) conversation.scrollTop = 0;
  else if (follows) conversation.scrollTop = conversation.scrollHeight;
}

function drawMeter() {
  const { vectors, text_tokens: tokens } = state.memory ?? {};
  $("meter").hidden = !tokens || !state.turns.length;
  if (!tokens) return;
  const whole = 2 ** Math.ceil(Math.log2(Math.max(tokens, vectors, 32)));
  $("meter-vectors").style.width = `${(100 * vectors) / whole}%`;
  $("meter-tokens").style.width = `${(100 * tokens) / whole}%`;
  const wide = (text) => make("span", { class: "wide" }, text);
  $("meter-text").replaceChildren(wide("memory: "), `${vectors} vectors for ${tokens} tokens`, wide(" of text"));
}

function drawComposer() {
  const busy = Boolean(state.running);
  const send = $("send");
  const label = busy ? "Stop" : "Send";
  if (send.getAttribute("aria-label") !== label) {
    send.setAttribute("aria-label", label);
    send.title = busy ? "Stop (Esc)" : "Send (Enter)";
    send.querySelector("use").setAttribute("href", busy ? "#i-stop" : "#i-send");
  }
  $("editing").hidden = !state.editing;
  for (const [id, kind] of [["mic", "audio"], ["camera", "video"]]) {
    const isOn = state.recording?.kind === kind;
    $(id).setAttribute("aria-pressed", String(isOn));
    $(id).disabled = Boolean(state.recording) && !isOn;
  }
  $("recorder").hidden = !state.recording;
  $("preview").hidden = state.recording?.kind !== "video";
}

function drawAttachments() {
  $("attachments").replaceChildren(
    ...state.attachments.map((clip) =>
      make("li", {}, player(clip, urlOf(clip.blob)), iconButton("close", "Remove this clip", () => {
        state.attachments = state.attachments.filter((each) => each !== clip);
        drawAttachments();
        keep();
        box.focus();
      })),
    ),
  );
}

// ------------------------------------------------------------------ what is kept

let saving = null;
let hasWarned = false;

async function saveNow() {
  clearTimeout(saving);
  saving = null;
  const { id, turns, memory, undo, attachments } = state;
  const isEmpty = !turns.length && !undo && !attachments.length;
  if (!(await store.write({ id, turns, memory, undo, attachments })) && !isEmpty && !hasWarned) {
    hasWarned = true;
    notify("This browser keeps nothing for this page (a private window, or no space is left). Save the conversation as a file.", { error: true });
  }
}

function keep(delay = 0) {
  if (delay === 0) saveNow();
  else saving ??= setTimeout(saveNow, delay);
}

function snapshot(draft = box.value) {
  const turns = state.turns.map((turn) => ({ ...turn, replies: turn.replies.map((reply) => ({ ...reply })) }));
  return { turns, memory: state.memory, draft, attachments: [...state.attachments] };
}

/** Make the last change undoable: Undo brings `before` back, and keeps what was written since. */
function offerUndo(text, before) {
  state.undo = { ...before, text };
  notify(text, { undo });
}

function undo() {
  const before = state.undo;
  if (!before || state.running) return;
  const written = box.value.trim() && box.value !== before.draft ? box.value : "";
  state.turns = before.turns;
  state.memory = before.memory;
  if (!state.attachments.length) state.attachments = before.attachments;
  state.undo = state.editing = null;
  write([before.draft, written].filter(Boolean).join("\n"));
  notify("");
  drawAttachments();
  draw();
  keep();
  box.focus();
}

function write(text) {
  box.value = text;
  box.dispatchEvent(new Event("input"));
}

// ------------------------------------------------------------------ turns

function historyBefore(turn) {
  const before = state.turns.slice(0, state.turns.indexOf(turn));
  return before.flatMap(({ text, replies }) => {
    const reply = replies.find(({ key }) => key === "main");
    return reply.text ? [{ role: "user", content: text }, { role: "assistant", content: reply.text }] : [];
  });
}

function newReplies(turn) {
  const columns = settings.columns.filter(({ key }) => key === "main" || options.columns.includes(key));
  return columns.map((column) => {
    const reply = { key: column.key, label: column.label, text: "", state: "waiting", stage: "sending", ahead: 0, first: null, seconds: null };
    if (!column.clips && !turn.clips.length) return { ...reply, state: "done", problem: "The same as this model: your message has no voice and no face." };
    if (!column.clips && !turn.text) return { ...reply, state: "done", problem: "Without voice and face, nothing is left of your message." };
    return reply;
  });
}

async function answer(turn, reply, { another, signal, onBegin }) {
  const column = settings.columns.find(({ key }) => key === reply.key);
  const request = {
    model: column.model,
    history: column.history ? historyBefore(turn) : [],
    text: turn.text,
    clips: column.clips ? turn.clips : [],
    another,
    signal,
  };
  const started = performance.now();
  const passed = () => (performance.now() - started) / 1000;
  const isMain = reply.key === "main";
  try {
    for await (const event of ask(request)) {
      onBegin();
      if (event.progress) {
        Object.assign(reply, event.progress);
        if (isMain) announce(stageText(reply));
      }
      if (event.emotion && isMain) turn.emotion = event.emotion;
      if (event.memory && isMain) state.memory = event.memory;
      if (event.text) {
        reply.first ??= passed();
        reply.state = "writing";
        reply.text += event.text;
      }
      draw();
      keep(SAVE_EVERY);
    }
    reply.state = "done";
  } catch (error) {
    if (error.name === "AbortError") reply.state = "stopped";
    else {
      reply.state = "failed";
      reply.problem = error instanceof ApiError ? error.message : `The page failed (${error.message}). Reload it; the conversation stays.`;
    }
  } finally {
    if (reply.text) reply.seconds = passed();
    onBegin();
    draw();
  }
}

/** Answer a turn of the conversation, in all columns. The model itself is asked first. */
async function run(turn, another = false) {
  hush();
  const controller = new AbortController();
  state.running = { abort: () => controller.abort() };
  turn.emotion = null;
  turn.replies = newReplies(turn);
  draw();
  drawNow();
  conversation.scrollTop = conversation.scrollHeight;
  keep();
  const [main, ...others] = turn.replies;
  const request = { another, signal: controller.signal };
  const begun = Promise.withResolvers?.() ?? deferred();
  const first = answer(turn, main, { ...request, onBegin: begun.resolve });
  await begun.promise;
  const open = others.filter((reply) => reply.state === "waiting");
  await Promise.all([first, ...open.map((reply) => answer(turn, reply, { ...request, onBegin: () => {} }))]);
  state.running = null;
  drawNow();
  keep();
  announce(main.problem ?? (main.text ? `Reply: ${main.text}` : main.state === "stopped" ? "Stopped." : "The reply has no words."));
  if (main.state === "done" && (options.speak || state.handsFree)) await speakReply(turn, main);
  if (state.handsFree) listenAgain(main.state === "done");
}

function deferred() {
  const found = {};
  found.promise = new Promise((resolve) => { found.resolve = resolve; });
  return found;
}

async function speakReply(turn, reply) {
  let emotion = answerTo(turn.emotion?.label);
  if (settings.names_emotion_of_text) {
    const found = await feel({ model: settings.model, text: reply.text, ifIdle: false }).catch(() => null);
    emotion = found?.label ?? emotion;
  }
  const view = views.get(turn.id)?.views.get(reply.key);
  await speak(view ? view.bubble.textContent : reply.text, emotion);
}

async function send() {
  if (state.running) return;
  if (state.recording) await endRecording();
  const text = box.value.trim();
  const { characters } = settings.limits;
  if (text.length > characters) {
    notify(`Your text has ${text.length.toLocaleString("en")} characters; the limit is ${characters.toLocaleString("en")}. Shorten it and send it again.`, { error: true });
    return;
  }
  if (!text && !state.attachments.length) {
    notify("Say something first: write, record your voice or your face, or attach a clip.", { error: true });
    box.focus();
    return;
  }
  const turn = { id: `${Date.now()}-${Math.random().toString(36).slice(2, 8)}`, text, clips: state.attachments, emotion: null, replies: [] };
  const edited = state.editing && state.turns.findIndex(({ id }) => id === state.editing.id);
  if (state.editing && edited >= 0) {
    offerUndo("Your message and what followed it are replaced.", snapshot(""));
    state.turns = state.turns.slice(0, edited);
  } else {
    state.undo = null;
    notify("");
  }
  state.turns.push(turn);
  state.attachments = state.editing?.attachments ?? [];
  write(state.editing?.draft ?? "");
  state.editing = null;
  drawAttachments();
  await run(turn);
}

function stop() {
  state.running?.abort();
}

async function retry(turn) {
  if (state.running) return;
  if (turn.clips.some((clip) => !clip.blob)) {
    notify("The clip of this message is no longer kept. Edit the message: attach the clip again, or send only the text.", { error: true });
    return;
  }
  const main = turn.replies.find(({ key }) => key === "main");
  if (main.text) offerUndo("The earlier reply and what followed it are replaced.", snapshot(""));
  state.turns = state.turns.slice(0, state.turns.indexOf(turn) + 1);
  await run(turn, main.state === "done");
}

function edit(turn) {
  if (state.running) return;
  if (state.editing) cancelEdit();
  state.editing = { id: turn.id, draft: box.value, attachments: state.attachments };
  state.attachments = turn.clips.filter((clip) => clip.blob);
  write(turn.text);
  drawAttachments();
  draw();
  box.focus();
}

function cancelEdit() {
  if (!state.editing) return;
  state.attachments = state.editing.attachments;
  const { draft } = state.editing;
  state.editing = null;
  write(draft);
  drawAttachments();
  draw();
  box.focus();
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied.");
    if (!state.undo) notify("Copied.");
  } catch {
    notify("The browser does not let this page copy. Select the text and copy it.", { error: true });
  }
}

/** Show another conversation; the one before can be brought back. */
function replace(turns, memory, text) {
  const draft = state.editing?.draft ?? box.value;
  const hadSomething = state.turns.length || draft || state.attachments.length;
  const before = { ...snapshot(draft), attachments: state.editing?.attachments ?? state.attachments };
  state.turns = turns;
  state.memory = memory;
  state.editing = null;
  if (hadSomething) offerUndo(text, before);
  else notify("");
  draw();
}

function startNew() {
  if (state.running) stop();
  replace([], null, "The conversation is cleared.");
  state.attachments = [];
  write("");
  drawAttachments();
  keep();
  box.focus();
}

async function startFrom(example) {
  const response = await fetch(example.clip).catch(() => null);
  if (!response?.ok) {
    notify("The clip of this example cannot be loaded. Try again when the server is back.", { error: true });
    return;
  }
  const blob = await response.blob();
  const turns = [];
  for (let place = 0; place < example.history.length; place += 2) {
    const reply = { key: "main", label: "from the example", text: example.history[place + 1].content, state: "done", first: null, seconds: null };
    turns.push({ id: `${Date.now()}-${place}`, text: example.history[place].content, clips: [], emotion: null, replies: [reply] });
  }
  const written = state.editing?.draft ?? box.value;
  const own = written.trim() && written !== example.text;
  replace(turns, null, own ? `The clip of the example is attached; your text stays. The example says: “${example.text}”` : "The example is filled in. Press Send.");
  state.attachments = [{ kind: "video", name: example.text, blob }];
  write(own ? written : example.text);
  drawAttachments();
  keep();
  box.focus();
}

// ------------------------------------------------------------------ clips

function attach(clip) {
  const { megabytes } = settings.limits;
  if (clip.blob.size > megabytes * 1e6) {
    notify(`${clip.name} has ${(clip.blob.size / 1e6).toFixed(1)} MB; the limit is ${megabytes} MB. Send a shorter or smaller clip.`, { error: true });
    return;
  }
  const replaced = state.attachments.find(({ kind }) => kind === clip.kind);
  state.attachments = [...state.attachments.filter((each) => each !== replaced), clip];
  if (replaced) {
    notify("The new clip replaces the one that was attached.", {
      undo: () => {
        state.attachments = [...state.attachments.filter((each) => each !== clip), replaced];
        notify("");
        drawAttachments();
        keep();
      },
    });
  }
  drawAttachments();
  keep();
}

function attachFile(file) {
  const kind = file.type.startsWith("video/") ? "video" : file.type.startsWith("audio/") ? "audio" : null;
  if (!kind) notify(`${file.name} is no sound and no video. Attach an audio or video file.`, { error: true });
  else attach({ kind, name: file.name, blob: file });
}

function showLevel(level) {
  const { recording } = state;
  if (!recording) return;
  const share = Math.min(1, Math.sqrt(level) * 1.6);
  $("level").firstElementChild.style.transform = `scaleX(${share.toFixed(2)})`;
  $("level").setAttribute("aria-valuenow", String(Math.round(100 * share)));
  const passed = Math.floor(recording.seconds);
  $("recording-time").textContent = `${Math.floor(passed / 60)}:${String(passed % 60).padStart(2, "0")}`;
}

function showLook(emotion) {
  $("live").classList.toggle("late", !emotion);
  if (!emotion) return; // the server was busy: the last one stays, pale
  $("live").replaceChildren(face(emotion.label), `${emotion.label} ${percent(emotion.probabilities[emotion.label])}`);
}

let isStarting = false;

async function startRecording(kind) {
  if (isStarting || state.recording) return;
  isStarting = true;
  hush();
  const isOver = utteranceEnd();
  try {
    state.recording = await Recording.start({
      kind,
      model: settings.model,
      seconds: settings.limits.seconds,
      onLevel: (level) => {
        showLevel(level);
        if (state.handsFree && state.recording && !state.running && isOver(level)) send();
      },
      onLook: settings.live_emotion ? showLook : null,
      onEnd: () => state.handsFree ? restart() : endRecording(),
    });
    $("live").replaceChildren();
    if (kind === "video") {
      $("preview").srcObject = state.recording.stream;
      $("preview").play().catch(() => {});
    }
    clearNotice();
    announce(kind === "video" ? "Recording your face and voice." : "Recording your voice.");
  } catch (error) {
    setHandsFree(false);
    notify(explain(error, kind), { error: true });
  } finally {
    isStarting = false;
    drawNow();
  }
}

/** End the recording and attach the clip. */
async function endRecording() {
  const { recording } = state;
  if (!recording) return;
  state.recording = null;
  $("preview").srcObject = null;
  const clip = await recording.stop();
  drawNow();
  if (clip.blob.size) attach(clip);
}

async function discardRecording() {
  const { recording } = state;
  if (!recording) return;
  state.recording = null;
  $("preview").srcObject = null;
  await recording.stop();
  drawNow();
}

function toggleRecording(kind) {
  if (state.recording?.kind === kind) endRecording();
  else startRecording(kind);
}

// ------------------------------------------------------------------ hands free

function setHandsFree(isOn) {
  state.handsFree = isOn;
  $("hands-free").checked = isOn;
}

async function restart() {
  await discardRecording();
  if (state.handsFree) startRecording("audio");
}

function listenAgain(isFine) {
  if (isFine) startRecording("audio");
  else setHandsFree(false);
}

// ------------------------------------------------------------------ files and options

function saveFile() {
  const link = make("a", { href: URL.createObjectURL(new Blob([toFile(state.turns, state.memory)], { type: "application/json" })), download: "conversation.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  $("menu").hidePopover();
}

async function loadFile(file) {
  try {
    if (file.size > LARGEST_FILE) throw new Error("This file is too large for a saved conversation.");
    const { turns, memory } = fromFile(await file.text());
    replace(turns, memory, `The conversation with ${turns.length} turns is loaded.`);
    if (!state.undo) notify(`The conversation with ${turns.length} turns is loaded.`);
    keep();
  } catch (error) {
    notify(error.message, { error: true });
  }
}

async function forgetAll() {
  stop();
  setHandsFree(false);
  await discardRecording();
  Object.assign(state, { turns: [], memory: null, attachments: [], undo: null, editing: null });
  write("");
  clearTimeout(saving);
  saving = null;
  await store.forget();
  Object.assign(options, { columns: [], speak: false });
  drawOptions();
  drawAttachments();
  drawNow();
  notify("This browser keeps nothing of this page any more.");
  $("menu").hidePopover();
  box.focus();
}

function drawOptions() {
  const boxes = settings.columns.filter(({ key }) => key !== "main").map(({ key, label }) => {
    const input = make("input", { type: "checkbox", id: `column-${key}`, change: () => {
      options.columns = settings.columns.map((column) => column.key).filter((name) => $(`column-${name}`)?.checked);
      store.choices.write(options);
    } });
    input.checked = options.columns.includes(key);
    return make("label", {}, input, ` ${label}`);
  });
  $("columns").replaceChildren($("columns").firstElementChild, ...boxes);
  $("speak").checked = options.speak;
  for (const id of ["speak", "hands-free"]) $(id).disabled = !canSpeak;
}

// ------------------------------------------------------------------ start

function drawCards() {
  const cards = settings.examples.map((example) => {
    const earlier = example.history.length ? make("p", { class: "earlier" }, `after ${example.history.length} messages`) : null;
    const clip = make("video", { src: example.clip, controls: true, preload: "metadata", playsinline: true, tabindex: "0", "aria-label": `Clip: ${example.text}` });
    return make("li", {}, clip, make("p", {}, `“${example.text}”`), earlier, make("button", { type: "button", click: () => startFrom(example), "aria-label": `Try it: ${example.text}` }, "Try it"));
  });
  $("cards").replaceChildren(...cards);
  const minutes = Math.max(1, Math.round(settings.keep_seconds / 60));
  const end = settings.keep_seconds ? `${minutes} minutes after the last message` : "after each reply";
  $("privacy").textContent = `The conversation is kept in this browser only. Clips are read and never stored on the server; what it has computed of a conversation is deleted ${end}.`;
  $("about").textContent = `The model is ${settings.model}. It answers with text; clips may have ${settings.limits.seconds} s and ${settings.limits.megabytes} MB.`;
}

function connect() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (state.running) stop();
    else send();
  });
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (state.running) announce("Wait for the reply, or stop it with Escape.");
    else send();
  });
  const grows = CSS.supports("field-sizing", "content");
  box.addEventListener("input", () => {
    store.draft.write(state.id, state.editing?.draft ?? box.value);
    if (grows) return;
    box.style.height = "auto";
    box.style.height = `${box.scrollHeight}px`;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented || $("menu").matches(":popover-open")) return;
    setHandsFree(false);
    hush();
    if (state.running) stop();
    else if (state.recording) endRecording();
    else cancelEdit();
  });
  $("mic").addEventListener("click", () => toggleRecording("audio"));
  $("camera").addEventListener("click", () => toggleRecording("video"));
  $("discard").addEventListener("click", () => {
    const button = $(state.recording?.kind === "video" ? "camera" : "mic");
    setHandsFree(false);
    discardRecording();
    button.focus();
  });
  $("attach").addEventListener("click", () => $("file").click());
  for (const [id, take] of [["file", attachFile], ["load-file", loadFile]]) {
    $(id).addEventListener("change", () => {
      if ($(id).files[0]) take($(id).files[0]);
      $(id).value = "";
    });
  }
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) attachFile(event.dataTransfer.files[0]);
  });
  $("new").addEventListener("click", startNew);
  $("cancel-edit").addEventListener("click", cancelEdit);
  $("dismiss").addEventListener("click", () => {
    if ($("undo").hidden) clearNotice();
    else notify("");
    box.focus();
  });
  $("save").addEventListener("click", saveFile);
  $("load").addEventListener("click", () => {
    $("menu").hidePopover();
    $("load-file").click();
  });
  $("forget").addEventListener("click", forgetAll);
  $("speak").addEventListener("change", () => {
    options.speak = $("speak").checked;
    if (!options.speak) hush();
    store.choices.write(options);
  });
  $("hands-free").addEventListener("change", () => {
    setHandsFree($("hands-free").checked);
    if (!state.handsFree) {
      hush();
      discardRecording();
    } else if (!state.running) {
      $("menu").hidePopover();
      startRecording("audio");
    }
  });
  // The keyboard of a phone shrinks the part that is seen, but not every browser shrinks the page with it.
  const fit = () => {
    document.documentElement.style.setProperty("--height", `${window.visualViewport.height}px`);
    if (state.turns.length && conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight < 500) conversation.scrollTop = conversation.scrollHeight;
  };
  window.visualViewport?.addEventListener("resize", fit);
}

async function restore() {
  const kept = await store.read(state.id);
  if (kept) {
    state.turns = kept.turns;
    for (const reply of state.turns.flatMap((turn) => turn.replies)) {
      if (reply.state === "waiting" || reply.state === "writing") reply.state = "stopped"; // the page was closed meanwhile
    }
    state.memory = kept.memory;
    state.attachments = kept.attachments.filter((clip) => clip.blob);
    state.undo = kept.undo;
    if (state.undo) notify(state.undo.text, { undo });
  }
  box.value = store.draft.read(state.id);
}

drawCards();
drawOptions();
connect();
await restore();
drawAttachments();
drawNow();
if (state.turns.length) conversation.scrollTop = conversation.scrollHeight;
document.body.dataset.ready = "";
