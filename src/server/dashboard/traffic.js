// Who sends tokens to whom: a row per owner, a column per rank that computes.

class Traffic {
  #pointed = null;

  constructor() {
    this.canvas = $("traffic");
    this.surface = new Surface(this.canvas, (...all) => this.#draw(...all), (...all) => this.#point(...all));
    this.canvas.addEventListener("keydown", (event) => {
      const columns = this.world.ranks;
      const to = moved(event.key, this.#pointed ?? 0, this.world.sent.length * columns, columns);
      if (event.key !== "Escape" && to === null) return;
      event.preventDefault();
      this.#pointed = to;
      this.surface.paint();
      this.#read();
    });
  }

  show(world) {
    this.world = world;
    this.total = sum(world.sent.map(sum));
    const away = world.away();
    const lead = "Rows are the owners of tokens, columns the ranks of their experts.";
    fill($("traffic-lead"), away === null ? lead : `${lead} ${percent(away)} of the tokens leave their rank; outlined ones stay.`);
    this.surface.paint();
    this.#read();
  }

  #frame() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const [left, bottom] = [40, 22];
    const [rows, columns] = [this.world.sent.length, this.world.ranks];
    const cell = Math.min((width - left - 4) / columns, (height - bottom - 4) / rows, 64);
    return { left, top: 2, cell, rows, columns };
  }

  #draw(context) {
    const { world } = this;
    if (!world || this.total === 0) return;
    const { left, top, cell, rows, columns } = this.#frame();
    const gap = cell >= 8 ? 1 : 0;
    const mean = this.total / (rows * columns);
    world.sent.forEach((row, source) => {
      row.forEach((tokens, rank) => {
        context.fillStyle = ink.css(ink.step(tokens / mean));
        context.fillRect(left + rank * cell, top + source * cell, cell - gap, cell - gap);
        if (rows !== columns || source !== rank || cell < 8) return;
        context.strokeStyle = ink.b;
        context.lineWidth = 1.5;
        context.strokeRect(left + rank * cell + 1, top + source * cell + 1, cell - gap - 2, cell - gap - 2);
      });
    });
    const every = labelStep(Math.max(rows, columns), (Math.max(rows, columns) * cell) / 24);
    for (let rank = 0; rank < columns; rank += every) text(context, rank, left + (rank + 0.5) * cell, top + rows * cell + 11, "center");
    for (let source = 0; source < rows; source += every) text(context, source, left - 7, top + (source + 0.5) * cell, "right");
    if (this.#pointed === null) return;
    context.strokeStyle = ink.ink;
    context.lineWidth = 2;
    const [x, y] = [this.#pointed % columns, Math.floor(this.#pointed / columns)];
    context.strokeRect(left + x * cell, top + y * cell, cell - gap, cell - gap);
  }

  #point(x, y) {
    if (!this.world) return;
    const { left, top, cell, rows, columns } = this.#frame();
    const [rank, source] = [Math.floor((x - left) / cell), Math.floor((y - top) / cell)];
    const inside = x !== null && rank >= 0 && rank < columns && source >= 0 && source < rows;
    this.#pointed = inside ? source * columns + rank : null;
    this.surface.paint();
    this.#read();
  }

  #read() {
    const { world } = this;
    if (this.total === 0) return fill($("traffic-reading"), "");
    const flat = world.sent.flat();
    const at = this.#pointed ?? largest(flat);
    const [source, rank] = [Math.floor(at / world.ranks), at % world.ranks];
    const lead = this.#pointed === null ? "Most: from" : "From";
    const stays = world.sent.length === world.ranks && source === rank;
    const size = stays ? ", which stay" : world.rowBytes > 0 ? `, ${bytes(flat[at] * world.rowBytes)} each way` : "";
    say($("traffic-reading"), `${lead} rank *${source}* to rank *${rank}*: ${count(flat[at])} tokens, *${percent(flat[at] / this.total)}* of all${size}`);
  }
}
