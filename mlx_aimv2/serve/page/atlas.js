// All images in a plane: dots from afar, thumbnails from near, a lasso that selects.

import { ask, bytes, count, say, sleep, trying } from "./api.js";
import { mark } from "./teach.js";

const at = (id) => document.getElementById(id);
const NEAR = 700, DOT = 2.2, SIDE = 72;

let about = null, places = null, view = { x: 0.5, y: 0.5, scale: 0.9 }, held = null, lasso = [], selected = [], thumbnails = new Map(), ticket = 0;

export function begin(what) {
  about = what;
  const map = at("map");
  at("plane").addEventListener("change", load);
  map.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * 0.0015), event.offsetX, event.offsetY);
  }, { passive: false });
  map.addEventListener("pointerdown", (event) => {
    map.setPointerCapture(event.pointerId);
    held = { x: event.offsetX, y: event.offsetY, moved: false, isLasso: event.shiftKey || isSelecting() };
    lasso = held.isLasso ? [[event.offsetX, event.offsetY]] : [];
    if (held.isLasso) select([]);
  });
  map.addEventListener("pointermove", (event) => {
    map.classList.toggle("selecting", event.shiftKey || isSelecting());
    if (!held) return;
    held.moved = true;
    if (held.isLasso) lasso.push([event.offsetX, event.offsetY]);
    else {
      view.x -= (event.offsetX - held.x) / unit();
      view.y -= (event.offsetY - held.y) / unit();
      [held.x, held.y] = [event.offsetX, event.offsetY];
    }
    draw();
  });
  map.addEventListener("pointerup", (event) => {
    if (held?.isLasso) select(inside());
    else if (held && !held.moved) openAt(event.offsetX, event.offsetY);
    held = null;
    lasso = [];
    draw();
  });
  map.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in steps) {
      view.x += 40 * steps[event.key][0] / unit();
      view.y += 40 * steps[event.key][1] / unit();
      draw();
    } else if ("+-".includes(event.key)) zoom(event.key === "+" ? 1.3 : 1 / 1.3, map.clientWidth / 2, map.clientHeight / 2);
    else if (event.key === "Escape") select([]);
    else return;
    event.preventDefault();
  });
  at("select").addEventListener("click", () => at("select").setAttribute("aria-pressed", String(!isSelecting())));
  for (const [name, factor] of [["nearer", 1.5], ["farther", 1 / 1.5]]) {
    at(name).addEventListener("click", () => zoom(factor, map.clientWidth / 2, map.clientHeight / 2));
  }
  at("selection").addEventListener("submit", trying(async (event) => {
    event.preventDefault();
    const label = at("selection-label").value.trim();
    if (!label) return;
    for (let start = 0; start < selected.length; start += 2000) await mark(selected.slice(start, start + 2000), label);
    say(`${count(selected.length, "image")} marked as ${label}`);
    select([]);
  }));
  new ResizeObserver(draw).observe(map);
}

export async function show() {
  if (about.index && !places) await load();
  else if (!about.index) at("atlas-status").textContent = "There is no index, so there are no images to place.";
  draw();
}

const load = trying(async () => {
  const number = ++ticket;
  const kind = at("plane").querySelector(":checked").value;
  if (!places || kind === "principal") move(await ask("/atlas?kind=principal"));
  while (kind === "neighbours" && number === ticket) {
    const answer = await ask("/atlas?kind=neighbours");
    if (answer.places) {
      if (number === ticket) move(answer);
      break;
    }
    const [done, total] = answer.progress;
    at("atlas-status").textContent = total ? `Finding neighbours … ${Math.round(100 * done / total)} %` : "Finding neighbours …";
    await sleep(600);
  }
});

// The images go to their new places, unless movement is unwanted.
function move(answer) {
  const next = new Uint16Array(bytes(answer.places).buffer);
  at("atlas-status").textContent = count(next.length / 2, "image");
  const before = places, start = performance.now();
  const isStill = !before || matchMedia("(prefers-reduced-motion: reduce)").matches;
  const step = (now) => {
    const share = isStill ? 1 : Math.min((now - start) / 700, 1), eased = share * share * (3 - 2 * share);
    places = share === 1 ? next : Float32Array.from(next, (value, i) => before[i] + (value - before[i]) * eased);
    draw();
    if (share < 1) requestAnimationFrame(step);
  };
  step(start);
}

const isSelecting = () => at("select").getAttribute("aria-pressed") === "true";

