//! The library that the engine rebalances with stays small: no HTTP and no tokenizer crate is anywhere below it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Crates that serve or speak HTTP, or that turn text into tokens.
const HEAVY: [&str; 22] = [
    "actix-web",
    "async-openai",
    "axum",
    "esaxx-rs",
    "h2",
    "hf-hub",
    "http",
    "hyper",
    "hyper-util",
    "isahc",
    "llguidance",
    "minijinja",
    "reqwest",
    "rocket",
    "sentencepiece",
    "spm_precompiled",
    "tiktoken-rs",
    "tokenizers",
    "tokio",
    "tower",
    "ureq",
    "warp",
];

/// Names of the crates that a workspace's lock file has below each crate, those of tests and of features included.
fn dependencies(lock: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in lock.split("[[package]]").skip(1) {
        let quoted = |line: &str| line.split('"').nth(1).map(str::to_owned);
        let name = package.lines().find(|line| line.starts_with("name = ")).and_then(quoted).unwrap();
        // Where there are several versions, an entry is "name version".
        let below = package.lines().filter(|line| line.starts_with(" \"")).filter_map(quoted);
        let below = below.map(|entry| entry.split(' ').next().unwrap().to_owned());
        all.entry(name).or_default().extend(below);
    }
    all
}

/// Everything below a crate.
fn tree(all: &BTreeMap<String, BTreeSet<String>>, root: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![root.to_owned()];
    while let Some(name) = open.pop() {
        let below = all.get(&name).unwrap_or_else(|| panic!("{name} is not in Cargo.lock"));
        open.extend(below.iter().filter(|name| found.insert((*name).clone())).cloned());
    }
    found
}

#[test]
fn no_http_and_no_tokenizer_below_router_sim() {
    let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.lock");
    let all = dependencies(&std::fs::read_to_string(lock).unwrap());
    let found = tree(&all, "router-sim");
    assert!(found.contains("clap") && found.contains("serde_core"), "not a tree: {found:?}");
    let heavy: Vec<_> = HEAVY.iter().filter(|name| found.contains(**name)).collect();
    assert!(heavy.is_empty(), "router-sim depends on {heavy:?}");
    // The server has some of them: the search finds what is there.
    let server = tree(&all, "moeyard");
    let served: Vec<_> = HEAVY.iter().filter(|name| server.contains(**name)).collect();
    assert!(
        served.contains(&&"hyper") && served.contains(&&"tokenizers"),
        "moeyard depends on {served:?} only"
    );
}
