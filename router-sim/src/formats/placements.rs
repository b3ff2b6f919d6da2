//! Placements for and of other engines.
//!
//! | format | who | layers |
//! | --- | --- | --- |
//! | `moeyard-placement` | this project, [`crate::placement`] | named |
//! | `sglang-placement` | SGLang `--init-expert-location`: `{"physical_to_logical_map": ...}` | all of the model, dense ones filled in order |
//! | `trtllm-placement` | TensorRT-LLM's `load_balancer` YAML: `initial_global_assignments` | named |
//! | `ascend-placement` | vllm-ascend `expert_map_path`: `layer_list`, `device_list`, `device_expert` | MoE layers, counted from 0 |
//! | `phy2log-npy` | DeepSeek's EPLB and vLLM: int64 `[layers, slots]` | MoE layers, counted from 0 |

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::number::Number;
use super::source::{self, Output};
use super::{in_file, npy};
use crate::placement::{EMPTY, Expected, Placement};
use crate::{Error, Result};

/// Whose form a placement has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlacementFormat {
    /// This project's JSON.
    Moeyard,
    /// SGLang's JSON.
    Sglang,
    /// TensorRT-LLM's YAML.
    Trtllm,
    /// vllm-ascend's JSON.
    Ascend,
    /// The bare map.
    Phy2log,
}

impl PlacementFormat {
    /// All of them.
    pub const ALL: [PlacementFormat; 5] = [
        PlacementFormat::Moeyard,
        PlacementFormat::Sglang,
        PlacementFormat::Trtllm,
        PlacementFormat::Ascend,
        PlacementFormat::Phy2log,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            PlacementFormat::Moeyard => "moeyard-placement",
            PlacementFormat::Sglang => "sglang-placement",
            PlacementFormat::Trtllm => "trtllm-placement",
            PlacementFormat::Ascend => "ascend-placement",
            PlacementFormat::Phy2log => "phy2log-npy",
        }
    }
}

impl FromStr for PlacementFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        PlacementFormat::ALL
            .into_iter()
            .find(|format| format.name() == name)
            .ok_or_else(|| format!("placement format {name:?} is unknown"))
    }
}

/// What a file does not say itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Missing {
    /// Ranks: SGLang's and the bare map need it.
    pub ranks: Option<usize>,
    /// Experts per layer; the largest one plus one when not given.
    pub experts: Option<usize>,
    /// Index of the first MoE layer; 0 when not given.
    pub first_layer: Option<usize>,
}

/// Slots per layer id.
struct Map {
    ranks: Option<usize>,
    layers: BTreeMap<usize, Vec<i32>>,
}

/// Reads a placement of any form, recognised by its content; its version number is 0.
///
/// # Errors
/// [`Error::Io`], [`Error::File`] and [`Error::Placement`].
pub fn read(path: &Path, missing: &Missing) -> Result<Placement> {
    let bytes = source::read_whole(path, None)?;
    let refuse = |why: String| in_file(path, why);
    if let Some(first) = missing.first_layer.filter(|first| *first > 1 << 20) {
        return Err(refuse(format!("first layer {first} exceeds the limit of {}", 1 << 20)));
    }
    let map = match &bytes[..] {
        npy if npy.starts_with(npy::MAGIC) => phy2log(bytes.clone(), missing).map_err(refuse)?,
        text => {
            let text = std::str::from_utf8(text).map_err(|_| refuse("neither .npy nor text".into()))?;
            match text.trim_start().starts_with('{') {
                true => return json(path, text, missing),
                false => yaml(text).map_err(refuse)?,
            }
        }
    };
    placement(map, missing).map_err(|e| refuse(e.to_string()))
}

/// Whether a file's content is a placement: text that names what only placements hold. (A trace's header holds a
/// placement too, but a trace is binary.)
pub fn looks_like(start: &[u8]) -> bool {
    let is_text = !start.contains(&0);
    let keys = [&b"\"physical_to_logical_map\""[..], b"\"moe_layer_count\"", b"initial_global_assignments:"];
    is_text && keys.iter().any(|key| start.windows(key.len()).any(|part| part == *key))
}

