// How turns look. A view is updated in place, so that focus, playing clips and open details stay.

import { face, icon, iconButton, make, percent } from "./dom.js";
import { markdown } from "./markdown.js";

const KINDS = { audio: "voice", video: "face" };
const STAGES = { sending: "Sending …", listening: "Listening …", watching: "Watching …", answering: "Answering …" };

/** What a reply waits for, in words. */
export function stageText({ stage, ahead }) {
  if (stage !== "waiting") return STAGES[stage] ?? STAGES.sending;
  return ahead === 1 ? "Waiting: one turn is before yours …" : `Waiting: ${ahead} turns are before yours …`;
}

function bars(title, { label, probabilities }) {
  const rows = Object.entries(probabilities).map(([name, share]) => {
    const bar = make("span");
    bar.style.width = percent(share).replace(" ", "");
    return make(
      "li",
      { class: name === label ? "best" : null },
      make("span", {}, name),
      make("span", { class: "track", "aria-hidden": "true" }, bar),
      make("span", { class: "value" }, percent(share)),
    );
  });
  return make("div", {}, make("p", { class: "title" }, title), make("ul", {}, ...rows));
}

/** A playable clip; `url` is null for a clip that is not kept. */
export function player(clip, url) {
  const name = clip.kind === "video" ? "Clip of your face and voice" : "Clip of your voice";
  if (!url) return make("p", { class: "mark" }, `${name} (no longer kept)`);
  const options = { src: url, controls: true, preload: "metadata", playsinline: true, "aria-label": name, tabindex: "0" };
  return make(clip.kind, options);
}

class ReplyView {
  constructor(reply, actions) {
    this.bubble = make("div", { class: "bubble" });
    this.cost = make("span", { class: "cost" });
    this.column = make("p", { class: "column" });
    this.buttons = [
      iconButton("speak", "Speak this reply", () => actions.speak(reply.key)),
      iconButton("copy", "Copy this reply", () => actions.copyReply(reply.key)),
      iconButton("retry", "Answer again", actions.retry),
    ];
    const foot = make("div", { class: "foot" }, this.cost, make("div", { class: "actions" }, ...this.buttons));
    const avatar = make("span", { class: "avatar model", "aria-hidden": "true" }, "e");
    this.element = make("div", { class: "reply message" }, this.column, avatar, this.bubble, foot);
    this.shown = null;
  }

  update(reply, { several, busy, canSpeak }) {
    this.column.hidden = !several;
    this.column.textContent = reply.label;
    const state = JSON.stringify([reply.text, reply.state, reply.stage, reply.ahead, reply.problem]);
    if (state !== this.shown) {
      this.shown = state;
      const content = markdown(reply.text);
      const isOpen = reply.state === "waiting" || reply.state === "writing";
      if (isOpen && !reply.text) content.push(make("p", { class: "stage" }, stageText(reply)));
      if (reply.state === "done" && !reply.text && !reply.problem) content.push(make("p", { class: "mark" }, "(no words)"));
      if (reply.state === "stopped") {
        content.push(make("p", { class: "mark" }, reply.text ? "Stopped here." : "Stopped before the first word."));
      }
      if (reply.problem) content.push(make("p", { class: reply.state === "failed" ? "problem" : "mark" }, reply.problem));
      this.bubble.replaceChildren(...content);
    }
    const costs = [];
    if (reply.first !== null && reply.first !== undefined) costs.push(`first word after ${reply.first.toFixed(2)} s`);
    if (reply.seconds !== null && reply.seconds !== undefined) costs.push(`${reply.seconds.toFixed(2)} s`);
    this.cost.textContent = costs.join(" · ");
    const [speak, copy, retry] = this.buttons;
    speak.hidden = !canSpeak || !reply.text;
    copy.hidden = !reply.text;
    retry.hidden = reply.key !== "main";
    retry.setAttribute("aria-disabled", String(busy)); // a disabled button would lose the focus
  }
}

/** The view of a turn: what the visitor said, the emotion below it, and the replies. */
export class TurnView {
  constructor(turn, actions, urlOf) {
    this.actions = actions;
    this.urlOf = urlOf;
    this.bubble = make("div", { class: "bubble" });
    this.avatar = make("span", { class: "avatar", "aria-hidden": "true" }, face("neutral"));
    this.feeling = make("button", { type: "button", class: "feeling", "aria-expanded": "false", hidden: true, click: () => this.toggle() });
    this.bars = make("div", { class: "bars", id: `bars-${turn.id}`, hidden: true });
    this.feeling.setAttribute("aria-controls", this.bars.id);
    this.copy = iconButton("copy", "Copy your message", actions.copy);
    this.edit = iconButton("edit", "Edit your message", actions.edit);
    const buttons = make("div", { class: "actions" }, this.copy, this.edit);
    this.replies = make("div", { class: "replies" });
    this.views = new Map();
    const said = make("div", { class: "said message" }, this.avatar, this.bubble, buttons, this.feeling, this.bars);
    this.element = make("li", { class: "turn" }, said, this.replies);
  }

  toggle() {
    this.bars.hidden = !this.bars.hidden;
    this.feeling.setAttribute("aria-expanded", String(!this.bars.hidden));
  }

  update(turn, settings) {
    const said = JSON.stringify([turn.text, turn.clips.map((clip) => [clip.kind, Boolean(clip.blob)])]);
    if (said !== this.said) {
      this.said = said;
      this.bubble.replaceChildren(...turn.clips.map((clip) => player(clip, this.urlOf(clip.blob))), ...markdown(turn.text));
    }
    this.copy.hidden = !turn.text;
    this.edit.setAttribute("aria-disabled", String(settings.busy));
    this.feel(turn.clips.length ? turn.emotion : null);
    const several = turn.replies.length > 1;
    this.replies.className = several ? "replies several" : "replies";
    for (const [name, value] of [["role", "group"], ["tabindex", "0"], ["aria-label", "Replies, side by side"]]) {
      if (several) this.replies.setAttribute(name, value);
      else this.replies.removeAttribute(name);
    }
    const keys = turn.replies.map((reply) => reply.key);
    for (const [key, view] of this.views) {
      if (!keys.includes(key)) {
        view.element.remove();
        this.views.delete(key);
      }
    }
    for (const reply of turn.replies) {
      if (!this.views.has(reply.key)) {
        this.views.set(reply.key, new ReplyView(reply, this.actions));
        this.replies.append(this.views.get(reply.key).element);
      }
      this.views.get(reply.key).update(reply, { ...settings, several });
    }
  }

  feel(emotion) {
    const state = JSON.stringify(emotion);
    if (state === this.felt) return;
    this.felt = state;
    this.feeling.hidden = !emotion;
    if (!emotion) {
      this.bars.hidden = true;
      this.feeling.setAttribute("aria-expanded", "false");
      this.avatar.replaceChildren(face("neutral"));
      return;
    }
    const { label, probabilities, alone } = emotion;
    this.avatar.replaceChildren(face(label));
    const text = make("span", {}, make("b", {}, label), ` ${percent(probabilities[label])}`);
    this.feeling.replaceChildren(face(label), text, icon("more", "chevron"));
    this.feeling.title = "What the voice and the face said";
    const parts = Object.entries(alone ?? {}).map(([kind, found]) => bars(`${KINDS[kind]} alone`, found));
    const whole = parts.length ? "voice and face together" : "recognized";
    this.bars.replaceChildren(bars(whole, emotion), ...parts);
  }
}
