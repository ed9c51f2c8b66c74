"use strict";
document.documentElement.classList.add("scripted");

function key(row, column) {
  const cell = row.cells[column];
  return cell.dataset.key ?? cell.textContent;
}

// Sort empty cells last, two numbers by value, and everything else as text, with 2 before 10.
function compare(a, b, direction) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const difference = Number(a) - Number(b);
  return direction * (Number.isNaN(difference) ? a.localeCompare(b, "en", { numeric: true }) : difference);
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const falling = heading.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compare(key(a, column), key(b, column), falling ? -1 : 1));
      table.tBodies[0].append(...rows);
    });
  });
}

for (const part of document.querySelectorAll(".searched")) {
  const rows = [...part.querySelector("tbody").rows];
  const count = part.querySelector(".count");
  part.querySelector("input").addEventListener("input", (event) => {
    const wanted = event.target.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
      shown += !row.hidden;
    }
    count.textContent = wanted ? `${shown} of ${rows.length}` : "";
  });
}
