// Shows one view at a time, by the address's hash.

import { ask, count, trying } from "./api.js";
import * as atlas from "./atlas.js";
import * as duplicates from "./duplicates.js";
import * as look from "./look.js";
import * as search from "./search.js";
import * as teach from "./teach.js";

const views = { search, look, teach, atlas, duplicates };

const show = trying(async () => {
  const [wanted, id] = location.hash.slice(1).split("/");
  const name = wanted in views ? wanted : "search";
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== name;
  for (const link of document.querySelectorAll("nav a")) {
    link.toggleAttribute("aria-current", link.hash === `#${name}` || (name === "look" && link.hash === "#search"));
    if (link.hasAttribute("aria-current")) link.setAttribute("aria-current", "page");
  }
  await views[name].show(id === undefined ? undefined : Number(id));
});

const about = await ask("/about");
document.getElementById("about").textContent = about.index
  ? `${about.index} · ${count(about.images, "image")}` : `${about.model} · no index`;
document.title = about.index ? `${about.index} · mlx-aimv2` : "mlx-aimv2";
for (const view of Object.values(views)) view.begin(about);
window.addEventListener("hashchange", show);
await show();
