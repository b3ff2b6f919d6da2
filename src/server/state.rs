//! What every request handler shares.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::Semaphore;

use super::error::ApiError;
use super::experts::ExpertLoad;
use super::generation::SamplingDefaults;
use super::metrics::Metrics;
use super::options::ServerOptions;
use super::request::Prompts;
use super::shutdown::{Shutdown, Stage};
use super::structured::Compiler;
use crate::engine::EngineHandle;
use crate::error::CONTEXT_PHRASE;
use crate::tokenizer::Tokenizer;

/// Texts up to this many bytes in all are tokenised where they arrive: a thread change would cost more.
pub(super) const INLINE_BYTES: usize = 4 << 10;
/// A normaliser may shrink a text (NFKC by up to three bytes for one) before it becomes tokens.
const NORMALIZER_SHRINKAGE: usize = 4;

/// The engine and what is known about its model.
pub struct Setup {
    /// Takes the sequences.
    pub engine: EngineHandle,
    /// Of the served checkpoint.
    pub tokenizer: Arc<Tokenizer>,
    /// Names under which the model is served; the first is its own. Never empty.
    pub served_names: Vec<String>,
    /// Tokens that end a text, from config.json and generation_config.json.
    pub eos_token_ids: Vec<u32>,
    /// Where a request says nothing.
    pub sampling_defaults: SamplingDefaults,
    /// The same that the engine reports its timings to.
    pub metrics: Arc<Metrics>,
    /// Limits.
    pub options: ServerOptions,
    /// Ends the server.
    pub shutdown: Shutdown,
}

/// State of a server; handlers hold it by `Arc`.
pub struct AppState {
    pub(super) engine: EngineHandle,
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) served_names: Vec<String>,
    pub(super) eos_token_ids: Vec<u32>,
    pub(super) sampling_defaults: SamplingDefaults,
    pub(super) metrics: Arc<Metrics>,
    /// Where the engine tells its expert load.
    pub(super) experts: Option<ExpertLoad>,
    pub(super) options: ServerOptions,
    pub(super) shutdown: Shutdown,
    /// Unix time in seconds.
    pub(super) created: u64,
    /// Bytes of a text that cannot fit the context, whatever is in it.
    hopeless_bytes: usize,
    tokenizing: Arc<Semaphore>,
    /// Of grammars.
    pub(super) compiler: Compiler,
}

impl AppState {
    /// Completes a setup.
    pub fn new(setup: Setup) -> Self {
        assert!(!setup.served_names.is_empty(), "0 served names");
        let longest_token =
            (0..setup.tokenizer.vocab_size()).map(|id| setup.tokenizer.token_bytes(id as u32).len()).max();
        let max_model_len = setup.engine.options().max_model_len;
        let created = unix_seconds();
        let row_bytes = setup.metrics.row_bytes();
        let experts = |source: &_| ExpertLoad::new(Arc::clone(source), row_bytes, created as f64);
        AppState {
            hopeless_bytes: max_model_len
                .saturating_mul(longest_token.unwrap_or(1).max(1))
                .saturating_mul(NORMALIZER_SHRINKAGE),
            tokenizing: Arc::new(Semaphore::new(setup.options.tokenize_threads.max(1))),
            compiler: Compiler::default(),
            created,
            engine: setup.engine,
            tokenizer: setup.tokenizer,
            served_names: setup.served_names,
            eos_token_ids: setup.eos_token_ids,
            sampling_defaults: setup.sampling_defaults,
            experts: setup.metrics.load_source().map(experts),
            metrics: setup.metrics,
            options: setup.options,
            shutdown: setup.shutdown,
        }
    }

    /// The served name that a request means.
    pub(super) fn model_name(&self, asked: Option<&str>) -> Result<String, ApiError> {
        match asked {
            None => Ok(self.served_names[0].clone()),
            Some(name) if self.served_names.iter().any(|served| served == name) => Ok(name.to_owned()),
            Some(name) => Err(ApiError::unknown_model(name)),
        }
    }

    /// Refuses new work during a shutdown.
    pub(super) fn check_serving(&self) -> Result<(), ApiError> {
        if self.shutdown.stage() > Stage::Serving {
            self.metrics.count_draining_rejection();
            return Err(ApiError::unavailable("The server is shutting down."));
        }
        Ok(())
    }

    /// Token ids of all prompts.
    pub(super) async fn tokenize(
        &self,
        prompts: Prompts,
        add_special: bool,
    ) -> Result<Vec<Vec<u32>>, ApiError> {
        let texts = match prompts {
            Prompts::Tokens(lists) => return Ok(lists),
            Prompts::Texts(texts) => texts,
        };
        texts.iter().try_for_each(|text| self.check_length("prompt", text))?;
        let short = texts.iter().map(String::len).sum::<usize>() <= INLINE_BYTES;
        let tokenizer = Arc::clone(&self.tokenizer);
        self.prepare(short, move || {
            texts.iter().map(|text| Ok(tokenizer.encode(text, add_special)?)).collect()
        })
        .await
    }

    /// Refuses a text that cannot fit the context whatever is in it, before it costs time.
    pub(super) fn check_length(&self, param: &str, text: &str) -> Result<(), ApiError> {
        let bytes = text.len();
        if bytes <= self.hopeless_bytes {
            return Ok(());
        }
        self.metrics.count_too_long();
        let limit = self.engine.options().max_model_len;
        let message = format!(
            "{CONTEXT_PHRASE} {limit} tokens. However, your prompt has {bytes} bytes, which \
             cannot be so few tokens. Please reduce the length of the prompt."
        );
        Err(ApiError::bad_param(param, message))
    }

    /// Runs what turns a request's text into tokens: at once when `short`, else on a blocking thread, a few at a time,
    /// so that long texts hold up neither sockets nor each other's memory.
    pub(super) async fn prepare<T: Send + 'static>(
        &self,
        short: bool,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        if short {
            return work();
        }
        let permit = Arc::clone(&self.tokenizing).acquire_owned().await;
        let prepared = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        prepared.await.unwrap_or_else(|panic| Err(ApiError::internal(&panic)))
    }
}

/// Seconds since 1970 by the system clock.
pub(super) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
