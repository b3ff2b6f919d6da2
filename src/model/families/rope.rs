//! Rotary embeddings of config.json, in both published forms: `rope_theta` beside `rope_scaling`, and
//! `rope_parameters` (transformers 5), which holds everything. Formulas are those of transformers'
//! `modeling_rope_utils`.

use super::keys::{Keys, MAX_POSITIONS};
use crate::spec::{Rope, RopeScaling};

/// What a family knows about its rotary embedding before config.json is read.
pub(super) struct RopeShape {
    /// Base when config.json names none.
    pub theta: f64,
    /// Width of a head (GQA) or of the rotary part (MLA).
    pub head_dim: usize,
    /// Share of `head_dim` that rotates when config.json names none; `None` if the family always rotates all of it.
    pub partial: Option<f64>,
    /// Pairs are (2i, 2i+1).
    pub interleaved: bool,
    /// Longest sequence, which stands in for a missing original length.
    pub max_position: usize,
    /// LongRoPE factors come with `short_mscale` and `long_mscale` (Phi-3.5-MoE).
    pub own_mscale: bool,
    /// Scaling when config.json has neither object.
    pub absent: RopeScaling,
}

impl RopeShape {
    /// What most families have; the others override.
    pub(super) fn plain(theta: f64, head_dim: usize, max_position: usize) -> Self {
        RopeShape {
            theta,
            head_dim,
            partial: None,
            interleaved: false,
            max_position,
            own_mscale: false,
            absent: RopeScaling::None,
        }
    }
}

/// A rotary embedding and what it does to the attention scale.
pub(super) struct Rotary {
    /// The embedding.
    pub rope: Rope,
    /// DeepSeek multiplies its attention scale by the square of this; 1 without `mscale_all_dim`.
    pub mscale: f64,
}

/// Reads the rotary embedding. `root` is config.json itself.
pub(super) fn read(root: &Keys, shape: &RopeShape) -> Rotary {
    let scaling = root.filled_object("rope_scaling").or_else(|| root.filled_object("rope_parameters"));
    let theta = theta(root, scaling.as_ref(), shape.theta);
    let dim = rotating_dim(root, scaling.as_ref(), shape);
    let (scaling, mscale) = match scaling {
        None => (shape.absent.clone(), 1.0),
        Some(keys) => scaled(&Stretch::read(keys, root, shape), dim),
    };
    Rotary { rope: Rope { theta, dim, interleaved: shape.interleaved, scaling }, mscale }
}

/// The base: inside the object, else beside it, else the family's.
fn theta(root: &Keys, scaling: Option<&Keys>, default: f64) -> f64 {
    let keys = scaling.filter(|keys| keys.has("rope_theta")).unwrap_or(root);
    let theta = keys.positive("rope_theta", default);
    keys.require(theta > 1.0, "rope_theta", "a number above 1", theta);
    theta
}

/// Leading dimensions of a head that rotate.
fn rotating_dim(root: &Keys, scaling: Option<&Keys>, shape: &RopeShape) -> usize {
    let key = "partial_rotary_factor";
    let keys = scaling.filter(|keys| keys.has(key)).unwrap_or(root);
    let partial = keys.positive(key, shape.partial.unwrap_or(1.0));
    if shape.partial.is_some() {
        keys.require(partial <= 1.0, key, "a number in (0, 1]", partial);
    } else {
        keys.require(partial == 1.0, key, "1 (this family rotates whole heads)", partial);
    }
    let dim = (shape.head_dim as f64 * partial.min(1.0)) as usize;
    let even = dim > 0 && dim.is_multiple_of(2);
    root.require(even, "head_dim", "an even number of rotating dimensions, at least 2", dim);
    if even { dim } else { 2 }
}

/// The object that describes the scaling, with the keys that several kinds use.
struct Stretch<'a> {
    keys: Keys<'a>,
    shape: &'a RopeShape,
    factor: Option<f64>,
    mscale_all_dim: f64,
    attention_factor: Option<f64>,
    /// Context length before stretching.
    original: usize,
}

