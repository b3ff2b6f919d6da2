//! config.json to [`ModelSpec`]: one file per family with its keys, the defaults transformers has for absent ones, the
//! mapping and the tensor names. No forward pass: a difference between families is a value in the spec.
//!
//! The authority on what a key means is transformers 5.17, whose outputs the golden fixtures hold.

mod keys;
mod basics;
mod rope;
mod routers;
mod quantization;
mod mixtral;
mod deepseek;
mod qwen_moe;
mod olmoe;
mod glm4_moe;
mod gpt_oss;
mod granitemoe;
mod phimoe;

use std::cell::RefCell;

use serde_json::{Map, Value};

use crate::error::{Problems, Result};
use crate::spec::ModelSpec;
use crate::weights::names::TensorNames;
use keys::{FILE, Keys, brief};

/// A model as its config.json describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Family {
    /// What the model is.
    pub spec: ModelSpec,
    /// How its tensors are called.
    pub names: TensorNames,
}

/// One entry of [`known`].
pub struct KnownFamily {
    /// `model_type` of config.json.
    pub model_type: &'static str,
    /// Names in `architectures`, published ones and those transformers writes.
    pub architectures: &'static [&'static str],
    read: fn(&Keys) -> ModelSpec,
    names: TensorNames,
}

const KNOWN: &[KnownFamily] = &[
    KnownFamily {
        model_type: "mixtral",
        architectures: &["MixtralForCausalLM"],
        read: mixtral::read,
        names: mixtral::NAMES,
    },
    KnownFamily {
        model_type: "deepseek_v2",
        architectures: &["DeepseekV2ForCausalLM"],
        read: deepseek::read_v2,
        names: deepseek::NAMES,
    },
    KnownFamily {
        model_type: "deepseek_v3",
        architectures: &["DeepseekV3ForCausalLM"],
        read: deepseek::read_v3,
        names: deepseek::NAMES,
    },
    KnownFamily {
        model_type: "kimi_k2",
        architectures: &["DeepseekV3ForCausalLM", "KimiK2ForCausalLM"],
        read: deepseek::read_v3,
        names: deepseek::NAMES,
    },
    KnownFamily {
        model_type: "qwen2_moe",
        architectures: &["Qwen2MoeForCausalLM"],
        read: qwen_moe::read_qwen2,
        names: qwen_moe::NAMES,
    },
    KnownFamily {
        model_type: "qwen3_moe",
        architectures: &["Qwen3MoeForCausalLM"],
        read: qwen_moe::read_qwen3,
        names: qwen_moe::NAMES,
    },
    KnownFamily {
        model_type: "olmoe",
        architectures: &["OlmoeForCausalLM"],
        read: olmoe::read,
        names: TensorNames::COMMON,
    },
    KnownFamily {
        model_type: "glm4_moe",
        architectures: &["Glm4MoeForCausalLM"],
        read: glm4_moe::read,
        names: TensorNames::COMMON,
    },
    KnownFamily {
        model_type: "gpt_oss",
        architectures: &["GptOssForCausalLM"],
        read: gpt_oss::read,
        names: gpt_oss::NAMES,
    },
    KnownFamily {
        model_type: "granitemoe",
        architectures: &["GraniteMoeForCausalLM"],
        read: granitemoe::read,
        names: granitemoe::NAMES,
    },
    KnownFamily {
        model_type: "phimoe",
        architectures: &["PhiMoEForCausalLM", "PhimoeForCausalLM"],
        read: phimoe::read,
        names: phimoe::NAMES,
    },
];

/// Every family this engine serves.
pub fn known() -> &'static [KnownFamily] {
    KNOWN
}

/// Reads a config.json.
///
/// # Errors
/// [`crate::Error::Checkpoint`] with every problem found: an unknown architecture, a value of the wrong type or out
/// of range, keys that contradict each other, a setting the engine does not compute. The list names config.json as
/// the checkpoint; a caller that knows the folder replaces it.
pub fn resolve(config_json: &[u8]) -> Result<Family> {
    let problems = RefCell::new(Problems::new(FILE));
    let family = parse(config_json, &problems).and_then(|map| {
        let keys = Keys::new(&map, &problems);
        let known = choose(&keys)?;
        Some(Family { spec: read_checked(known, &keys), names: known.names.clone() })
    });
    problems.into_inner().into_result()?;
    Ok(family.expect("whoever finds no family notes a problem"))
}

fn parse(config_json: &[u8], problems: &RefCell<Problems>) -> Option<Map<String, Value>> {
    match serde_json::from_slice(config_json) {
        Ok(Value::Object(map)) => return Some(map),
        Ok(other) => problems.borrow_mut().add(FILE, None, "a JSON object", brief(&other)),
        Err(error) => problems.borrow_mut().add(FILE, None, "a JSON object", error.to_string()),
    }
    None
}

/// The family of a known `model_type`; without one, the first with a known architecture.
fn choose(keys: &Keys) -> Option<&'static KnownFamily> {
    let model_type = keys.text("model_type");
    let architectures = keys.texts("architectures").unwrap_or_default();
    let fits = |f: &&KnownFamily| f.architectures.iter().any(|a| architectures.contains(a));
    let by_type = KNOWN.iter().find(|f| Some(f.model_type) == model_type);
    if let Some(family) = by_type {
        let fits = architectures.is_empty() || fits(&family);
        keys.require(fits, "architectures", family.architectures.join(" or "), architectures.join(", "));
        return Some(family);
    }
    let by_architecture = KNOWN.iter().find(fits);
    if by_architecture.is_none() {
        let known: Vec<&str> = KNOWN.iter().map(|f| f.model_type).collect();
        let expected = format!("one of {}", known.join(", "));
        let found = match (model_type, &architectures[..]) {
            (Some(model_type), _) => model_type.to_owned(),
            (None, []) => "nothing, and no architectures either".to_owned(),
            (None, names) => format!("nothing, and architectures {}", names.join(", ")),
        };
        keys.problem("model_type", expected, found);
    }
    by_architecture
}

fn read_checked(known: &KnownFamily, keys: &Keys) -> ModelSpec {
    let spec = (known.read)(keys);
    let moe_layers = spec.moe_layers().len();
    keys.require(moe_layers > 0, "num_hidden_layers", "at least one layer with experts", "none");
    spec
}
