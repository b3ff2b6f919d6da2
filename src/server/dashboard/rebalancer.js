// The rebalancer in words: what it does, why, and what came of it.

function showRebalancer(state) {
  const { mode, decision, last_applied: move, migration } = state;
  const age = ages(state);
  const parts = [element("p", opening(state), { className: "lead" })];
  if (migration) {
    const share = migration.total_bytes === 0 ? 0 : migration.bytes / migration.total_bytes;
    const bar = element("progress", "", { value: share, max: 1 });
    const words = ` ${migration.arrived} of ${many(migration.arrivals, "expert")} have arrived, ${bytes(migration.bytes)} of ${bytes(migration.total_bytes)}`;
    parts.push(element("p", [element("b", "Experts are moving: "), bar, words]));
  }
  if (move) parts.push(element("p", [element("b", `Moved experts ${span(age.last_applied)} ago: `), move.reason]));
  if (decision && !decision.applied) {
    parts.push(element("p", [element("b", `Left them where they are ${span(age.decision)} ago: `), decision.reason]));
  }
  const { applied, skipped, failed } = state.rebalances;
  const figure = (name, value) => [element("dt", name), element("dd", value)];
  const facts = [figure("Placement", `version ${state.placement_version}, in force for ${span(age.placement)}`)];
  if (move) {
    const { before, after, bound } = move.balancedness;
    const came = state.achieved_balancedness === null ? "" : `; ${balanced(state.achieved_balancedness)} achieved`;
    facts.push(figure("Balancedness", `${balanced(before)} before, ${balanced(after)} predicted, ${balanced(bound)} at best with these slots${came}`));
    facts.push(figure("Price", `${many(move.moves, "expert")}, ${bytes(move.bytes)}, for ${figures(move.gain_us_per_step)} µs per step`));
  }
  if (decision) facts.push(figure("Chance alone costs", `${percent(decision.sampling_floor_ratio)} in a step of this size`));
  if (applied + skipped + failed > 0 || mode !== "off") {
    facts.push(figure("Since the start", `${applied} applied, ${skipped} skipped, ${failed} failed; ${many(state.moved_experts, "expert")} moved, ${bytes(state.moved_bytes)}`));
  }
  if (age.look !== null) facts.push(figure("Last look at the load", `${span(age.look)} ago`));
  parts.push(element("dl", facts.flat()));
  fill($("rebalancer-text"), ...parts);
}

/** As of now: an answer that has not changed since is older by that time. */
function ages({ age_seconds: then, received_ms: received }) {
  const since = (performance.now() - received) / 1000;
  return Object.fromEntries(Object.entries(then).map(([what, age]) => [what, age === null ? null : age + since]));
}

function opening({ mode, policy, window_steps: steps }) {
  if (mode === "off") return "Off: experts stay where they are until someone moves them (--rebalance).";
  const when = mode === "auto" ? "Acts when the gain is expected to outweigh the move" : `Looks every ${mode.replace("every=", "")} steps`;
  return `${when}; policy ${policy}, on the load of ${many(steps, "step")}.`;
}

/** Asks what a rebalance would bring, and then for it. */
class Actions {
  constructor(api) {
    this.api = api;
    $("ask").addEventListener("click", () => this.#send(true));
    $("act").addEventListener("click", () => this.#send(false));
  }

  async #send(dry) {
    for (const id of ["ask", "act"]) $(id).disabled = true;
    $("act").hidden = true;
    try {
      const change = await this.api.post("v1/experts/rebalance", { dry_run: dry });
      $("act").hidden = !dry || change.moves === 0;
      this.#say(sentence(change));
    } catch (error) {
      this.#say(error instanceof Refused ? error.message : "the server does not answer", "bad");
    }
    for (const id of ["ask", "act"]) $(id).disabled = false;
  }

  #say(words, kind = "") {
    $("proposal").className = kind;
    fill($("proposal"), words);
  }
}

function sentence({ started, moves, bytes: size, gain_ratio: gain, reason }) {
  const said = reason[0].toUpperCase() + reason.slice(1);
  if (moves === 0) return `${said}.`;
  const saved = gain === null ? "" : `; the busiest ranks compute ${percent(Math.max(0, gain))} less`;
  return started ? `${many(moves, "expert")} are on their way, ${bytes(size)}${saved}.` : `${said}: ${bytes(size)}${saved}.`;
}
