// Puts the parts together: asks once a second while the page is seen, and shows what came.

const api = new Api();
const past = new History();
const heat = new Heat(() => render());
const balance = new BalanceChart();
const ranks = new Ranks();
const traffic = new Traffic();
new Actions(api);

const PERIOD_MS = 1000;
/** After a failure the server is asked less often. */
const PATIENCE_MS = 4000;

let latest = null;
let placement = null;
let timer = null;
/** Counts the polls begun, so that one that was overtaken is not shown. */
let turn = 0;

const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;

async function poll() {
  clearTimeout(timer);
  const own = ++turn;
  let wait = PERIOD_MS;
  try {
    const phase = chosen("phase");
    const path = `v1/experts?window=${chosen("window")}s&phase=${phase}&owners=false`;
    const asked = [api.get(path, "load"), api.get(past.path, "balance"), api.get("v1/experts/rebalance")];
    const [load, news, state] = await Promise.all(asked);
    if (own !== turn) return;
    if (placement?.placement_version !== load.placement_version) placement = await api.get("v1/experts/placement");
    if (own !== turn) return;
    past.add(news);
    latest = { load, phase, state };
    pulse("live", `live, last ${span(Math.max(1, load.window_seconds))}`);
    render();
  } catch (error) {
    if (own !== turn) return;
    wait = PATIENCE_MS;
    if (error.status === 401) return lock();
    pulse("lost", error instanceof Refused ? error.message : "the server does not answer");
  }
  if (!document.hidden) timer = setTimeout(poll, wait);
}

function render() {
  if (latest === null) return;
  const { load, phase, state } = latest;
  const world = new World(load, placement, phase);
  const layer = heat.chosen?.layer ?? null;
  $("locked").hidden = true;
  const quiet = world.total === 0 && past.points.length === 0;
  $("empty").hidden = !quiet;
  $("live").hidden = quiet;
  fill($("subject"), `${many(world.layers, "MoE layer")} of ${many(world.experts, "expert")} on ${many(world.ranks, "rank")}`);
  if (quiet) return showExample();
  // A single rank has nothing to balance.
  for (const part of document.querySelectorAll(".several")) part.hidden = world.ranks === 1;
  heat.show(world, chosen("order"));
  $("all-layers").hidden = layer === null;
  balance.show(past, phase);
  ranks.show(world, layer);
  traffic.show(world);
  showReplicas(world, layer, (cell) => heat.choose(cell));
  showRebalancer(state);
  showTiles(world, state);
}

function showExample() {
  const key = api.hasKey ? " -H 'Authorization: Bearer KEY'" : "";
  const url = new URL("v1/completions", location.href);
  fill($("example"), `curl ${url}${key} -H 'content-type: application/json' \\\n  -d '{"prompt": "Once upon a time", "max_tokens": 100}'`);
}

function showTiles(world, state) {
  const now = world.balance();
  const hot = world.hottest();
  const load = world.rankLoad(null);
  const busiest = largest(load);
  const uneven = world.layerIds.map((_, layer) => world.imbalance(layer));
  const worst = largest(uneven);
  const one = world.ranks === 1;
  fill(
    $("tiles"),
    tile("Balancedness", balanced(now), one ? "one rank has all experts" : `busiest ranks ${signed(1 / now - 1)} against the mean`),
    tile("Expert rows per second", count(world.total / Math.max(world.seconds, 1e-3)), `${count(world.total)} in ${span(Math.max(1, world.seconds))}`),
    tile("Hottest expert", `${figures(hot.heat)} × mean`, `expert ${hot.expert} of layer ${world.layerIds[hot.layer]}`),
    tile("Most uneven layer", one ? "none" : signed(uneven[worst]), one ? "there is one rank" : `layer ${world.layerIds[worst]}; over all, rank ${busiest} has most`),
    tile("Placement", `version ${world.version}`, `for ${span(ages(state).placement)}; ${world.slots > world.experts ? `${world.slots - world.experts} extra slots per layer` : "one slot per expert"}`),
  );
}

function tile(name, value, note) {
  return element("div", [element("span", name), element("b", value), element("i", note)], { className: "tile" });
}

function pulse(state, words) {
  $("pulse").className = state;
  fill($("pulse").querySelector("span"), words);
}

/** Asks for the key; the polls go on with the one that is given. */
function lock() {
  pulse("lost", "locked");
  $("live").hidden = true;
  $("empty").hidden = true;
  const first = $("locked").hidden;
  $("locked").hidden = false;
  fill($("refused"), api.hasKey ? "This key is wrong." : "");
  api.key = null;
  if (first) $("secret").focus();
}

$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  api.key = $("secret").value.trim();
  $("secret").value = "";
  poll();
});

for (const name of ["phase", "window"]) $(name).addEventListener("change", poll);
$("order").addEventListener("change", render);
$("all-layers").addEventListener("click", () => heat.choose(null));
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : poll()));
matchMedia("(prefers-color-scheme:dark)").addEventListener("change", () => {
  ink.read();
  paintLegend();
  render();
});

ink.read();
paintLegend();
poll();
