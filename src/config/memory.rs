//! What fits: weights, KV cache and working space against the memory there is, decided before a weight is read.

use super::size::ByteSize;
use crate::error::{Error, Result};

/// What a run wants. The ranks of one process share the memory of their device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    /// As errors call it.
    pub device: String,
    /// Bytes of weights, all ranks together.
    pub weights: u64,
    /// Bytes of activations, logits and buffers, all ranks together.
    pub working: u64,
    /// Ranks on this device, each with a KV pool of the same size.
    pub ranks: usize,
    /// Bytes of one KV block on one rank, all layers.
    pub kv_block: u64,
    /// Tokens per KV block.
    pub block_size: usize,
    /// `--kv-cache-memory`: bytes per rank.
    pub kv_memory: Option<ByteSize>,
    /// `--max-model-len`; already within what the model was made for.
    pub max_model_len: Option<usize>,
    /// Longest sequence the model was made for.
    pub model_positions: usize,
    /// Sequences that run at once on a rank: more KV than their longest forms is not taken by default.
    pub max_num_seqs: usize,
}

/// What a run gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// KV blocks per rank.
    pub kv_blocks: usize,
    /// Longest sequence: as asked for; else the model's, or what the KV pool holds if that is less.
    pub max_model_len: usize,
}

/// Divides `available` bytes. By default the KV pools take half of what weights and working space leave (the rest stays
/// for the page cache and the machine's other work), or less where the longest batch needs less.
///
/// # Errors
/// [`Error::Memory`] with the sum when the parts exceed what is available or a sequence of `--max-model-len` tokens
/// does not fit the pool; [`Error::Config`] when `--kv-cache-memory` is too small for that.
pub fn plan(available: u64, demand: &Demand) -> Result<MemoryPlan> {
    let fixed = demand.weights.saturating_add(demand.working);
    let left = available.saturating_sub(fixed);
    let ranks = demand.ranks as u64;
    let longest = demand.max_model_len.unwrap_or(demand.model_positions);
    let needed = blocks_for(longest, demand);
    let blocks = match demand.kv_memory {
        Some(ByteSize(bytes)) => bytes / demand.kv_block,
        None => (left / 2 / ranks / demand.kv_block).min(needed.saturating_mul(demand.max_num_seqs as u64)),
    };
    // A length that was asked for is owed; the model's own is only a wish.
    let required = if demand.max_model_len.is_some() { needed } else { 1 };
    let taken = if demand.kv_memory.is_some() { blocks } else { blocks.max(required) };
    let kv = taken.saturating_mul(demand.kv_block).saturating_mul(ranks);
    if fixed.saturating_add(kv) > available {
        return Err(does_not_fit(available, demand, kv));
    }
    if taken < required {
        return Err(Error::config(
            "kv-cache-memory",
            format!(
                "{} holds {taken} blocks of {} tokens; {longest} tokens need {required} blocks, {}",
                demand.kv_memory.map_or(0, |size| size.0),
                demand.block_size,
                ByteSize(required.saturating_mul(demand.kv_block)),
            ),
        ));
    }
    let kv_blocks = usize::try_from(taken).unwrap_or(usize::MAX);
    Ok(MemoryPlan { kv_blocks, max_model_len: longest.min(kv_blocks.saturating_mul(demand.block_size)) })
}

/// Blocks that hold one sequence.
fn blocks_for(tokens: usize, demand: &Demand) -> u64 {
    tokens.div_ceil(demand.block_size) as u64
}

fn does_not_fit(available: u64, demand: &Demand, kv: u64) -> Error {
    let sum = demand.weights.saturating_add(demand.working).saturating_add(kv);
    Error::Memory {
        device: demand.device.clone(),
        sum: format!(
            "weights {} + KV {} + working space {} = {} > {} available",
            ByteSize(demand.weights),
            ByteSize(kv),
            ByteSize(demand.working),
            ByteSize(sum),
            ByteSize(available),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// Two ranks, 1 GiB of weights, 1 MiB per block of 32 tokens.
    fn demand() -> Demand {
        Demand {
            device: "cpu".to_owned(),
            weights: GIB,
            working: GIB / 2,
            ranks: 2,
            kv_block: 1 << 20,
            block_size: 32,
            kv_memory: None,
            max_model_len: None,
            model_positions: 4096,
            max_num_seqs: 64,
        }
    }

    fn refusal(available: u64, demand: &Demand) -> String {
        plan(available, demand).unwrap_err().to_string()
    }

    #[test]
    fn kv_takes_half_of_what_is_left_by_default() {
        let plan = plan(3 * GIB + GIB / 2, &demand()).unwrap();
        assert_eq!(plan, MemoryPlan { kv_blocks: 512, max_model_len: 4096 });
    }

    #[test]
    fn kv_is_not_larger_than_the_longest_batch() {
        let plan = plan(1 << 50, &demand()).unwrap();
        assert_eq!(plan.kv_blocks, 64 * 4096 / 32);
    }

    #[test]
    fn the_models_length_gives_way_but_one_that_was_asked_for_does_not() {
        // 16 MiB left for each of the two ranks, half of it taken: 8 blocks.
        let available = 3 * GIB / 2 + (32 << 20);
        let short = plan(available, &demand()).unwrap();
        assert_eq!(short, MemoryPlan { kv_blocks: 8, max_model_len: 256 });
        let asked = |tokens| Demand { max_model_len: Some(tokens), ..demand() };
        // More than half is taken where the length needs it.
        assert_eq!(plan(available, &asked(512)).unwrap(), MemoryPlan { kv_blocks: 16, max_model_len: 512 });
        assert_eq!(
            refusal(available, &asked(513)),
            "not enough memory on cpu: weights 1.0 GiB + KV 34.0 MiB + working space 512.0 MiB = 1.5 GiB > 1.5 GiB \
             available"
        );
    }

    #[test]
    fn an_explicit_kv_size_is_taken_or_refused() {
        let sized =
            |kv: u64, tokens| Demand { kv_memory: Some(ByteSize(kv)), max_model_len: tokens, ..demand() };
        let plan = |kv, tokens| plan(4 * GIB, &sized(kv, tokens));
        assert_eq!(plan(GIB, None).unwrap(), MemoryPlan { kv_blocks: 1024, max_model_len: 4096 });
        assert_eq!(plan(4 << 20, None).unwrap(), MemoryPlan { kv_blocks: 4, max_model_len: 128 });
        let error = plan(4 << 20, Some(129)).unwrap_err().to_string();
        assert!(
            error.contains("4194304 holds 4 blocks of 32 tokens; 129 tokens need 5 blocks, 5.0 MiB"),
            "{error}"
        );
        assert!(plan(1, None).unwrap_err().to_string().contains("holds 0 blocks"));
        let error = plan(2 * GIB, None).unwrap_err().to_string();
        assert!(
            error.contains("weights 1.0 GiB + KV 4.0 GiB + working space 512.0 MiB = 5.5 GiB > 4.0 GiB"),
            "{error}"
        );
    }

    #[test]
    fn weights_that_do_not_fit_are_refused_with_the_sum() {
        assert!(refusal(GIB, &demand()).contains("= 1.5 GiB > 1.0 GiB available"));
        let huge = Demand { weights: u64::MAX, working: u64::MAX, ..demand() };
        assert!(refusal(GIB, &huge).contains("> 1.0 GiB available"));
    }
}
