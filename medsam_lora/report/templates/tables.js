/* Tables that sort by their headers and are narrowed by text and choice. */

(() => {
  const cellOf = (row, index) => {
    const cell = row.cells[index];
    const number = cell.querySelector(".num");
    return number ? Number(number.dataset.value) : cell.textContent.trim();
  };

  function compare(a, b) {
    // Empty cells come last, whichever way the others run.
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  }

  function sortBy(table, header) {
    const descending = header.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const index = header.cellIndex;
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row, place) => ({ row, place, key: cellOf(row, index) }));
    const empty = (entry) => entry.key === "" || entry.key === "–";
    rows.sort((a, b) => {
      if (empty(a) !== empty(b)) return empty(a) ? 1 : -1;
      return (descending ? -compare(a.key, b.key) : compare(a.key, b.key)) || a.place - b.place;
    });
    body.append(...rows.map((entry) => entry.row));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    for (const header of table.tHead.rows[0].cells) {
      const button = header.querySelector("button");
      if (button) button.addEventListener("click", () => sortBy(table, header));
    }
  }

  const cases = document.getElementById("case-table");
  const text = document.getElementById("filter-text");
  const choices = { run: document.getElementById("filter-run"), region: document.getElementById("filter-region") };
  const counter = document.getElementById("filter-count");
  const rows = [...cases.tBodies[0].rows];

  function narrow() {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const content = row.textContent.toLowerCase();
      const fits = words.every((word) => content.includes(word))
        && Object.entries(choices).every(([key, select]) => !select.value || row.dataset[key] === select.value);
      row.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    counter.textContent = `${shown} of ${rows.length} rows`;
  }

  text.addEventListener("input", narrow);
  Object.values(choices).forEach((select) => select.addEventListener("change", narrow));
  document.getElementById("filter-clear").addEventListener("click", () => {
    text.value = "";
    Object.values(choices).forEach((select) => { select.value = ""; });
    narrow();
  });
  narrow();

  const open = (row) => document.dispatchEvent(
    new CustomEvent("show-case", { detail: { id: row.dataset.case, run: row.dataset.run } }),
  );
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-open]");
    if (button) open(button.closest("[data-case]"));
    else {
      const row = event.target.closest("#case-table tbody tr.opens");
      // Text that is being marked is not a wish to leave it.
      if (row && String(window.getSelection()) === "") open(row);
    }
  });
})();