impl<'a> Stretch<'a> {
    fn read(keys: Keys<'a>, root: &Keys, shape: &'a RopeShape) -> Self {
        // transformers 5 may nest one object per layer type; one embedding serves all layers here.
        keys.absent("full_attention");
        keys.absent("sliding_attention");
        // Phi keeps the original length beside the object too, and transformers prefers it there.
        let key = "original_max_position_embeddings";
        let inside = keys.size(key, shape.max_position, MAX_POSITIONS);
        let original = root.size(key, inside, MAX_POSITIONS);
        let agree = !keys.has(key) || original == inside;
        keys.require(agree, key, format!("{original}, as at the top of the file"), inside);
        Stretch {
            factor: keys.optional_positive("factor"),
            mscale_all_dim: keys.number("mscale_all_dim", 0.0),
            attention_factor: keys.optional_positive("attention_factor"),
            original,
            keys,
            shape,
        }
    }

    /// `factor`, or how far the longest sequence exceeds the original one.
    fn factor_or_ratio(&self) -> f64 {
        self.factor.unwrap_or(self.shape.max_position as f64 / self.original as f64)
    }

    fn linear(&self) -> RopeScaling {
        self.keys.require(self.keys.has("factor"), "factor", "a number above 0", "nothing");
        RopeScaling::Linear { factor: self.factor.unwrap_or(1.0) }
    }

    fn yarn(&self) -> RopeScaling {
        let keys = &self.keys;
        let factor = self.factor_or_ratio();
        let own = keys.number("mscale", 0.0);
        let computed = if own != 0.0 && self.mscale_all_dim != 0.0 {
            mscale(factor, own) / mscale(factor, self.mscale_all_dim)
        } else {
            mscale(factor, 1.0)
        };
        let attention_factor = self.attention_factor.unwrap_or(computed);
        let usable = (attention_factor as f32).is_finite() && attention_factor > 0.0;
        keys.require(usable, "mscale", "an attention factor above 0", attention_factor);
        RopeScaling::Yarn {
            factor,
            original_max_position: self.original,
            beta_fast: keys.positive("beta_fast", 32.0),
            beta_slow: keys.positive("beta_slow", 1.0),
            truncate: keys.flag("truncate", true),
            attention_factor,
        }
    }

    fn longrope(&self, dim: usize) -> RopeScaling {
        let keys = &self.keys;
        let factors = |key: &str| {
            let list = keys.positives(key).unwrap_or_default();
            keys.require(list.len() == dim / 2, key, format!("{} numbers", dim / 2), list.len());
            list
        };
        let attention_factor = self.attention_factor.unwrap_or_else(|| {
            let factor = self.factor_or_ratio();
            if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (self.original as f64).ln()).sqrt() }
        });
        let usable = attention_factor.is_finite();
        keys.require(usable, "original_max_position_embeddings", "at least 2", self.original);
        let own = |key: &str| {
            if !self.shape.own_mscale {
                return attention_factor;
            }
            keys.require(keys.has(key), key, "a number above 0", "nothing");
            keys.positive(key, attention_factor)
        };
        RopeScaling::LongRope {
            short_factor: factors("short_factor"),
            long_factor: factors("long_factor"),
            original_max_position: self.original,
            short_mscale: own("short_mscale"),
            long_mscale: own("long_mscale"),
        }
    }
}

/// The scaling, and DeepSeek's factor on the attention scale.
fn scaled(stretch: &Stretch, dim: usize) -> (RopeScaling, f64) {
    let keys = &stretch.keys;
    let key = keys.either("rope_type", "type");
    let scaling = match keys.text(key).unwrap_or("default") {
        "default" => return (RopeScaling::None, 1.0),
        "linear" => stretch.linear(),
        "yarn" => stretch.yarn(),
        "longrope" => stretch.longrope(dim),
        other => {
            keys.problem(key, "one of default, linear, yarn, longrope", other);
            RopeScaling::None
        }
    };
    (scaling, mscale(stretch.factor_or_ratio(), stretch.mscale_all_dim))
}

/// YaRN's attention temperature for a stretch of `factor`, weighted by `weight`; 1 for weight 0.
pub(super) fn mscale(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}