fn placement(map: Map, missing: &Missing) -> Result<Placement> {
    let Some(ranks) = map.ranks.or(missing.ranks).filter(|ranks| *ranks > 0) else {
        return Err(Error::Placement("the file does not say how many ranks there are; give --ranks".into()));
    };
    let experts = missing.experts.unwrap_or_else(|| experts_seen(map.layers.values()));
    let slots = map.layers.values().next().map_or(0, Vec::len);
    if !slots.is_multiple_of(ranks) {
        return Err(Error::Placement(format!("{slots} slots per layer are not a multiple of {ranks} ranks")));
    }
    let (layer_ids, slots_of) = map.layers.into_iter().unzip();
    Placement::new(ranks, slots / ranks, experts, layer_ids, slots_of)
}

/// One more than the largest expert.
fn experts_seen<'a>(layers: impl Iterator<Item = &'a Vec<i32>>) -> usize {
    layers.flatten().map(|expert| usize::try_from(*expert).map_or(0, |expert| expert + 1)).max().unwrap_or(0)
}

#[derive(Deserialize)]
struct JsonFields {
    layer_ids: Option<Vec<usize>>,
    physical_to_logical_map: Option<Vec<Vec<i32>>>,
    layer_list: Option<Vec<AscendLayer>>,
}

#[derive(Serialize, Deserialize)]
struct AscendFile {
    moe_layer_count: usize,
    layer_list: Vec<AscendLayer>,
}

#[derive(Serialize, Deserialize)]
struct AscendLayer {
    layer_id: usize,
    device_count: usize,
    device_list: Vec<AscendDevice>,
}

#[derive(Serialize, Deserialize)]
struct AscendDevice {
    device_id: usize,
    device_expert: Vec<i32>,
}

/// This project's, SGLang's or vllm-ascend's.
fn json(path: &Path, text: &str, missing: &Missing) -> Result<Placement> {
    let refuse = |why: String| in_file(path, why);
    let fields: JsonFields = serde_json::from_str(text).map_err(|e| refuse(e.to_string()))?;
    if let Some(layers) = fields.layer_list {
        let map = ascend(layers, missing).map_err(refuse)?;
        return placement(map, missing).map_err(|e| refuse(e.to_string()));
    }
    let Some(map) = fields.physical_to_logical_map else {
        return Err(refuse("neither physical_to_logical_map nor layer_list: no placement".into()));
    };
    let first = missing.first_layer.unwrap_or(0);
    let layer_ids = fields.layer_ids.unwrap_or_else(|| (first..map.len().max(first)).collect());
    let experts = missing.experts.unwrap_or_else(|| experts_seen(map.iter()));
    let expected = Expected { ranks: missing.ranks, experts, layer_ids: &layer_ids };
    Placement::from_json(text, &expected).map_err(|e| refuse(e.to_string()))
}

fn ascend(layers: Vec<AscendLayer>, missing: &Missing) -> Result<Map, String> {
    let first = missing.first_layer.unwrap_or(0);
    let mut map = Map { ranks: None, layers: BTreeMap::new() };
    for layer in layers {
        let id = layer.layer_id;
        if layer.device_list.len() != layer.device_count
            || *map.ranks.get_or_insert(layer.device_count) != layer.device_count
        {
            return Err(format!(
                "layer {id}: {} devices listed, device_count {}",
                layer.device_list.len(),
                layer.device_count
            ));
        }
        let width = layer.device_list.first().map_or(0, |device| device.device_expert.len());
        if let Some(device) = layer.device_list.iter().find(|device| device.device_expert.len() != width) {
            return Err(format!(
                "layer {id}, device {}: {} experts, expected {width}",
                device.device_id,
                device.device_expert.len()
            ));
        }
        let slots = layer.device_list.into_iter().flat_map(|device| device.device_expert).collect();
        if map.layers.insert(first.saturating_add(id), slots).is_some() {
            return Err(format!("layer {id} is there twice"));
        }
    }
    Ok(map)
}

fn phy2log(bytes: Vec<u8>, missing: &Missing) -> Result<Map, String> {
    let mut array = npy::read(Box::new(io::Cursor::new(bytes)))?;
    if array.shape.len() != 2 {
        return Err(format!("an array of shape {:?} is no map [layers, slots]", array.shape));
    }
    let mut map = Map { ranks: None, layers: BTreeMap::new() };
    let mut layer = missing.first_layer.unwrap_or(0);
    while let Some(numbers) = array.next_record()? {
        let expert = |number: Number| {
            i32::try_from(number.id()?)
                .map_err(|_| format!("layer {layer}: expert {number:?} is out of range"))
        };
        map.layers.insert(layer, numbers.map(expert).collect::<Result<_, _>>()?);
        layer += 1;
    }
    Ok(map)
}

