// A text field that suggests: arrows choose, Enter takes, Escape closes. It completes the last of several genes.

const WAIT_MS = 90;
const MOST_SUGGESTED = 12;

/** Names that begin with the typed text, then those that contain it. */
function namesLike(names, typed) {
  const wanted = typed.toUpperCase();
  const begin = names.filter((name) => name.toUpperCase().startsWith(wanted));
  const inside = names.filter((name) => name.toUpperCase().includes(wanted) && !begin.includes(name));
  return [...begin.sort(), ...inside.sort()].slice(0, MOST_SUGGESTED);
}

/** The gene that was typed, as it is spelled; fails if the page has no such gene. */
function nameAmong(names, typed) {
  const name = names.includes(typed) ? typed : names.find((one) => one.toUpperCase() === typed.toUpperCase());
  if (name === undefined) throw new Error(`${typed} is not among the ${count(names.length, "gene")} in this page.`);
  return name;
}

class Combo {
  /** `suggest` gives the names for what was typed, or a promise of them; `taken` is told what was entered. */
  constructor(field, list, suggest, taken) {
    this.field = field;
    this.list = list;
    this.suggest = suggest;
    this.taken = taken;
    this.chosen = -1;
    this.turn = 0;
    field.addEventListener("input", () => this.#soon());
    field.addEventListener("keydown", (event) => this.#key(event));
    field.addEventListener("blur", () => setTimeout(() => this.close(), 150));
    list.addEventListener("mousedown", (event) => event.preventDefault());
    list.addEventListener("click", (event) => this.#click(event));
  }

  close() {
    this.turn++;
    clearTimeout(this.timer);
    this.list.hidden = true;
    this.chosen = -1;
    this.field.setAttribute("aria-expanded", "false");
    this.field.removeAttribute("aria-activedescendant");
  }

  #soon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.#suggest(), WAIT_MS);
  }

  async #suggest() {
    const typed = this.field.value.split(",").at(-1).trim();
    const turn = ++this.turn;
    if (!typed) return this.close();
    const names = await this.suggest(typed);
    if (turn !== this.turn) return;
    this.list.replaceChildren(...names.map((name, i) => this.#option(name, i)));
    this.list.hidden = names.length === 0;
    this.chosen = -1;
    this.field.setAttribute("aria-expanded", String(names.length > 0));
  }

  #option(name, i) {
    const option = element("li", { textContent: name, id: `gene-${i}` });
    option.setAttribute("role", "option");
    option.setAttribute("aria-selected", "false");
    return option;
  }

  #key(event) {
    const options = [...this.list.children];
    if (event.key === "ArrowDown" && !this.list.hidden) this.#mark(options, this.chosen + 1);
    else if (event.key === "ArrowUp" && !this.list.hidden) this.#mark(options, this.chosen - 1);
    else if (event.key === "Escape" && !this.list.hidden) this.close();
    else if (event.key === "Enter") this.#enter(options);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #mark(options, index) {
    this.chosen = (index + options.length) % options.length;
    options.forEach((option, i) => option.setAttribute("aria-selected", String(i === this.chosen)));
    options[this.chosen].scrollIntoView({ block: "nearest" });
    this.field.setAttribute("aria-activedescendant", options[this.chosen].id);
  }

  #enter(options) {
    if (this.chosen >= 0) this.#put(options[this.chosen].textContent);
    this.close();
    if (this.field.value.trim()) this.taken(this.field.value.trim());
  }

  #click(event) {
    const option = event.target.closest("li");
    if (!option) return;
    this.#put(option.textContent);
    this.close();
    this.taken(this.field.value.trim());
  }

  #put(name) {
    const before = this.field.value.split(",").slice(0, -1).map((part) => part.trim());
    this.field.value = [...before, name].join(", ");
  }
}
