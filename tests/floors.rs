//! The house rules that a compiler does not hold: imports go strictly downward, `cfg(feature = ...)` stands in one file of
//! src/ only, `unsafe` in four places only. Each violation is reported with file and line.

use std::fs;
use std::path::{Path, PathBuf};

/// Modules of `src/`, lowest floor first (ARCHITECTURE.md, the house). Those in tests/support are for unit tests of any floor.
const FLOORS: &[&[&str]] = &[
    &["error", "spec", "metrics", "support"],
    &["backend"],
    &["comm", "weights", "tokenizer"],
    &["layers"],
    &["moe"],
    &["model"],
    &["engine"],
    &["server"],
    &["config"],
    &["cli"],
];

/// The file that may choose by feature.
const FEATURE_FILE: &str = "backend/cuda/mod.rs";

/// Where `unsafe` may stand.
const UNSAFE_PLACES: &[&str] = &["backend/cpu/", "backend/cuda/", "comm/nccl/", "weights/mmap.rs"];

fn floor_of(module: &str) -> Option<usize> {
    FLOORS.iter().position(|modules| modules.contains(&module))
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// Modules named right after `crate::` in a line; `crate::{a, b}` names several.
fn imported(line: &str) -> Vec<String> {
    let identifier = |s: &str| s.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut modules = Vec::new();
    for (at, _) in line.match_indices("crate::") {
        let rest = &line[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            Some(group) => modules.extend(top_level_items(group).iter().map(|item| identifier(item.trim()))),
            None => modules.push(identifier(rest)),
        }
    }
    modules
}

/// Splits `a::{b, c}, d}...` at the commas outside inner braces, up to the closing brace.
fn top_level_items(group: &str) -> Vec<&str> {
    let (mut depth, mut start, mut items) = (0, 0, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                items.push(&group[start..at]);
                return items;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                items.push(&group[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    items.push(&group[start..]);
    items
}

/// Violations in one file; `relative` is its path under `src/`.
fn violations(relative: &str, text: &str) -> Vec<String> {
    let module = relative.split('/').next().unwrap().trim_end_matches(".rs");
    let own = floor_of(module);
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap();
        let mut report = |what: String| found.push(format!("src/{relative}:{}: {what}", number + 1));
        // lib.rs and main.rs hold the house together and may name every floor.
        if let Some(own) = own {
            for target in imported(code) {
                if target == module {
                    continue;
                }
                match floor_of(&target) {
                    Some(floor) if floor < own => {}
                    Some(floor) => report(format!("floor {own} ({module}) imports floor {floor} ({target})")),
                    None if ["Result", "Error"].contains(&target.as_str()) => {}
                    None => report(format!("`{target}` belongs to no floor")),
                }
            }
        }
        let by_feature = code.contains("cfg") && code.replace("target_feature", "").contains("feature =");
        if by_feature && relative != FEATURE_FILE {
            report(format!("cfg(feature) outside {FEATURE_FILE}"));
        }
        let words = code.split(|c: char| !c.is_alphanumeric() && c != '_');
        if words.into_iter().any(|w| w == "unsafe") && !UNSAFE_PLACES.iter().any(|p| relative.starts_with(p))
        {
            report("unsafe outside the places that may hold it".to_owned());
        }
    }
    found
}

#[test]
fn the_house_stands() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    assert!(files.len() > 40, "only {} files found under {}", files.len(), src.display());
    let found: Vec<String> = files
        .iter()
        .flat_map(|path| {
            let relative = path.strip_prefix(&src).unwrap().to_string_lossy().replace('\\', "/");
            violations(&relative, &fs::read_to_string(path).unwrap())
        })
        .collect();
    assert!(found.is_empty(), "{} violations:\n{}", found.len(), found.join("\n"));
}

#[test]
fn every_module_has_a_floor() {
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    for line in lib.lines().filter_map(|l| l.strip_prefix("pub mod ")) {
        let module = line.trim_end_matches(';');
        assert!(floor_of(module).is_some(), "{module} of src/lib.rs has no floor");
    }
}

#[test]
fn violations_are_seen() {
    let cases = [
        ("backend/mod.rs", "use crate::engine::Engine;", "src/backend/mod.rs:1: floor 1 (backend) imports"),
        ("moe/x.rs", "\nuse crate::{spec, model::Batch};", "src/moe/x.rs:2: floor 4 (moe) imports floor 5"),
        ("comm/local.rs", "use crate::weights::X;", "floor 2 (comm) imports floor 2 (weights)"),
        ("server/mod.rs", "#[cfg(feature = \"cuda\")]", "cfg(feature)"),
        ("comm/nccl/mod.rs", "#[cfg(all(test, feature = \"cuda\"))]", "cfg(feature)"),
        ("engine/x.rs", "let x = unsafe { y };", "unsafe"),
        ("engine/x.rs", "use crate::attic::X;", "`attic` belongs to no floor"),
    ];
    for (file, text, expected) in cases {
        let found = violations(file, text);
        assert!(found.len() == 1 && found[0].contains(expected), "{file}: {found:?} lacks {expected:?}");
    }
    for (file, text) in [
        ("moe/x.rs", "use crate::{backend::{View, ViewMut}, spec};"),
        ("backend/cuda/mod.rs", "#[cfg(feature = \"cuda\")]"),
        ("backend/cpu/pool.rs", "unsafe { x }"),
        ("backend/cpu/pool.rs", "#[cfg(target_feature = \"avx2\")]"),
        ("engine/x.rs", "// unsafe is mentioned here, and crate::server"),
        ("lib.rs", "pub use crate::error::Error;"),
    ] {
        assert_eq!(violations(file, text), Vec::<String>::new(), "{file}");
    }
}
