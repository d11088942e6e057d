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
  document.addEventListener("keydown", (event) => {
    const stop = document.getElementById("stop");
    if (event.key === "Escape" && stop && !stop.disabled) stop.click();
  });
}
