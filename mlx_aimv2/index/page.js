const links = [...document.querySelectorAll("li a")];
const columns = (link) => {
  const row = links.filter((other) => other.offsetTop === link.offsetTop);
  return row.length;
};
document.addEventListener("keydown", (event) => {
  const at = links.indexOf(document.activeElement);
  const down = at < 0 ? 1 : columns(links[at]);
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: down, ArrowUp: -down, Home: -at, End: links.length - 1 - at };
  const next = links[at < 0 ? 0 : at + steps[event.key]];
  if (event.key in steps && next) {
    event.preventDefault();
    next.focus();
  }
});
