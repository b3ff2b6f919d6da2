//! `quantization_config` of config.json.

use super::keys::{Keys, MAX_WIDTH};
use crate::spec::Quantization;

/// Storage formats that the layout of a family's tensors allows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Formats {
    /// One tensor per matrix: fp8 blocks, AWQ, GPTQ.
    PerMatrix,
    /// Experts of a layer in one tensor, as gpt-oss packs them: MXFP4.
    Packed,
    /// Plain floating point only.
    Plain,
}

impl Formats {
    fn names(self) -> &'static [&'static str] {
        match self {
            Formats::PerMatrix => &["fp8", "awq", "gptq"],
            Formats::Packed => &["mxfp4"],
            Formats::Plain => &[],
        }
    }
}

/// Reads `quantization_config`; whatever the loader could not honour is refused by name.
pub(super) fn read(root: &Keys, formats: Formats) -> Option<Quantization> {
    let keys = root.filled_object("quantization_config")?;
    let method = keys.text("quant_method").unwrap_or("nothing");
    if !formats.names().contains(&method) {
        let expected = match formats.names() {
            [] => "no quantisation in this family".to_owned(),
            names => format!("one of {}", names.join(", ")),
        };
        keys.problem("quant_method", expected, method);
        return None;
    }
    match method {
        "fp8" => fp8(&keys),
        "awq" => awq(&keys),
        "gptq" => gptq(&keys),
        _ => Some(Quantization::Mxfp4),
    }
}

fn fp8(keys: &Keys) -> Option<Quantization> {
    keys.only_text("fmt", "e4m3");
    keys.only_text("activation_scheme", "dynamic");
    let block = keys.integers("weight_block_size", MAX_WIDTH);
    let found = format!("{block:?}");
    match block[..] {
        [rows, columns] if rows > 0 && columns > 0 => Some(Quantization::Fp8Block { block: [rows, columns] }),
        _ => {
            keys.problem("weight_block_size", "rows and columns of a block, both above 0", found);
            None
        }
    }
}

fn awq(keys: &Keys) -> Option<Quantization> {
    four_bits(keys);
    keys.only_flag("zero_point", true);
    if let Some(version) = keys.text("version") {
        keys.require(version.eq_ignore_ascii_case("gemm"), "version", "gemm", version);
    }
    Some(Quantization::Awq { group_size: group_size(keys) })
}

fn gptq(keys: &Keys) -> Option<Quantization> {
    four_bits(keys);
    // Version 2 stores zero points as they are, version 1 minus one.
    keys.only_text("checkpoint_format", "gptq");
    keys.require(keys.filled_object("dynamic").is_none(), "dynamic", "no settings per module", "an object");
    Some(Quantization::Gptq { group_size: group_size(keys) })
}

/// `group_size`; -1 is one group for the whole column.
fn group_size(keys: &Keys) -> Option<usize> {
    let whole_column = keys.optional_number("group_size") == Some(-1.0);
    (!whole_column).then(|| keys.size("group_size", 128, MAX_WIDTH))
}

fn four_bits(keys: &Keys) {
    let bits = keys.size("bits", 4, 64);
    keys.require(bits == 4, "bits", "4", bits);
}