const unit = () => Math.min(at("map").clientWidth, at("map").clientHeight) * view.scale;

function positions() {
  const map = at("map"), size = unit(), x = map.clientWidth / 2 - view.x * size, y = map.clientHeight / 2 - view.y * size;
  return (i) => [places[2 * i] / 65535 * size + x, places[2 * i + 1] / 65535 * size + y];
}

function zoom(factor, x, y) {
  const map = at("map"), before = unit();
  view.scale = Math.min(Math.max(view.scale * factor, 0.5), 400);
  const change = 1 / before - 1 / unit();
  view.x += (x - map.clientWidth / 2) * change;
  view.y += (y - map.clientHeight / 2) * change;
  draw();
}

let isDrawing = false;

function draw() {
  if (isDrawing || at("atlas").hidden) return;
  isDrawing = true;
  requestAnimationFrame(() => { isDrawing = false; paint(); });
}

function paint() {
  const map = at("map"), context = map.getContext("2d"), ratio = devicePixelRatio, style = getComputedStyle(document.body);
  map.width = map.clientWidth * ratio;
  map.height = map.clientHeight * ratio;
  context.scale(ratio, ratio);
  if (!places) return;
  const position = positions(), chosen = new Set(selected), visible = [];
  const accent = style.getPropertyValue("--accent"), quiet = style.getPropertyValue("--quiet");
  for (let i = 0; i < places.length / 2; i += 1) {
    const [x, y] = position(i);
    if (x > -SIDE && y > -SIDE && x < map.clientWidth + SIDE && y < map.clientHeight + SIDE) visible.push([i, x, y]);
  }
  const isNear = visible.length <= NEAR, area = map.clientWidth * map.clientHeight;
  const side = Math.min(SIDE, Math.max(20, 0.7 * Math.sqrt(area / Math.max(visible.length, 1))));
  for (const [i, x, y] of visible) {
    const picture = isNear ? thumbnail(i) : null;
    if (picture) {
      const scale = side / Math.max(picture.naturalWidth, picture.naturalHeight), width = picture.naturalWidth * scale, height = picture.naturalHeight * scale;
      context.drawImage(picture, x - width / 2, y - height / 2, width, height);
      if (chosen.has(i)) {
        context.strokeStyle = accent;
        context.lineWidth = 3;
        context.strokeRect(x - width / 2, y - height / 2, width, height);
      }
    } else {
      context.fillStyle = chosen.has(i) ? accent : quiet;
      context.beginPath();
      context.arc(x, y, chosen.has(i) ? 2 * DOT : DOT, 0, 7);
      context.fill();
    }
  }
  if (lasso.length > 1) {
    context.strokeStyle = accent;
    context.lineWidth = 2;
    context.setLineDash([5, 4]);
    context.beginPath();
    lasso.forEach(([x, y]) => context.lineTo(x, y));
    context.closePath();
    context.stroke();
  }
}

function thumbnail(number) {
  let picture = thumbnails.get(number);
  if (!picture) {
    if (thumbnails.size > 1000) thumbnails.delete(thumbnails.keys().next().value);
    picture = new Image();
    picture.addEventListener("load", draw);
    picture.src = `/thumbnail/${number}`;
    thumbnails.set(number, picture);
  }
  return picture.complete && picture.naturalWidth ? picture : null;
}

// The images within the lasso, by the even-odd rule.
function inside() {
  if (lasso.length < 3 || !places) return [];
  const position = positions(), found = [];
  for (let i = 0; i < places.length / 2; i += 1) {
    const [x, y] = position(i);
    let isIn = false;
    for (let a = 0, b = lasso.length - 1; a < lasso.length; b = a, a += 1) {
      const [[ax, ay], [bx, by]] = [lasso[a], lasso[b]];
      if ((ay > y) !== (by > y) && x < (bx - ax) * (y - ay) / (by - ay) + ax) isIn = !isIn;
    }
    if (isIn) found.push(i);
  }
  return found;
}

function openAt(x, y) {
  if (!places) return;
  const position = positions();
  let best = null, least = (SIDE / 2) ** 2;
  for (let i = 0; i < places.length / 2; i += 1) {
    const [px, py] = position(i), distance = (px - x) ** 2 + (py - y) ** 2;
    if (distance < least) [best, least] = [i, distance];
  }
  if (best !== null) location.hash = `#look/${best}`;
}

function select(numbers) {
  selected = numbers;
  at("selection").hidden = !numbers.length;
  at("selected").value = count(numbers.length, "image");
  draw();
}
