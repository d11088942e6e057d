() => {
  const log = document.getElementById("conversation");
  if (log) {
    log.setAttribute("role", "log");
    log.setAttribute("aria-label", "Conversation");
    log.tabIndex = 0;
    let follows = true;
    log.addEventListener("scroll", () => { follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80; });
    new MutationObserver(() => { if (follows) log.scrollTop = log.scrollHeight; })
      .observe(log, { childList: true, subtree: true, characterData: true });
  }
  // What the visitor is writing survives a reload of the page, also after the server was restarted.
  const box = () => document.querySelector("#text textarea");
  window.addEventListener("pagehide", () => { if (box()) sessionStorage.setItem("draft", box().value); });
  const draft = sessionStorage.getItem("draft");
  if (draft && box() && !box().value) {
    box().value = draft;
    box().dispatchEvent(new Event("input", { bubbles: true }));
  }
  document.addEventListener("keydown", (event) => {
    const stop = document.getElementById("stop");
    if (event.key === "Escape" && stop && !stop.disabled) stop.click();
  });
}
