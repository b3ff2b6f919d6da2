//! The placement file: JSON that people write, tools exchange and `--placement` reads.
//!
//! ```json
//! {"version": 1, "ranks": 2, "slots_per_rank": 2, "layer_ids": [1, 2],
//!  "physical_to_logical_map": [[0, 1, 2, 3], [0, 2, 1, 3]]}
//! ```
//! One list per MoE layer: the expert of each slot, rank-major, -1 for an empty slot. `version` is that of this format.
//! SGLang's file, which has `physical_to_logical_map` alone, is read as well where the rank count is known; its lists
//! may cover the MoE layers only or, as SGLang writes them, every decoder layer.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Placement, refuse};
use crate::{Error, Result, whole};

/// The version of the file format that is written and read.
const FORMAT_VERSION: u32 = 1;

/// The file's fields as written; turn it into a [`Placement`] with [`PlacementFile::check`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlacementFile {
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "whole::field")]
    version: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "whole::field")]
    ranks: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "whole::field")]
    slots_per_rank: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "whole::list")]
    layer_ids: Option<Vec<usize>>,
    #[serde(deserialize_with = "whole::lists")]
    physical_to_logical_map: Vec<Vec<i32>>,
}

/// What a placement file must fit.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// Expert-parallel ranks, when known; a file that does not say its own needs it.
    pub ranks: Option<usize>,
    /// Logical experts per layer.
    pub experts: usize,
    /// Absolute indices of the model's MoE layers, ascending.
    pub layer_ids: &'a [usize],
}

impl PlacementFile {
    /// Reads the text of a placement file.
    ///
    /// # Errors
    /// [`Error::Placement`] on bad JSON, an unknown key, or a value of another type, with the key and the place.
    pub fn parse(text: &str) -> Result<PlacementFile> {
        let refused = |why: String| Error::Placement(why);
        let mut reader = serde_json::Deserializer::from_str(text);
        let file = serde_path_to_error::deserialize(&mut reader).map_err(|e| refused(e.to_string()))?;
        reader.end().map_err(|e| refused(e.to_string()))?;
        Ok(file)
    }

    /// Absolute indices of the MoE layers, where the file says them.
    pub fn layer_ids(&self) -> Option<&[usize]> {
        self.layer_ids.as_deref()
    }

    /// The placement it describes, with version number 0.
    ///
    /// # Errors
    /// [`Error::Placement`] naming the key, the limit and the value.
    pub fn check(self, expected: &Expected<'_>) -> Result<Placement> {
        let experts = expected.experts;
        let PlacementFile { version, ranks, slots_per_rank, layer_ids, physical_to_logical_map: map } = self;
        match (version, ranks, slots_per_rank, layer_ids) {
            (None, None, None, None) => from_bare_map(map, expected),
            (Some(FORMAT_VERSION), Some(ranks), Some(slots_per_rank), Some(layer_ids)) => {
                if let Some(wanted) = expected.ranks.filter(|wanted| *wanted != ranks) {
                    return refuse(format!("made for {ranks} ranks, but there are {wanted}"));
                }
                if layer_ids != expected.layer_ids {
                    return refuse(format!(
                        "layer_ids {layer_ids:?} are not the model's MoE layers {:?}",
                        expected.layer_ids
                    ));
                }
                Placement::new(ranks, slots_per_rank, experts, layer_ids, map)
            }
            (Some(version), ..) if version != FORMAT_VERSION => {
                refuse(format!("version {version} is unknown, expected {FORMAT_VERSION}"))
            }
            (version, ranks, slots_per_rank, layer_ids) => {
                let missing = [
                    ("version", version.is_none()),
                    ("ranks", ranks.is_none()),
                    ("slots_per_rank", slots_per_rank.is_none()),
                    ("layer_ids", layer_ids.is_none()),
                ];
                let missing: Vec<_> =
                    missing.iter().filter(|(_, absent)| *absent).map(|(key, _)| *key).collect();
                refuse(format!("missing {}", missing.join(", ")))
            }
        }
    }
}

