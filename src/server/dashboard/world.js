// What the answers mean: shares, means, owners. Plain data, no drawing.

const sum = (row) => row.reduce((a, b) => a + b, 0);
const largest = (row) => row.reduce((best, n, i) => (n > row[best] ? i : best), 0);
const balancedness = (ratio) => 1 / (1 + ratio);

/** A window of load under a placement. Layers are counted from 0 among the MoE layers. */
class World {
  constructor(load, placement, phase) {
    this.seconds = load.window_seconds;
    this.version = load.placement_version;
    this.layerIds = load.layer_ids;
    this.experts = load.experts;
    this.ranks = load.ranks;
    this.tokens = load.expert_tokens[phase];
    this.rankTokens = load.rank_tokens[phase];
    this.sent = load.sent_tokens[phase];
    this.rowBytes = load.row_bytes;
    this.layerTotals = this.tokens.map(sum);
    this.total = sum(this.layerTotals);
    this.owners = placement === null ? null : ownersOf(placement, this.experts);
    this.slots = placement === null ? 0 : placement.ranks * placement.slots_per_rank;
  }

  get layers() {
    return this.layerIds.length;
  }

  /** Tokens of an expert over the mean of its layer; 0 in a layer without tokens. */
  heat(layer, expert) {
    const total = this.layerTotals[layer];
    return total === 0 ? 0 : (this.tokens[layer][expert] * this.experts) / total;
  }

  share(layer, expert) {
    const total = this.layerTotals[layer];
    return total === 0 ? 0 : this.tokens[layer][expert] / total;
  }

  /** Tokens of each rank in a layer, or over all layers for `null`. */
  rankLoad(layer) {
    if (layer !== null) return this.rankTokens[layer];
    return Array.from({ length: this.ranks }, (_, rank) => sum(this.rankTokens.map((row) => row[rank])));
  }

  /** Busiest rank of a layer over the mean rank, minus 1. */
  imbalance(layer) {
    const row = this.rankTokens[layer];
    const all = sum(row);
    return all === 0 ? 0 : (Math.max(...row) * this.ranks) / all - 1;
  }

  /** Mean rank load over the highest, as the mean over layers. */
  balance() {
    return sum(this.layerIds.map((_, layer) => balancedness(this.imbalance(layer)))) / this.layers;
  }

  /** Layer and expert with most tokens over the mean of their layer. */
  hottest() {
    let best = { layer: 0, expert: 0, heat: -1 };
    this.tokens.forEach((row, layer) => {
      const expert = largest(row);
      const heat = this.heat(layer, expert);
      if (heat > best.heat) best = { layer, expert, heat };
    });
    return best;
  }

  /** Experts of a layer with several copies. */
  replicated(layer) {
    const copies = this.owners[layer].map((ranks, expert) => ({ layer, expert, ranks }));
    return copies.filter(({ ranks }) => ranks.length > 1);
  }

  /** Share of tokens that leave their rank; `null` where several ranks share an expert and "own" has no meaning. */
  away() {
    const all = sum(this.sent.map(sum));
    if (this.sent.length !== this.ranks || all === 0) return null;
    return 1 - sum(this.sent.map((row, source) => row[source])) / all;
  }
}

/** `[layer][expert]`: the rank of each of its copies. */
function ownersOf(placement, experts) {
  return placement.physical_to_logical_map.map((slots) => {
    const owners = Array.from({ length: experts }, () => []);
    slots.forEach((expert, slot) => {
      if (expert >= 0) owners[expert].push(Math.floor(slot / placement.slots_per_rank));
    });
    return owners;
  });
}

/** The balance of the last minutes, put together from what each poll brings. */
class History {
  #next = 0;
  points = [];
  marks = [];

  get path() {
    return `v1/experts/balance?since=${this.#next}`;
  }

  add(news) {
    // A server that started anew counts from the beginning.
    if (news.next < this.#next) this.points = [];
    this.#next = news.next;
    this.marks = news.marks;
    const at = new Map(this.points.map((point) => [point.number, point]));
    news.unix_seconds.forEach((time, i) => {
      const number = news.first + i;
      const view = (phase) => ({
        balance: news.balancedness[phase][i],
        floor: news.sampling_floor_ratio[phase][i] === null ? null : balancedness(news.sampling_floor_ratio[phase][i]),
      });
      at.set(number, { number, time, rows: news.rows[i], both: view("both"), prefill: view("prefill"), decode: view("decode") });
    });
    const latest = news.unix_seconds.at(-1) ?? this.points.at(-1)?.time ?? 0;
    this.points = [...at.values()].filter((point) => point.time > latest - 600);
  }
}
