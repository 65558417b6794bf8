// The list: only the rows that are in view exist in the document.

const ROW_HEIGHT = 62;  // as in the style sheet
const AROUND = 6;  // rows beyond the edges

class List {
  constructor(node, spacer, label, choose) {
    Object.assign(this, { node, spacer, label, choose, rows: [], selected: null });
    node.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(node);
  }

  show(rows, keepPlace) {
    this.rows = rows;
    if (!keepPlace) this.node.scrollTop = 0;
    this.spacer.style.height = rows.length * ROW_HEIGHT + "px";
    this.draw();
  }

  select(row, focus) {
    this.selected = row;
    const at = this.rows.indexOf(row);
    if (at >= 0) {
      const top = at * ROW_HEIGHT, { scrollTop, clientHeight } = this.node, below = top + ROW_HEIGHT - scrollTop - clientHeight;
      if (top < scrollTop - 2 * ROW_HEIGHT || below > 2 * ROW_HEIGHT) this.node.scrollTop = top - clientHeight / 2;
      else if (top < scrollTop) this.node.scrollTop = top;
      else if (below > 0) this.node.scrollTop = scrollTop + below;
    }
    if (focus) this.node.focus({ preventScroll: true });
    this.draw();
  }

  // The row `by` places after the selected one.
  step(by) {
    if (!this.rows.length) return;
    const at = this.rows.indexOf(this.selected);
    const next = at < 0 ? 0 : Math.max(0, Math.min(this.rows.length - 1, at + by));
    this.choose(this.rows[next]);
  }

  draw() {
    const first = Math.max(0, Math.floor(this.node.scrollTop / ROW_HEIGHT) - AROUND);
    const end = Math.min(this.rows.length, Math.ceil((this.node.scrollTop + this.node.clientHeight) / ROW_HEIGHT) + AROUND);
    const items = [];
    let active = "";
    for (let i = first; i < end; i++) {
      const row = this.rows[i], chosen = this.selected !== null && row.key === this.selected.key, item = make("div", "item" + (chosen ? " chosen" : ""));
      item.id = "row-" + i;
      item.setAttribute("role", "option");
      item.setAttribute("aria-selected", String(chosen));
      item.setAttribute("aria-setsize", String(this.rows.length));
      item.setAttribute("aria-posinset", String(i + 1));
      item.style.top = i * ROW_HEIGHT + "px";
      item.onclick = () => this.choose(row);
      if (chosen) active = item.id;
      const head = make("div", "what");
      head.append(verdict(row.right), make("span", "", row.question || row.id));
      const facts = make("div", "facts", this.label(row));
      for (const flag of ["invalid", "length", "forced", "failures", "error"]) {
        const [, text, test] = FLAGS.find(entry => entry[0] === flag);
        if (test(row)) facts.append(" ", make("span", "flag", text));
      }
      item.append(head, facts);
      items.push(item);
    }
    this.spacer.replaceChildren(...items);
    if (active) this.node.setAttribute("aria-activedescendant", active);
    else this.node.removeAttribute("aria-activedescendant");
  }
}
