// Speaks with the server: the key, entity tags, one answer at a time.

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The routes, relative to this page, so that a proxy may put the server below a path. */
class Api {
  #key = sessionStorage.getItem("moeyard-key");
  /** Latest answer by path. */
  #known = new Map();

  /** For this tab only; `null` forgets. */
  set key(key) {
    this.#key = key;
    this.#known.clear();
    if (key === null) sessionStorage.removeItem("moeyard-key");
    else sessionStorage.setItem("moeyard-key", key);
  }

  get hasKey() {
    return this.#key !== null;
  }

  /** What a route says; the same object as before when nothing changed. `slot` names what may replace what. */
  async get(path, slot = path) {
    const known = this.#known.get(slot);
    const headers = known?.path === path ? { "If-None-Match": known.tag } : {};
    const response = await this.#send("GET", path, headers);
    if (response.status === 304) return known.answer;
    const answer = await response.json();
    answer.received_ms = performance.now();
    const version = response.headers.get("x-placement-version");
    if (version !== null) answer.placement_version = Number(version);
    this.#known.set(slot, { path, tag: response.headers.get("etag"), answer });
    return answer;
  }

  async post(path, body) {
    const response = await this.#send("POST", path, { "Content-Type": "application/json" }, JSON.stringify(body));
    return response.json();
  }

  async #send(method, path, headers, body) {
    if (this.#key !== null) headers.Authorization = `Bearer ${this.#key}`;
    const options = { method, headers, body, cache: "no-store", signal: AbortSignal.timeout(10000) };
    const response = await fetch(path, options);
    if (response.ok || response.status === 304) return response;
    const said = await response.json().catch(() => null);
    throw new Refused(response.status, said?.error?.message ?? `the server answered ${response.status}`);
  }
}
