// A canvas that is sharp on every screen, follows its box and the light or dark setting, and tells where it is pointed at.

const STEPS = 128;

/** The style sheet's colours, read again when the setting changes. */
const ink = {
  read() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["card", "ink", "soft", "line", "grid", "a", "b", "c", "f", "chance"]) {
      this[name] = style.getPropertyValue(`--${name}`).trim();
    }
    const ends = Array.from({ length: 9 }, (_, level) => style.getPropertyValue(`--h${level}`).trim());
    const channels = ends.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
    /** From ⅛ to 16 times the mean in equal ratios. */
    this.ramp = Array.from({ length: STEPS }, (_, step) => {
      const at = (step / (STEPS - 1)) * 8;
      const [low, high] = [channels[Math.floor(at)], channels[Math.ceil(at)]];
      return low.map((channel, i) => Math.round(channel + (high[i] - channel) * (at % 1)));
    });
    this.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  },
  /** The step of the ramp for a load in times of the mean: the legend's ticks lie where the levels of a report lie. */
  step(heat) {
    if (heat <= 0) return 0;
    const at = (Math.log2(heat) + 3.5) / 8;
    return Math.max(0, Math.min(STEPS - 1, Math.round(at * (STEPS - 1))));
  },
  css(step) {
    return `rgb(${this.ramp[step].join(" ")})`;
  },
};

class Surface {
  /** `draw(context, width, height)` in CSS pixels; `point(x, y, pressed)` with `null` for x when the pointer left. */
  constructor(canvas, draw, point) {
    this.canvas = canvas;
    this.draw = draw;
    this.context = canvas.getContext("2d");
    new ResizeObserver(() => this.paint()).observe(canvas);
    const at = (event) => [event.offsetX, event.offsetY];
    canvas.addEventListener("pointermove", (event) => point(...at(event), false));
    canvas.addEventListener("click", (event) => point(...at(event), true));
    canvas.addEventListener("pointerleave", () => point(null, null, false));
  }

  paint() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (width === 0 || height === 0) return;
    const scale = devicePixelRatio || 1;
    const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
    if (this.canvas.width !== w || this.canvas.height !== h) Object.assign(this.canvas, { width: w, height: h });
    const { context } = this;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = ink.font;
    context.textBaseline = "middle";
    this.draw(context, width, height);
  }
}

/** Every how many of `n` a label stands when there is room for `most`: 1, 2, 4, 5, 8, 10, 16, 20, 32, ... */
function labelStep(n, most) {
  const steps = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384];
  return steps.find((step) => n / step <= most) ?? n;
}

/** Moves within a row or a grid by the keyboard; `null` for keys that mean nothing. */
function moved(key, at, count, columns = count) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -at, End: count - 1 - at };
  if (!(key in steps)) return null;
  const to = at + steps[key];
  return to < 0 || to >= count ? at : to;
}

function text(context, words, x, y, align, colour = ink.soft) {
  context.fillStyle = colour;
  context.textAlign = align;
  context.fillText(words, x, y);
}