/// The subset of YAML that TensorRT-LLM's scripts write: one key per line, lists in brackets.
fn yaml(text: &str) -> Result<Map, String> {
    let mut map = Map { ranks: None, layers: BTreeMap::new() };
    let mut slots = None;
    for (number, line) in text.lines().enumerate() {
        let wrong = |what: &str| format!("line {}: {what}", number + 1);
        if line.trim().is_empty() || line.trim_start().starts_with('#') {
            continue;
        }
        let (key, value) = line.split_once(':').ok_or_else(|| wrong("no key"))?;
        let value = value.trim();
        match key {
            "num_slots" => slots = Some(value.parse::<usize>().map_err(|_| wrong("num_slots is no number"))?),
            "initial_global_assignments" | "layer_updates_per_iter" => {}
            _ if key.starts_with(' ') => {
                let layer = key.trim().parse().map_err(|_| wrong("no layer index"))?;
                let list = value.strip_prefix('[').and_then(|v| v.strip_suffix(']'));
                let list = list.ok_or_else(|| wrong("no list in brackets"))?;
                let experts = list.split(',').map(|id| id.trim().parse::<i32>());
                let experts: Result<Vec<i32>, _> = experts.collect();
                map.layers.insert(layer, experts.map_err(|_| wrong("an expert is no number"))?);
            }
            _ => return Err(wrong(&format!("key {key:?} is unknown"))),
        }
    }
    match map.layers.iter().find(|(_, experts)| slots.is_some_and(|slots| slots != experts.len())) {
        Some((layer, experts)) => {
            Err(format!("layer {layer} has {} slots, num_slots is {slots:?}", experts.len()))
        }
        None => Ok(map),
    }
}

/// Writes a placement. What the form cannot say is refused: empty slots everywhere but in this project's form and the
/// bare map.
///
/// # Errors
/// [`Error::Io`], [`Error::File`].
pub fn write(path: &Path, placement: &Placement, format: PlacementFormat) -> Result<()> {
    let whole = matches!(format, PlacementFormat::Moeyard | PlacementFormat::Phy2log);
    for layer in 0..placement.layers() {
        let empty = placement.layer(layer).slots().iter().position(|expert| *expert == EMPTY);
        if let Some(slot) = empty.filter(|_| !whole) {
            let id = placement.layer_ids()[layer];
            let why = format!("layer {id}, slot {slot} is empty, which {} cannot say", format.name());
            return Err(in_file(path, why));
        }
    }
    match format {
        PlacementFormat::Moeyard => placement.write(path),
        PlacementFormat::Sglang => source::write_text(path, &sglang_text(placement)),
        PlacementFormat::Trtllm => source::write_text(path, &trtllm_text(placement)),
        PlacementFormat::Ascend => {
            let text =
                serde_json::to_string(&ascend_file(placement)).map_err(|e| in_file(path, e.to_string()))?;
            source::write_text(path, &text)
        }
        PlacementFormat::Phy2log => {
            let mut output = Output::create(path)?;
            let shape = [placement.layers(), placement.slots()];
            let slots = (0..placement.layers()).flat_map(|layer| placement.layer(layer).slots());
            let bytes: Vec<u8> = slots.flat_map(|expert| i64::from(*expert).to_le_bytes()).collect();
            let written =
                npy::write_header(&mut output, "<i8", &shape).and_then(|()| output.write_all(&bytes));
            written.map_err(|e| output.error(e))?;
            output.finish()
        }
    }
}

fn list<T: ToString>(values: impl IntoIterator<Item = T>) -> String {
    format!("[{}]", values.into_iter().map(|v| v.to_string()).collect::<Vec<_>>().join(", "))
}

/// A list per decoder layer up to the last MoE layer; dense ones, which nobody looks at, hold the experts in order.
fn sglang_text(placement: &Placement) -> String {
    let last = placement.layer_ids().last().copied().unwrap_or(0);
    let in_order = list((0..placement.slots()).map(|slot| slot % placement.experts()));
    let of_layer = |id: usize| match placement.layer_ids().binary_search(&id) {
        Ok(layer) => list(placement.layer(layer).slots()),
        Err(_) => in_order.clone(),
    };
    let layers: Vec<String> = (0..=last).map(of_layer).collect();
    format!("{{\"physical_to_logical_map\": [\n{}]}}\n", layers.join(",\n"))
}

