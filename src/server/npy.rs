//! Expert choices as NumPy's .npy in base64: what readers of vLLM's `routed_experts` take.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::model::Routing;

/// `[positions, moe layers, top_k]` expert ids of the first `positions` positions, C order. Dense layers have no row: a
/// reader that counts all layers, as vLLM's buffer does, finds MoE layer i at i plus the dense layers before it. The type is `u8` where all of
/// the model's `experts` have such an id, else `<u2`: the smallest that holds them, the same in every answer.
pub fn routed_experts(routing: &Routing, positions: usize, experts: usize) -> String {
    let Routing { rows, top_k, ids, .. } = routing;
    let layers = ids.len().checked_div(rows * top_k).unwrap_or(0);
    let positions = positions.min(*rows);
    let small = experts <= 1 << 8;
    let mut bytes = header(if small { "|u1" } else { "<u2" }, [positions, layers, *top_k]);
    for position in 0..positions {
        for layer in 0..layers {
            let at = (layer * rows + position) * top_k;
            for &id in &ids[at..at + top_k] {
                assert!((id as usize) < experts, "expert {id} of {experts}");
                bytes.extend_from_slice(&(id as u16).to_le_bytes()[..if small { 1 } else { 2 }]);
            }
        }
    }
    STANDARD.encode(bytes)
}

/// Version 1.0 of the format: magic, version, length, and a Python dictionary padded so that the data is aligned to 64.
fn header(dtype: &str, shape: [usize; 3]) -> Vec<u8> {
    const PREAMBLE: usize = 10;
    let [a, b, c] = shape;
    let mut text = format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({a}, {b}, {c}), }}");
    let unpadded = PREAMBLE + text.len() + 1;
    text.extend(std::iter::repeat_n(' ', unpadded.next_multiple_of(64) - unpadded));
    text.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend_from_slice(&(text.len() as u16).to_le_bytes());
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_come_first_and_the_type_is_the_smallest() {
        // 2 layers, 3 positions, top 2: id = 100 * layer + 10 * position + k.
        let ids = (0..12).map(|i| 100 * (i / 6) + 10 * (i % 6 / 2) + i % 2).collect();
        let routing = Routing { first_row: 0, rows: 3, top_k: 2, ids, weights: vec![] };
        for (experts, dtype, width) in [(256, "'|u1'", 1), (257, "'<u2'", 2)] {
            let bytes = STANDARD.decode(routed_experts(&routing, 2, experts)).unwrap();
            let length = u16::from_le_bytes([bytes[8], bytes[9]]) as usize;
            assert_eq!((&bytes[..8], (10 + length) % 64), (&b"\x93NUMPY\x01\x00"[..], 0));
            let text = std::str::from_utf8(&bytes[10..10 + length]).unwrap();
            assert!(text.contains(dtype) && text.contains("(2, 2, 2)") && text.ends_with('\n'), "{text:?}");
            let data: Vec<u8> = bytes[10 + length..].chunks(width).map(|id| id[0]).collect();
            assert_eq!(data, [0, 1, 100, 101, 10, 11, 110, 111]);
        }
    }
}
