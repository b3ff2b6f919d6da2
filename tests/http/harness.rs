//! A server over the scripted model, on a port of its own.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use moeyard::backend::Backend;
use moeyard::backend::reference::ReferenceBackend;
use moeyard::engine::scripted::{Fault, Script, setups, setups_with};
use moeyard::engine::{
    Engine, EngineHandle, EngineOptions, EngineStats, Experts, Hooks, RankSetup, SchedulingPolicy,
};
use moeyard::metrics::LoadSource;
use moeyard::model::FormRules;
use moeyard::server::{
    AppState, Info, Metrics, SamplingDefaults, SeriesOptions, ServerOptions, Setup, Shutdown, Sources, Stage,
    serve,
};
use moeyard::tokenizer::{Tokenizer, TokenizerFiles};
use serde_json::{Value, json};

use crate::client::{Client, Response};
use crate::patience::{PATIENCE, eventually};

/// EOS of the demo checkpoint whose tokenizer is used.
pub const EOS: u32 = 1;

/// What a test may want to differ. No limit of time ends anything that a test does not want to end.
pub struct Config {
    pub options: ServerOptions,
    pub engine: EngineOptions,
    pub pause: Duration,
    pub fault: Fault,
    pub load: Option<Arc<dyn LoadSource>>,
    /// Experts on as many ranks as they live on, each with sequences of its own.
    pub experts: Option<Experts>,
    /// Instead of the demo checkpoint's; an empty one is none.
    pub chat_template: Option<&'static str>,
}

impl Default for Config {
    fn default() -> Self {
        let engine = EngineOptions {
            vocab_size: 4096,
            experts: 8,
            max_model_len: 512,
            block_size: 16,
            kv_blocks: 256,
            max_num_seqs: 16,
            max_num_batched_tokens: 64,
            prefill_chunk_size: 32,
            max_logit_rows: 16,
            prefix_caching: true,
            form_rules: FormRules::default(),
            max_waiting: 64,
            max_waiting_tokens: 1 << 20,
            scheduling_policy: SchedulingPolicy::Arrival,
            step_timeout: PATIENCE,
        };
        let options = ServerOptions {
            header_read_timeout: PATIENCE,
            body_read_timeout: PATIENCE,
            stalled_reader_timeout: PATIENCE,
            drain_timeout: PATIENCE,
            dead_engine_grace: PATIENCE,
            ..ServerOptions::default()
        };
        Config {
            options,
            engine,
            pause: Duration::ZERO,
            fault: Fault::None,
            load: None,
            experts: None,
            chat_template: None,
        }
    }
}

/// A running server; ends when dropped.
pub struct Server {
    pub address: SocketAddr,
    pub shutdown: Shutdown,
    pub tokenizer: Arc<Tokenizer>,
    pub script: Script,
    engine: EngineHandle,
    serving: Option<JoinHandle<moeyard::Result<()>>>,
}

impl Server {
    pub fn start() -> Server {
        Server::with(Config::default())
    }

    pub fn with(config: Config) -> Server {
        let tokenizer = Arc::new(tokenizer(config.chat_template));
        let mut script = Script::of(&config.engine);
        script.pause = config.pause;
        script.fault = config.fault;
        let ranks = ranks(&script, &config.engine, config.experts.as_ref());
        let sources = Sources {
            load: config.load,
            ranks: ranks.iter().map(|rank| Arc::clone(&rank.meter)).collect(),
            ..Sources::default()
        };
        let metrics = Arc::new(Metrics::new(&info(), sources, SeriesOptions::default()).expect("metrics"));
        let hooks =
            Hooks { timing: Some(Arc::clone(&metrics) as _), experts: config.experts, ..Hooks::default() };
        let engine = Engine::start(ranks, config.engine, hooks).expect("engine");
        let shutdown = Shutdown::default();
        let state = AppState::new(Setup {
            engine: engine.clone(),
            tokenizer: Arc::clone(&tokenizer),
            served_names: vec!["demo".into(), "org/alias".into()],
            eos_token_ids: vec![EOS],
            sampling_defaults: SamplingDefaults {
                temperature: 0.8,
                top_p: 0.95,
                ..SamplingDefaults::default()
            },
            metrics,
            options: config.options,
            shutdown: shutdown.clone(),
        });
        let (address, serving) = spawn(state);
        Server { address, shutdown, tokenizer, script, engine, serving: Some(serving) }
    }

    pub fn client(&self) -> Client {
        Client::connect(self.address)
    }

    /// Greedy completion of a prompt, with more fields.
    pub fn complete(&self, fields: Value) -> Response {
        self.client().post("/v1/completions", &greedy(fields))
    }

