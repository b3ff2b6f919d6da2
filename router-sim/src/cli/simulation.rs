//! Flags that replay, compare and advise share: the tokens, the model, the cluster, and what placements are fitted on.

use std::path::PathBuf;

use clap::Args;
use router_sim::cost::{Constants, CostModel, ModelShape};
use router_sim::formats::{self, Input, Options};
use router_sim::load::{LoadWindow, Phase};
use router_sim::placement::PolicyName;
use router_sim::report::data::{Report, Run, Subject};
use router_sim::simulate::{DrawOptions, Drawn, Interleaved, OpenTokens, Scenario, Shuffled, Sources};
use router_sim::split::Split;
use router_sim::stream::TokenStream;
use router_sim::topology::Cluster;
use router_sim::{Error, Result};

use super::input::InputFlags;

/// What is simulated.
#[derive(Args, Clone, Debug)]
pub struct SimulationFlags {
    /// Tokens to run: a trace, or loads to draw tokens from; FILE#LABEL takes the tokens with that label
    #[arg(value_name = "INPUT", required_unless_present = "on")]
    input: Option<PathBuf>,
    /// The same as INPUT; reads well beside --fit
    #[arg(long, value_name = "INPUT", conflicts_with = "input")]
    on: Option<PathBuf>,
    /// Fit placements on this record instead of the tokens that are run
    #[arg(long, value_name = "FILE")]
    fit: Option<PathBuf>,
    /// Most windows that the fitted record is cut into; a policy may look at each
    #[arg(long, value_name = "N", default_value_t = 16)]
    fit_windows: usize,
    #[command(flatten)]
    reading: InputFlags,
    #[command(flatten)]
    batches: BatchFlags,
    #[command(flatten)]
    machine: MachineFlags,
}

