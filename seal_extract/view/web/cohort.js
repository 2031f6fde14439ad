(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const by = (id) => document.getElementById(id);
  document.documentElement.classList.add("js");

  for (const copy of all(".copy")) {
    copy.onclick = async () => {
      const paths = all(".path", copy.closest(".group, section")).map((path) => {
        const reason = "reasons" in copy.dataset ? path.parentNode.querySelector(".reason") : null;
        return reason ? `${path.textContent}\t${reason.textContent}` : path.textContent;
      });
      try {
        await navigator.clipboard.writeText(paths.join("\n"));
        copy.textContent = `Copied ${paths.length}`;
      } catch {
        copy.textContent = "The browser did not allow it";
      }
    };
  }
  addEventListener("beforeprint", () => all("details").forEach((details) => (details.open = true)));

  const table = by("slides");
  if (!table) return;
  for (const again of all("a[data-of]")) {
    const picture = by(again.dataset.of).cloneNode();
    picture.removeAttribute("id");
    again.replaceChildren(picture);
    again.classList.remove("none");
  }

  const rows = all("tbody tr", table);
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const collator = new Intl.Collator(undefined, { numeric: true });
  const [find, show, sort, turn] = ["find", "show", "sort", "turn"].map(by);
  let descending = false;

  function filter() {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const fits = (!show.value || row.classList.contains(show.value)) && words.every((word) => texts.get(row).includes(word));
      row.hidden = !fits;
      shown += fits;
    }
    by("shown").textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} slides shown`;
  }

  function order() {
    const column = Number(sort.value);
    const sign = descending ? -1 : 1;
    const keyed = rows.map((row) => {
      const { dataset, textContent } = row.cells[column];
      const numeric = "v" in dataset;
      return { row, key: numeric ? Number(dataset.v) : textContent, empty: (numeric ? dataset.v : textContent) === "" };
    });
    // what is unknown comes last either way
    keyed.sort((a, b) => a.empty - b.empty || sign * (typeof a.key === "number" ? a.key - b.key : collator.compare(a.key, b.key)) || 0);
    table.tBodies[0].append(...keyed.map(({ row }) => row));
    turn.textContent = descending ? "▼" : "▲";
    for (const head of all("th button", table)) {
      const chosen = Number(head.dataset.column) === column;
      head.parentNode.ariaSort = chosen ? (descending ? "descending" : "ascending") : null;
    }
  }

  find.oninput = show.onchange = filter;
  sort.onchange = () => { descending = !["1", "2", "9"].includes(sort.value); order(); };
  turn.onclick = () => { descending = !descending; order(); };
  for (const head of all("th button", table)) {
    head.onclick = () => {
      const again = sort.value === head.dataset.column;
      sort.value = head.dataset.column;
      again ? turn.onclick() : sort.onchange();
    };
  }
  for (const button of all("[data-view]")) {
    button.onclick = () => {
      table.className = button.dataset.view;
      for (const other of all("[data-view]")) other.ariaPressed = other === button;
    };
  }
  const tools = all(".tools")[0];
  new ResizeObserver(() => document.documentElement.style.setProperty("--tools", `${tools.offsetHeight}px`)).observe(tools);
  order();
  filter();
})();
