//! What commands write: records and placements in a format that the file's extension or a flag says.

use std::path::Path;

use router_sim::formats::placements::PlacementFormat;
use router_sim::formats::{Format, Input, write};
use router_sim::stream::{LoadStream, Summed, TokenLoads, TokenStream};
use router_sim::{Error, Result};

/// What to write.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// Tokens or loads.
    Record(Format),
    /// A placement.
    Placement(PlacementFormat),
}

impl Target {
    /// By the name of the format.
    pub fn parse(name: &str) -> Result<Self, String> {
        let record = name.parse().map(Target::Record);
        record.or_else(|_| name.parse().map(Target::Placement)).map_err(|_: String| {
            "expected trace, tokens-jsonl, routed-npy, load-npy, load-safetensors, load-csv, load-json, or a placement format"
                .to_owned()
        })
    }

    /// By the extension of the file; `placement` says what the input holds.
    pub fn by_extension(path: &Path, placement: bool) -> Result<Self> {
        Ok(match (path.extension().and_then(|e| e.to_str()), placement) {
            (Some("json"), true) => Target::Placement(PlacementFormat::Moeyard),
            (Some("yaml" | "yml"), _) => Target::Placement(PlacementFormat::Trtllm),
            (Some("npy"), true) => Target::Placement(PlacementFormat::Phy2log),
            (Some("npy"), false) => Target::Record(Format::LoadNpy),
            (Some("moeroute"), _) => Target::Record(Format::Trace),
            (Some("jsonl"), _) => Target::Record(Format::TokensJsonl),
            (Some("safetensors"), _) => Target::Record(Format::LoadSafetensors),
            (Some("csv"), _) => Target::Record(Format::LoadCsv),
            (Some("json"), false) => Target::Record(Format::LoadJson),
            (extension, _) => {
                let why =
                    format!("extension {:?} says no format; give --output-format", extension.unwrap_or(""));
                return Err(Error::File { path: path.into(), why });
            }
        })
    }
}

/// What became of it.
pub struct Written {
    /// Of what and how much, and what the format cannot hold.
    pub what: String,
    /// Records that a lenient reader left out.
    pub skipped: u64,
}

/// Writes tokens or loads; loads are summed to windows of so many steps.
pub fn write_record(to: &Path, format: Format, input: Input, per_window: u64) -> Result<Written> {
    let refuse = |why: String| Err(Error::File { path: to.into(), why });
    let loads = |loads: Box<dyn LoadStream>| -> Result<(String, u64)> {
        let mut loads = Summed::new(loads, per_window);
        let windows = write::loads(to, format, &mut loads)?;
        Ok((format!("{windows} windows"), loads.skipped()))
    };
    let (lost, (what, skipped)) = match (input, write::lost_of_loads(format)) {
        (Input::Loads(input), Some(lost)) => (lost, loads(input)?),
        (Input::Loads(_), None) => {
            return refuse(format!("the input holds loads only, which cannot be written as {format}"));
        }
        (Input::Tokens(tokens), Some(mut lost)) => {
            lost.insert(0, "the experts of each token");
            (lost, loads(Box::new(TokenLoads::new(tokens, 1)))?)
        }
        (Input::Tokens(mut tokens), None) => match write::lost_of_tokens(format, tokens.shape()) {
            Some(lost) => {
                let rows = write::tokens(to, format, &mut tokens)?;
                (lost, (format!("{rows} tokens"), tokens.skipped()))
            }
            None => return refuse(format!("{format} is read, but not written")),
        },
    };
    let what = match lost.is_empty() {
        true => what,
        false => format!("{what}; not in this format: {}", lost.join(", ")),
    };
    Ok(Written { what, skipped })
}
