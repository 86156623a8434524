// Cards of images in a grid, and the keys that move among them.

export function element(name, settings = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(settings)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key in made && !key.startsWith("aria")) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// An image with its caption; `actions` are [sign, words, function] for buttons on it.
export function card(image, { open, actions = [], badge = null, kind = "", score = null, detail = null }) {
  const picture = element("img", { src: `/thumbnail/${image.id}`, alt: image.name, loading: "lazy", decoding: "async" });
  picture.addEventListener("error", () => picture.replaceWith("file missing or unreadable"), { once: true });
  const made = element("li", { className: "card", title: image.path },
    element("button", { className: "open", type: "button", onclick: () => open(image) }, picture));
  made.image = image;
  if (badge) made.append(element("span", { className: `badge ${kind}` }, badge));
  if (actions.length) {
    made.append(element("div", { className: "actions" }, ...actions.map(([sign, words, work]) =>
      element("button", { type: "button", title: words, "aria-label": `${words}: ${image.name}`, onclick: () => work(image) }, sign))));
  }
  made.append(element("div", { className: "caption" },
    element("span", { className: "name" }, image.name),
    element("span", { className: "score" }, score === null ? "" : score.toFixed(3)),
    element("span", { className: "folder" }, detail ?? image.folder)));
  return made;
}

// Arrow keys, Home and End move the focus in a grid; other keys go to `keys`, by name, with the image.
export function movable(grid, keys = {}) {
  grid.addEventListener("keydown", (event) => {
    const here = event.target.closest(".card");
    if (!here || event.ctrlKey || event.metaKey || event.altKey) return;
    const cards = [...grid.querySelectorAll(".card")];
    const at = cards.indexOf(here);
    const row = cards.filter((one) => one.offsetTop === here.offsetTop).length;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: row, ArrowUp: -row, Home: -at, End: cards.length - 1 - at };
    if (event.key in steps) {
      const next = cards[at + steps[event.key]];
      if (next) next.querySelector(".open").focus();
      event.preventDefault();
    } else if (event.key in keys) {
      keys[event.key](here.image);
      event.preventDefault();
    }
  });
}
