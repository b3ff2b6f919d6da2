//! `place` and `split` as a user meets them.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use router_sim::placement::{Expected, Placement, transfers};

fn router_sim(folder: &Path, line: &str) -> Output {
    let binary = env!("CARGO_BIN_EXE_router-sim");
    Command::new(binary).current_dir(folder).args(line.split(' ')).output().unwrap()
}

fn told(folder: &Path, line: &str) -> String {
    let output = router_sim(folder, line);
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(folder: &Path, line: &str) -> String {
    let output = router_sim(folder, line);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{line}: {message}");
    message
}

/// A `.npy` of int64.
fn write_npy(path: &Path, shape: &[usize], values: &[i64]) {
    let shape = shape.iter().map(|n| format!("{n}, ")).collect::<String>();
    let mut header = format!("{{'descr': '<i8', 'fortran_order': False, 'shape': ({shape}), }}");
    header += &" ".repeat(117 - header.len());
    header += "\n";
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(values.iter().flat_map(|n| n.to_le_bytes()));
    fs::write(path, bytes).unwrap();
}

/// Shape text and values of an int64 `.npy`.
fn read_npy(path: &Path) -> (String, Vec<i64>) {
    let bytes = fs::read(path).unwrap();
    let header = String::from_utf8(bytes[10..128].to_vec()).unwrap();
    assert!(header.contains("'<i8'") && header.contains("'fortran_order': False"), "{header}");
    let shape = header[header.find('(').unwrap()..=header.find(')').unwrap()].to_owned();
    (shape, bytes[128..].chunks(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect())
}

fn read(folder: &Path, name: &str) -> Placement {
    let expected = Expected { ranks: Some(4), experts: 8, layer_ids: &[0, 1] };
    Placement::read(&folder.join(name), &expected).unwrap()
}

#[test]
fn a_load_is_placed_split_and_repaired() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    // Two steps of two layers; the steps add up.
    let first = [[40, 9, 8, 7, 6, 5, 4, 1], [3, 3, 3, 3, 50, 3, 3, 3]].concat();
    let steps = [first.clone(), first.clone()].concat();
    write_npy(&folder.join("load.npy"), &[2, 2, 8], &steps);
    for policy in ["linear", "eplb", "eplb-hierarchical --nodes 2 --groups 4", "moeyard"] {
        let line = format!("place --load load.npy --ranks 4 --slots 12 --policy {policy} --out p.json");
        let text = told(folder, &line);
        for word in ["2 layers x 8 experts, 4 ranks x 3 slots", "bound of any placement", "gap to the bound"]
        {
            assert!(text.contains(word), "{policy}: {text}");
        }
        read(folder, "p.json");
        for split in ["even", "waterfill", "exact", "activated"] {
            told(
                folder,
                &format!("split --load load.npy --placement p.json --ranks 4 --split {split} --out t.npy"),
            );
            let (shape, tokens) = read_npy(&folder.join("t.npy"));
            assert_eq!(shape, "(2, 12,)");
            let placement = read(folder, "p.json");
            for layer in 0..2 {
                for expert in 0..8 {
                    let slots = placement.layer(layer).replicas(expert);
                    let sum: i64 = slots.iter().map(|slot| tokens[layer * 12 + *slot as usize]).sum();
                    assert_eq!(sum, 2 * first[layer * 8 + expert], "{policy}, {split}");
                }
            }
        }
    }
    // Another load: few transfers, and the table says how many.
    write_npy(
        &folder.join("new.npy"),
        &[2, 8],
        &[[4, 9, 8, 7, 60, 5, 4, 1], [3, 3, 30, 3, 50, 3, 3, 3]].concat(),
    );
    let line = "place --load new.npy --ranks 4 --slots 12 --policy moeyard --from p.json --max-transfers 1 --expert-bytes 1000 --out q.json";
    let text = told(folder, line);
    let moved = transfers(&read(folder, "p.json"), &read(folder, "q.json"));
    assert!(moved.len() <= 2 && text.contains(&format!("{} in all", moved.len())), "{text}");
    assert!(text.contains("before, even split") && text.contains("GB"), "{text}");
}

#[test]
fn extreme_loads_are_placed() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut hot = [0; 8];
    hot[5] = 1_000_000;
    for (name, counts) in [("huge", [i64::MAX; 8]), ("none", [0; 8]), ("hot", hot)] {
        write_npy(&folder.join("load.npy"), &[1, 8], &counts);
        for (ranks, slots) in [(1, 8), (4, 8), (4, 12), (16, 16)] {
            let line = format!(
                "place --load load.npy --ranks {ranks} --slots {slots} --policy moeyard --out p.json"
            );
            let text = told(folder, &line);
            assert!(
                text.contains("duplicates on a rank     0"),
                "{name}, {ranks} ranks, {slots} slots: {text}"
            );
        }
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_npy(&folder.join("load.npy"), &[1, 8], &[5, 4, 3, 2, 1, 1, 1, 1]);
    write_npy(&folder.join("huge.npy"), &[1, 8], &[i64::MAX; 8]);
    fs::write(folder.join("bad.json"), "{\"version\": 1}").unwrap();
    told(folder, "place --load load.npy --ranks 4 --slots 8 --policy linear --out p.json");
    let place = "place --load load.npy --out q.json";
    let split = "split --load load.npy --out t.npy --split exact";
    for (line, expected) in [
        (format!("{place} --ranks 0 --slots 8 --policy eplb"), "--ranks 0"),
        (format!("{place} --ranks 4 --slots 4 --policy eplb"), "at least one for each of 8 experts"),
        (format!("{place} --ranks 4 --slots 10 --policy eplb"), "8 or 12 do"),
        (format!("{place} --ranks 4 --slots 8 --policy best"), "best"),
        (format!("{place} --ranks 4 --slots 8 --policy moeyard --max-transfers 3"), "--from"),
        (
            format!("{place} --ranks 4 --slots 8 --policy eplb --from p.json --max-transfers 3"),
            "--max-transfers needs",
        ),
        (format!("{place} --ranks 4 --slots 12 --policy moeyard --from p.json"), "--from has 8 slots"),
        (
            format!("{place} --ranks 2 --slots 8 --policy moeyard --from p.json"),
            "made for 4 ranks, but there are 2",
        ),
        (format!("{place} --ranks 4 --slots 8 --policy moeyard --from bad.json"), "bad.json"),
        (format!("{place} --ranks 4 --slots 8 --policy eplb-hierarchical --nodes 3"), "do not divide"),
        (format!("{place} --ranks 4 --slots 12 --policy moeyard --failed-ranks 4"), "failed rank 4"),
        (format!("{split} --placement p.json --ranks 2"), "made for 4 ranks, but there are 2"),
        (format!("{split} --placement bad.json --ranks 4"), "bad.json: missing field"),
        ("split --load huge.npy --out t.npy --split exact --placement p.json".into(), "exceed the limit of"),
    ] {
        let message = refused(folder, &line);
        assert!(message.contains(expected), "{line}: {message:?} should contain {expected:?}");
    }
    assert!(!folder.join("t.npy").exists() && !folder.join("q.json").exists(), "nothing is left behind");
}
