//! A scheduler whose ranks are played by scripted caches.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::super::*;
use crate::engine::options::SchedulingPolicy;
use crate::engine::request::{Finished, TokenEvent};
use crate::engine::sampler::Sampler;
use crate::engine::scripted::{Script, ScriptedCache};
use crate::model::FormRules;

pub const VOCAB: usize = 50;

pub fn options() -> EngineOptions {
    EngineOptions {
        vocab_size: VOCAB,
        experts: crate::engine::scripted::EXPERTS,
        max_model_len: 10_000,
        block_size: 4,
        kv_blocks: 64,
        max_num_seqs: 8,
        max_num_batched_tokens: 32,
        prefill_chunk_size: 16,
        max_logit_rows: 8,
        prefix_caching: true,
        form_rules: FormRules::default(),
        max_waiting: 1000,
        max_waiting_tokens: 1 << 20,
        scheduling_policy: SchedulingPolicy::Arrival,
        step_timeout: Duration::from_secs(60),
    }
}

pub fn request(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request::greedy(prompt, max_tokens)
}

/// `len` tokens that differ from those of another `salt`.
pub fn prompt(salt: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 7 + salt * 13 + i / 5) % VOCAB as u32).collect()
}

/// What a request reported.
#[derive(Default)]
pub struct Output {
    pub tokens: Vec<u32>,
    pub scores: Vec<TokenEvent>,
    pub finished: Option<Finished>,
}

/// A scheduler with its ranks played by scripted caches.
pub struct World {
    pub script: Script,
    pub scheduler: Scheduler,
    pub caches: Vec<ScriptedCache>,
    pub sampler: Sampler,
    pub plan: StepPlan,
    pub outputs: BTreeMap<RequestId, Output>,
}

impl World {
    pub fn new(options: &EngineOptions, dp_ranks: usize) -> Self {
        let script = Script::of(options);
        World {
            scheduler: Scheduler::new(options.clone(), dp_ranks),
            caches: (0..dp_ranks).map(|_| ScriptedCache::new(script.clone())).collect(),
            script,
            sampler: Sampler::default(),
            plan: StepPlan::default(),
            outputs: BTreeMap::new(),
        }
    }

    pub fn add(&mut self, id: RequestId, request: Request) {
        self.scheduler.add(id, Arc::new(request));
    }

    pub fn step(&mut self) {
        self.scheduler.plan(&mut self.plan);
        self.scheduler.check();
        let mut results = Vec::new();
        for (sub, cache) in self.plan.sub_plans.iter().zip(&mut self.caches) {
            let mut histories = Vec::new();
            cache.forward(&sub.batch(false), &mut histories);
            let mut logits = vec![0.0; VOCAB];
            let jobs = sub.logit_rows.iter().zip(&sub.jobs).enumerate();
            let rows = jobs.map(|(i, (&row, job))| {
                self.script.fill_logits(histories[row as usize], sub.tokens[row as usize], &mut logits);
                self.sampler.run(i as u32, job, sub.history_of(job), &logits)
            });
            results.push(SubResults { rows: rows.collect(), routing: vec![] });
        }
        self.scheduler.finish_step(&self.plan, &mut results);
        self.scheduler.check();
        self.note_updates();
    }

    pub fn note_updates(&mut self) {
        let mut updates = Vec::new();
        self.scheduler.take_updates(&mut updates);
        for (id, update) in updates {
            let output = self.outputs.entry(id).or_default();
            assert!(output.finished.is_none(), "request {id} reports after its end");
            match update {
                Update::Admitted => {}
                Update::Event(Event::Prompt(prompt)) => output.scores = prompt.scores,
                Update::Event(Event::Token(event)) => output.tokens.push(event.token),
                Update::Event(Event::Finished(finished)) => output.finished = Some(finished),
            }
        }
    }

    /// Steps until nothing is left; every block must be back.
    pub fn run(&mut self) {
        let mut steps = 0;
        while !self.scheduler.is_idle() {
            self.step();
            steps += 1;
            assert!(steps < 100_000, "no progress");
        }
        let stats = self.scheduler.stats();
        assert_eq!((stats.running, stats.waiting, stats.kv.used), (0, 0, 0));
    }

    pub fn finished(&self, id: RequestId) -> &Finished {
        self.outputs[&id].finished.as_ref().expect("the request has ended")
    }
}

/// What one request reports alone, with room for all.
pub fn alone(request: &Request, rules: FormRules) -> Output {
    let options = EngineOptions {
        kv_blocks: 1000,
        max_num_batched_tokens: 4000,
        prefill_chunk_size: 4000,
        prefix_caching: false,
        form_rules: rules,
        ..options()
    };
    let mut world = World::new(&options, 1);
    world.add(0, request.clone());
    world.run();
    world.outputs.remove(&0).expect("it ran")
}