/// How tokens become batches.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Batches")]
struct BatchFlags {
    /// Tokens of a batch on each rank, where the input has no steps
    #[arg(long, value_name = "N", default_value_t = 64.0)]
    tokens_per_rank: f64,
    /// How tokens follow each other, where the input has no steps: as recorded, one token of every request at a time, or
    /// at random [default: interleaved with --phase decode, else recorded]
    #[arg(long, value_name = "recorded|interleaved|shuffled", value_parser = parse_order)]
    order: Option<Order>,
    /// Requests under way at a time with --order interleaved [default: as many as a batch has tokens]
    #[arg(long, value_name = "N")]
    requests: Option<usize>,
    /// Stop after so many steps; draw so many from loads [default: all, 100 from loads]
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Experts per token, where the input holds loads [default: the model's]
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// Which rank owns a token: as recorded, or equal runs of each batch dealt to the ranks
    #[arg(long, value_name = "auto|recorded|dealt", default_value = "auto", value_parser = parse_sources)]
    sources: Sources,
    /// Of everything that is drawn
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// The model, the cluster and what they cost.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model and cluster")]
struct MachineFlags {
    /// deepseek-v3, gpt-oss-20b, mixtral-8x7b, qwen3-235b-a22b, or a config.json [default: by the input's shape]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// A name of configs/clusters or a TOML file [default: h100-4x8, with as many nodes as the ranks need]
    #[arg(long, value_name = "CLUSTER")]
    cluster: Option<String>,
    /// Nodes, instead of the description's
    #[arg(long, value_name = "N")]
    nodes: Option<usize>,
    /// Cost constants that were measured: a TOML file; the others keep their defaults
    #[arg(long, value_name = "FILE")]
    cost: Option<PathBuf>,
    /// One cost constant, as in the file: --set expert-weights=fp8 --set wire=node
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Price of a device, for the cost per token
    #[arg(long, value_name = "USD")]
    usd_per_device_hour: Option<f64>,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

/// How tokens follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Recorded,
    Interleaved,
    Shuffled,
}

fn parse_order(name: &str) -> Result<Order, String> {
    match name {
        "recorded" => Ok(Order::Recorded),
        "interleaved" => Ok(Order::Interleaved),
        "shuffled" => Ok(Order::Shuffled),
        _ => Err("expected recorded, interleaved or shuffled".into()),
    }
}

fn parse_sources(name: &str) -> Result<Sources, String> {
    match name {
        "auto" => Ok(Sources::Auto),
        "recorded" => Ok(Sources::Recorded),
        "dealt" => Ok(Sources::Dealt),
        _ => Err("expected auto, recorded or dealt".into()),
    }
}

/// What the flags stand for, read and checked.
pub struct Simulation {
    open: Box<OpenTokens<'static>>,
    tokens_per_rank: f64,
    steps: Option<u64>,
    sources: Sources,
    fit: Vec<LoadWindow>,
    hindsight: LoadWindow,
    pub cluster: Cluster,
    pub model: ModelShape,
    constants: Constants,
    top_k: usize,
    pub threads: usize,
    input: String,
    fitted_on: Option<String>,
    order: String,
    seed: u64,
}

impl SimulationFlags {
    /// The file that is run, without its label.
    pub fn input(&self) -> (PathBuf, Options) {
        let input = self.input.as_ref().or(self.on.as_ref()).expect("clap asks for one of them");
        self.reading.options(input)
    }

    /// Reads the fitted record and describes the rest; `ranks` is the most that any run has.
    pub fn prepare(&self, ranks: usize) -> Result<Simulation> {
        let input = self.input.as_ref().or(self.on.as_ref()).expect("clap asks for one of them");
        let fit_file = self.fit.as_ref().unwrap_or(input);
        let fit = self.reading.windows(fit_file, self.fit_windows)?;
        let hindsight = match &self.fit {
            None => sum(&fit)?,
            Some(_) => self.reading.total_load(input)?,
        };
        if (fit[0].experts(), fit[0].layer_ids()) != (hindsight.experts(), hindsight.layer_ids()) {
            return Err(Error::Impossible(format!(
                "{} has {} experts in layers {:?}, {} has {} in {:?}",
                fit_file.display(),
                fit[0].experts(),
                fit[0].layer_ids(),
                input.display(),
                hindsight.experts(),
                hindsight.layer_ids()
            )));
        }
        if !(self.batches.tokens_per_rank > 0.0 && self.batches.tokens_per_rank <= 1e6) {
            return Err(Error::Impossible(format!(
                "--tokens-per-rank {} is not above 0 and at most 1000000",
                self.batches.tokens_per_rank
            )));
        }
        let (path, mut options) = self.reading.options(input);
        // Runs in parallel would fight for one bar.
        options.progress = None;
        let recorded = match formats::open(&path, &options)? {
            Input::Tokens(tokens) => {
                let shape = tokens.shape();
                Some((shape.top_k, shape.ranks.is_some()))
            }
            Input::Loads(_) => None,
        };
        let model = self
            .machine
            .model(&hindsight, recorded.as_ref().map(|(top_k, _)| *top_k).or(self.batches.top_k))?;
        let top_k = recorded.as_ref().map_or(self.batches.top_k.unwrap_or(model.top_k), |(top_k, _)| *top_k);
        let open: Box<OpenTokens<'static>> = match recorded {
            Some((.., has_steps)) => self.read_tokens(path, options, has_steps)?,
            None => self.draw(self.reading.windows(input, 1 << 12)?, top_k),
        };
        Ok(Simulation {
            open,
            tokens_per_rank: self.batches.tokens_per_rank,
            steps: self.batches.steps,
            sources: self.batches.sources,
            fit,
            hindsight,
            cluster: self.machine.cluster(ranks)?,
            model,
            constants: self.machine.constants()?,
            top_k,
            threads: self.machine.threads(),
            input: input.display().to_string(),
            fitted_on: self.fit.as_ref().map(|file| file.display().to_string()),
            order: format!(
                "{:?} of {:?} requests, {} windows",
                self.batches.order, self.batches.requests, self.fit_windows
            ),
            seed: self.batches.seed,
        })
    }

    /// Recorded tokens, in the order that is asked for where the recording has no steps of its own.
    fn read_tokens(
        &self,
        path: PathBuf,
        options: Options,
        has_steps: bool,
    ) -> Result<Box<OpenTokens<'static>>> {
        let BatchFlags { order, requests, seed, .. } = self.batches;
        if has_steps && (order.is_some() || requests.is_some()) {
            let flag = if order.is_some() { "--order" } else { "--requests" };
            return Err(Error::Impossible(format!(
                "{flag} is for inputs without steps; {} has them",
                path.display()
            )));
        }
        let decode = options.phase == Some(Phase::Decode);
        let order = order.unwrap_or(if decode && !has_steps { Order::Interleaved } else { Order::Recorded });
        if requests.is_some() && order != Order::Interleaved {
            return Err(Error::Impossible("--requests needs --order interleaved".into()));
        }
        Ok(Box::new(move |rows| {
            let tokens = formats::open_tokens(&path, &Options { batch_rows: Some(rows), ..options.clone() })?;
            Ok(match order {
                Order::Recorded => tokens,
                Order::Interleaved => Box::new(Interleaved::new(tokens, requests.unwrap_or(rows), rows)),
                Order::Shuffled => Box::new(Shuffled::new(tokens, rows, seed)),
            })
        }))
    }

    fn draw(&self, windows: Vec<LoadWindow>, top_k: usize) -> Box<OpenTokens<'static>> {
        let batches = self.batches.steps.unwrap_or(100.max(windows.len() as u64));
        let seed = self.batches.seed;
        Box::new(move |rows| {
            let drawn = Drawn::new(&windows, DrawOptions { top_k, rows, batches, seed })?;
            Ok(Box::new(drawn) as Box<dyn TokenStream>)
        })
    }
}

