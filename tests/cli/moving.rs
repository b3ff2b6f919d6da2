//! Experts of a served model move by HTTP while it answers: the texts stay those of the golden file.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::patience::eventually;
use crate::process::Served;
use crate::support::{Golden, model_dir};

/// Layers, experts, ranks and slots per rank of the embedded model here.
const SHAPE: (usize, usize, usize, usize) = (6, 8, 2, 6);

/// Ends what goes on while the flag is set, when a test ends or fails.
struct Ended<'a>(&'a AtomicBool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// The same map in every layer.
fn file(map: &[i32]) -> String {
    let (layers, _, ranks, slots_per_rank) = SHAPE;
    assert_eq!(map.len(), ranks * slots_per_rank);
    json!({
        "version": 1, "ranks": ranks, "slots_per_rank": slots_per_rank, "layer_ids": (0..layers).collect::<Vec<_>>(),
        "physical_to_logical_map": vec![map; layers],
    })
    .to_string()
}

fn state(server: &Served) -> Value {
    server.client().get("/v1/experts/rebalance").json()
}

/// Waits until the experts are where a change brought them.
fn arrived(server: &Served, change: &Value) {
    let target = change["target_version"].as_u64().unwrap_or_else(|| panic!("nothing moves: {change}"));
    eventually("they have arrived", || {
        let state = state(server);
        state["placement_version"] == target && state["migration"].is_null()
    });
}

#[test]
fn texts_stay_as_they_are_while_experts_move() {
    let empty = TempDir::new().unwrap();
    let flags = "--dtype f32 --threads 1 --kv-cache-memory 16MiB --expert-parallel-size 2 --redundant-experts 4 --rebalance off";
    let server = Served::start(empty.path(), flags.split(' '));
    let golden = Golden::open(&model_dir("demo-mixtral")).json;
    let prompts = &golden["prompts"].as_array().unwrap()[..3];
    let (moving, texts) = (AtomicBool::new(true), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let _end = Ended(&moving);
        for prompt in prompts {
            let (server, moving, texts) = (&server, &moving, &texts);
            scope.spawn(move || {
                let ask = json!({"prompt": prompt["prompt"], "max_tokens": 48, "temperature": 0, "ignore_eos": true});
                while moving.load(Ordering::Relaxed) {
                    let answer = server.client().post("/v1/completions", &ask).json();
                    assert_eq!(answer["choices"][0]["text"], prompt["f32_text"], "{answer}");
                    texts.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let maps = [
            [7, 6, 5, 4, 3, 2, 1, 0, 7, 7, -1, 6],
            [0, 2, 4, 6, 0, 2, 1, 3, 5, 7, 1, 3],
            [0, 1, 2, 3, -1, -1, 4, 5, 6, 7, -1, -1],
        ];
        for map in maps.iter().chain(&maps) {
            let put = server.client().request("PUT", "/v1/experts/placement", &[], file(map).as_bytes());
            assert_eq!(put.status, 202, "{}", put.body);
            arrived(&server, &put.json());
            let now = server.client().get("/v1/experts/placement").json();
            assert_eq!(now["physical_to_logical_map"][5], json!(map));
        }
        // Without any load, nothing would be planned.
        eventually("there was some load", || texts.load(Ordering::Relaxed) >= 3);
        let planned = server.client().post("/v1/experts/rebalance", &json!({}));
        assert_eq!(planned.status, 202, "{}", planned.body);
        arrived(&server, &planned.json());
        let forecast = &planned.json()["balancedness"];
        assert!(forecast["after"].as_f64() > forecast["before"].as_f64(), "{forecast}");
    });
    let page = server.client().get("/metrics").body;
    let value = |series: &str| -> f64 {
        let line = page.lines().find_map(|line| line.strip_prefix(series));
        line.unwrap_or_else(|| panic!("{series} is not in\n{page}")).trim().parse().unwrap()
    };
    assert_eq!(value("moeyard_rebalances_total{outcome=\"applied\"}"), 7.0);
    assert_eq!(value("moeyard_rebalance_duration_seconds_count"), 7.0);
    let moved = value("moeyard_rebalance_moved_bytes_total");
    let sent =
        |rank| value(&format!("moeyard_comm_bytes_total{{rank=\"{rank}\",op=\"migrate\",dir=\"sent\"}}"));
    assert!(moved > 0.0 && sent(0) > 0.0 && sent(0) + sent(1) <= moved, "{moved} bytes moved");
    let (code, log) = server.terminate();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("given up"), "{log}");
}
