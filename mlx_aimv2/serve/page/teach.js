// Labels taught by examples: a click marks an image, a probe says what all the others are.

import { ask, count, say, trying } from "./api.js";
import { card, element, movable } from "./grid.js";
import { found } from "./search.js";

const at = (id) => document.getElementById(id);

let about = null, state = null, active = null, added = [];

export function begin(what) {
  about = what;
  at("new-label").addEventListener("submit", (event) => {
    event.preventDefault();
    const label = at("label").value.trim();
    if (!label) return;
    added.push(label);
    active = label;
    at("label").value = "";
    draw();
  });
  at("undo").addEventListener("click", trying(async () => take(await ask("/examples/undo", {}))));
  at("save").addEventListener("click", trying(save));
  document.addEventListener("keydown", (event) => {
    if (at("teach").hidden || event.target.matches("input") || event.ctrlKey || event.metaKey || event.altKey) return;
    const label = labels()[Number(event.key) - 1];
    const image = document.activeElement?.closest(".card")?.image;
    if (event.key === "z" || event.key === "u") at("undo").click();
    else if (label) {
      active = label;
      if (image) mark([image.id], label);
      else draw();
    }
  });
  movable(at("lessons"), { Backspace: (image) => mark([image.id], null), Delete: (image) => mark([image.id], null) });
}

export async function show() {
  if (about.index) take(await ask("/examples"));
  else at("teach-status").textContent = "There is no index, so there are no images to teach with.";
}

const labels = () => [...new Set([...(state?.labels ?? []).map((one) => one.label), ...added])];

// Gives images a label, or with null takes theirs away.
export const mark = trying(async (ids, label) => {
  const answer = await ask("/examples", { ids, label });
  if (!at("teach").hidden) take(answer);
  return answer;
});

function take(answer) {
  state = answer;
  active = labels().includes(active) ? active : labels()[0] ?? null;
  draw();
}

const save = async () => {
  at("save").disabled = true;
  at("teach-status").textContent = "Fitting the head …";
  try {
    const { head, data, result } = await ask("/examples/save", {});
    at("teach-status").textContent = `${head} is the head (${result}), ${data} the labelled data. Try: mlx-aimv2 predict ${head} IMAGE`;
    say(`Saved as ${head}`);
  } finally {
    at("save").disabled = false;
  }
};

function draw() {
  const known = Object.fromEntries(state.labels.map((one) => [one.label, one]));
  at("taught").replaceChildren(...labels().map((label, number) => element("li", {}, element("button", {
    type: "button", className: "quiet", "aria-pressed": String(label === active), onclick: () => { active = label; draw(); },
  }, element("kbd", {}, number < 9 ? String(number + 1) : ""), label, element("small", {}, String(known[label]?.examples ?? 0))))));
  at("undo").disabled = !state.steps;
  at("save").disabled = state.labels.length < 2;
  at("teach-status").textContent = state.labels.length > 1
    ? `${count(state.examples.length, "example")}: click an image to call it ${active}; keys 1 to 9 choose another label`
    : active ? `Click images that are ${active}, then add a second label` : "Add a label, then click images that are examples of it";
  const groups = [];
  if (state.labels.length < 2) groups.push(["Images", found.length ? "the last search results" : "", found, null]);
  if (state.uncertain.length) groups.push(["Most uncertain", "labelling these helps most", state.uncertain.slice(0, 24), "guess"]);
  for (const { label, images } of state.labels) {
    const sure = state.certain[label];
    if (sure?.length) groups.push([label, `${images.toLocaleString("en")} images, the most certain first`, sure.slice(0, 24), "guess"]);
  }
  if (state.examples.length) groups.push(["Examples", "click one to remove its label", state.examples, "own"]);
  const focused = document.activeElement?.closest(".card")?.image?.id;
  at("lessons").replaceChildren(...groups.map(([title, words, images, kind]) => element("section", { className: "lesson", "aria-label": title },
    element("h2", {}, title, " ", element("small", {}, words)),
    element("ul", { className: "grid" }, ...images.map((image) => card(image, {
      open: () => choose(image, kind),
      badge: image.label ? (kind === "guess" ? `${image.label} ${Math.round(100 * image.probability)} %` : image.label) : null,
      kind: kind === "own" ? "own" : "",
    }))))));
  if (focused !== undefined) {
    const same = [...at("lessons").querySelectorAll(".card")];
    (same.find((one) => one.image.id === focused) ?? same[0])?.querySelector(".open").focus();
  }
}

function choose(image, kind) {
  if (kind === "own") mark([image.id], null);
  else if (active) mark([image.id], active);
  else say("Add a label first");
}
