// The top of the page: what happened, in words, numbers, a table and curves.

function showOverview(overview, open, chooseStep) {
  document.title = clean(overview.title);
  $("title").textContent = clean(overview.title);
  $("subtitle").textContent = clean(overview.subtitle);
  showSummaries(overview.summaries, open);
  $("tiles").replaceChildren(...overview.tiles.map(([label, value]) => {
    const tile = make("div", "tile");
    tile.append(make("span", "", label), make("b", "", value));
    return tile;
  }));
  showTable(overview.table, overview.compares);
  $("curves").hidden = !overview.charts.length;
  showChanges(overview.changes);
  const marks = overview.compares ? [] : overview.changes;
  $("charts").replaceChildren(...overview.charts.map(spec => chart(spec, chooseStep, marks)));
  $("left-out").textContent = clean(overview.leftOut);
  $("left-out").hidden = !overview.leftOut;
}

function showSummaries(summaries, open) {
  $("summary").hidden = !summaries.length;
  $("summary").replaceChildren(...summaries.map(summary => {
    const part = make("div", "story " + (summary.tone === "good" ? "up" : summary.tone === "bad" ? "down" : ""));
    if (summary.run) part.append(make("p", "run", summary.run));
    part.append(make("h2", "", summary.headline), ...summary.sentences.map(sentence => make("p", "", sentence)));
    if (summary.example) part.append(exampleOf(summary.example, open));
    return part;
  }));
}

function exampleOf(example, open) {
  const box = make("div", "example");
  box.append(make("p", "question", "For example: " + example.question));
  for (const rollout of example.attempts) {
    const line = make("p", "rollout");
    line.append(make("b", "", "Step " + count(rollout.step) + ": "));
    rollout.queries.forEach((query, i) => {
      line.append(i ? ", then " : "searched ", make("span", "query", query));
    });
    if (!rollout.queries.length) line.append("searched nothing");
    line.append(rollout.answer === null ? ", gave no answer " : ", answered ");
    if (rollout.answer !== null) line.append(make("span", "reply", rollout.answer), " ");
    line.append(verdict(rollout.right), " ", button("link", "read it", () => open(rollout.key)));
    box.append(line);
  }
  return box;
}

function verdict(right) {
  const mark = make("b", right ? "good" : "bad", right ? "✓" : "✗");
  mark.setAttribute("role", "img");
  mark.setAttribute("aria-label", right ? "right" : "wrong");
  return mark;
}

function showChanges(changes) {
  $("changes").hidden = !changes.length;
  $("change-list").replaceChildren(...changes.map(change => {
    const part = make("div", "change"), list = make("ul");
    list.append(...change.settings.map(text => make("li", "", text)));
    part.append(make("b", "", (change.run ? change.run + ", from" : "From") + " step " + count(change.step) + " on"), list);
    return part;
  }));
}

function showTable(table, compares) {
  $("evaluation").hidden = !table.length;
  $("table-title").textContent = compares ? "Runs" : "Evaluation";
  $("table").className = compares ? "" : "totals";
  $("table").replaceChildren(...table.map((cells, number) => {
    const line = make("tr");
    line.append(...cells.map(text => make(number ? "td" : "th", "", text)));
    return line;
  }));
}
