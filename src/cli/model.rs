//! A checkpoint opened and understood, before anything of it is loaded.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::embedded;
use crate::config::flags::LoadFormat;
use crate::config::resolve::GenerationConfig;
use crate::error::{Error, Problems, Result};
use crate::model::families::{self, Family};
use crate::server::SamplingDefaults;
use crate::tokenizer::{Tokenizer, TokenizerFiles};
use crate::weights::{Checkpoint, TOKENIZER, validate};

/// A checkpoint with what its JSON files say.
pub struct OpenModel {
    /// The files.
    pub checkpoint: Checkpoint,
    /// What it is and how its tensors are called.
    pub family: Family,
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// The folder's name, or the embedded model's.
    pub name: String,
}

/// Sampling defaults and end-of-text tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Where a request says nothing.
    pub sampling: SamplingDefaults,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

impl OpenModel {
    /// Opens a folder, or the embedded model without one. Everything wrong with the checkpoint is reported at once.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with all problems of config.json, of the tensors or of the tokenizer.
    pub fn open(folder: Option<&Path>) -> Result<OpenModel> {
        Self::open_as(folder, None)
    }

    /// [`OpenModel::open`] with weights as `--load-format` says. Made-up ones come with the embedded model's tokenizer where the
    /// folder has none.
    ///
    /// # Errors
    /// As there; [`Error::Config`] for the embedded model without its weights.
    pub fn open_as(folder: Option<&Path>, format: Option<LoadFormat>) -> Result<OpenModel> {
        let checkpoint = match (folder, format.unwrap_or_default()) {
            (Some(folder), LoadFormat::Auto) => Checkpoint::open(folder)?,
            (None, LoadFormat::Auto) => Checkpoint::embedded(embedded::FILES),
            (Some(folder), LoadFormat::Dummy) => {
                tracing::warn!("--load-format dummy: the weights are made up, answers are noise");
                Checkpoint::dummy(folder)?
            }
            (None, LoadFormat::Dummy) => {
                let why = "dummy needs a folder with a config.json, and none was given";
                return Err(Error::config("--load-format", why));
            }
        };
        let family = family(&checkpoint)?;
        for warning in validate(&checkpoint, &family.spec, &family.names)? {
            tracing::warn!("{}: {warning}", checkpoint.name());
        }
        let embedded = Checkpoint::embedded(embedded::FILES);
        let borrowed = checkpoint.is_dummy() && checkpoint.text(TOKENIZER)?.is_none();
        let words = if borrowed { &embedded } else { &checkpoint };
        let tokenizer = Arc::new(tokenizer(words, family.spec.vocab_size)?);
        let name = match folder {
            Some(folder) => folder_name(folder),
            None => embedded::NAME.to_owned(),
        };
        Ok(OpenModel { checkpoint, family, tokenizer, name })
    }

    /// What generation_config.json (or the file given instead) says. End-of-text tokens always include config.json's.
    ///
    /// # Errors
    /// [`Error::Config`] when the file is not what it should be.
    pub fn generation(&self, choice: &GenerationConfig) -> Result<Generation> {
        let mut eos = self.family.spec.eos_token_ids.clone();
        let (name, bytes): (String, Option<Cow<'_, [u8]>>) = match choice {
            GenerationConfig::File(path) => {
                let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
                (path.display().to_string(), Some(Cow::Owned(bytes)))
            }
            GenerationConfig::Checkpoint | GenerationConfig::None => {
                ("generation_config.json".to_owned(), self.checkpoint.text("generation_config.json")?)
            }
        };
        let Some(bytes) = bytes else {
            return Ok(Generation { sampling: SamplingDefaults::default(), eos_token_ids: eos });
        };
        let file: GenerationFile =
            serde_json::from_slice(&bytes).map_err(|e| Error::config(&name, e.to_string()))?;
        let named = file.eos_token_id.as_ref().map_or(Vec::new(), Ids::list);
        eos.extend(named.into_iter().filter(|id| !self.family.spec.eos_token_ids.contains(id)));
        let sampling = match choice {
            GenerationConfig::None => SamplingDefaults::default(),
            _ => file.sampling(&name)?,
        };
        Ok(Generation { sampling, eos_token_ids: eos })
    }
}

fn family(checkpoint: &Checkpoint) -> Result<Family> {
    let Some(config) = checkpoint.text("config.json")? else {
        let mut problems = Problems::new(checkpoint.name());
        problems.add("config.json", None, "a config.json in Hugging Face layout", "no such file");
        return Err(Error::Checkpoint(problems));
    };
    families::resolve(&config).map_err(|error| match error {
        // The family knows the file but not the folder it came from.
        Error::Checkpoint(problems) => {
            Error::Checkpoint(Problems { checkpoint: checkpoint.name().to_owned(), ..problems })
        }
        other => other,
    })
}

