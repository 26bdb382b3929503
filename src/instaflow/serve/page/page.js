// Draws after every keystroke. The oldest request is being drawn and lands, so that a moving slider moves the pictures;
// those behind it are stale and aborted, and no answer replaces that of a later one.
const TEXTS = {
  en: {
    other: "Українською", prompt: "Say what to draw", hint: "In English: the model learned English words.", pictures: "Pictures: click one to save it",
    walk: "Walk from one seed to another", prompt2: "… or from these words to others", sketch: "Sketch outlines, and the picture follows", strength: "Strength", wipe: "Wipe", seed: "Seed", seed2: "Second seed", roll: "Roll the seed", rolls: "with every letter",
    style: "Style", any: "the model's own", steps: "Steps", guidance: "Guidance", key: "This service asks for an API key",
    history: "Drawn before", save: "Save", seconds: "s", ms: "ms", empty: "Say what to draw, for example: a red apple.",
    cyrillic: "This model reads English. Try: a red apple.", busy: "Many are drawing; trying again…", away: "The service does not answer; trying again…",
    said: (words, ms) => `Four pictures of ${words}, in ${ms} ms`, alt: (words, seed) => `${words}, seed ${seed}`,
  },
  uk: {
    other: "English", prompt: "Що намалювати", hint: "Пишіть, будь ласка, англійською: модель вчилася англійських слів.", pictures: "Малюнки: натисніть, щоб зберегти",
    walk: "Прогулянка від одного зерна до іншого", prompt2: "… або від цих слів до інших", sketch: "Накидайте обриси, і малюнок піде за ними", strength: "Сила", wipe: "Стерти", seed: "Зерно", seed2: "Друге зерно", roll: "Кинути зерно", rolls: "з кожною літерою",
    style: "Стиль", any: "на розсуд моделі", steps: "Кроки", guidance: "Сила підказки", key: "Ця служба просить ключ API",
    history: "Намальоване раніше", save: "Зберегти", seconds: "с", ms: "мс", empty: "Напишіть, що намалювати, наприклад: a red apple.",
    cyrillic: "Модель читає англійською. Спробуйте так: a red apple.", busy: "Багато хто малює; пробую ще раз…", away: "Служба не відповідає; пробую ще раз…",
    said: (words, ms) => `Чотири малюнки: ${words}, за ${ms} мс`, alt: (words, seed) => `${words}, зерно ${seed}`,
  },
};
const COUNT = 4, KEPT = 24, SETTLED_MS = 900, AGAIN_MS = 1000;
const $ = (id) => document.getElementById(id);
const make = (tag, more) => Object.assign(document.createElement(tag), more);
const number = (id) => Math.max(0, Math.trunc(Number($(id).value)) || 0);

const pad = $("pad"), ink = pad.getContext("2d");

let control = "", sketched = false, pen; // the name of the control that reads sketches, whether there is one, where the pen was
let text, asked = 0, shown = 0, known = false, settling, retrying;
const flying = [];

async function api(path, options = {}) {
  const key = $("key").value.trim();
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const answer = await fetch(`v1/${path}`, { ...options, headers });
  if (answer.status === 401 && $("key").parentElement.hidden) {
    $("key").parentElement.hidden = false;
    $("key").focus();
  }
  return answer;
}

function request() {
  const body = { prompt: $("prompt").value, n: COUNT, seed: number("seed") };
  const mix = Number($("mix").value), words = $("prompt2").value.trim();
  if (mix) Object.assign(body, words ? { prompt2: words, mix } : { seed2: number("seed2"), mix });
  if ($("style").value) body.style = $("style").value;
  if ($("steps").value) body.steps = number("steps");
  if ($("guidance").value) body.guidance = Number($("guidance").value);
  const loras = [...$("loras").querySelectorAll("input")].filter((e) => Number(e.value));
  if (loras.length) body.lora = Object.fromEntries(loras.map((e) => [e.name, Number(e.value)]));
  const scale = Number($("strength").value);
  if (sketched && scale) body.control = { [control]: { image: pad.toDataURL("image/png").split(",")[1], scale } };
  return body;
}

