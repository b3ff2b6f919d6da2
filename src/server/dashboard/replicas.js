// Experts with several copies, the hottest first.

const SHOWN = 40;

function showReplicas(world, layer, choose) {
  if (!world.owners) return;
  const layers = layer === null ? world.layerIds.map((_, index) => index) : [layer];
  const all = layers.flatMap((index) => world.replicated(index));
  const spare = world.slots - world.experts;
  const where = layer === null ? "" : ` in layer ${world.layerIds[layer]}`;
  const slots = spare === 0 ? "Every layer has one slot per expert, so no expert can have a second copy (--redundant-experts gives more)." : `${many(spare, "slot")} per layer beyond one per expert.`;
  const copies = spare === 0 ? "" : all.length === 0 ? ` No expert has a second copy${where}.` : ` ${many(all.length, "expert")}${where} with several copies${all.length > SHOWN ? `, the hottest ${SHOWN} are listed` : ""}.`;
  fill($("replicas-lead"), slots + copies);
  all.sort((a, b) => world.heat(b.layer, b.expert) - world.heat(a.layer, a.expert));
  const head = element("thead", element("tr", ["layer", "expert", "copies", "tokens", "× mean", "on ranks"].map((name) => element("th", name))));
  const row = ({ layer, expert, ranks }) => {
    const open = element("button", String(world.layerIds[layer]), { type: "button", title: "show this layer" });
    open.addEventListener("click", () => choose({ layer, expert }));
    const cells = [open, expert, ranks.length, count(world.tokens[layer][expert]), figures(world.heat(layer, expert)), list(ranks)];
    return element("tr", cells.map((cell) => element("td", cell instanceof Node ? cell : String(cell))));
  };
  const rows = all.slice(0, SHOWN).map(row);
  fill($("replicas"), ...(rows.length === 0 ? [] : [head, element("tbody", rows)]));
}