fn tokenizer(checkpoint: &Checkpoint, embedding_rows: usize) -> Result<Tokenizer> {
    let [json, config, special, template] =
        ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
            .map(|name| checkpoint.text(name));
    let (json, config, special, template) = (json?, config?, special?, template?);
    let files = TokenizerFiles {
        checkpoint: checkpoint.name(),
        tokenizer_json: json.as_deref(),
        tokenizer_config: config.as_deref(),
        special_tokens_map: special.as_deref(),
        chat_template: template.as_deref(),
    };
    Tokenizer::from_parts(&files, embedding_rows)
}

/// The last part of a path, also of `.` and of paths that end in `..`.
fn folder_name(folder: &Path) -> String {
    let whole: PathBuf = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
    whole.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// The keys of generation_config.json that serving reads; the file belongs to others and has many more. `do_sample` is
/// about transformers' `generate()`: an API samples unless a request asks for temperature 0.
#[derive(Debug, Default, Deserialize)]
struct GenerationFile {
    eos_token_id: Option<Ids>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl Ids {
    fn list(&self) -> Vec<u32> {
        match self {
            Ids::One(id) => vec![*id],
            Ids::Many(ids) => ids.clone(),
        }
    }
}

impl GenerationFile {
    fn sampling(&self, file: &str) -> Result<SamplingDefaults> {
        let openai = SamplingDefaults::default();
        let temperature = self.temperature.unwrap_or(openai.temperature);
        let top_p = self.top_p.unwrap_or(openai.top_p);
        let top_k = self.top_k.unwrap_or(0);
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(Error::config(file, format!("temperature: expected 0 or more, found {temperature}")));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::config(file, format!("top_p: expected above 0 to 1, found {top_p}")));
        }
        let min_p = self.min_p.unwrap_or(openai.min_p);
        if !(0.0..=1.0).contains(&min_p) {
            return Err(Error::config(file, format!("min_p: expected 0 to 1, found {min_p}")));
        }
        let repetition_penalty = self.repetition_penalty.unwrap_or(openai.repetition_penalty);
        if !(repetition_penalty > 0.0 && repetition_penalty.is_finite()) {
            let why = format!("repetition_penalty: expected above 0, found {repetition_penalty}");
            return Err(Error::config(file, why));
        }
        // -1 and 0 both mean all.
        let top_k = usize::try_from(top_k).unwrap_or(0);
        Ok(SamplingDefaults { temperature, top_p, top_k, min_p, repetition_penalty })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::stored_bytes;

    #[test]
    fn the_embedded_model_is_whole() {
        let model = OpenModel::open(None).unwrap();
        assert_eq!(model.name, "demo-mixtral");
        let generation = model.generation(&GenerationConfig::Checkpoint).unwrap();
        assert_eq!(generation.eos_token_ids, [1, 6]);
        assert_eq!((generation.sampling.temperature, generation.sampling.top_p), (0.8, 0.95));
        let none = model.generation(&GenerationConfig::None).unwrap();
        assert_eq!((none.sampling, none.eos_token_ids), (SamplingDefaults::default(), vec![1, 6]));
    }

    #[test]
    fn made_up_weights_need_nothing_but_a_configuration() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/models/deepseek-v3");
        let model = OpenModel::open_as(Some(&folder), Some(LoadFormat::Dummy)).unwrap();
        assert_eq!(model.name, "deepseek-v3");
        let spec = &model.family.spec;
        let bytes =
            stored_bytes(&model.checkpoint, spec, &model.family.names).iter().map(|(_, b)| b).sum::<u64>();
        let parameters = spec.parameters().total() as f64;
        assert!((bytes as f64 / 2.0 / parameters - 1.0).abs() < 1e-3, "{bytes} bytes for {parameters}");
        assert!(OpenModel::open(Some(&folder)).is_err());
        let refused = OpenModel::open_as(None, Some(LoadFormat::Dummy)).map(|_| ()).unwrap_err().to_string();
        assert!(refused.contains("--load-format: dummy needs a folder"), "{refused}");
    }

    #[test]
    fn values_out_of_range_are_named() {
        for (json, message) in [
            (r#"{"temperature": -1}"#, "temperature: expected 0 or more, found -1"),
            (r#"{"top_p": 0}"#, "top_p: expected above 0 to 1, found 0"),
            (r#"{"min_p": 2}"#, "min_p: expected 0 to 1, found 2"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty: expected above 0, found 0"),
        ] {
            let file: GenerationFile = serde_json::from_str(json).unwrap();
            assert!(file.sampling("g.json").unwrap_err().to_string().contains(message));
        }
    }
}
