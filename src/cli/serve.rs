//! `moeyard serve`: load, listen, answer, drain.

use std::sync::Arc;

use super::Run;
use super::launch::{Launched, Needs, Prepared};
use super::model::{Generation, OpenModel};
use crate::backend::DType;
use crate::error::{Error, Result};
use crate::server::{self, AppState, Info, Metrics, RankMemory, ServerOptions, Setup, Shutdown};

/// Loads the model and serves it until a signal ends the process.
pub(super) fn run(run: Run) -> Result<()> {
    let raw = run.settings.read()?;
    let model = OpenModel::open(run.model.as_deref())?;
    let needs = Needs::default();
    let prepared = Prepared::new(model, raw, needs)?;
    let generation = prepared.model.generation(&prepared.options.server.generation_config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| Error::io("async runtime", e))?;
    runtime.block_on(async {
        // The port is taken before minutes go into loading; nothing is answered until the model is there.
        let host = &prepared.options.server.host;
        let listener = server::bind(host, prepared.options.server.port).await?;
        let trace = prepared.recorder.as_ref().map(|recorder| recorder.counters());
        let metrics = Arc::new(Metrics::new(&info(&prepared), Some(Arc::new(prepared.load())), trace)?);
        let shutdown = Shutdown::on_signals()?;
        let launched = launch(&prepared, needs, Arc::clone(&metrics))?;
        announce(&prepared, &listener);
        let drain = prepared.options.server.drain_timeout;
        let state = state(&prepared, &launched, generation, metrics, shutdown);
        let outcome = server::serve(listener, state).await;
        tokio::task::spawn_blocking(move || launched.finish(drain))
            .await
            .map_err(|e| Error::Stopped(e.to_string()))?;
        outcome
    })
}

/// Loading uses threads of its own and takes a while: it runs off the async threads.
fn launch(prepared: &Prepared, needs: Needs, metrics: Arc<Metrics>) -> Result<Launched> {
    tokio::task::block_in_place(|| prepared.launch(needs, Some(metrics)))
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
    };
    Info {
        backend: "cpu".to_owned(),
        model: served_name(prepared),
        dtype: dtype_name(prepared.options.model.dtype).to_owned(),
        layers: spec.layers.len(),
        experts: spec.moe.experts,
        top_k: spec.moe.top_k,
        tp: parallel.tp,
        dp: parallel.dp,
        ep: parallel.ep,
        memory: vec![memory; parallel.world],
    }
}

/// As flags and metrics spell a type.
pub(super) fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::Bf16 => "bf16",
        DType::I32 => "i32",
    }
}

fn state(
    prepared: &Prepared,
    launched: &Launched,
    generation: Generation,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
) -> AppState {
    AppState::new(Setup {
        engine: launched.engine.clone(),
        tokenizer: Arc::clone(&prepared.model.tokenizer),
        served_names: vec![served_name(prepared)],
        eos_token_ids: generation.eos_token_ids,
        sampling_defaults: generation.sampling,
        metrics,
        options: ServerOptions {
            drain_timeout: prepared.options.server.drain_timeout,
            ..ServerOptions::default()
        },
        shutdown,
    })
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
        dtype_name(prepared.options.model.dtype),
        prepared.memory.max_model_len,
        prepared.memory.kv_blocks,
        prepared.options.cache.block_size,
    );
    if let Ok(address) = listener.local_addr() {
        if !address.ip().is_loopback() {
            tracing::warn!("listening beyond this machine, and requests need no key");
        }
        tracing::info!("listening on http://{address}  (try: curl http://{address}/v1/models)");
    }
}
