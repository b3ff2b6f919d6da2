//! What a step cannot do without: the bytes it must read and the arithmetic it must do.

use moeyard::backend::Precision;
use moeyard::spec::{Attention, ModelSpec};

/// Floating-point operations (a multiplication and an addition are two) of a whole prompt: all matrices but the head for every
/// token, the head for the last one, and attention over what each token sees, in the form used (MLA: expanded keys and
/// values; expanding them is among the matrices).
pub fn flops_of_prompt(spec: &ModelSpec, tokens: usize) -> f64 {
    let all = spec.parameters();
    let head = if spec.tied_embeddings { all.embedding } else { all.head };
    let matrices = (spec.active_parameters() - all.embedding - all.head) as f64;
    let per_position = match spec.attention {
        Attention::Gqa { heads, head_dim, .. } => heads * 2 * head_dim,
        Attention::Mla { heads, nope_dim, rope_dim, v_dim, .. } => heads * (nope_dim + rope_dim + v_dim),
    };
    let seen = |window: Option<usize>| {
        let window = window.unwrap_or(usize::MAX);
        (1..=tokens).map(|n| n.min(window)).sum::<usize>()
    };
    let pairs: usize = spec.layers.iter().map(|layer| seen(layer.window)).sum();
    2.0 * (tokens as f64 * matrices + head as f64 + (pairs * per_position) as f64)
}

/// What one or more decode steps cannot do without, matrix by matrix: a matrix is read once per step, whatever the number of rows.
pub struct Decode {
    /// Bytes of everything but routed experts: weights, of the embedding none, since a step reads some rows of it only, and the cache.
    always: f64,
    /// Operations of the rows of these steps with those weights.
    always_flops: f64,
    /// Bytes of a routed expert. Scales of quantised weights are left out.
    expert: f64,
    /// Operations of one row with a routed expert.
    expert_flops: f64,
    /// How often an expert met so many rows, by the number of rows; index 0 counts nothing.
    met: Vec<usize>,
}

impl Decode {
    /// One step of as many sequences as there are `rows`, which see `context` tokens together. `met` is how often one of them met an
    /// expert, for each expert and layer with any.
    pub fn step(
        spec: &ModelSpec,
        precision: Precision,
        rows: usize,
        context: usize,
        met: &[usize],
    ) -> Decode {
        let all = spec.parameters();
        let expert = all.experts / (spec.moe_layers().len() * spec.moe.experts) as u64;
        let head = if spec.tied_embeddings { all.embedding } else { 0 };
        let matrices = all.total() - all.embedding - all.experts - all.shared + head;
        let cache = context as u64 * spec.kv_numbers_per_token(1);
        let Precision { weights, activations, experts: quantized } = precision;
        let parts = [(matrices, weights), (all.shared, quantized), (cache, activations)];
        let mut histogram = vec![0; rows + 1];
        met.iter().for_each(|&rows| histogram[rows] += 1);
        Decode {
            always: parts.map(|(numbers, dtype)| numbers as f64 * dtype.bytes() as f64).iter().sum(),
            always_flops: 2.0 * rows as f64 * (matrices + all.shared) as f64,
            expert: expert as f64 * quantized.bytes() as f64,
            expert_flops: 2.0 * expert as f64,
            met: histogram,
        }
    }

    /// Counts one more step of the same model and as many rows.
    pub fn add(&mut self, step: &Decode) {
        self.always += step.always;
        self.always_flops += step.always_flops;
        self.met.iter_mut().zip(&step.met).for_each(|(n, more)| *n += more);
    }

    /// All bytes.
    pub fn bytes(&self) -> f64 {
        self.always + self.met.iter().sum::<usize>() as f64 * self.expert
    }

    /// Seconds if every matrix takes what is longer, reading it or multiplying by it: what there is to reach for an engine that holds no
    /// matrix in a cache before it is needed. `bytes` and `flops` are what the machine does in a second.
    pub fn by_matrix(&self, bytes: f64, flops: f64) -> f64 {
        let always = (self.always / bytes).max(self.always_flops / flops);
        let experts =
            self.met.iter().enumerate().map(|(rows, &n)| {
                n as f64 * (self.expert / bytes).max(rows as f64 * self.expert_flops / flops)
            });
        always + experts.sum::<f64>()
    }
}
