// Whose GPU time a turn takes: on ZeroGPU, the web site that frames the page knows the visitor and gives headers for it.

const SUPPORTED = "supports-zerogpu-headers"; // said by both sides
const WANTED = "zerogpu-headers";
const LONGEST = 3000; // milliseconds to wait for the headers

let origin = null;
let isSupported = false;

/** Ask the frame around the page, if it is of this origin, whether it gives headers. */
export function watchFrame(from) {
  if (!from || window.parent === window) return;
  origin = from;
  window.addEventListener("message", (event) => {
    if (event.origin === origin && event.data === SUPPORTED) isSupported = true;
  });
  window.parent.postMessage(SUPPORTED, origin);
}

/** The headers for a turn; none if nobody gives them. */
export function visitorHeaders() {
  if (!isSupported) return {};
  return new Promise((resolve) => {
    const channel = new MessageChannel();
    const finish = (headers) => {
      channel.port1.close();
      resolve(headers ?? {});
    };
    channel.port1.onmessage = ({ data }) => finish(data);
    setTimeout(finish, LONGEST);
    window.parent.postMessage(WANTED, origin, [channel.port2]);
  });
}
