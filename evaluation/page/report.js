"use strict";
// Only textContent and attributes are set, so that no text of a report becomes markup.
(() => {
  const find = (id) => document.getElementById(id);

  const option = (select, value, text) => {
    const made = document.createElement("option");
    made.value = value;
    made.textContent = text;
    select.append(made);
  };

  const valueOf = (row, column) => {
    const cell = row.cells[column];
    if (!("value" in cell.dataset)) return cell.textContent;
    return cell.dataset.value === "" ? -Infinity : Number(cell.dataset.value);
  };

  const compare = (a, b) =>
    typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });

  const sortBy = (table, column, head) => {
    const falling = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => compare(valueOf(a, column), valueOf(b, column)) * (falling ? -1 : 1));
    table.tBodies[0].append(...rows);
  };

  const makeSortable = (table) => {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      button.addEventListener("click", () => sortBy(table, column, head));
      head.replaceChildren(button);
    });
  };

  const makeFilter = (table) => {
    const ways = new Map();
    for (const row of table.tBodies[0].rows) ways.set(row.dataset.way, row.cells[2].textContent);
    if (ways.size < 2) return;
    const select = find("way-filter").querySelector("select");
    option(select, "", "all ways");
    for (const [way, name] of ways) option(select, way, name);
    select.addEventListener("change", () => {
      for (const row of table.tBodies[0].rows)
        row.hidden = select.value !== "" && row.dataset.way !== select.value;
    });
    find("way-filter").hidden = false;
  };

  const show = (data, text) => {
    const spans = text.tokens.map((token, place) => {
      const span = document.createElement("span");
      if (text.drafted) span.className = text.drafted[place] === "1" ? "drafted" : "own";
      if (text.divergence === place) span.classList.add("differs");
      span.textContent = token;
      return span;
    });
    find("text-tokens").replaceChildren(...spans);
    find("text-name").textContent = `${data.prompts[text.prompt].id}, ${data.ways[text.way]}`;
    find("text-state").textContent = text.state;
    find("text-asked").textContent = data.prompts[text.prompt].text || "–";
  };

  const makeChoice = (data) => {
    const prompt = find("text-prompt"), way = find("text-way");
    const byPlace = new Map(data.texts.map((text) => [`${text.prompt} ${text.way}`, text]));
    const prompts = new Set(data.texts.map((text) => text.prompt));
    const chosen = data.texts[data.first];
    for (const number of prompts) option(prompt, number, data.prompts[number].id);
    const choose = (wanted) => {
      way.replaceChildren();
      const ways = data.texts.filter((text) => String(text.prompt) === prompt.value);
      for (const text of ways) option(way, text.way, data.ways[text.way]);
      if (ways.some((text) => String(text.way) === wanted)) way.value = wanted;
      show(data, byPlace.get(`${prompt.value} ${way.value}`));
    };
    prompt.value = chosen.prompt;
    choose(String(chosen.way));
    prompt.addEventListener("change", () => choose(way.value));
    way.addEventListener("change", () => choose(way.value));
    find("text-choice").hidden = false;
  };

  const table = find("outcomes");
  if (table) {
    makeSortable(table);
    makeFilter(table);
  }
  const data = find("text-data");
  if (data) makeChoice(JSON.parse(data.textContent));
})();
