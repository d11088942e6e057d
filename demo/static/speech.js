// Spoken replies, by the browser's own speech synthesis.

// Rate and pitch of a voice with an emotion.
const VOICES = {
  angry: [1.08, 0.9], disgust: [0.95, 0.88], fearful: [1.08, 1.15], happy: [1.1, 1.2], neutral: [1, 1], sad: [0.86, 0.88],
  surprise: [1.15, 1.3],
};
// The emotion of a voice that answers someone's emotion, for models that cannot name the emotion of their reply.
const ANSWERS = { angry: "neutral", disgust: "neutral", fearful: "neutral", happy: "happy", neutral: "neutral", sad: "sad", surprise: "surprise" };

export const canSpeak = "speechSynthesis" in window;

export const answerTo = (emotion) => ANSWERS[emotion] ?? "neutral";

/** Speak a text; resolve when it is spoken or stopped. */
export function speak(text, emotion) {
  if (!canSpeak || !text.trim()) return Promise.resolve();
  speechSynthesis.cancel();
  const utterance = new SpeechSynthesisUtterance(text);
  [utterance.rate, utterance.pitch] = VOICES[emotion] ?? VOICES.neutral;
  utterance.lang = document.documentElement.lang;
  return new Promise((resolve) => {
    utterance.onend = utterance.onerror = resolve;
    speechSynthesis.speak(utterance);
  });
}

export function hush() {
  if (canSpeak) speechSynthesis.cancel();
}