impl MachineFlags {
    fn model(&self, load: &LoadWindow, top_k: Option<usize>) -> Result<ModelShape> {
        let (experts, layers) = (load.experts(), load.layers());
        let model = match &self.model {
            Some(name) => ModelShape::find(name)?,
            None => ModelShape::of_shape(experts, top_k, layers).ok_or_else(|| {
                Error::Impossible(format!(
                    "no known model has {layers} MoE layers of {experts} experts; name one with --model (a config.json will do)"
                ))
            })?,
        };
        if model.experts != experts || model.moe_layers < layers {
            return Err(Error::Impossible(format!(
                "the input has {layers} MoE layers of {experts} experts, model {} has {} of {}",
                model.name, model.moe_layers, model.experts
            )));
        }
        Ok(model)
    }

    fn cluster(&self, ranks: usize) -> Result<Cluster> {
        let mut cluster = Cluster::find(self.cluster.as_deref().unwrap_or("h100-4x8"))?;
        let needed = self.cluster.is_none().then(|| cluster.nodes_of(ranks.max(1)));
        if let Some(nodes) = self.nodes.or(needed) {
            cluster = cluster.with_nodes(nodes)?;
        }
        if let Some(price) = self.usd_per_device_hour {
            cluster = cluster.with_price(price)?;
        }
        Ok(cluster)
    }

    fn constants(&self) -> Result<Constants> {
        let mut constants = match &self.cost {
            Some(path) => Constants::read(path)?,
            None => Constants::default(),
        };
        constants.set(&self.set)?;
        Ok(constants)
    }

    fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
        self.threads.unwrap_or_else(cores).max(1)
    }
}

impl Simulation {
    /// What all runs share.
    pub fn scenario(&self) -> Scenario<'_> {
        Scenario {
            open: &*self.open,
            tokens_per_rank: self.tokens_per_rank,
            steps: self.steps,
            sources: self.sources,
            fit: &self.fit,
            hindsight: &self.hindsight,
            cluster: &self.cluster,
            model: &self.model,
            constants: &self.constants,
            reference: PolicyName::BEST,
        }
    }

    /// The costs on so many ranks.
    pub fn cost(&self, ranks: usize) -> Result<CostModel> {
        CostModel::new(&self.cluster, ranks, &self.model, &self.constants)
    }

    /// A policy by name; hierarchical ones know the nodes of so many ranks.
    pub fn policy(&self, name: &str, groups: usize, ranks: usize) -> Result<PolicyName> {
        PolicyName::parse(name, groups, self.cluster.nodes_of(ranks))
    }

    /// Everything that all runs of a sweep share, in words: two sweeps with the same words give the same figures.
    pub fn describe(&self) -> String {
        format!(
            "input {} fit {} tokens-per-rank {} order {} steps {:?} sources {:?} seed {} top-k {} model {:?} cluster {:?} cost {:?}",
            self.input,
            self.fitted_on.as_deref().unwrap_or("the same"),
            self.tokens_per_rank,
            self.order,
            self.steps,
            self.sources,
            self.seed,
            self.top_k,
            self.model,
            self.cluster,
            self.constants
        )
    }

    /// A split by name: random ones with the seed, near ones with the cluster's nodes, the decode one with the model's
    /// costs on this cluster.
    pub fn split(&self, name: &str, ranks: usize) -> Result<Split> {
        Ok(match name.parse()? {
            Split::Random { .. } => Split::Random { seed: self.seed },
            Split::Nearest { .. } => Split::Nearest { ranks_per_node: self.cluster.devices_per_node },
            Split::Activated { .. } => self.cost(ranks)?.activated_split(),
            other => other,
        })
    }

    /// Logical experts per layer.
    pub fn experts(&self) -> usize {
        self.hindsight.experts()
    }

    /// Absolute indices of the MoE layers.
    pub fn layer_ids(&self) -> &[usize] {
        self.hindsight.layer_ids()
    }

    /// A report of runs on so many ranks.
    pub fn report(&self, runs: Vec<Run>, ranks: usize) -> Report {
        let counts = |layer| self.hindsight.totals(layer).collect();
        Report {
            version: 1,
            subject: Subject {
                input: self.input.clone(),
                fitted_on: self.fitted_on.clone(),
                model: self.model.name.clone(),
                cluster: self.cluster.name.clone(),
                ranks,
                nodes: self.cluster.nodes_of(ranks),
                experts: self.experts(),
                top_k: self.top_k,
                layer_ids: self.layer_ids().to_vec(),
                tokens: runs.first().map_or(0, |run| run.totals.tokens),
                seed: self.seed,
            },
            expert_tokens: (0..self.hindsight.layers()).map(counts).collect(),
            runs,
            ..Report::default()
        }
    }
}

fn sum(windows: &[LoadWindow]) -> Result<LoadWindow> {
    let mut sum = windows[0].clone();
    for window in &windows[1..] {
        sum.merge(window)?;
    }
    Ok(sum)
}