const said = (body) => (body.prompt2 ? `${body.prompt} → ${body.prompt2}` : body.prompt);

async function draw() {
  clearTimeout(retrying);
  const mine = ++asked, body = request();
  if (!body.prompt.trim()) return tell(text.empty);
  while (flying.length > 1) flying.pop().abort();
  const abort = new AbortController(), begun = performance.now();
  flying.push(abort);
  $("row").setAttribute("aria-busy", "true");
  try {
    if (!known) await describe();
    const answer = await api("images/generations", { method: "POST", body: JSON.stringify(body), signal: abort.signal });
    const found = await answer.json();
    if (mine < shown) return;
    if (answer.ok) {
      shown = mine;
      return show(body, found.data, Math.round(performance.now() - begun));
    }
    if (mine < asked) return; // a later one is on its way and may be right
    if (answer.status === 429) again(text.busy);
    else tell(kindly(body.prompt) || found.error.message);
  } catch (error) {
    if (error.name !== "AbortError" && mine === asked) again(text.away);
  } finally {
    if (flying.includes(abort)) flying.splice(flying.indexOf(abort), 1); // not where a later one has put it out
    if (!flying.length) $("row").removeAttribute("aria-busy");
  }
}

const kindly = (words) => (/\p{Script=Cyrillic}/u.test(words) ? text.cyrillic : "");

function tell(words) { $("note").textContent = words; }

function again(words) {
  tell(words);
  retrying = setTimeout(draw, AGAIN_MS);
}

function show(body, data, ms) {
  tell(kindly(body.prompt));
  $("time").textContent = ms < 10000 ? `${ms} ${text.ms}` : `${Math.round(ms / 1000)} ${text.seconds}`;
  data.forEach((drawn, i) => {
    const link = $("row").children[i], words = text.alt(said(body), drawn.seed);
    link.href = link.firstChild.src = `data:image/png;base64,${drawn.b64_json}`;
    link.download = `${body.prompt.trim().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}-${drawn.seed}.png`;
    link.firstChild.alt = words;
    link.setAttribute("aria-label", `${text.save}: ${words}`);
  });
  clearTimeout(settling);
  settling = setTimeout(keep, SETTLED_MS, body, $("row").querySelector("img").src, ms);
}

// Once the hand rests: into the history, and said to who listens instead of looks.
function keep(body, src, ms) {
  $("said").textContent = text.said(said(body), ms);
  if ($("history").firstChild?.firstChild.src === src) return;
  const words = text.alt(said(body), body.seed), button = make("button", { type: "button", title: words });
  button.append(make("img", { src, alt: words }));
  button.addEventListener("click", async () => { await recall(body); draw(); });
  $("history").prepend(button);
  if ($("history").children.length > KEPT) $("history").lastChild.remove();
}

async function recall(body) {
  for (const id of ["prompt", "seed", "seed2", "prompt2", "style", "steps", "guidance"]) if (id in body) $(id).value = body[id];
  $("mix").value = body.mix ?? 0;
  if (!body.style) $("style").value = "";
  if (!body.prompt2) $("prompt2").value = "";
  wipe();
  if (body.control) {
    const { image, scale } = Object.values(body.control)[0], old = make("img", { src: `data:image/png;base64,${image}` });
    await old.decode();
    ink.drawImage(old, 0, 0);
    sketched = true;
    $("strength").value = scale;
  }
  for (const e of $("loras").querySelectorAll("input")) {
    e.value = body.lora?.[e.name] ?? 0;
    e.nextElementSibling.value = e.value;
  }
}

