// The heat map: a row per layer, a column per expert, and how uneven the ranks are in each layer.

class Heat {
  /** Cell under the pointer, and the chosen one: `{layer, expert}` or `null`. */
  #pointed = null;
  chosen = null;
  /** `[layer]`: experts from left to right, and what that is called where it is not by number. */
  #order = [];
  #caption = "";

  constructor(chose) {
    this.chose = chose;
    this.canvas = $("heat");
    this.surface = new Surface(this.canvas, (...all) => this.#draw(...all), (...all) => this.#point(...all));
    this.image = document.createElement("canvas");
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  show(world, order) {
    this.world = world;
    this.#caption = { load: "most tokens first", rank: "by the rank of the first copy" }[order] ?? "";
    this.#order = world.tokens.map((row, layer) => inOrder(world, row, layer, order));
    const bar = world.ranks > 1 ? 64 : 0;
    const rows = world.layers;
    this.box = { left: 34, top: 2, bar, row: Math.max(9, Math.min(30, Math.round(420 / rows))) };
    // Narrower cells could not be hit by a finger: the map scrolls instead.
    const least = this.box.left + bar + world.experts * (world.experts > 64 ? 3 : 8);
    this.canvas.style.minWidth = `${least}px`;
    this.canvas.style.width = "100%";
    this.canvas.style.height = `${this.box.top + rows * this.box.row + 22}px`;
    this.surface.paint();
    this.#read();
  }

  #draw(context, width, height) {
    const { world } = this;
    if (!world) return;
    const { left, top, bar, row } = this.box;
    const cells = width - left - bar;
    const column = cells / world.experts;
    if (column >= 6) this.#large(context, column);
    else this.#small(context, cells);
    const labels = labelStep(world.layers, (world.layers * row) / 15);
    world.layerIds.forEach((id, layer) => {
      if (layer % labels === 0) text(context, id, left - 7, top + (layer + 0.5) * row, "right");
      if (bar === 0) return;
      const share = Math.min(1, world.imbalance(layer));
      context.fillStyle = ink.grid;
      context.fillRect(width - bar + 10, top + layer * row + row / 2 - 0.5, bar - 10, 1);
      context.fillStyle = ink.b;
      context.fillRect(width - bar + 10, top + (layer + 0.15) * row, Math.max(1, share * (bar - 10)), row * 0.7);
    });
    const below = top + world.layers * row + 12;
    if (this.#caption) text(context, this.#caption, left, below, "left");
    // In another order than by number, a column has no number of its own.
    const every = labelStep(world.experts, cells / 46);
    for (let expert = 0; expert < world.experts && !this.#caption; expert += every) {
      text(context, expert, left + (expert + 0.5) * column, below, "center");
    }
    if (bar > 0) text(context, "ranks", width - bar + 10, below, "left");
    for (const cell of [this.chosen, this.#pointed]) {
      if (cell === null) continue;
      const at = this.#order[cell.layer].indexOf(cell.expert);
      context.strokeStyle = cell === this.#pointed ? ink.ink : ink.b;
      context.lineWidth = 2;
      const wide = Math.max(column, 5);
      context.strokeRect(left + (at + 0.5) * column - wide / 2, top + cell.layer * row, wide, row);
      if (cell === this.chosen) context.strokeRect(left - 1, top + cell.layer * row, cells + 2, row);
    }
  }

  #large(context, column) {
    const { left, top, row } = this.box;
    this.#order.forEach((experts, layer) => {
      experts.forEach((expert, at) => {
        context.fillStyle = ink.css(ink.step(this.world.heat(layer, expert)));
        context.fillRect(left + at * column, top + layer * row, column - 1, row - 1);
      });
    });
  }

  /** A pixel per cell, enlarged: what 15,000 cells a second want. */
  #small(context, cells) {
    const { world, image } = this;
    const { left, top, row } = this.box;
    Object.assign(image, { width: world.experts, height: world.layers });
    const small = image.getContext("2d");
    const pixels = small.createImageData(world.experts, world.layers);
    this.#order.forEach((experts, layer) => {
      experts.forEach((expert, at) => {
        const colour = ink.ramp[ink.step(world.heat(layer, expert))];
        pixels.data.set(colour, 4 * (layer * world.experts + at));
        pixels.data[4 * (layer * world.experts + at) + 3] = 255;
      });
    });
    small.putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(image, left, top, cells, world.layers * row);
    context.fillStyle = ink.card;
    if (row >= 6) for (let layer = 1; layer < world.layers; layer += 1) context.fillRect(left, top + layer * row - 1, cells, 1);
  }

  #point(x, y, pressed) {
    const { world } = this;
    if (!world) return;
    const { left, top, bar, row } = this.box;
    const layer = Math.floor((y - top) / row);
    const at = Math.floor(((x - left) / (this.canvas.clientWidth - left - bar)) * world.experts);
    const inside = x !== null && layer >= 0 && layer < world.layers && at < world.experts;
    const cell = inside ? { layer, expert: this.#order[layer][Math.max(0, at)] } : null;
    if (pressed && cell) {
      const again = this.chosen?.layer === cell.layer && this.chosen.expert === cell.expert;
      this.choose(again ? null : cell);
    }
    this.#pointed = pressed ? null : cell;
    this.surface.paint();
    this.#read();
  }

  #key(event) {
    const { world } = this;
    if (!world) return;
    if (event.key === "Escape") return this.choose(null);
    const { layer, expert } = this.chosen ?? world.hottest();
    const at = layer * world.experts + this.#order[layer].indexOf(expert);
    const to = moved(event.key, at, world.layers * world.experts, world.experts);
    if (to === null) return;
    event.preventDefault();
    const row = Math.floor(to / world.experts);
    this.choose({ layer: row, expert: this.#order[row][to % world.experts] });
  }

  choose(cell) {
    this.chosen = cell;
    this.chose();
    this.surface.paint();
    this.#read();
  }

  #read() {
    const { world } = this;
    if (world.total === 0) return say($("heat-reading"), "No tokens in this window.");
    const cell = this.#pointed ?? this.chosen ?? world.hottest();
    const lead = this.#pointed || this.chosen ? "Layer" : "Hottest: layer";
    const { layer, expert } = cell;
    const ranks = world.owners?.[layer][expert] ?? [];
    const copies = ranks.length > 1 ? `${ranks.length} copies on ranks ${list(ranks)}` : `on rank ${ranks[0] ?? "?"}`;
    say(
      $("heat-reading"),
      `${lead} *${world.layerIds[layer]}*, expert *${expert}*: ${count(world.tokens[layer][expert])} tokens, ` +
        `${percent(world.share(layer, expert))} of the layer, *${figures(world.heat(layer, expert))} ×* the mean; ${copies}`,
    );
  }
}

/** Experts of a layer from left to right. */
function inOrder(world, row, layer, order) {
  const experts = row.map((_, expert) => expert);
  if (order === "load") experts.sort((a, b) => row[b] - row[a] || a - b);
  if (order === "rank" && world.owners) experts.sort((a, b) => world.owners[layer][a][0] - world.owners[layer][b][0] || a - b);
  return experts;
}

/** The legend's colours, which have the numbers of the style sheet. */
function paintLegend() {
  const canvas = $("heat-legend").querySelector("canvas");
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x += 1) {
    context.fillStyle = ink.css(Math.round((x / (canvas.width - 1)) * (STEPS - 1)));
    context.fillRect(x, 0, 1, canvas.height);
  }
}
