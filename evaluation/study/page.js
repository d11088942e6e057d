"use strict";
// Texts of conversations, of models and of the study are only ever set as text, never as HTML.
(() => {
  const study = JSON.parse(document.getElementById("study").textContent);
  const served = study.saved !== null;
  const byId = (name) => document.getElementById(name);
  const RETRY = 3000; // milliseconds

  // ------------------------------------------------------------------------------------------------- what is kept

  // An answer lies in the browser's own store until the server has it (without a server: for good), one entry each, so
  // that two open pages do not write over each other.
  const prefix = `empathic-study ${study.rater} `;
  const answers = {}; // item: {question: score}
  const waiting = []; // {key, line} that the server does not have; without a server: all
  let counter = 0;

  function keep(key, value) {
    try {
      localStorage.setItem(prefix + key, JSON.stringify(value));
    } catch {
      // A browser that stores nothing: answers still go to the server, or into the file.
      if (!served) alarm("This browser keeps nothing: do not close the page before you have downloaded your answers.");
    }
  }

  function forget(key) {
    try {
      localStorage.removeItem(prefix + key);
    } catch {
      // It was not kept either.
    }
  }

  function kept() {
    const found = [];
    try {
      for (let i = 0; i < localStorage.length; i++) {
        const key = localStorage.key(i);
        if (key.startsWith(prefix)) found.push([key.slice(prefix.length), JSON.parse(localStorage.getItem(key))]);
      }
    } catch {
      // Nothing is kept.
    }
    return found;
  }

  function note(line) {
    answers[line.item] = { ...answers[line.item], [line.question]: line.score };
  }

  const seconds = {}; // item: how long it was looked at
  for (const [item, scores] of Object.entries(study.saved || {})) answers[item] = { ...scores };
  for (const [key, value] of kept()) {
    if (key.startsWith("line ")) waiting.push({ key, line: value });
    else if (key.startsWith("seconds ")) seconds[key.slice("seconds ".length)] = value;
  }
  waiting.sort((a, b) => (a.key < b.key ? -1 : 1));
  for (const { line } of waiting) note(line);

  // ------------------------------------------------------------------------------------------------------- saving

  let sending = false;

  function alarm(text) {
    byId("saving").textContent = text;
    byId("saving").className = "alarm";
  }

  function showSaving() {
    byId("saving").className = "";
    const done = study.items.some((item) => answers[item.code]);
    byId("saving").textContent = served ? (waiting.length ? "Saving …" : done ? "All answers saved" : "") : "";
    showEnd();
  }

  async function send() {
    if (!served || sending) return;
    sending = true;
    while (waiting.length) {
      const { key, line } = waiting[0];
      let problem = null;
      try {
        const response = await fetch(`${study.rater}/answers`, {
          method: "POST",
          headers: { "Content-Type": "application/json" },
          body: JSON.stringify(line),
          keepalive: true,
        });
        if (!response.ok) problem = `Not saved: ${await response.text()}`;
      } catch {
        problem = "Not saved yet: no connection. Trying again …";
      }
      if (problem !== null) {
        alarm(problem);
        await new Promise((resolve) => setTimeout(resolve, RETRY));
        continue;
      }
      waiting.shift();
      forget(key);
      showSaving();
    }
    sending = false;
    showSaving();
  }

  function save(item, question, score) {
    keepSeconds();
    const now = new Date();
    const line = {
      rater: study.rater,
      item: item.code,
      question,
      score,
      time: now.toISOString(),
      seconds: Math.round(seconds[item.code] * 100) / 100,
      played: Math.round(playedSeconds() * 100) / 100,
    };
    const key = `line ${now.toISOString()} ${String(counter++).padStart(6, "0")}`;
    note(line);
    waiting.push({ key, line });
    keep(key, line);
    showSaving();
    send();
  }

  // ------------------------------------------------------------------------------------------------------- timing

  let since = null; // when the item came into sight

  function keepSeconds() {
    if (shownItem === null) return;
    if (since !== null) seconds[shownItem.code] = (seconds[shownItem.code] || 0) + (performance.now() - since) / 1000;
    since = document.hidden ? null : performance.now();
    keep(`seconds ${shownItem.code}`, seconds[shownItem.code] || 0);
  }

  document.addEventListener("visibilitychange", () => {
    keepSeconds();
    if (!document.hidden) since = performance.now();
  });
  window.addEventListener("pagehide", keepSeconds);

  function playedSeconds() {
    let total = 0;
    for (const clip of byId("messages").querySelectorAll("video, audio")) {
      for (let i = 0; i < clip.played.length; i++) total += clip.played.end(i) - clip.played.start(i);
    }
    return total;
  }

  // ------------------------------------------------------------------------------------------------------- showing

  let index = -1;
  let shownItem = null;
  let shownConversation = null;
  let active = 0; // the question that the keys 1, 2, 3 answer

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function section(name) {
    for (const each of ["start", "rating", "end"]) byId(each).hidden = each !== name;
    byId("title").hidden = name !== "rating"; // the other sections have a heading of their own
  }

  function complete(item) {
    return study.questions.every((question) => answers[item.code] && answers[item.code][question.name]);
  }

  function showProgress() {
    const done = study.items.filter(complete).length;
    byId("done").style.width = `${(100 * done) / study.items.length}%`;
    byId("bar").setAttribute("aria-valuemax", study.items.length);
    byId("bar").setAttribute("aria-valuenow", done);
    byId("progress").textContent = `${done} of ${study.items.length} replies judged`;
  }

  function showConversation(code) {
    if (code === shownConversation) return; // the replies to one conversation come in a row: its clip plays on
    shownConversation = code;
    const messages = study.conversations[code];
    byId("messages").replaceChildren(
      ...messages.map((message, place) => {
        const line = element("li", [message.mine ? "mine" : "", place === messages.length - 1 ? "last" : ""].join(" "));
        line.append(element("span", "name", message.name));
        if (message.clip) {
          const clip = element(message.clip.kind === "video" ? "video" : "audio");
          clip.controls = true;
          clip.preload = "metadata";
          clip.playsInline = true;
          clip.addEventListener("error", () => clip.after(element("p", "warning", "This clip cannot be played.")));
          clip.src = study.media + message.clip.file;
          line.append(clip);
        }
        const text = element("span", "text", message.text);
        text.dir = "auto";
        line.append(text);
        return line;
      })
    );
  }

  function showQuestions(item) {
    byId("questions").replaceChildren(
      ...study.questions.map((question, place) => {
        const field = element("fieldset");
        field.append(element("legend", "", question.text));
        const choices = element("div", "choices");
        for (const step of study.scale) {
          const label = element("label");
          const input = element("input");
          input.type = "radio";
          input.name = question.name;
          input.value = step.score;
          input.checked = (answers[item.code] || {})[question.name] === step.score;
          input.addEventListener("change", () => choose(place, step.score));
          label.append(input, element("span", "", step.label), element("kbd", "", step.score));
          choices.append(label);
        }
        field.append(choices);
        field.addEventListener("focusin", () => activate(place));
        return field;
      })
    );
  }

  function activate(place) {
    active = place;
    [...byId("questions").children].forEach((field, at) => field.classList.toggle("active", at === place));
  }

  function choose(place, score) {
    const question = study.questions[place];
    const input = byId("questions").children[place].querySelector(`input[value="${score}"]`);
    input.checked = true;
    if ((answers[shownItem.code] || {})[question.name] !== score) save(shownItem, question.name, score);
    showProgress();
    byId("next").disabled = !complete(shownItem);
  }

  function show(place) {
    keepSeconds();
    index = place;
    if (place >= study.items.length) {
      shownItem = since = null;
      for (const clip of byId("messages").querySelectorAll("video, audio")) clip.pause();
      section("end");
      window.scrollTo(0, 0);
      showEnd();
      byId("thanks").focus();
      return;
    }
    const item = study.items[place];
    shownItem = item;
    since = document.hidden ? null : performance.now();
    const together = study.items.filter((other) => other.conversation === item.conversation);
    byId("heading").textContent =
      together.length > 1 ? `Reply ${together.indexOf(item) + 1} of ${together.length}` : "The reply";
    const empty = item.reply.trim() === "";
    byId("reply").textContent = empty ? "(says nothing)" : item.reply;
    byId("reply").className = empty ? "empty" : "";
    const same = item.conversation === shownConversation;
    showConversation(item.conversation);
    showQuestions(item);
    const open = study.questions.findIndex((question) => !(answers[item.code] || {})[question.name]);
    activate(Math.max(open, 0));
    byId("back").disabled = place === 0;
    byId("next").disabled = !complete(item);
    showProgress();
    section("rating");
    byId("heading").focus({ preventScroll: true });
    // A phone shows the reply below the conversation, which has been read when the next reply to it comes.
    if (same) byId("heading").scrollIntoView({ block: "nearest" });
    else window.scrollTo(0, 0);
  }

  function showEnd() {
    const count = study.items.filter((item) => !complete(item)).length;
    byId("thanks").textContent = count ? "Some replies are not judged yet." : study.thanks;
    byId("all-saved").textContent = !served
      ? "Your answers are in this browser only. Download them as a file, and send it to whoever gave you this page."
      : waiting.length
        ? "The last answers are being saved. Please keep this page open."
        : "All your answers are saved. You can close this page.";
    byId("download").hidden = served;
  }

  // ------------------------------------------------------------------------------------------------ mouse and keys

  function next() {
    if (shownItem !== null && complete(shownItem)) show(index + 1);
  }

  function back() {
    if (index > 0) show(index - 1);
  }

  byId("next").addEventListener("click", next);
  byId("back").addEventListener("click", back);
  byId("again").addEventListener("click", () => show(study.items.length - 1));
  byId("begin").addEventListener("click", () => show(0));
  byId("download").addEventListener("click", () => {
    const lines = waiting.map(({ line }) => JSON.stringify(line) + "\n");
    const link = element("a");
    link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
    link.download = `${study.rater}.jsonl`;
    link.click();
    URL.revokeObjectURL(link.href);
  });

  document.addEventListener("keydown", (event) => {
    if (shownItem === null || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const steps = study.scale.map((step) => String(step.score));
    const key = event.key.toLowerCase();
    if (steps.includes(key)) {
      const place = active;
      choose(place, Number(key));
      if (place + 1 < study.questions.length) {
        // Away from the radio buttons, whose focus would make the question before active again.
        byId("heading").focus({ preventScroll: true });
        activate(place + 1);
      }
    } else if (key === "arrowdown" || key === "arrowup") {
      if (event.target.closest("video, audio")) return; // its volume
      activate(Math.min(Math.max(active + (key === "arrowdown" ? 1 : -1), 0), study.questions.length - 1));
    } else if (key === "enter") {
      if (event.target.closest("button, video, audio")) return; // does what it does
      next();
    } else if (key === "b") {
      back();
    } else if (key === "p") {
      const clips = byId("messages").querySelectorAll("video, audio");
      const clip = clips[clips.length - 1];
      if (clip) {
        clip.scrollIntoView({ block: "nearest" });
        clip.paused ? clip.play().catch(() => {}) : clip.pause();
      }
    } else {
      return;
    }
    event.preventDefault();
  });

  // -------------------------------------------------------------------------------------------------------- begin

  for (const heading of [document.querySelector("#start h1"), byId("title")]) heading.textContent = study.title;
  byId("introduction").replaceChildren(...study.introduction.map((text) => element("p", "", text)));
  showProgress();
  showSaving();
  send();
  const open = study.items.findIndex((item) => !complete(item));
  if (Object.keys(answers).length === 0) section("start");
  else show(open === -1 ? study.items.length : open);
})();
