// A column per rank, against the mean.

class Ranks {
  #pointed = null;

  constructor() {
    this.canvas = $("ranks");
    this.surface = new Surface(this.canvas, (...all) => this.#draw(...all), (x) => this.#point(x));
    this.canvas.addEventListener("keydown", (event) => {
      const to = moved(event.key, this.#pointed ?? largest(this.load), this.load.length);
      if (event.key !== "Escape" && to === null) return;
      event.preventDefault();
      this.#pointed = to;
      this.surface.paint();
      this.#read();
    });
  }

  show(world, layer) {
    this.load = world.rankLoad(layer);
    this.mean = sum(this.load) / this.load.length;
    const where = layer === null ? "All layers together; choose one in the map to see it alone." : `Layer ${world.layerIds[layer]} alone.`;
    fill($("ranks-lead"), `Tokens that each rank's experts computed, the line is the mean. ${where}`);
    this.surface.paint();
    this.#read();
  }

  #draw(context, width, height) {
    if (!this.load || this.mean === 0) return;
    const [left, top, bottom] = [40, 10, 22];
    const high = Math.max(1.25, Math.max(...this.load) / this.mean);
    const y = (times) => top + (1 - times / high) * (height - top - bottom);
    const step = high > 8 ? 4 : high > 4 ? 2 : high > 2 ? 1 : 0.5;
    for (let times = 0; times <= high; times += step) {
      context.fillStyle = ink.grid;
      context.fillRect(left, Math.round(y(times)), width - left, 1);
      text(context, `${figures(times)} ×`, left - 7, y(times), "right");
    }
    const column = (width - left) / this.load.length;
    const wide = Math.min(56, column * 0.76);
    const every = labelStep(this.load.length, (width - left) / 26);
    this.load.forEach((tokens, rank) => {
      const times = tokens / this.mean;
      const x = left + (rank + 0.5) * column;
      context.fillStyle = times > 1.1 ? ink.b : ink.a;
      context.globalAlpha = this.#pointed === null || this.#pointed === rank ? 1 : 0.55;
      context.fillRect(x - wide / 2, y(times), wide, y(0) - y(times));
      context.globalAlpha = 1;
      if (rank % every === 0) text(context, rank, x, height - 9, "center");
    });
    context.fillStyle = ink.ink;
    context.fillRect(left, Math.round(y(1)) - 0.75, width - left, 1.5);
  }

  #point(x) {
    if (!this.load) return;
    const rank = Math.floor(((x - 40) / (this.canvas.clientWidth - 40)) * this.load.length);
    this.#pointed = x === null || rank < 0 ? null : Math.min(rank, this.load.length - 1);
    this.surface.paint();
    this.#read();
  }

  #read() {
    if (this.mean === 0) return fill($("ranks-reading"), "");
    const rank = this.#pointed ?? largest(this.load);
    const lead = this.#pointed === null ? "Busiest: rank" : "Rank";
    say($("ranks-reading"), `${lead} *${rank}*: ${count(this.load[rank])} tokens, *${signed(this.load[rank] / this.mean - 1)}* against the mean`);
  }
}
