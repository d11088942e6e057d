// Recording with the microphone and the camera, the loudness, and the emotion while recording.

import { feel } from "./api.js";

const WINDOW = 2000; // milliseconds of a look
const BETWEEN_LOOKS = 1000;
const MOST_FAILED = 5; // looks in a row, after which no more are sent
const SHORTEST = 1000; // bytes: a busy browser may end a look before its first picture
const TYPES = {
  audio: ["audio/webm;codecs=opus", "audio/mp4", "audio/ogg"],
  video: ["video/webm;codecs=vp8,opus", "video/webm", "video/mp4"],
};

const typeOf = (kind) => TYPES[kind].find((type) => MediaRecorder.isTypeSupported(type));

/** What to do about an error of getUserMedia. */
export function explain(error, kind) {
  const device = kind === "video" ? "camera" : "microphone";
  const names = kind === "video" ? "the camera and the microphone" : "the microphone";
  if (!window.isSecureContext || !navigator.mediaDevices) {
    return `Browsers give ${names} only to pages at localhost or over https. Open the page that way, or attach a file.`;
  }
  if (error.name === "NotAllowedError") {
    return `The browser does not let this page use ${names}. Open the site settings (the icon left of the address), allow ${names}, and press the button again.`;
  }
  if (error.name === "NotFoundError") return `No ${device} was found. Connect one, or attach a file.`;
  if (error.name === "NotReadableError") return `The ${device} is in use by another program. Close that program, and press the button again.`;
  return `The ${device} did not start (${error.name}). Try again, or attach a file.`;
}

/** Record a stream; resolve with the clip when `stop` is called on the returned object. */
function record(stream, kind, bits = {}) {
  const pieces = [];
  const recorder = new MediaRecorder(stream, { mimeType: typeOf(kind), ...bits });
  recorder.ondataavailable = (event) => event.data.size && pieces.push(event.data);
  const ended = new Promise((resolve) => {
    recorder.onstop = () => resolve(new Blob(pieces, { type: recorder.mimeType.split(";")[0] }));
  });
  recorder.start();
  return {
    stop: () => {
      if (recorder.state !== "inactive") recorder.stop();
      return ended;
    },
  };
}

/** A recording in progress. */
export class Recording {
  /**
   * Start recording. `kind` is "audio" or "video"; `onLevel` gets the loudness (0 to 1) many times a second; `onLook`
   * gets the emotion of the last seconds, or null when the server had no time, and is null if nobody looks; `onEnd` is
   * called when the time is over or the device is gone. Throws the error of getUserMedia.
   */
  static async start({ kind, model, seconds, onLevel, onLook, onEnd }) {
    const picture = { width: { ideal: 640 }, height: { ideal: 480 }, frameRate: { ideal: 15, max: 30 } };
    const stream = await navigator.mediaDevices.getUserMedia({ audio: true, video: kind === "video" && picture });
    return new Recording(stream, kind, model, seconds, onLevel, onLook, onEnd);
  }

  constructor(stream, kind, model, seconds, onLevel, onLook, onEnd) {
    Object.assign(this, { stream, kind, model, onLevel, onLook });
    this.started = performance.now();
    this.recorder = record(stream, kind);
    this.over = setTimeout(onEnd, seconds * 1000);
    for (const track of stream.getTracks()) track.addEventListener("ended", onEnd);
    this.context = new AudioContext();
    this.context.resume();
    const analyser = this.context.createAnalyser();
    this.context.createMediaStreamSource(stream).connect(analyser);
    const samples = new Float32Array(analyser.fftSize);
    this.timer = setInterval(() => {
      analyser.getFloatTimeDomainData(samples);
      onLevel(Math.sqrt(samples.reduce((sum, value) => sum + value * value, 0) / samples.length));
    }, 60);
    this.looks = new AbortController();
    this.failed = 0;
    this.asking = false;
    this.small = onLook && this.smaller();
    this.next = onLook && setTimeout(() => this.look(), 0);
  }

  /** A small copy of the stream, so that looks cost little. */
  smaller() {
    const copy = this.stream.clone();
    const size = { width: 320, height: 240, frameRate: 8 };
    for (const track of copy.getVideoTracks()) track.applyConstraints(size).catch(() => {});
    return copy;
  }

  /** Look at the next seconds, and begin another look meanwhile. A look is dropped while the one before is open. */
  async look() {
    this.next = setTimeout(() => this.look(), BETWEEN_LOOKS);
    const recorder = record(this.small, this.kind, { audioBitsPerSecond: 32000, videoBitsPerSecond: 200000 });
    await new Promise((resolve) => setTimeout(resolve, WINDOW));
    const blob = await recorder.stop();
    if (this.asking || this.looks.signal.aborted || this.failed >= MOST_FAILED || blob.size < SHORTEST) return;
    this.asking = true;
    try {
      const clips = [{ kind: this.kind, blob }];
      const found = await feel({ model: this.model, clips, ifIdle: true, signal: this.looks.signal });
      this.failed = 0;
      if (!this.looks.signal.aborted) this.onLook(found);
    } catch {
      this.failed += 1; // a look is never worth a message: the turn itself is sent as a whole
    } finally {
      this.asking = false;
    }
  }

  get seconds() {
    return (performance.now() - this.started) / 1000;
  }

  /** End the recording; resolve with the clip. */
  async stop() {
    this.looks.abort();
    for (const timer of [this.over, this.timer, this.next]) clearTimeout(timer);
    const blob = await this.recorder.stop();
    for (const stream of [this.stream, this.small]) for (const track of stream?.getTracks() ?? []) track.stop();
    this.context.close();
    return { kind: this.kind, blob, name: this.kind === "video" ? "recording of your face and voice" : "recording of your voice" };
  }
}

/** Notices the end of an utterance in a stream of loudness values: call it with each, it returns true at the end. */
export function utteranceEnd(silence = 1300, shortest = 250) {
  let floor = 0.01;
  let voiced = 0;
  let last = performance.now();
  let quietSince = null;
  return (level) => {
    const now = performance.now();
    const passed = now - last;
    last = now;
    floor = Math.min(Math.max(level, 0.002), floor * 1.002);
    if (level > Math.max(0.015, 3 * floor)) {
      voiced += passed;
      quietSince = null;
      return false;
    }
    quietSince ??= now;
    return voiced >= shortest && now - quietSince >= silence;
  };
}
