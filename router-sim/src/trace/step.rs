//! The record of one step: which rows ran on which rank, and the experts of each.

use super::bits;
use super::header::{TraceHeader, WeightFormat};
use super::varint::{self, Cursor};
use crate::load::{LoadWindow, Phase};

const DECODE: u8 = 1;
const RECOMPUTED: u8 = 2;
const CONTINUES: u8 = 4;

/// What all pieces of a step share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepInfo {
    /// Counts the steps of a run.
    pub step: u64,
    /// Start of the step, in microseconds since the start of the run.
    pub start_us: u64,
    /// How long it took, in microseconds.
    pub duration_us: u64,
    /// Version of the placement that was in force.
    pub placement_version: u64,
    /// Rows of the whole step, over all ranks and records.
    pub rows: u64,
}

/// One token of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowInfo {
    /// The request it belongs to.
    pub request: u64,
    /// Its position in the sequence.
    pub position: u64,
    /// Prompt token or generated one.
    pub phase: Phase,
    /// Computed before and again after a preemption.
    pub recomputed: bool,
}

/// The rows of a step that one rank owns, as the writer takes them.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    /// The owner.
    pub rank: usize,
    /// Its rows.
    pub rows: &'a [RowInfo],
    /// `[layers][rows][top_k]` expert ids, best first.
    pub ids: &'a [u32],
    /// Same shape; not looked at when the trace stores none.
    pub weights: &'a [f32],
}

/// The rows of a step that one rank owns, as read back.
#[derive(Debug, Clone, PartialEq)]
pub struct PieceRecord {
    /// The owner.
    pub rank: usize,
    /// Its rows.
    pub rows: Vec<RowInfo>,
    /// `[layers][rows][top_k]` expert ids, best first.
    pub ids: Vec<u16>,
    /// Same shape; empty when the trace stores none.
    pub weights: Vec<f32>,
}

/// A step, or the part of it that one recorder saw.
#[derive(Debug, Clone, PartialEq)]
pub struct StepRecord {
    /// What all its parts share.
    pub info: StepInfo,
    /// One per rank that owned rows.
    pub pieces: Vec<PieceRecord>,
}

impl StepRecord {
    /// Rows of this record.
    pub fn rows(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.rows.len() as u64).sum()
    }

    /// All rows of the step are here.
    pub fn is_whole(&self) -> bool {
        self.rows() == self.info.rows
    }

    /// Adds one to the load of every expert chosen here, for each time it was chosen.
    ///
    /// # Panics
    /// When the window is not of the trace's shape.
    pub fn add_to(&self, load: &mut LoadWindow) {
        for piece in self.pieces.iter().filter(|piece| !piece.rows.is_empty()) {
            let per_layer = piece.ids.len() / load.layers();
            let top_k = per_layer / piece.rows.len();
            for (layer, ids) in piece.ids.chunks_exact(per_layer).enumerate() {
                for (row, ids) in piece.rows.iter().zip(ids.chunks_exact(top_k)) {
                    let counts = load.counts_mut(row.phase, layer);
                    ids.iter()
                        .for_each(|&id| counts[usize::from(id)] = counts[usize::from(id)].saturating_add(1));
                }
            }
        }
    }
}