    /// What the scripted model continues `prompt` with, by definition.
    pub fn expected_tokens(&self, prompt: &str, tokens: usize) -> Vec<u32> {
        self.script.greedy(&self.tokenizer.encode(prompt, true).unwrap(), tokens)
    }

    /// The text of [`Self::expected_tokens`].
    pub fn expected_text(&self, prompt: &str, tokens: usize) -> String {
        self.tokenizer.decode(&self.expected_tokens(prompt, tokens), true)
    }

    /// Holds the next step, until [`Self::release`].
    pub fn hold(&self) {
        self.script.brake.hold();
    }

    pub fn release(&self) {
        self.script.brake.release();
    }

    /// A server that holds its first step.
    pub fn held(config: Config) -> Server {
        let server = Server::with(config);
        server.hold();
        server
    }

    /// Waits until nothing runs or waits, and no block is held.
    pub fn idle(&self) {
        eventually("all are gone", || {
            let stats = self.stats();
            (stats.running, stats.waiting, stats.kv.used) == (0, 0, 0)
        });
    }

    /// Sequences whose clients left before their end, as the server has noticed.
    pub fn aborted(&self) -> f64 {
        self.metric(r#"moeyard_requests_total{endpoint="completions",outcome="abort"}"#)
    }

    pub fn stats(&self) -> EngineStats {
        self.engine.stats()
    }

    /// The value of a series on the metrics page, as `name{labels}`.
    pub fn metric(&self, series: &str) -> f64 {
        let page = self.client().get("/metrics").body;
        let line = page.lines().find(|line| line.rsplit_once(' ').is_some_and(|(name, _)| name == series));
        let line = line.unwrap_or_else(|| panic!("{series} is not in\n{page}"));
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    }

    /// Waits for the server to end by itself.
    pub fn ended(&mut self) -> moeyard::Result<()> {
        self.serving.take().expect("not yet joined").join().expect("the server panicked")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.release();
        self.shutdown.advance(Stage::Aborting);
        if let Some(serving) = self.serving.take() {
            let _ = serving.join();
        }
        self.engine.shutdown(Duration::ZERO);
    }
}

/// `fields` as a request that samples greedily and does not stop at EOS, unless it says otherwise.
pub fn greedy(fields: Value) -> Value {
    let mut request = json!({"model": "demo", "temperature": 0, "ignore_eos": true});
    for (name, value) in fields.as_object().unwrap() {
        request[name] = value.clone();
    }
    request
}

fn spawn(state: AppState) -> (SocketAddr, JoinHandle<moeyard::Result<()>>) {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let serving = std::thread::spawn(move || {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async { serve(tokio::net::TcpListener::from_std(listener).unwrap(), state).await })
    });
    (address, serving)
}

fn ranks(script: &Script, options: &EngineOptions, experts: Option<&Experts>) -> Vec<RankSetup> {
    let backend: Arc<dyn Backend> = Arc::new(ReferenceBackend);
    match experts.map(|experts| experts.in_force.placement()) {
        None => setups(script, 1, 1, options.max_logit_rows, &backend),
        Some(placement) => {
            setups_with(script, (1, placement.ranks()), options.max_logit_rows, &backend, &placement)
        }
    }
    .expect("ranks")
}

fn tokenizer(chat_template: Option<&str>) -> Tokenizer {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo-mixtral");
    let read = |name| std::fs::read(folder.join(name)).expect(name);
    let (tokenizer, config) = (read("tokenizer.json"), read("tokenizer_config.json"));
    let template = chat_template.map_or_else(|| read("chat_template.jinja"), |template| template.into());
    let files = TokenizerFiles {
        checkpoint: "demo-mixtral",
        tokenizer_json: Some(&tokenizer),
        tokenizer_config: Some(&config),
        chat_template: (!template.is_empty()).then_some(&template[..]),
        ..TokenizerFiles::default()
    };
    Tokenizer::from_parts(&files, 4096).expect("tokenizer")
}

fn info() -> Info {
    Info {
        backend: "cpu".into(),
        model: "demo".into(),
        dtype: "f32".into(),
        expert_dtype: "f32".into(),
        layers: 2,
        experts: 8,
        top_k: 2,
        tp: 1,
        dp: 1,
        ep: 1,
        placement: "linear".into(),
        redundant_slots: 0,
        memory: vec![moeyard::server::RankMemory {
            weights: 3 << 20,
            kv: 1 << 20,
            workspace: 1 << 10,
            redundant: 0,
        }],
    }
}