/// SGLang's form. A list per decoder layer is recognised by covering the last MoE layer's absolute index.
fn from_bare_map(mut map: Vec<Vec<i32>>, expected: &Expected<'_>) -> Result<Placement> {
    let Some(ranks) = expected.ranks.filter(|ranks| *ranks > 0) else {
        return refuse("a file with physical_to_logical_map alone needs the number of ranks".into());
    };
    let ids = expected.layer_ids;
    if map.len() != ids.len() && ids.last().is_some_and(|last| *last < map.len()) {
        map = ids.iter().map(|id| std::mem::take(&mut map[*id])).collect();
    }
    if map.len() != ids.len() {
        return refuse(format!("{} lists for the model's {} MoE layers", map.len(), ids.len()));
    }
    let width = map.first().map_or(0, Vec::len);
    if !width.is_multiple_of(ranks) {
        return refuse(format!("{width} slots per layer are not a multiple of {ranks} ranks"));
    }
    Placement::new(ranks, width / ranks, expected.experts, ids.to_vec(), map)
}

impl Placement {
    /// The file's fields.
    pub fn to_file(&self) -> PlacementFile {
        PlacementFile {
            version: Some(FORMAT_VERSION),
            ranks: Some(self.ranks),
            slots_per_rank: Some(self.slots_per_rank),
            layer_ids: Some(self.layer_ids.clone()),
            physical_to_logical_map: self.slots.clone(),
        }
    }

    /// Parses a placement file and checks it against the model; the version number is 0.
    ///
    /// # Errors
    /// [`Error::Placement`] on bad JSON (with line and column), an unknown key, or anything that does not fit.
    pub fn from_json(text: &str, expected: &Expected<'_>) -> Result<Placement> {
        PlacementFile::parse(text)?.check(expected)
    }

    /// The text of a placement file, one layer per line.
    pub fn to_json(&self) -> String {
        let layers: Vec<String> = self.slots.iter().map(|map| format!("  {}", json_list(map))).collect();
        format!(
            "{{\"version\": {FORMAT_VERSION}, \"ranks\": {}, \"slots_per_rank\": {}, \"layer_ids\": {},\n \"physical_to_logical_map\": [\n{}]}}\n",
            self.ranks,
            self.slots_per_rank,
            json_list(&self.layer_ids),
            layers.join(",\n")
        )
    }

    /// Reads a placement file; see [`Placement::from_json`].
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read; [`Error::Placement`], beginning with the path, when it does not fit.
    pub fn read(path: &Path, expected: &Expected<'_>) -> Result<Placement> {
        let file = Placement::read_file(path)?;
        file.check(expected).map_err(|e| at(path, e))
    }

    /// Reads a placement file's fields, to be checked against a model later.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read; [`Error::Placement`], beginning with the path, on bad JSON or an unknown key.
    pub fn read_file(path: &Path) -> Result<PlacementFile> {
        let text = fs::read_to_string(path).map_err(|source| Error::Io { path: path.into(), source })?;
        PlacementFile::parse(&text).map_err(|e| at(path, e))
    }

    /// Writes a placement file: whole or not at all, by renaming a temporary file beside it.
    ///
    /// # Errors
    /// [`Error::Io`] with the path at fault.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut name = path.as_os_str().to_owned();
        name.push(".tmp");
        let temporary = Path::new(&name);
        fs::write(temporary, self.to_json())
            .map_err(|source| Error::Io { path: temporary.into(), source })?;
        fs::rename(temporary, path).map_err(|source| Error::Io { path: path.into(), source })
    }
}

/// Says which file a placement error is about.
fn at(path: &Path, error: Error) -> Error {
    match error {
        Error::Placement(why) => Error::Placement(format!("{}: {why}", path.display())),
        other => other,
    }
}