// What the one model of this service can be asked for: a control that it has no use for stays hidden.
async function describe() {
  const answer = await api("models");
  if (!answer.ok) return;
  const { id, instaflow: model } = (await answer.json()).data[0];
  $("model").textContent = `${id} · ${model.engine}`;
  const offer = (name, has) => { $(name).parentElement.hidden = !has; };
  offer("style", model.styles.length);
  $("style").replaceChildren(make("option", { value: "", textContent: text.any }), ...model.styles.map((s) => make("option", { value: s, textContent: s })));
  if (model.kind !== "one-step") $("steps").value = model.steps;
  if (model.max_guidance > 1) Object.assign($("guidance"), { value: model.guidance, max: model.max_guidance });
  offer("steps", model.kind !== "one-step");
  offer("guidance", model.max_guidance > 1);
  $("loras").hidden = !model.loras.length;
  $("loras").replaceChildren($("loras").firstElementChild);
  for (const name of model.loras) {
    const label = make("label"), range = make("input", { type: "range", name, min: 0, max: 1.5, step: 0.05, value: 0 });
    const output = make("output", { value: 0 });
    range.addEventListener("input", () => { output.value = range.value; });
    label.append(make("span", { textContent: name, title: name }), range, output);
    $("loras").append(label);
  }
  control = Object.keys(model.controls).find((name) => ["edges", "scribble"].includes(model.controls[name])) ?? "";
  $("sketch").hidden = !control;
  if (!known) wipe(model.size);
  known = true;
}

// White lines on black, as edges are. Small models get four of the pad's dots for each of theirs: a hand is not that fine.
function wipe(size) {
  if (size) pad.width = pad.height = size <= 128 ? 4 * size : size;
  if (size) ink.lineWidth = (1.5 * pad.width) / size;
  ink.fillRect(0, 0, pad.width, pad.height);
  sketched = false;
}

function stroke(event) {
  if (!event.buttons || (event.type !== "pointerdown" && !pad.hasPointerCapture(event.pointerId))) return; // begun elsewhere
  const dots = pad.width / pad.clientWidth, x = event.offsetX * dots, y = event.offsetY * dots;
  if (event.type === "pointerdown") {
    pad.setPointerCapture(event.pointerId);
    pen = [x, y];
  }
  ink.strokeStyle = "#fff";
  ink.lineCap = "round";
  ink.beginPath();
  ink.moveTo(...pen);
  ink.lineTo(x, y);
  ink.stroke();
  pen = [x, y];
  sketched = true;
  draw();
}

function speak(language) {
  text = TEXTS[language];
  document.documentElement.lang = language;
  for (const e of document.querySelectorAll("[data-text]")) e.textContent = text[e.dataset.text];
  for (const e of document.querySelectorAll("[data-label]")) e.setAttribute("aria-label", text[e.dataset.label]);
  for (const e of $("row").children) e.dataset.save = text.save;
  if ($("style").firstChild) $("style").firstChild.textContent = text.any;
  $("language").textContent = text.other;
  $("language").lang = language === "uk" ? "en" : "uk";
}

const roll = () => { $("seed").value = Math.floor(Math.random() * 2 ** 30); };
for (let i = 0; i < COUNT; i++) {
  $("row").append(make("a"));
  $("row").lastChild.append(make("img", { alt: "" }));
}
speak(navigator.language.startsWith("uk") ? "uk" : "en");
$("language").addEventListener("click", () => { speak($("language").lang); draw(); });
$("prompt").addEventListener("input", () => { if ($("rolls").checked) roll(); draw(); });
$("roll").addEventListener("click", () => { roll(); draw(); });
$("controls").addEventListener("input", (event) => { if (event.target !== $("rolls")) draw(); });
for (const type of ["pointerdown", "pointermove"]) pad.addEventListener(type, stroke);
$("wipe").addEventListener("click", () => { wipe(); draw(); });
$("controls").addEventListener("submit", (event) => event.preventDefault());
draw();
