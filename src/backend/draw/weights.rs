//! Weights of tokens, with the same bits on every machine.

/// The weight of the best token.
pub const ONE: u64 = 1 << 39;

/// Tokens whose weights are summed together, so that a draw passes over them at once.
const BLOCK: usize = 512;

/// exp((logit - max) / temperature), where that is `min_p` at least: the best token has 1. It never falls as the logit rises.
#[inline]
pub fn weight(logit: f32, max: f32, temperature: f32, min_p: f32) -> f32 {
    let weight = exp_nonpositive((logit - max) / temperature);
    if weight >= min_p { weight } else { 0.0 }
}

/// A weight from 0 to 1 in units of 1 / [`ONE`], to the nearest, ties to even.
#[inline]
pub fn units(weight: f32) -> u64 {
    (f64::from(weight) + ROUND).to_bits() - ROUND.to_bits()
}

/// Where numbers of f64 lie a unit apart: adding it rounds, and the units stand in the low bits.
const ROUND: f64 = 8192.0;

/// The sum of weights in units: what rounding added to each is taken off once.
fn sum_of(weights: &[f32]) -> u64 {
    let bits = weights.iter().map(|&weight| (f64::from(weight) + ROUND).to_bits());
    bits.fold(0, u64::wrapping_add).wrapping_sub((weights.len() as u64).wrapping_mul(ROUND.to_bits()))
}

/// The weights of a row.
#[derive(Debug, Default)]
pub struct Weights {
    each: Vec<f32>,
    /// Sums of [`BLOCK`] of them, in units; empty until they are asked for.
    blocks: Vec<u64>,
}

impl Weights {
    /// Takes memory for rows of `vocab` tokens.
    pub fn reserve(&mut self, vocab: usize) {
        self.each.clear();
        self.each.reserve(vocab);
        self.blocks.clear();
        self.blocks.reserve(vocab.div_ceil(BLOCK));
    }

    /// Weighs all tokens; see [`weight`].
    pub fn weigh(&mut self, logits: &[f32], max: f32, temperature: f32, min_p: f32) {
        self.each.clear();
        self.blocks.clear();
        if min_p > 0.0 {
            self.each.extend(logits.iter().map(|&logit| weight(logit, max, temperature, min_p)));
        } else {
            self.each.extend(logits.iter().map(|&logit| exp_nonpositive((logit - max) / temperature)));
        }
    }

    /// The weight of one token, in units.
    pub fn of(&self, id: u32) -> u64 {
        units(self.each[id as usize])
    }

    /// Sum of all weights.
    pub fn mass(&mut self) -> u64 {
        if self.blocks.is_empty() {
            self.blocks.extend(self.each.chunks(BLOCK).map(sum_of));
        }
        self.blocks.iter().sum()
    }

    /// Sum of the weights of these tokens.
    pub fn mass_of(&self, ids: &[u32]) -> u64 {
        ids.iter().map(|&id| self.of(id)).sum()
    }

    /// Selects the tokens of more than this weight, in id order.
    pub fn select_above(&self, ids: &mut Vec<u32>, weight: u64) {
        // Every id is written and most are written over: quicker than to branch where it cannot be foreseen.
        ids.clear();
        ids.resize(self.each.len(), 0);
        let mut selected = 0;
        for (id, &each) in (0u32..).zip(&self.each) {
            ids[selected] = id;
            selected += usize::from(units(each) > weight);
        }
        ids.truncate(selected);
    }

    /// The first token with which the weights add up to more than `target`.
    ///
    /// # Panics
    /// When all together do not.
    pub fn pick(&mut self, target: u64) -> u32 {
        let (mass, mut left) = (self.mass(), target);
        assert!(target < mass, "{target} of tokens that weigh {mass}");
        for (block, &mass) in self.blocks.iter().enumerate() {
            if mass > left {
                let first = block * BLOCK;
                let ids = first as u32..self.each.len().min(first + BLOCK) as u32;
                return self.pick_from(ids, left).expect("a token of a block that weighs more");
            }
            left -= mass;
        }
        unreachable!("all blocks together weigh more than {target}");
    }

    /// The first of these tokens with which their weights add up to more than `target`.
    ///
    /// # Panics
    /// When all together do not.
    pub fn pick_of(&self, ids: &[u32], target: u64) -> u32 {
        let picked = self.pick_from(ids.iter().copied(), target);
        picked.unwrap_or_else(|| panic!("{target} of {} tokens that weigh {}", ids.len(), self.mass_of(ids)))
    }

    fn pick_from(&self, mut ids: impl Iterator<Item = u32>, target: u64) -> Option<u32> {
        let mut sum = 0;
        ids.find(|&id| {
            sum += self.of(id);
            sum > target
        })
    }
}

/// exp(x) for x <= 0, to about 2 ulp; 0 where the result would be denormal. Plain multiplications and additions in a
/// fixed order, so the same bits everywhere, and free of branches, so that a loop over it becomes vector code. Of all numbers from
/// -88 to 0, none has a greater result than the next one.
/// Argument reduction and polynomial are those of Cephes' `expf` (Moshier).
#[inline]
pub(super) fn exp_nonpositive(x: f32) -> f32 {
    const LOWEST: f32 = -87.0;
    /// 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > LOWEST { x } else { LOWEST };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + c;
    }
    let fraction = p * r * r + r + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    if x > LOWEST { fraction * power } else { 0.0 }
}