fn trtllm_text(placement: &Placement) -> String {
    let mut text = format!("num_slots: {}\ninitial_global_assignments:\n", placement.slots());
    for (layer, id) in placement.layer_ids().iter().enumerate() {
        writeln!(text, "  {id}: {}", list(placement.layer(layer).slots())).expect("a text takes everything");
    }
    text.push_str("layer_updates_per_iter: 0\n");
    text
}

fn ascend_file(placement: &Placement) -> AscendFile {
    let device = |layer, rank| AscendDevice {
        device_id: rank,
        device_expert: placement.layer(layer).slots_of_rank(rank).to_vec(),
    };
    let layer = |layer| AscendLayer {
        layer_id: layer,
        device_count: placement.ranks(),
        device_list: (0..placement.ranks()).map(|rank| device(layer, rank)).collect(),
    };
    AscendFile {
        moe_layer_count: placement.layers(),
        layer_list: (0..placement.layers()).map(layer).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(first: usize) -> Placement {
        let maps = vec![vec![0, 1, 2, 0], vec![2, 1, 0, 2]];
        Placement::new(2, 2, 3, vec![first, first + 1], maps).unwrap()
    }

    #[test]
    fn all_forms_round_trip() {
        let folder = tempfile::tempdir().unwrap();
        for format in PlacementFormat::ALL {
            let path = folder.path().join(format.name());
            write(&path, &sample(3), format).unwrap();
            let missing = Missing { ranks: Some(2), experts: Some(3), first_layer: Some(3) };
            assert_eq!(read(&path, &missing).unwrap(), sample(3), "{}", format.name());
            assert!(format == PlacementFormat::Phy2log || looks_like(&std::fs::read(&path).unwrap()));
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), PlacementFormat::ALL.len());
    }

    #[test]
    fn files_that_say_everything_need_nothing() {
        let folder = tempfile::tempdir().unwrap();
        for format in [PlacementFormat::Moeyard, PlacementFormat::Ascend] {
            let path = folder.path().join(format.name());
            write(&path, &sample(0), format).unwrap();
            assert_eq!(read(&path, &Missing::default()).unwrap(), sample(0), "{}", format.name());
        }
    }

    #[test]
    fn what_a_form_cannot_say_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("placement");
        let gap = Placement::new(2, 2, 3, vec![5], vec![vec![0, 1, 2, EMPTY]]).unwrap();
        for format in [PlacementFormat::Sglang, PlacementFormat::Trtllm, PlacementFormat::Ascend] {
            let message = write(&path, &gap, format).unwrap_err().to_string();
            assert!(message.contains("layer 5, slot 3 is empty"), "{message}");
        }
        for format in [PlacementFormat::Moeyard, PlacementFormat::Phy2log] {
            write(&path, &gap, format).unwrap();
        }
    }

    #[test]
    fn mangled_placements_never_panic() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("placement");
        for format in PlacementFormat::ALL {
            write(&path, &sample(1), format).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            for at in (0..bytes.len()).step_by(3) {
                for value in [b'9', b'-', b'[', 0xff] {
                    let mut mangled = bytes.clone();
                    mangled[at] = value;
                    mangled.truncate(if value == 0xff { at } else { bytes.len() });
                    std::fs::write(&path, &mangled).unwrap();
                    let _ = read(&path, &Missing { ranks: Some(2), ..Missing::default() });
                }
            }
        }
    }

    #[test]
    fn refusals() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("placement");
        for (text, expected) in [
            ("{}", "no placement"),
            (r#"{"physical_to_logical_map": [[0, 1]]}"#, "needs the number of ranks"),
            ("num_slots: 2\ninitial_global_assignments:\n  0: [0, 1]\n", "give --ranks"),
            ("num_slots: 3\ninitial_global_assignments:\n  0: [0, 1]\n", "layer 0 has 2 slots"),
            ("initial_global_assignments:\n  0: 5\n", "line 2: no list in brackets"),
            (r#"{"physical_to_logical_map": [[2147483647, 0]], "ranks": 1}"#, "missing version"),
            ("other: 1\n", "line 1: key \"other\" is unknown"),
            (
                r#"{"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_count": 2, "device_list": []}]}"#,
                "0 devices listed",
            ),
        ] {
            std::fs::write(&path, text).unwrap();
            let message = read(&path, &Missing::default()).unwrap_err().to_string();
            assert!(message.contains(expected), "{message:?} should contain {expected:?}");
        }
    }
}
