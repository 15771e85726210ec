"use strict";
const byText = new Intl.Collator(undefined, { numeric: true });

function compare(a, b) {
  const [x, y] = [a.dataset.sort, b.dataset.sort];
  if (x !== undefined && y !== undefined) return Number(x) - Number(y);
  if (x !== undefined || y !== undefined) return x === undefined ? -1 : 1;
  return byText.compare(a.textContent, b.textContent);
}

for (const button of document.querySelectorAll("th[aria-sort] button")) {
  button.addEventListener("click", () => {
    const title = button.parentElement;
    const body = title.closest("table").tBodies[0];
    const order = title.ariaSort === "ascending" ? "descending" : "ascending";
    const sign = order === "ascending" ? 1 : -1;
    for (const other of title.parentElement.cells) other.ariaSort = "none";
    title.ariaSort = order;
    const place = title.cellIndex;
    const rows = [...body.rows].sort((a, b) => sign * compare(a.cells[place], b.cells[place]));
    body.append(...rows);
  });
}

for (const filter of document.querySelectorAll(".filter")) {
  const rows = filter.closest("section").querySelectorAll("tbody tr");
  filter.addEventListener("input", () => {
    for (const row of rows) {
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(filter.value.toLowerCase());
    }
  });
}
