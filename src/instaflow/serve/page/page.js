// Draws after every keystroke: one request at a time is on its way, and only the latest text is asked for next.
const TEXTS = {
  uk: { prompt: "Що намалювати (англійською)", seed: "Зерно", roll: "Кинути", ms: "мс від запиту до картинки", save: "Зберегти" },
  en: { prompt: "Say what to draw", seed: "Seed", roll: "Roll", ms: "ms from request to picture", save: "Save" },
};
const language = navigator.language.startsWith("uk") ? "uk" : "en";
const text = TEXTS[language];
const [prompt, seed, roll, row, note] = ["prompt", "seed", "roll", "row", "note"].map((id) => document.getElementById(id));
document.documentElement.lang = language;
for (const e of document.querySelectorAll("[data-text]")) e.textContent = text[e.dataset.text];

let busy = false, again = false;

async function draw() {
  if (busy) { again = true; return; }
  busy = true;
  do {
    again = false;
    if (prompt.value.trim()) await once(prompt.value, Number(seed.value) || 0);
  } while (again);
  busy = false;
}

async function once(words, first) {
  const begun = performance.now();
  try {
    const answer = await fetch("v1/images/generations", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ prompt: words, seed: first, n: 4 }),
    });
    const found = await answer.json();
    if (again) return; // stale: a later text waits
    if (!answer.ok) { note.textContent = found.error.message; return; }
    row.replaceChildren(...found.data.map((d) => picture(d, words)));
    note.textContent = `${Math.round(performance.now() - begun)} ${text.ms}`;
  } catch (error) {
    note.textContent = String(error);
  }
}

function picture(drawn, words) {
  const link = document.createElement("a"), image = document.createElement("img");
  link.href = image.src = `data:image/png;base64,${drawn.b64_json}`;
  link.download = `${words.replace(/[^\p{L}\p{N}]+/gu, "-")}-${drawn.seed}.png`;
  link.title = text.save;
  image.alt = `${words}, ${drawn.seed}`;
  link.append(image);
  return link;
}

prompt.addEventListener("input", draw);
seed.addEventListener("input", draw);
roll.addEventListener("click", () => { seed.value = Math.floor(Math.random() * 2 ** 30); draw(); });
draw();