fn json_list<T: ToString>(numbers: &[T]) -> String {
    format!("[{}]", numbers.iter().map(T::to_string).collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: Expected<'static> = Expected { ranks: Some(2), experts: 3, layer_ids: &[1, 2] };

    #[test]
    fn files_round_trip() {
        let placement =
            Placement::new(2, 2, 3, vec![1, 2], vec![vec![0, 1, 2, -1], vec![2, 1, 0, 2]]).unwrap();
        assert_eq!(Placement::from_json(&placement.to_json(), &MODEL).unwrap(), placement);
        let compact = serde_json::to_string(&placement.to_file()).unwrap();
        assert_eq!(Placement::from_json(&compact, &MODEL).unwrap(), placement);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("placement.json");
        placement.write(&path).unwrap();
        assert_eq!(Placement::read(&path, &Expected { ranks: None, ..MODEL }).unwrap(), placement);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn whole_numbers_may_be_written_as_floats() {
        let text = r#"{"version": 1.0, "ranks": 2e0, "slots_per_rank": 2.0, "layer_ids": [1.0, 2],
            "physical_to_logical_map": [[0.0, 1, 2, -1.0], [2, 1e0, 0, 2]]}"#;
        let placement = Placement::from_json(text, &MODEL).unwrap();
        assert_eq!(
            (placement.layer(0).slots(), placement.layer(1).slots()),
            (&[0, 1, 2, -1][..], &[2, 1, 0, 2][..])
        );
    }

    #[test]
    fn sglang_maps_cover_moe_layers_or_all_layers() {
        let moe_only = r#"{"physical_to_logical_map": [[0, 1, 2, 0], [2, 1, 0, 2]]}"#;
        let all_layers =
            r#"{"physical_to_logical_map": [[0, 1, 2, 2], [0, 1, 2, 0], [2, 1, 0, 2], [1, 1, 1, 1]]}"#;
        let placement = Placement::from_json(moe_only, &MODEL).unwrap();
        assert_eq!(placement.layer(1).slots(), [2, 1, 0, 2]);
        assert_eq!(Placement::from_json(all_layers, &MODEL).unwrap(), placement);
    }

    #[test]
    fn refusals() {
        let full = |head: &str, map: &str| format!(r#"{{{head}, "physical_to_logical_map": {map}}}"#);
        let head = r#""version": 1, "ranks": 2, "slots_per_rank": 2, "layer_ids": [1, 2]"#;
        let map = "[[0, 1, 2, -1], [2, 1, 0, 2]]";
        assert!(Placement::from_json(&full(head, map), &MODEL).is_ok());
        for (text, expected) in [
            (full(&head.replace("1,", "2,"), map), "version 2 is unknown"),
            (full(&head.replace("\"ranks\": 2", "\"ranks\": 4"), map), "made for 4 ranks, but there are 2"),
            (full(&head.replace("[1, 2]", "[0, 1]"), map), "layer_ids [0, 1] are not"),
            (full(&head.replace("version", "Version"), map), "unknown field `Version`"),
            (full(r#""version": 1, "ranks": 2"#, map), "missing slots_per_rank, layer_ids"),
            (full(head, "[[0, 1, 2, 3], [2, 1, 0, 2]]"), "layer 1, slot 3 (rank 1): expert 3"),
            (full(head, "[[0, 1, 2, 99999999999], [2, 1, 0, 2]]"), "99999999999"),
            (full(head, "[[0, 1, 2, -1]]"), "1 layer maps for 2 layer ids"),
            (full(head, "[[0, 1, 2, 0], [2, 1, 0]]"), "layer 2 lists 3 slots"),
            (r#"{"physical_to_logical_map": [[0, 1, 2]]}"#.into(), "1 lists for the model's 2 MoE layers"),
            (r#"{"physical_to_logical_map": [[0, 1, 2], [0, 1, 2]]}"#.into(), "not a multiple of 2 ranks"),
            (
                full(head, "[[0, 1, 2, -1], [2, 1, 0.5, 2]]"),
                "physical_to_logical_map[1][2]: invalid type: floating point `0.5`",
            ),
            (
                full(&head.replace("[1, 2]", "[1, 2.5]"), map),
                "layer_ids[1]: invalid type: floating point `2.5`",
            ),
            (full(&head.replace("\"ranks\": 2", "\"ranks\": -2"), map), "ranks: invalid value: integer `-2`"),
            (format!("{} x", full(head, map)), "trailing"),
            ("{".into(), "line 1"),
        ] {
            let message = Placement::from_json(&text, &MODEL).unwrap_err().to_string();
            assert!(message.contains(expected), "{message:?} should contain {expected:?}");
        }
        let bare = r#"{"physical_to_logical_map": [[0, 1, 2, 0], [2, 1, 0, 2]]}"#;
        let message = Placement::from_json(bare, &Expected { ranks: None, ..MODEL }).unwrap_err().to_string();
        assert!(message.contains("needs the number of ranks"));
    }
}
