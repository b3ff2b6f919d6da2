//! `moeyard serve`: load, listen, answer, drain.

use std::sync::Arc;
use std::time::Duration;

use super::Run;
use super::launch::{Launched, Needs, Prepared};
use super::model::{Generation, OpenModel};
use crate::backend::{DType, DeviceId};
use crate::config::secret::Secret;
use crate::error::{Error, Result};
use crate::server::{
    self, ApiKeys, AppState, Info, Metrics, RankMemory, ServerOptions, Setup, Shutdown, Stage,
};

/// A step under way may take this long when everything else has been aborted.
const LAST_STEP: Duration = Duration::from_millis(300);

/// Loads the model and serves it until a signal ends the process.
pub(super) fn run(run: Run) -> Result<()> {
    let raw = run.settings.read()?;
    let model = OpenModel::open_as(run.model.as_deref(), raw.load_format)?;
    let prepared = Prepared::new(model, raw, Needs::default())?;
    let generation = prepared.model.generation(&prepared.options.server.generation_config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| Error::io("async runtime", e))?;
    let outcome = runtime.block_on(serve(prepared, generation));
    // Loading cannot be interrupted, and a signal during it should not have to wait for it.
    runtime.shutdown_background();
    outcome
}

async fn serve(prepared: Prepared, generation: Generation) -> Result<()> {
    // The port is taken before minutes go into loading.
    let host = &prepared.options.server.host;
    let listener = server::bind(host, prepared.options.server.port).await?;
    let series = prepared.options.server.metrics;
    let metrics = Arc::new(Metrics::new(&info(&prepared), prepared.metric_sources(), series)?);
    let shutdown = Shutdown::on_signals()?;
    let prepared = Arc::new(prepared);
    let options = server_options(&prepared);
    let loading = launch(Arc::clone(&prepared), Arc::clone(&metrics));
    let launched = tokio::select! {
        launched = server::while_loading(&listener, &options, loading) => launched?,
        () = shutdown.reached(Stage::Draining) => return Ok(()),
    };
    announce(&prepared, &listener);
    let (drain, stage) = (options.drain_timeout, shutdown.clone());
    let state = state(&prepared, &launched, generation, metrics, options, shutdown);
    let outcome = server::serve(listener, state).await;
    // Who was told twice, or has waited long enough, does not wait for a step either.
    let hurried = stage.stage() == Stage::Aborting;
    let (drain, patience) = if hurried { (Duration::ZERO, LAST_STEP) } else { (drain, Duration::MAX) };
    tokio::task::spawn_blocking(move || launched.finish(drain, patience))
        .await
        .map_err(|e| Error::Stopped(e.to_string()))??;
    outcome
}

/// Loading uses threads of its own and takes a while: it runs off the async threads.
async fn launch(prepared: Arc<Prepared>, metrics: Arc<Metrics>) -> Result<Launched> {
    let loaded = tokio::task::spawn_blocking(move || prepared.launch(Needs::default(), Some(metrics)));
    loaded.await.unwrap_or_else(|panic| Err(Error::Stopped(panic.to_string())))
}

fn served_name(prepared: &Prepared) -> String {
    prepared.options.server.served_model_name.clone().unwrap_or_else(|| prepared.model.name.clone())
}

fn info(prepared: &Prepared) -> Info {
    let spec = &prepared.model.family.spec;
    let parallel = prepared.options.parallel;
    let memory = RankMemory {
        weights: prepared.footprint.weights,
        kv: prepared.footprint.kv_block * prepared.memory.kv_blocks as u64,
        workspace: prepared.footprint.working,
        redundant: prepared.footprint.redundant,
    };
    Info {
        backend: match prepared.backends[0].device() {
            DeviceId::Cpu => "cpu",
            DeviceId::Cuda(_) => "cuda",
        }
        .to_owned(),
        model: served_name(prepared),
        dtype: dtype_name(prepared.options.model.dtype).to_owned(),
        expert_dtype: dtype_name(prepared.precision().experts).to_owned(),
        layers: spec.layers.len(),
        experts: spec.moe.experts,
        top_k: spec.moe.top_k,
        tp: parallel.tp,
        dp: parallel.dp,
        ep: parallel.ep,
        placement: if prepared.options.experts.placement.is_some() { "file" } else { "linear" }.to_owned(),
        redundant_slots: prepared.placement.slots().saturating_sub(spec.moe.experts),
        memory: vec![memory; parallel.world],
    }
}

/// As flags and metrics spell a type.
pub(super) fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::Bf16 => "bf16",
        DType::I32 => "i32",
        DType::I8 => "int8",
        DType::F8 => "fp8",
        DType::I4x2 => "int4",
    }
}

fn state(
    prepared: &Prepared,
    launched: &Launched,
    generation: Generation,
    metrics: Arc<Metrics>,
    options: ServerOptions,
    shutdown: Shutdown,
) -> AppState {
    AppState::new(Setup {
        engine: launched.engine.clone(),
        tokenizer: Arc::clone(&prepared.model.tokenizer),
        served_names: vec![served_name(prepared)],
        eos_token_ids: generation.eos_token_ids,
        sampling_defaults: generation.sampling,
        metrics,
        options,
        shutdown,
    })
}

fn server_options(prepared: &Prepared) -> ServerOptions {
    let asked = &prepared.options.server;
    ServerOptions {
        api_keys: ApiKeys::new(asked.api_keys.iter().map(Secret::reveal)),
        trust_chat_template: asked.trust_chat_template,
        drain_timeout: asked.drain_timeout,
        ..ServerOptions::default()
    }
}

fn announce(prepared: &Prepared, listener: &tokio::net::TcpListener) {
    let parallel = prepared.options.parallel;
    tracing::info!(
        "{} ({}) on {} rank{} (TP {}, DP {}, EP {}): {}, {}; context {} tokens, {} KV blocks of {} per rank",
        served_name(prepared),
        prepared.model.family.spec.family,
        parallel.world,
        if parallel.world == 1 { "" } else { "s" },
        parallel.tp,
        parallel.dp,
        parallel.ep,
        prepared.backends[0].describe(),
        prepared.types(),
        prepared.memory.max_model_len,
        prepared.memory.kv_blocks,
        prepared.options.cache.block_size,
    );
    if let Ok(address) = listener.local_addr() {
        if !address.ip().is_loopback() && prepared.options.server.api_keys.is_empty() {
            tracing::warn!("listening beyond this machine, and requests need no key: see --api-key");
        }
        tracing::info!("listening on http://{address}  (try: curl http://{address}/v1/models)");
    }
}
