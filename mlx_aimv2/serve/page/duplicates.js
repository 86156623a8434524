// Groups of images that are the same, side by side; the server writes a list and deletes nothing.

import { ask, count, say, sleep, trying } from "./api.js";
import { card, element, movable } from "./grid.js";

const at = (id) => document.getElementById(id);
const KINDS = { file: "The same file", image: "The same image", similar: "Similar images" };

let about = null, groups = null;

export function begin(what) {
  about = what;
  at("list").addEventListener("click", trying(async () => {
    const { file } = await ask("/duplicates/list", {});
    at("duplicates-status").textContent = `${file} lists all but the first of each group. Nothing was deleted.`;
    say(`Written: ${file}`);
  }));
  movable(at("groups"));
}

export async function show() {
  const status = at("duplicates-status");
  if (!about.index) {
    status.textContent = "There is no index, so there are no images to compare.";
    return;
  }
  while (!groups) {
    const answer = await ask("/duplicates"), [done, total] = answer.progress;
    groups = answer.groups;
    if (!groups) {
      status.textContent = total ? `Comparing ${done.toLocaleString("en")} of ${count(total, "image")} …` : "Comparing …";
      await sleep(400);
    }
  }
  const others = groups.flatMap((group) => group.images.slice(1));
  const megabytes = others.reduce((sum, image) => sum + image.bytes, 0) / 1e6;
  status.textContent = groups.length
    ? `${count(groups.length, "group")}; all but the first of each take ${megabytes.toLocaleString("en", { maximumFractionDigits: 1 })} MB` : "No duplicates";
  at("list").hidden = !groups.length;
  at("groups").replaceChildren(...groups.map((group) => element("section", { className: "group", "aria-label": KINDS[group.kind] },
    element("h2", {}, `${KINDS[group.kind]}, ${count(group.images.length, "file")}`),
    element("ul", { className: "grid" }, ...group.images.map((image, number) => card(image, {
      open: () => { location.hash = `#look/${image.id}`; },
      badge: number === 0 ? "keep" : null,
      kind: "keep",
      detail: `${image.pixels[0].toLocaleString("en")} × ${image.pixels[1].toLocaleString("en")}, ${(image.bytes / 1e3).toFixed(0)} kB · ${image.folder}`,
    }))))));
}
