// Balancedness over time, with what chance costs and the changes of placement.

class BalanceChart {
  #pointed = null;

  constructor() {
    this.canvas = $("balance");
    this.surface = new Surface(this.canvas, (...all) => this.#draw(...all), (x) => this.#point(x));
    this.canvas.addEventListener("keydown", (event) => {
      const at = this.#pointed ?? this.points.length - 1;
      const to = moved(event.key, at, this.points.length);
      if (event.key === "Escape") this.#pointed = null;
      else if (to === null) return;
      else this.#pointed = to;
      event.preventDefault();
      this.surface.paint();
      this.#read();
    });
    this.points = [];
  }

  show(history, phase) {
    this.points = history.points.filter((point) => point[phase].balance !== null);
    this.marks = history.marks;
    this.phase = phase;
    if (this.#pointed !== null && this.#pointed >= this.points.length) this.#pointed = null;
    const marks = this.marks.length > 0 ? [key("mark", "placement changed")] : [];
    const told = this.marks.some((mark) => mark.predicted !== null) ? [key("said", "predicted")] : [];
    const seen = this.marks.some((mark) => mark.achieved !== null) ? [key("got", "achieved")] : [];
    fill($("balance-legend"), key("line", "balancedness"), key("chance", "cost of chance"), ...marks, ...told, ...seen);
    this.surface.paint();
    this.#read();
  }

  /** From the oldest point or the last two minutes, whichever is longer, until now. */
  #frame(width, height) {
    const [left, right, top, bottom] = [38, 12, 10, 24];
    const end = this.points.at(-1).time;
    const begin = Math.max(end - 600, Math.min(this.points[0].time, end - 120));
    const values = this.points.map((point) => point[this.phase].balance);
    values.push(...this.marks.flatMap((mark) => [mark.predicted ?? 1, mark.achieved ?? 1]));
    const low = Math.max(0, Math.floor(Math.min(...values) * 5 - 0.2) / 5);
    return {
      begin,
      end,
      low,
      x: (time) => left + ((time - begin) / (end - begin)) * (width - left - right),
      y: (value) => top + ((1 - Math.max(value, low)) / (1 - low)) * (height - top - bottom),
    };
  }

  #draw(context, width, height) {
    const { points, phase } = this;
    if (points.length < 2) {
      text(context, "waiting for the first seconds with tokens", width / 2, height / 2, "center");
      return;
    }
    const frame = this.#frame(width, height);
    const { x, y } = frame;
    this.#axes(context, frame, width, height);
    const runs = consecutive(points);
    for (const run of runs) {
      const line = (of) => run.forEach((point, i) => context[i ? "lineTo" : "moveTo"](x(point.time), y(of(point[phase]))));
      context.beginPath();
      line((view) => view.floor);
      context.lineTo(x(run.at(-1).time), y(1));
      context.lineTo(x(run[0].time), y(1));
      context.fillStyle = ink.chance;
      context.fill();
      context.beginPath();
      line((view) => view.balance);
      context.strokeStyle = ink.a;
      context.lineWidth = 2;
      context.lineJoin = "round";
      context.stroke();
    }
    this.#drawMarks(context, frame, height);
    const point = points[this.#pointed];
    if (point) {
      context.fillStyle = ink.a;
      context.beginPath();
      context.arc(x(point.time), y(point[phase].balance), 4.5, 0, 7);
      context.fill();
    }
  }

  #axes(context, { begin, end, low, x, y }, width, height) {
    context.lineWidth = 1;
    for (let value = 1; value > low - 1e-9; value -= low < 0.5 ? 0.2 : 0.1) {
      context.strokeStyle = value > 0.999 ? ink.line : ink.grid;
      context.beginPath();
      context.moveTo(x(begin), Math.round(y(value)) + 0.5);
      context.lineTo(width - 12, Math.round(y(value)) + 0.5);
      context.stroke();
      text(context, figures(value), x(begin) - 7, y(value), "right");
    }
    const step = [15, 30, 60, 120, 300].find((step) => (end - begin) / step <= Math.min(8, width / 90)) ?? 600;
    for (let ago = 0; ago <= end - begin; ago += step) {
      const words = ago === 0 ? "now" : ago < 60 ? `−${ago} s` : `−${figures(ago / 60)} min`;
      text(context, words, x(end - ago), height - 9, ago === 0 ? "right" : "center");
    }
  }

  #drawMarks(context, { begin, x, y }, height) {
    for (const mark of this.marks.filter((mark) => mark.unix_seconds >= begin)) {
      const at = x(mark.unix_seconds);
      context.strokeStyle = ink.soft;
      context.lineWidth = 1.5;
      context.setLineDash([4, 3]);
      context.beginPath();
      context.moveTo(at, 8);
      context.lineTo(at, height - 22);
      context.stroke();
      context.setLineDash([]);
      if (mark.predicted !== null) {
        const [px, py] = [at, y(mark.predicted)];
        context.strokeStyle = ink.c;
        context.lineWidth = 2;
        context.beginPath();
        [[0, -5], [5, 0], [0, 5], [-5, 0]].forEach(([dx, dy]) => context.lineTo(px + dx, py + dy));
        context.closePath();
        context.stroke();
      }
      if (mark.achieved !== null) {
        context.fillStyle = ink.b;
        context.beginPath();
        context.arc(at, y(mark.achieved), 4.5, 0, 7);
        context.fill();
      }
    }
  }

  #point(x) {
    if (this.points.length < 2) return;
    this.#pointed = null;
    if (x !== null) {
      const frame = this.#frame(this.canvas.clientWidth, this.canvas.clientHeight);
      const away = (point) => Math.abs(frame.x(point.time) - x);
      this.#pointed = this.points.reduce((best, point, i) => (away(point) < away(this.points[best]) ? i : best), 0);
    }
    this.surface.paint();
    this.#read();
  }

  #read() {
    const point = this.points[this.#pointed] ?? this.points.at(-1);
    if (!point) return fill($("balance-reading"), "");
    const { balance, floor } = point[this.phase];
    const ago = this.points.at(-1).time - point.time;
    const near = this.marks.findLast((mark) => Math.abs(mark.unix_seconds - point.time) <= 1);
    say(
      $("balance-reading"),
      `${ago < 1 ? "Latest second" : `${span(ago)} ago`}: *${balanced(balance)}*, the busiest ranks ${signed(1 / balance - 1)} against the mean; ` +
        `chance alone allows ${balanced(floor)}; ${count(point.rows)} expert rows${near ? `; placement ${near.placement_version} came into force${foreseen(near)}` : ""}`,
    );
  }
}

function foreseen({ predicted, achieved }) {
  const told = predicted === null ? "" : `, predicted ${balanced(predicted)}`;
  return achieved === null ? told : `${told}, achieved ${balanced(achieved)}`;
}

function key(kind, words) {
  return element("span", [element("i", "", { className: kind }), words]);
}

/** Points without a pause between them. */
function consecutive(points) {
  const runs = [];
  for (const point of points) {
    const run = runs.at(-1);
    if (run && point.time - run.at(-1).time < 3.5) run.push(point);
    else runs.push([point]);
  }
  return runs;
}
