//! `.moetrace`, the simple trace of the demo models: magic `MOETRC01`, u32 little-endian header length, a JSON header,
//! then `domain` u8 `[tokens]` and `expert_ids` u8 `[layers][tokens][top_k]`.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::Options;
use super::matrix::check_shape;
use super::source::Source;
use crate::load::Phase;
use crate::stream::rows::{Row, RowReader};
use crate::stream::{TokenRow, TokenShape};
use crate::trace::RowInfo;

/// First bytes of a file.
pub const MAGIC: &[u8] = b"MOETRC01";
/// Largest header that is read.
const MAX_HEADER_BYTES: u32 = 1 << 20;
/// Tokens read at a time: each layer's ids lie in another part of the file.
const BLOCK_TOKENS: u64 = 8192;

#[derive(Deserialize)]
struct Header {
    model: String,
    layers: usize,
    first_moe_layer: usize,
    tokens: u64,
    n_experts: usize,
    top_k: usize,
    seq_len: u64,
    #[serde(default)]
    domains: Vec<String>,
    dtype: String,
}

/// Tokens in the order of the file; a sequence is a request.
#[derive(Debug)]
pub struct MoetraceReader {
    path: PathBuf,
    source: Source,
    shape: TokenShape,
    phase: Phase,
    tokens: u64,
    seq_len: u64,
    /// Where the domains begin.
    data_start: u64,
    /// Tokens whose ids are there in every layer.
    whole_tokens: u64,
    /// The token that is read next.
    next: u64,
    /// First token of the block at hand.
    block_start: u64,
    /// Domains of the block, then `[layers][block tokens][top_k]` ids.
    block: Vec<u8>,
}

impl MoetraceReader {
    /// Reads the header.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(path: &Path, mut source: Source, options: &Options) -> Result<Self, String> {
        let mut start = [0; 12];
        source.read_exact(&mut start).map_err(|e| format!("cut within the header: {e}"))?;
        if start[..8] != *MAGIC {
            return Err("not a .moetrace: it does not begin with MOETRC01".into());
        }
        let length = u32::from_le_bytes([start[8], start[9], start[10], start[11]]);
        if length > MAX_HEADER_BYTES {
            return Err(format!("a header of {length} bytes exceeds the limit of {MAX_HEADER_BYTES}"));
        }
        let mut json = vec![0; length as usize];
        source.read_exact(&mut json).map_err(|e| format!("cut within the header: {e}"))?;
        let header: Header =
            serde_json::from_slice(&json).map_err(|e| format!("the header is not valid: {e}"))?;
        let data_start = 12 + u64::from(length);
        let bytes = source.get_ref().bytes();
        check(&header, options)?;
        let layer_bytes = header.tokens.checked_mul(header.top_k as u64);
        let due = layer_bytes
            .and_then(|n| {
                n.checked_mul(header.layers as u64)?.checked_add(header.tokens)?.checked_add(data_start)
            })
            .ok_or_else(|| format!("{} tokens do not fit any file", header.tokens))?;
        if bytes > due {
            return Err(format!("the file has {bytes} bytes, its header describes {due}"));
        }
        // The last layer ends first when the file is cut.
        let missing = (due - bytes).div_ceil(header.top_k as u64);
        Ok(MoetraceReader {
            path: path.into(),
            source,
            phase: options.phase(),
            tokens: header.tokens,
            seq_len: header.seq_len,
            data_start,
            whole_tokens: header.tokens.saturating_sub(missing),
            next: 0,
            block_start: 0,
            block: Vec::new(),
            shape: TokenShape {
                model: header.model,
                layer_ids: (header.first_moe_layer..header.first_moe_layer + header.layers).collect(),
                experts: header.n_experts,
                top_k: header.top_k,
                labels: header.domains,
                ..TokenShape::default()
            },
        })
    }

    fn block_tokens(&self) -> u64 {
        BLOCK_TOKENS.min(self.whole_tokens - self.block_start)
    }

    fn read_block(&mut self) -> Result<(), String> {
        self.block_start = self.next;
        let (n, top_k) = (self.block_tokens(), self.shape.top_k as u64);
        self.block.clear();
        self.take(self.data_start + self.block_start, n)?;
        for layer in 0..self.shape.layers() as u64 {
            let at = self.data_start + self.tokens + (layer * self.tokens + self.block_start) * top_k;
            self.take(at, n * top_k)?;
        }
        Ok(())
    }

    fn take(&mut self, at: u64, bytes: u64) -> Result<(), String> {
        self.source.seek(SeekFrom::Start(at)).map_err(|e| e.to_string())?;
        match self.source.by_ref().take(bytes).read_to_end(&mut self.block) {
            Ok(n) if n as u64 == bytes => Ok(()),
            Ok(n) => Err(format!("cut after {n} of {bytes} bytes")),
            Err(e) => Err(e.to_string()),
        }
    }
}

fn check(header: &Header, options: &Options) -> Result<(), String> {
    check_shape(header.layers, header.n_experts)?;
    options.check_experts(header.n_experts)?;
    if header.top_k == 0 || header.top_k > header.n_experts {
        return Err(format!("top_k {} is not within 1..={} experts", header.top_k, header.n_experts));
    }
    if header.dtype != "u8" {
        return Err(format!("dtype {:?} is not read, expected \"u8\"", header.dtype));
    }
    if header.seq_len == 0 {
        return Err("seq_len is 0".into());
    }
    if header.first_moe_layer > 1 << 20 {
        return Err(format!("first_moe_layer {} exceeds the limit of {}", header.first_moe_layer, 1 << 20));
    }
    Ok(())
}

impl RowReader for MoetraceReader {
    fn shape(&self) -> &TokenShape {
        &self.shape
    }

    fn next_row(&mut self, row: &mut Row) -> Result<bool, String> {
        if self.next >= self.whole_tokens {
            let cut = self.next < self.tokens;
            let why = format!("cut: {} of {} tokens have experts in every layer", self.next, self.tokens);
            self.tokens = self.next;
            return if cut { Err(why) } else { Ok(false) };
        }
        let (token, top_k) = (self.next, self.shape.top_k);
        let at_hand = !self.block.is_empty() && token < self.block_start + self.block_tokens();
        if !at_hand && let Err(why) = self.read_block() {
            (self.whole_tokens, self.tokens) = (self.next, self.next);
            return Err(why);
        }
        self.next += 1;
        let (at, n) = ((token - self.block_start) as usize, self.block_tokens() as usize);
        row.ids.clear();
        for layer in 0..self.shape.layers() {
            let ids = n + (layer * n + at) * top_k;
            row.ids.extend(self.block[ids..ids + top_k].iter().map(|&id| i64::from(id)));
        }
        let label = u16::from(self.block[at]);
        if usize::from(label) >= self.shape.labels.len().max(1) {
            return Err(format!("domain {label} of {}", self.shape.labels.len()));
        }
        let (request, position) = (token / self.seq_len, token % self.seq_len);
        let info = RowInfo { request, position, phase: self.phase, recomputed: false };
        row.token = Some(TokenRow { info, rank: 0, label });
        Ok(true)
    }

    fn record(&self) -> u64 {
        self.next.saturating_sub(1)
    }

    fn path(&self) -> &Path {
        &self.path
    }
}
