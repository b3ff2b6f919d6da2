// Experts with several copies, the hottest first.

const SHOWN = 12;

function showReplicas(world, layer, choose) {
  if (!world.owners) return;
  const layers = layer === null ? world.layerIds.map((_, index) => index) : [layer];
  const all = layers.flatMap((index) => world.replicated(index));
  const spare = world.slots - world.experts;
  const where = layer === null ? "" : ` in layer ${world.layerIds[layer]}`;
  const slots = spare === 0 ? "Every layer has one slot per expert, so no expert can have a second copy (--redundant-experts gives more)." : `${many(spare, "slot")} per layer beyond one per expert.`;
  const most = layer === null ? SHOWN : all.length;
  const cut = all.length > most ? `; these are the hottest ${most}, choose a layer to see all of its own` : "";
  const copies = spare === 0 ? "" : all.length === 0 ? ` No expert has a second copy${where}.` : ` ${many(all.length, "expert")}${where} with several copies${cut}.`;
  fill($("replicas-lead"), slots + copies);
  all.sort((a, b) => world.heat(b.layer, b.expert) - world.heat(a.layer, a.expert));
  const names = ["layer", "expert", "copies", "on ranks", "× mean", "tokens"];
  const head = element("thead", element("tr", names.map((name) => element("th", name))));
  const row = ({ layer, expert, ranks }) => {
    const open = element("button", String(world.layerIds[layer]), { type: "button", title: "show this layer" });
    open.addEventListener("click", () => choose({ layer, expert }));
    const cells = [open, expert, ranks.length, list(ranks), figures(world.heat(layer, expert)), count(world.tokens[layer][expert])];
    return element("tr", cells.map((cell) => element("td", cell instanceof Node ? cell : String(cell))));
  };
  const rows = all.slice(0, most).map(row);
  fill($("replicas"), ...(rows.length === 0 ? [] : [head, element("tbody", rows)]));
}