/// Appends the payload of a step record.
///
/// # Panics
/// When a piece's lengths disagree, or it names a rank or an expert that does not exist.
pub(super) fn encode(out: &mut Vec<u8>, header: &TraceHeader, info: &StepInfo, pieces: &[Piece<'_>]) {
    let StepInfo { step, start_us, duration_us, placement_version, rows } = *info;
    for number in [step, start_us, duration_us, placement_version, rows, pieces.len() as u64] {
        varint::put(out, number);
    }
    let listed: u64 = pieces.iter().map(|piece| piece.rows.len() as u64).sum();
    assert!(listed <= rows, "{listed} rows listed of a step of {rows}");
    for piece in pieces {
        assert!(piece.rank < header.world(), "rank {} of {}", piece.rank, header.world());
        let ids = piece.rows.len() * header.ids_per_row();
        assert_eq!(piece.ids.len(), ids, "expert ids of {} rows", piece.rows.len());
        varint::put(out, piece.rank as u64);
        varint::put(out, piece.rows.len() as u64);
        put_rows(out, piece.rows);
        bits::pack(out, piece.ids, header.placement.experts());
        if header.weights != WeightFormat::None {
            assert_eq!(piece.weights.len(), ids, "router weights of {} rows", piece.rows.len());
            put_weights(out, piece.weights, header.weights);
        }
    }
}

/// Reads the payload of a step record; every count is checked against the bytes that are there before it is believed.
pub(super) fn decode(payload: &[u8], header: &TraceHeader) -> Result<StepRecord, String> {
    let mut cursor = Cursor(payload);
    let info = StepInfo {
        step: cursor.varint()?,
        start_us: cursor.varint()?,
        duration_us: cursor.varint()?,
        placement_version: cursor.varint()?,
        rows: cursor.varint()?,
    };
    let pieces = cursor.varint()?;
    if pieces > header.world() as u64 {
        return Err(format!("step {}: {pieces} pieces from {} ranks", info.step, header.world()));
    }
    let pieces: Result<Vec<_>, String> = (0..pieces).map(|_| piece(&mut cursor, header)).collect();
    let record = StepRecord { info, pieces: pieces.map_err(|why| format!("step {}: {why}", info.step))? };
    if !cursor.0.is_empty() {
        return Err(format!("step {}: {} bytes too many", info.step, cursor.0.len()));
    }
    if record.rows() > info.rows {
        return Err(format!("step {}: {} rows listed where {} ran", info.step, record.rows(), info.rows));
    }
    Ok(record)
}

fn piece(cursor: &mut Cursor<'_>, header: &TraceHeader) -> Result<PieceRecord, String> {
    let rank = cursor.varint()?;
    if rank >= header.world() as u64 {
        return Err(format!("rank {rank} of {}", header.world()));
    }
    let rows = cursor.varint()?;
    // A row takes at least the byte of its flags and the bits of its ids; below, sizes cannot overflow.
    let limit = cursor.0.len() / (1 + header.id_bits_per_row() / 8);
    let Some(count) = usize::try_from(rows).ok().filter(|n| *n <= limit) else {
        return Err(format!("{rows} rows in {} bytes", cursor.0.len()));
    };
    let rows = take_rows(cursor, count)?;
    let experts = header.placement.experts();
    let ids = count * header.ids_per_row();
    let packed = cursor.take(bits::packed_len(ids, bits::width(experts)))?;
    let weight_bytes = ids * header.weights.bytes();
    let ids = bits::unpack(packed, ids, experts).map_err(|id| format!("expert {id} of {experts}"))?;
    let weights = take_weights(cursor.take(weight_bytes)?, header.weights);
    Ok(PieceRecord { rank: rank as usize, rows, ids, weights })
}

fn put_rows(out: &mut Vec<u8>, rows: &[RowInfo]) {
    let (mut request, mut due_position) = (0u64, None);
    for row in rows {
        let continues = row.request == request && due_position == Some(row.position);
        let flags =
            [(row.phase == Phase::Decode, DECODE), (row.recomputed, RECOMPUTED), (continues, CONTINUES)];
        out.push(flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum());
        if !continues {
            varint::put(out, varint::zigzag(row.request.wrapping_sub(request) as i64));
            varint::put(out, row.position);
        }
        (request, due_position) = (row.request, row.position.checked_add(1));
    }
}

fn take_rows(cursor: &mut Cursor<'_>, count: usize) -> Result<Vec<RowInfo>, String> {
    let mut rows = Vec::with_capacity(count);
    let (mut request, mut due_position) = (0u64, None);
    for row in 0..count {
        let flags = cursor.byte()?;
        if flags & !(DECODE | RECOMPUTED | CONTINUES) != 0 {
            return Err(format!("row {row} has unknown flags {flags:#04x}"));
        }
        let position = if flags & CONTINUES == 0 {
            request = request.wrapping_add(varint::unzigzag(cursor.varint()?) as u64);
            cursor.varint()?
        } else {
            due_position.ok_or_else(|| format!("row {row} continues where nothing precedes"))?
        };
        due_position = position.checked_add(1);
        rows.push(RowInfo {
            request,
            position,
            phase: if flags & DECODE == 0 { Phase::Prefill } else { Phase::Decode },
            recomputed: flags & RECOMPUTED != 0,
        });
    }
    Ok(rows)
}

fn put_weights(out: &mut Vec<u8>, weights: &[f32], format: WeightFormat) {
    match format {
        WeightFormat::None => {}
        WeightFormat::F32 => weights.iter().for_each(|w| out.extend_from_slice(&w.to_le_bytes())),
        WeightFormat::Bf16 => weights.iter().for_each(|w| out.extend_from_slice(&to_bf16(*w).to_le_bytes())),
    }
}

fn take_weights(bytes: &[u8], format: WeightFormat) -> Vec<f32> {
    let (words, halves) = (bytes.as_chunks().0, bytes.as_chunks().0);
    match format {
        WeightFormat::None => Vec::new(),
        WeightFormat::F32 => words.iter().map(|word| f32::from_le_bytes(*word)).collect(),
        WeightFormat::Bf16 => {
            halves.iter().map(|half| f32::from_bits(u32::from(u16::from_le_bytes(*half)) << 16)).collect()
        }
    }
}

/// Rounds to nearest even. A NaN stays one, by keeping its quiet bit.
fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_to_nearest_even() {
        let rounded = |x: f32| f32::from_bits(u32::from(to_bf16(x)) << 16);
        for exact in [0.0, -0.0, 1.0, -2.5, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(rounded(exact).to_bits(), exact.to_bits());
        }
        assert_eq!(rounded(1.0 + 1.0 / 256.0), 1.0);
        assert_eq!(rounded(1.0 + 3.0 / 256.0), 1.0 + 4.0 / 256.0);
        assert_eq!(rounded(f32::MAX), f32::INFINITY);
        assert!(rounded(f32::NAN).is_nan() && rounded(f32::from_bits(0x7f80_0001)).is_nan());
    }
}
