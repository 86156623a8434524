// One image large: how like the patch under the pointer its patches are, and those of other images.

import { ask, bytes, floats, say, trying } from "./api.js";
import { element } from "./grid.js";
import { found } from "./search.js";

const at = (id) => document.getElementById(id);
// From unlike to alike, as in the maps that `mlx-aimv2 map` draws.
const HEAT = [[16, 18, 52], [62, 38, 120], [140, 46, 116], [214, 84, 80], [248, 158, 66], [252, 236, 152]];

let image = null, about = null, grid = null, colours = null, maps = null, others = [], patch = null, waiting = null, isAsking = false;

export function begin(what) {
  about = what;
  at("back").addEventListener("click", () => { location.hash = "#search"; });
  at("copy").addEventListener("click", trying(async () => {
    await navigator.clipboard.writeText(image.path);
    say("Path copied");
  }));
  at("reveal").hidden = !about.reveal;
  at("reveal").addEventListener("click", trying(() => ask(`/reveal/${image.id}`, {})));
  at("labels-form").hidden = !about.text;
  at("labels").value = localStorage.getItem("labels") ?? "";
  at("labels-form").addEventListener("submit", (event) => event.preventDefault());
  let timer;
  at("labels").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(classify, 350);
  });
  at("overlay").addEventListener("change", draw);
  document.addEventListener("keydown", (event) => {
    if (at("look").hidden || event.target.matches("input[type=text], input:not([type])")) return;
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Escape") location.hash = "#search";
    else if (event.key in steps && grid && !event.target.matches("input")) {
      event.preventDefault();
      const [row, column] = patch ?? [Math.floor(grid.rows / 2), Math.floor(grid.columns / 2)];
      pointAt(row + steps[event.key][0], column + steps[event.key][1]);
    }
  });
}

export async function show(id) {
  if (id === undefined) {
    location.hash = "#search";
    return;
  }
  maps = patch = grid = null;
  const known = found.find((one) => one.id === id);
  image = known ?? (await ask(`/images?start=${id}&count=1`)).images[0];
  others = found.filter((one) => one.id !== id).slice(0, 8);
  at("look-name").textContent = `${image.folder}/${image.name}`;
  at("look-name").title = image.path;
  const picture = element("img", { src: `/view/${id}`, alt: image.name });
  const canvas = element("canvas", { tabIndex: 0, "aria-label": "Patches: move with the arrow keys" });
  canvas.addEventListener("pointermove", (event) => pointTo(event, canvas));
  canvas.addEventListener("pointerdown", (event) => pointTo(event, canvas));
  at("large").replaceChildren(element("div", { className: "stack" }, picture, canvas));
  at("beside-title").hidden = !others.length;
  at("beside").replaceChildren(...others.map((one) => element("li", {}, element("button", {
    type: "button", title: one.path, "aria-label": `Look at ${one.name}`, onclick: () => { location.hash = `#look/${one.id}`; },
  }, element("span", { className: "stack" }, element("img", { src: `/view/${one.id}`, alt: "" }), element("canvas", { id: `map-${one.id}` }))))));
  at("bars").replaceChildren();
  classify();
  grid = await ask(`/patches/${id}`);
  colours = bytes(grid.colours);
  if (image.id !== id) return;
  draw();
  pointAt(Math.floor(grid.rows / 2), Math.floor(grid.columns / 2));
}

function pointTo(event, canvas) {
  if (!grid) return;
  const box = canvas.getBoundingClientRect();
  pointAt(Math.floor((event.clientY - box.top) / box.height * grid.rows), Math.floor((event.clientX - box.left) / box.width * grid.columns));
}

function pointAt(row, column) {
  const next = [Math.min(Math.max(row, 0), grid.rows - 1), Math.min(Math.max(column, 0), grid.columns - 1)];
  if (patch && next[0] === patch[0] && next[1] === patch[1]) return;
  patch = next;
  waiting = next;
  if (!isAsking) compare();
}

// Asks for the last patch that was pointed at, one question at a time.
const compare = trying(async () => {
  isAsking = true;
  try {
    while (waiting) {
      const wanted = waiting, id = image.id;
      waiting = null;
      const answer = await ask("/similarity", { id, patch: wanted, others: others.map((one) => one.id) });
      if (image.id === id) maps = answer.maps;
      draw();
    }
  } finally {
    isAsking = false;
  }
});

function draw() {
  const kind = at("overlay").querySelector(":checked").value;
  const canvas = at("large").querySelector("canvas");
  if (!canvas || !grid) return;
  at("look-hint").textContent = {
    similarity: "Point at a patch, or move with the arrow keys: bright patches are similar to it.",
    components: "Patches with similar colours are similar: the three directions in which this image's patches differ most.",
    none: "The image as the model sees it.",
  }[kind];
  const components = kind === "components" ? { ...grid, pixel: (i) => [...colours.slice(3 * i, 3 * i + 3), 235] } : null;
  paint(canvas, components ?? (kind === "similarity" ? heat(maps?.[image.id]) : null), kind === "similarity" ? patch : null);
  for (const one of others) {
    const small = at(`map-${one.id}`);
    if (small) paint(small, kind === "similarity" ? heat(maps?.[one.id]) : null, null);
  }
}

// Cosines as colours: what is unlike is dark and clear, what is alike bright.
function heat(map) {
  if (!map) return null;
  const cosines = floats(map.cosines), own = floats(maps[image.id].cosines);
  const low = Math.min(...own), high = 1;
  const pixel = (i) => {
    const level = Math.min(Math.max((cosines[i] - low) / Math.max(high - low, 1e-6), 0), 1) * (HEAT.length - 1);
    const first = Math.min(Math.floor(level), HEAT.length - 2);
    return [...HEAT[first].map((from, c) => from + (HEAT[first + 1][c] - from) * (level - first)), 175];
  };
  return { ...map, pixel };
}

function paint(canvas, map, framed) {
  const context = canvas.getContext("2d");
  canvas.width = map?.columns ?? 1;
  canvas.height = map?.rows ?? 1;
  if (!map) return;
  const data = context.createImageData(map.columns, map.rows);
  for (let i = 0; i < map.rows * map.columns; i += 1) data.data.set(map.pixel(i), 4 * i);
  if (framed) data.data[4 * (framed[0] * map.columns + framed[1]) + 3] = 0;
  context.putImageData(data, 0, 0);
}

const classify = trying(async () => {
  const labels = [...new Set(at("labels").value.split(",").map((label) => label.trim()).filter(Boolean))];
  localStorage.setItem("labels", at("labels").value);
  if (!about.text || labels.length < 2) {
    at("bars").replaceChildren();
    return;
  }
  const id = image.id;
  const answer = await ask("/classify", { labels, id });
  if (image.id !== id) return;
  at("bars").replaceChildren(...answer.labels.map(({ label, probability }) => {
    const fill = element("i");
    fill.style.width = `${100 * probability}%`;
    return element("li", {}, element("span", {}, label), element("span", { className: "track" }, fill),
      element("span", { className: "value" }, `${(100 * probability).toFixed(1)} %`));
  }));
});
