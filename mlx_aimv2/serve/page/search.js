// Queries made of chips, and the grid of what they find.

import { ask, count, say, trying } from "./api.js";
import { card, element, movable } from "./grid.js";

const at = (id) => document.getElementById(id);
const PAGE = 60, MOST = 2000, STEP = 200;

let parts = [], about = null, shown = PAGE, asked = 0, startedWith = false;

// What was found last, for other views.
export let found = [];

export function begin(what) {
  about = what;
  at("words").placeholder = about.text ? "Words, such as: a dog on a beach" : "Drop, paste or choose an image";
  at("words").disabled = !about.index;
  at("folder").append(...(about.folders ?? []).map((one) =>
    element("option", { value: one.path }, `${one.path.split("/").slice(-2).join("/")} (${one.images.toLocaleString("en")})`)));
  at("query").addEventListener("submit", (event) => {
    event.preventDefault();
    addWords();
    run();
  });
  at("words").addEventListener("keydown", (event) => {
    if (event.key === "Backspace" && !at("words").value && parts.length) remove(parts.at(-1));
    if (event.key === "ArrowDown") at("results").querySelector(".open")?.focus();
  });
  for (const name of ["folder", "after", "before"]) at(name).addEventListener("change", run);
  at("min-score").addEventListener("input", () => { at("min-score-shown").value = least() ?? "any"; });
  at("min-score").addEventListener("change", run);
  at("file").addEventListener("change", () => [...at("file").files].forEach(addFile));
  at("more").addEventListener("click", () => { shown = MOST; run(); });
  document.addEventListener("paste", (event) => takeFiles(event.clipboardData, event));
  document.addEventListener("dragover", (event) => { event.preventDefault(); at("drop").hidden = false; });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) at("drop").hidden = true; });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    at("drop").hidden = true;
    takeFiles(event.dataTransfer, event);
  });
  document.addEventListener("keydown", (event) => {
    const isTyping = event.target.matches("input, select, textarea");
    if (event.key === "/" && !isTyping && !at("search").hidden) {
      event.preventDefault();
      at("words").focus();
    } else if (event.key === "Escape" && !at("search").hidden) {
      if (document.activeElement === at("words") && parts.length) clear();
      at("words").focus();
    }
  });
  movable(at("results"), { "+": (image) => add({ id: image.id, name: image.name }, 1), "-": (image) => add({ id: image.id, name: image.name }, -1) });
}

export async function show() {
  if (!startedWith) {
    startedWith = true;
    await run();
    at("words").focus();
  }
}

function takeFiles(transfer, event) {
  const files = [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
  if (!files.length) return;
  event.preventDefault();
  location.hash = "#search";
  files.forEach(addFile);
}

const addFile = trying(async (file) => {
  if (file.size > 20e6) throw new Error(`${file.name} has more than 20 MB`);
  const url = await new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(file);
  });
  at("file").value = "";
  add({ image: url, name: file.name }, 1);
});

// Words that begin with a minus take something away.
function addWords() {
  const words = at("words").value.trim();
  at("words").value = "";
  if (!words) return;
  const isMinus = words.startsWith("-") && words.length > 1;
  parts.push({ text: isMinus ? words.slice(1).trim() : words, weight: isMinus ? -1 : 1 });
  draw();
}

export function add(part, weight) {
  parts = parts.filter((one) => part.id === undefined || one.id !== part.id);
  parts.push({ ...part, weight });
  draw();
  location.hash = "#search";
  run();
}

function remove(part) {
  parts = parts.filter((one) => one !== part);
  draw();
  run();
}

function clear() {
  parts = [];
  draw();
  run();
}

function draw() {
  at("parts").replaceChildren(...parts.map((part) => {
    const name = part.text ?? part.name;
    const picture = part.text ? [] : [element("img", { src: part.image ?? `/thumbnail/${part.id}`, alt: "" })];
    const sign = part.weight < 0 ? "−" : "+";
    const turn = () => { part.weight = -part.weight; draw(); run(); };
    return element("li", { className: `part ${part.weight < 0 ? "minus" : ""}` },
      element("button", { type: "button", className: "what", title: "Plus or minus", "aria-label": `${sign} ${name}: turn into ${part.weight < 0 ? "plus" : "minus"}`, onclick: turn },
        `${sign} `, ...picture, element("span", {}, name)),
      element("button", { type: "button", "aria-label": `Remove ${name}`, onclick: () => remove(part) }, "×"));
  }));
}

const least = () => (Number(at("min-score").value) <= -0.2 ? null : Number(at("min-score").value));

const run = trying(async () => {
  const number = ++asked;
  if (!about.index) {
    at("status").textContent = "There is no index to search: the server runs a model only. The API is described at /docs.";
    return;
  }
  let matches = [];
  if (parts.length) {
    const query = parts.map(({ text, id, image, weight }) => ({ text, id, image, weight }));
    const folder = at("folder").value || null;
    const body = { query, k: shown, min_score: least(), folder, after: at("after").value || null, before: at("before").value || null };
    matches = (await ask("/search", body)).matches;
  } else {
    matches = (await ask(`/images?count=${PAGE}`)).images;
  }
  if (number !== asked) return;
  found = matches;
  at("status").textContent = parts.length
    ? `${count(matches.length, "image")}, best first, of ${about.images.toLocaleString("en")}`
    : `The first ${count(matches.length, "image")} of ${about.images.toLocaleString("en")}`;
  if (parts.length && !matches.length) say("No image matches: lower the minimum score, or widen the filters");
  const actions = [
    ["+", "More like this", (image) => add({ id: image.id, name: image.name }, 1)],
    ["−", "Less like this", (image) => add({ id: image.id, name: image.name }, -1)],
  ];
  const open = (image) => { location.hash = `#look/${image.id}`; };
  const made = (start, end) => matches.slice(start, end).map((image) => card(image, { open, actions, score: image.score ?? null }));
  at("results").replaceChildren(...made(0, PAGE));
  at("more").hidden = !parts.length || matches.length < shown || shown === MOST || about.images <= shown;
  // What is below the screen comes in the next frames, so that what can be seen is there at once.
  for (let start = PAGE; start < matches.length; start += STEP) {
    await new Promise(requestAnimationFrame);
    if (number !== asked) return;
    at("results").append(...made(start, start + STEP));
  }
});
