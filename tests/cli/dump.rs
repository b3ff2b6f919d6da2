//! Compares a dump with a fixture's golden outputs, as tests/fixtures/check_fixture.py does for f32.

use serde_json::Value;

use crate::support::{Golden, ids};

/// Asserts that every part of the golden file is in the dump, within the golden's tolerances.
pub fn check(what: &str, golden: &Golden, dump: &Golden) {
    assert_eq!(dump.json["schema"], "moe-fixture-dump/1", "{what}");
    assert_eq!(dump.json["fixture"], golden.json["fixture"], "{what}");
    for key in ["tokenizer", "chats"] {
        check_texts(&format!("{what} {key}"), list(&golden.json[key]), list(&dump.json[key]));
    }
    let (expected, found) = (list(&golden.json["prompts"]), list(&dump.json["prompts"]));
    assert_eq!(found.len(), expected.len(), "{what}: prompts");
    for (expected, found) in expected.iter().zip(found) {
        assert_eq!(found["id"], expected["id"], "{what}");
        Pair { what: &format!("{what} {}", expected["id"]), golden, dump, expected, found }.check();
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// Whatever the golden case says, the dump says too; a template that must refuse does.
fn check_texts(what: &str, expected: &[Value], found: &[Value]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (expected, found) in expected.iter().zip(found) {
        for (key, value) in expected.as_object().unwrap() {
            match key.as_str() {
                "raises" => assert!(found["raises"].is_string(), "{what}: not refused: {expected}"),
                _ => assert_eq!(&found[key], value, "{what}: {key}"),
            }
        }
    }
}

/// One prompt in both files.
struct Pair<'a> {
    what: &'a str,
    golden: &'a Golden,
    dump: &'a Golden,
    expected: &'a Value,
    found: &'a Value,
}

impl Pair<'_> {
    fn check(&self) {
        assert_eq!(self.found["input_ids"], self.expected["input_ids"], "{}", self.what);
        self.check_tensor("last_logits");
        if self.expected.get("all_logits").is_some() {
            self.check_tensor("all_logits");
        }
        let (expected, found) = (list(&self.expected["router"]), list(&self.found["router"]));
        assert_eq!(found.len(), expected.len(), "{}: MoE layers", self.what);
        for (expected, found) in expected.iter().zip(found) {
            self.check_router(expected, found);
        }
        self.check_greedy(&self.expected["greedy"], &self.found["greedy"]);
    }

    fn tolerance(&self, key: &str) -> f64 {
        self.golden.json["tolerance"][key].as_f64().unwrap_or_else(|| panic!("{}: no {key}", self.what))
    }

    fn near(&self, item: &str, tolerance: &str, expected: f64, found: f64) {
        let (error, limit) = ((expected - found).abs(), self.tolerance(tolerance));
        // A NaN is not within any limit.
        assert!(error <= limit, "{} {item}: off by {error:e}, {tolerance} {limit:e}", self.what);
    }

    fn check_tensor(&self, key: &str) {
        let expected = self.golden.tensor(&self.expected[key]);
        let found = self.dump.tensor(&self.found[key]);
        assert_eq!(found.len(), expected.len(), "{} {key}", self.what);
        expected.iter().zip(&found).for_each(|(e, f)| self.near(key, "f32_logits_abs", *e, *f));
    }

    /// Expert sets are equal; a weight belongs to the id in its place.
    fn check_router(&self, expected: &Value, found: &Value) {
        let item = format!("layer {}", expected["layer"]);
        assert_eq!(found["layer"], expected["layer"], "{}", self.what);
        let rows = list(&self.expected["input_ids"]).len();
        let pairs = |file: &Golden, entry: &Value| -> Vec<Vec<(f64, f64)>> {
            let (ids, weights) = (file.tensor(&entry["expert_ids"]), file.tensor(&entry["expert_weights"]));
            assert_eq!(ids.len(), weights.len(), "{} {item}", self.what);
            let pairs: Vec<_> = ids.into_iter().zip(weights).collect();
            let mut rows: Vec<_> = pairs.chunks(pairs.len() / rows).map(<[_]>::to_vec).collect();
            rows.iter_mut().for_each(|row| row.sort_by(|a, b| a.0.total_cmp(&b.0)));
            rows
        };
        let (expected, found) = (pairs(self.golden, expected), pairs(self.dump, found));
        assert_eq!(found.len(), expected.len(), "{} {item}", self.what);
        for (row, (expected, found)) in expected.iter().zip(&found).enumerate() {
            let experts = |row: &[(f64, f64)]| row.iter().map(|pair| pair.0).collect::<Vec<_>>();
            assert_eq!(experts(found), experts(expected), "{} {item}, token {row}", self.what);
            for (e, f) in expected.iter().zip(found) {
                self.near(&item, "f32_router_weight_abs", e.1, f.1);
            }
        }
    }

    fn check_greedy(&self, expected: &Value, found: &Value) {
        assert_eq!(ids(&found["tokens"]), ids(&expected["tokens"]), "{} greedy", self.what);
        let (expected, found) = (list(&expected["steps"]), list(&found["steps"]));
        assert_eq!(found.len(), expected.len(), "{} greedy steps", self.what);
        for (expected, found) in expected.iter().zip(found) {
            let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
            self.near("greedy", "f32_logprob_abs", number(&expected["logprob"]), number(&found["logprob"]));
            for best in list(&expected["top"]) {
                // The last of the five may have a near twin.
                let same = list(&found["top"]).iter().find(|other| other[0] == best[0]);
                if let Some(same) = same {
                    self.near("greedy top", "f32_logprob_abs", number(&best[1]), number(&same[1]));
                }
            }
        }
    }
}
